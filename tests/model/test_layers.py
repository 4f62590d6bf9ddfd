"""Where the residual stream is added to: by products, as on a CPU, or by the norms, as on a GPU; the same model."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from m4.model import M4, ModelConfig, layers
from m4kernels import MaskedBatch, Segments, cross_modal_attention
from m4kernels.cases import random_masked_batch
from tests.ops.attention_cases import Made

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


@contextmanager
def three_tensors() -> Iterator[None]:
    """Queries, keys and values given to the op one by one; autograd joins their gradients."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            layers,
            "cross_modal_attention_qkvpacked",
            lambda qkv, segments, **options: cross_modal_attention(*qkv.unbind(1), segments, segments, **options),
        )
        patch.setattr(
            layers,
            "cross_modal_attention_kvpacked",
            lambda q, kv, *segments, **options: cross_modal_attention(q, *kv.unbind(1), *segments, **options),
        )
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_projections_change_no_bit(batch: MaskedBatch, dtype: torch.dtype) -> None:
    with three_tensors(), Made() as made:
        expected = step(model(), batch, dtype)
    assert "m4kernels::cross_modal_attention_backward" in dict(made.sizes)
    with Made() as made:
        actual = step(model(), batch, dtype)
    assert "m4kernels::cross_modal_attention_backward" not in dict(made.sizes)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_the_backward_pass_of_a_layer_makes_no_second_gradient_of_the_projection(kind: str) -> None:
    """Nothing of the size of the projection is made but its gradient, by the kernel: no stack, no copy."""
    torch.manual_seed(0)
    q_seg, k_seg = (Segments.from_counts(torch.tensor(n)) for n in ([[3, 2], [0, 5]], [[4, 0], [1, 6]]))
    dim, q_tokens, k_tokens = 16, 10, 11
    x, context = torch.randn(q_tokens, dim, requires_grad=True), torch.randn(k_tokens, dim, requires_grad=True)
    layer: nn.Module
    if kind == "self":
        layer, size = layers.SelfAttention(dim, 8), 3 * dim * q_tokens
        out, _ = layer(x, torch.zeros_like(x), q_seg, None)
    else:
        layer, size = layers.CrossAttention(dim, 8), 2 * dim * k_tokens
        out, _ = layer(x, context, torch.zeros_like(x), q_seg, k_seg, None)
    assert size not in [p.numel() for p in layer.parameters()]
    with Made() as made:
        out.sum().backward()
    packed = "qkv" if kind == "self" else "kv"
    assert [name for name, n in made.sizes if n == size] == [
        f"m4kernels::cross_modal_attention_{packed}packed_backward"
    ]
    assert not any(name in ("aten::stack", "aten::cat", "aten::copy_", "aten::clone") for name, _ in made.sizes)
