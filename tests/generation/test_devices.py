"""Evaluation and generation on a GPU; and on a CPU that refuses what a GPU lacks."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import m4.generate
from m4.evaluation.report import evaluate_run
from m4.generation.decode import generate
from m4.generation.options import Decoding
from m4.generation.rollout import roll_out
from m4.modalities import NEXT, REFERENCE
from m4.model import M4, ModelConfig
from m4.saved_run import SavedRun
from m4.training.trainer import Trainer
from tests.saved_runs import saved_config
from tests.training.step_setup import needs_cuda

cuda = pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_cuda)])
CONFIG = ModelConfig([*REFERENCE, *NEXT], [32, 20, 32, 20], [5, 3, 5, 3], dim=16, head_dim=8, enc_depth=1, dec_depth=1)
SETTINGS = [
    {"steps": 1},
    {"steps": 4, "temperature": 1.0},
    {"steps": 8, "temperature": 2.0, "top_k": 3, "order": "random"},
    {"steps": 3, "temperature": 0.7, "top_p": 0.8, "schedule": "cosine", "temperature_schedule": "linear"},
    {"steps": 2, "temperature": 1.0, "guidance": 3.0},
]


class AsAGpu(TorchDispatchMode):
    """Refuses what PyTorch has on a CPU only: matrix products of integers."""

    PRODUCTS = ("aten.mm", "aten.bmm", "aten.addmm", "aten.mv", "aten.dot", "aten.baddbmm")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith(self.PRODUCTS) and not args[-1].is_floating_point():
            raise NotImplementedError(f"{func} of {args[-1].dtype} is not implemented on a GPU")
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def model() -> M4:
    torch.manual_seed(0)
    model = M4(CONFIG).eval()
    with torch.no_grad():
        model.to_logits.weight.normal_()
    return model


def filled(model: M4, settings: dict, device: str = "cpu") -> torch.Tensor:
    tokens = torch.randint(0, 20, (6, 16), generator=torch.Generator().manual_seed(1)).to(device)
    decoding = Decoding(**settings)
    return generate(model.to(device), tokens, given=REFERENCE, wanted=NEXT, decoding=decoding).cpu()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_generation_asks_nothing_that_a_gpu_lacks(model, settings):
    with AsAGpu():
        filled(model, settings)
    with pytest.raises(NotImplementedError, match="mm"), AsAGpu():
        torch.ones(2, 2, dtype=torch.int64) @ torch.ones(2, 2, dtype=torch.int64)


def test_evaluation_asks_nothing_that_a_gpu_lacks(saved_run):
    with AsAGpu():
        evaluate_run(SavedRun.open(saved_run), futures=2)


@cuda
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_generation(model, settings, device):
    """The same draws; logits differ by rounding, so that now and then one falls to the neighbour."""
    found, expected = filled(model, settings, device), filled(model, settings)
    assert (found != expected).float().mean() < 0.1
    assert torch.equal(found, filled(model, settings, device))


@cuda
def test_roll_out(model, device):
    tokens = torch.randint(0, 20, (2, 16), generator=torch.Generator().manual_seed(1)).to(device)
    moments = roll_out(model.to(device), tokens, 3, given=REFERENCE, wanted=list(NEXT), decoding=Decoding(steps=2))
    assert len(moments) == 3
    assert all(moment.shape == tokens.shape for moment in moments)


@cuda
def test_evaluation(saved_run, device):
    """The figures of a CPU, nearly: weights are random, so that rounding moves a few codes."""
    found = evaluate_run(SavedRun.open(saved_run, device=device), futures=2)
    expected = evaluate_run(SavedRun.open(saved_run, device="cpu"), futures=2)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    for name in ("error_px", "nats"):
        assert found["next"]["pose"][name] == pytest.approx(expected["next"]["pose"][name], rel=1e-2)
    copies = [report["next"]["pose"]["copy"] for report in (found, expected)]
    assert copies[0] == copies[1]


@cuda
@pytest.mark.parametrize("name", ["next.png", "next.gif", "next.npz"])
@pytest.mark.parametrize("more", [[], ["--rollout", "2"], ["--temperature", "1", "--steps", "3", "--top-p", "0.9"]])
def test_command(saved_run, tmp_path, device, name, more):
    out = tmp_path / name
    assert m4.generate.main(["--run", str(saved_run), "--device", device, "--out", str(out), *more]) == 0
    assert out.stat().st_size > 0


@cuda
def test_training_that_evaluates(picture_data, tmp_path, device):
    """Every kind of figure on the way, the short form of the next moment among them; averaged weights too."""
    config = dataclasses.replace(
        saved_config(picture_data, tmp_path), device=device, stop_after_steps=4, eval_freq=0.002, ema=0.9
    )
    assert Trainer(config).run("command") == 0
    assert '"kind": "eval"' in (config.run_dir / "metrics.jsonl").read_text()
