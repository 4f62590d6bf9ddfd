"""`dtype: bf16` on a CPU: losses beside those in fp32, weights rounded once a step, a word where it is slow."""

import dataclasses
import logging
from types import SimpleNamespace

import pytest
import torch

from m4.training import step
from m4.training.step import Execution
from m4.training.trainer import Trainer
from m4kernels import _ext
from m4kernels.ops.linear import api, copies
from m4kernels.processor import has_amx, slow_bf16
from tests.training.step_setup import CPU, ON_A_CPU, Steps


@pytest.fixture
def config(tiny_train_config, monkeypatch):
    # In two micro-batches, with layers of the size that the extension multiplies.
    monkeypatch.setattr(api, "FEWEST_ROWS", 64)
    monkeypatch.setattr(api, "NARROWEST", 8)
    if _ext.load() is not None and not has_amx():  # ours multiply bfloat16, whatever is faster here
        monkeypatch.setitem(api.OWN_LEVELS, torch.bfloat16, (_ext.require().simd_level(),))
    return dataclasses.replace(tiny_train_config, batch_size=16, global_batch_size=32, lr=0.01)


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "avx2", "onednn", "onednn_bf16", "fast"),
    [
        (True, False, True, True, True, True),
        (False, True, True, True, True, True),
        (False, False, True, True, True, False),  # oneDNN emulates it with AVX-512
        (False, False, True, True, False, False),
        (False, False, False, True, True, True),  # ARM
        (False, False, False, True, False, False),
        (False, False, False, False, None, False),  # a torch without oneDNN, as on macOS, has no such question
    ],
)
def test_which_processors_multiply_bf16(monkeypatch, amx, avx512_bf16, avx2, onednn, onednn_bf16, fast):
    answers = {"_is_amx_tile_supported": amx, "_is_avx512_bf16_supported": avx512_bf16, "_is_avx2_supported": avx2}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cpu, name, lambda answer=answer: answer)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    asked = {} if onednn_bf16 is None else {"_is_mkldnn_bf16_supported": lambda: onednn_bf16}
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**asked))
    assert (slow_bf16() is None) is fast


def test_losses_are_within_a_hundredth_of_those_in_fp32(config, monkeypatch):
    roundings, made = [], []
    rounded = copies.rounded

    def watched(weight):
        copy = rounded(weight)
        roundings.append((id(weight), copies._step))
        made.append(copy.dtype)
        return copy

    monkeypatch.setattr(copies, "rounded", watched)
    losses = {}
    for dtype in ("fp32", "bf16"):
        figures = Steps(dataclasses.replace(config, dtype=dtype), execution=ON_A_CPU).run(15)
        losses[dtype] = [sum(one.losses) / len(one.losses) for one in figures]
    assert losses["fp32"] != losses["bf16"]
    assert losses["fp32"][-1] < 0.99 * losses["fp32"][0]  # they have learnt something
    for full, half in zip(losses["fp32"], losses["bf16"], strict=True):
        assert half == pytest.approx(full, rel=0.01)
    if api.why_not_own_products(torch.bfloat16) is None:
        assert set(made) == {torch.bfloat16}
        assert len(roundings) >= 4 * len(set(roundings))  # read forward and backward, of two micro-batches
        assert copies.rounded(next(iter(Steps(config).model.parameters()))).dtype == torch.float32  # outside a step


@pytest.mark.parametrize(("why", "dtype"), [("it has none", "bf16"), ("it has none", "fp32"), (None, "bf16")])
def test_it_is_said_once_where_bf16_is_slow(config, why, dtype, monkeypatch, caplog):
    monkeypatch.setattr(step, "slow_bf16", lambda: why)
    with caplog.at_level(logging.WARNING):
        Trainer(dataclasses.replace(config, dtype=dtype), device=CPU).train_step()
    said = [record.message for record in caplog.records if "bf16" in record.message]
    expected = "dtype: bf16 is slower than fp32 on this processor: it has none; use dtype=fp32"
    assert said == ([expected] if why and dtype == "bf16" else [])


@pytest.mark.parametrize(("dtype", "device"), [("fp32", "cuda"), ("bf16", "cuda"), ("fp32", "cpu")])
def test_it_is_said_once_where_fp32_is_slow(config, dtype, device, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with caplog.at_level(logging.WARNING):
        Execution.of(dataclasses.replace(config, dtype=dtype), torch.device(device))
    said = [record.message for record in caplog.records if "fp32" in record.message]
    expected = (
        "dtype: fp32 leaves the tensor cores of cuda idle, which multiply bfloat16 about ten times as fast; "
        "use dtype=bf16"
    )
    assert said == ([expected] if (dtype, device) == ("fp32", "cuda") else [])
