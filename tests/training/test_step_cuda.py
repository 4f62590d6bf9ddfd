"""The training step on a GPU: captured as CUDA graphs, without synchronisation, through the trainer."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from m4.checkpoint import newest_whole
from m4.training.graphs import CudaGraphs
from m4.training.step import Execution
from m4.training.trainer import Trainer
from tests.training.step_setup import Steps, assert_same, logged_losses, needs_cuda


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"dtype": "bf16"},
        {"global_batch_size": 4},
        {"vocab_lr_scale": 0.5, "coords_lr_scale": 2.0},
        {"kernels": "reference"},
        {"batch_size": 128, "global_batch_size": 512},  # more than 4,096 tokens: other kernels for embedding gradients
        {"compile": True, "dtype": "bf16"},
    ],
    ids=str,
)
@pytest.mark.parametrize("_", [pytest.param("cuda", marks=needs_cuda)])
def test_captured_step_is_the_eager_step(config, setting, _):
    """Losses, norms and weights after five steps: the same bits, since the kernels and their order are the same.

    For PyTorch's attention and compiled embeddings, whose backward passes may add in any order, nearly the same.
    """
    config = dataclasses.replace(config, **setting)
    config.input_tokens_range, config.target_tokens_range = [12, 24], [4, 12]
    cuda = torch.device("cuda")
    eager = Steps(dataclasses.replace(config, compile=False), cuda)
    graphs = Steps(config, cuda, Execution(True, True)).record(CudaGraphs(cuda))
    if config.kernels == "reference" or config.compile:
        rounding = 2e-2 if config.dtype == "bf16" else 1e-3
        for a, b in zip(eager.run(5), graphs.run(5), strict=True):
            assert b.losses == pytest.approx(a.losses, rel=rounding)
            assert b.norm == pytest.approx(a.norm, rel=rounding)
        return
    assert eager.run(5) == graphs.run(5)
    assert_same(eager.weights(), graphs.weights(), rtol=0, atol=0)
    again = Steps(config, cuda, Execution(True, True)).record(CudaGraphs(cuda))
    again.run(5)
    assert_same(again.weights(), graphs.weights(), rtol=0, atol=0)


@pytest.mark.parametrize("captured", [pytest.param(value, marks=needs_cuda) for value in (False, True)])
def test_no_synchronisation_between_log_points(config, captured):
    cuda = torch.device("cuda")
    setup = Steps(config, cuda, Execution(True, captured))
    if captured:
        setup.record(CudaGraphs(cuda))
    setup.run(2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            setup.launch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    figures = setup.step.read()
    assert figures.finite
    assert figures.updates == 3


@pytest.mark.parametrize("graphs", [pytest.param(value, marks=needs_cuda) for value in ("on", "off")])
def test_trainer_on_cuda(config, graphs):
    """As on the CPU within rounding, and bit for bit when it is resumed."""
    config.stop_after_steps, config.log.every = 10, 2
    assert Trainer(dataclasses.replace(config, run_name="cpu")).run("command") == 0
    config.device, config.cuda_graphs = "cuda", graphs
    straight = dataclasses.replace(config, run_name="straight")
    assert Trainer(straight).run("command") == 0
    assert logged_losses(straight) == pytest.approx(
        logged_losses(dataclasses.replace(config, run_name="cpu")), rel=1e-2
    )
    pieces = dataclasses.replace(config, run_name="pieces", stop_after_steps=4)
    assert Trainer(pieces).run("command") == 0
    assert Trainer(dataclasses.replace(pieces, stop_after_steps=10)).run("command") == 0
    weights = [load_file(newest_whole(c.run_dir)[0] / "model.safetensors") for c in (straight, pieces)]
    assert_same(*weights, rtol=0, atol=0)
