"""Where the residual stream is added to: by products, as on a CPU, or by the norms, as on a GPU; the same model."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from m4.model import M4, ModelConfig, layers
from m4kernels import MaskedBatch
from m4kernels.cases import random_masked_batch

DEPTH = 2
NORMS_THAT_ADD = (2 * DEPTH - 1) + 1 + (3 * DEPTH - 1) + 1  # but the first of each trunk; enc_norm and dec_norm too


def model(depth: int = DEPTH, **changes: object) -> M4:
    torch.manual_seed(0)
    config = ModelConfig(
        ["a", "b"], [60, 40], [32, 32], dim=32, enc_depth=depth, dec_depth=depth, head_dim=16, **changes
    )
    made = M4(config)
    torch.nn.init.normal_(made.to_logits.weight, std=0.05)  # so that all has gradients
    return made


@pytest.fixture
def batch() -> MaskedBatch:
    return random_masked_batch(4, (12, 12), (12, 12), (60, 40), torch.Generator().manual_seed(0))


@contextmanager
def adding_norms(seen: list[tuple[Tensor, ...]]) -> Iterator[None]:
    """Norms add, as on a GPU; `seen` gets the results of each."""
    add = layers.add_layer_norm

    def watched(*args: Tensor, **others: object) -> tuple[Tensor, ...]:
        seen.append(add(*args, **others))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "norms_add", lambda x: True)
        patch.setattr(layers, "add_layer_norm", watched)
        yield


def step(model: M4, batch: MaskedBatch, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The loss and all gradients."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model(batch).total
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def test_norms_that_add_change_no_bit(batch: MaskedBatch) -> None:
    expected, seen = step(model(), batch), []
    with adding_norms(seen):
        actual = step(model(), batch)
    assert len(seen) == NORMS_THAT_ADD
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@pytest.mark.parametrize("recompute", [False, True])
def test_norms_that_add_under_autocast(batch: MaskedBatch, recompute: bool) -> None:
    """All but the last give what the next product multiplies; gradients are as near to float32's as without."""
    truth, plain, seen = step(model(), batch), step(model(), batch, torch.bfloat16), []
    with adding_norms(seen):
        actual = step(model(activation_checkpointing=recompute), batch, torch.bfloat16)
    in_blocks = NORMS_THAT_ADD - 2
    assert len(seen) == NORMS_THAT_ADD + (in_blocks if recompute else 0)
    *inner, last = seen[:NORMS_THAT_ADD]
    assert {(normed.dtype, total.dtype) for normed, total in inner} == {(torch.bfloat16, torch.float32)}
    assert {x.dtype for x in last} == {torch.float32}
    for name, value in truth.items():
        error = (actual[name] - value).norm()
        assert error <= 2 * (plain[name] - value).norm() + 0.01 * value.norm(), name


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_backends_of_the_norms(batch: MaskedBatch, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("there Triton runs on the GPU: tests/training/test_step_cuda.py")
    add, norm = layers.add_layer_norm, layers.layer_norm
    monkeypatch.setattr(layers, "norms_add", lambda x: True)
    monkeypatch.setattr(layers, "add_layer_norm", lambda *args, **others: add(*args, **others, backend=backend))
    monkeypatch.setattr(layers, "layer_norm", lambda *args, **others: norm(*args, **others, backend=backend))
    actual = step(model(depth=1), batch)
    monkeypatch.undo()
    for name, value in step(model(depth=1), batch).items():
        torch.testing.assert_close(actual[name], value, rtol=2e-4, atol=2e-6)


def test_norms_that_add_compile(batch: MaskedBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "norms_add", lambda x: True)
    made = model(depth=1)
    expected = step(made, batch)
    torch._dynamo.reset()
    actual = step(torch.compile(made, backend="aot_eager"), batch)  # type: ignore[arg-type]
    for name, value in expected.items():
        torch.testing.assert_close(actual.get(name, actual.get(f"_orig_mod.{name}")), value, rtol=1e-5, atol=1e-6)
