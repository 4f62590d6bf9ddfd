"""What is logged of a step: accuracy of each modality, time, and the share of the peak; in every logger."""

import dataclasses

import pytest
import torch

from m4.config import load_config
from m4.errors import ConfigError
from m4.model.flops import training_flop
from m4.run.metrics import read_metrics
from m4.training.trainer import Trainer
from tests.training.step_setup import AS_ON_A_GPU, CPU, ON_A_CPU


@pytest.fixture
def config(config):
    """Every modality has targets, some predictions are right."""
    return dataclasses.replace(
        config, target_alphas=[1.0] * 4, eval_generate_samples=0, eval_freq=100, save_ckpt_freq=100, lr=0.05,
        token_warmup=0.008,
    )  # fmt: skip


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("execution", [ON_A_CPU, AS_ON_A_GPU], ids=["cpu", "as on a gpu"])
def test_accuracy_is_of_the_whole_step(config, kernels, execution):
    """Against the logits of its micro-batches, before the update."""
    trainer = Trainer(dataclasses.replace(config, kernels=kernels), execution=execution, device=CPU)
    found_any = 0.0
    for step in range(8):
        right, count = torch.zeros(4), torch.zeros(4)
        with torch.no_grad():
            for micro_batch in trainer.batches.step(trainer.state.position).micro_batches:
                targets = micro_batch.masked.decoder
                there = targets.ids >= 0
                found = (trainer.model.logits(micro_batch.masked).argmax(-1) == targets.ids) & there
                for m in range(4):
                    right[m] += found[targets.modalities == m].sum()
                    count[m] += (there & (targets.modalities == m)).sum()
        figures = trainer.train_step()
        assert figures.accuracies == pytest.approx((right / count).tolist()), step
        found_any += sum(figures.accuracies)
    assert found_any > 0


def test_every_line_has_them(config):
    config.stop_after_steps, config.log.peak_tflops, config.log.tensorboard = 3, 1e-3, True
    assert Trainer(config).run("command") == 0
    lines = read_metrics(config.run_dir / "metrics.jsonl")
    train = [line for line in lines if line["kind"] == "train"]
    assert len(train) == 3
    for line in train:
        assert list(line["accuracy"]) == config.modalities
        assert all(0 <= share <= 1 for share in line["accuracy"].values())
        assert 0 < line["data_wait_s"] < line["step_s"]
        assert line["grad_norm"] > 0
        # 8 samples of at most 12 inputs and 12 targets of 64 classes.
        most = training_flop(config.model_config(), 8 * 12, [8 * 12, 0, 0, 0])
        assert 0 < line["mfu"] * line["step_s"] * 1e9 < most
    assert 0 <= lines[-1]["accuracy"]["coords"] <= 1
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(config.run_dir))
    events.Reload()
    named = set(events.Tags()["scalars"])
    assert {
        "train/mfu",
        "train/data_wait_s",
        "train/grad_norm",
        "train/accuracy/coords",
        "eval/accuracy/coords",
    } <= named
    assert events.Scalars("train/mfu")[-1].value == pytest.approx(train[-1]["mfu"])


def test_the_peak_is_measured_where_none_is_given(config, caplog):
    caplog.set_level("INFO", logger="m4")
    config.stop_after_steps = 1
    assert Trainer(config).run("command") == 0
    (said,) = [message for message in caplog.messages if message.startswith("mfu is of ")]
    assert 1e-4 < float(said.split()[3]) < 100
    (line,) = [line for line in read_metrics(config.run_dir / "metrics.jsonl") if line["kind"] == "train"]
    assert 0 < line["mfu"] < 1


@pytest.mark.parametrize("value", ["0", "-1", "1e10"])
def test_what_is_no_peak(tiny_config, value):
    with pytest.raises(ConfigError, match=r"log\.peak_tflops: expected TFLOP/s above 0"):
        load_config(tiny_config, [f"log.peak_tflops={value}"])
