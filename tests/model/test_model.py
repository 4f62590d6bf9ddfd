from dataclasses import replace
from typing import Any

import pytest
import torch

from m4.model import M4, AttentionConfig, ModelConfig, m4
from m4kernels import MaskedBatch, linear_cross_entropy
from m4kernels.cases import random_masked_batch
from m4kernels.ops.linear_cross_entropy.arguments import LossArguments
from tests.model.padded_nano4m import per_modality_losses
from tests.ops.targets import HAS_TRITON

VOCAB = (61, 40, 61, 40)
EYE = [[int(i == j) for j in range(4)] for i in range(4)]
CAUSAL = [[int(j <= i) for j in range(4)] for i in range(4)]


def tiny(**changes: object) -> ModelConfig:
    """A model that a test can afford."""
    config = ModelConfig(
        ("tok_rgb", "coords", "tok_rgb_next", "coords_next"), VOCAB, (24, 12, 24, 12), 32, 2, 2, head_dim=8
    )
    return replace(config, **changes)


def model_with_head(config: ModelConfig, seed: int = 0) -> M4:
    """A model whose output layer is random too, so that the loss reaches every weight."""
    torch.manual_seed(seed)
    model = M4(config)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        parameter.data.add_(noise * (0.3 if "to_logits" in name else 0.05))
    return model


def batch(seed: int = 0, samples: int = 5, tail: int = 0) -> MaskedBatch:
    g = torch.Generator().manual_seed(seed)
    return random_masked_batch(samples, (12, 6, 12, 6), (6, 3, 9, 5), VOCAB, g, tail=tail)


@pytest.mark.parametrize("kernels", ["auto", "reference", "reference-matmul"])
@pytest.mark.parametrize("vocab", [VOCAB, (61, 61, 61, 61)])
@pytest.mark.parametrize(
    "attention", [{}, {"decoder": "within_modality"}, {"encoder": CAUSAL, "decoder": EYE, "cross": CAUSAL}]
)
def test_losses_and_gradients_equal_an_independent_padded_model(
    kernels: str, vocab: tuple[int, ...], attention: dict
) -> None:
    model = model_with_head(tiny(kernels=kernels, vocab_sizes=vocab, attention=AttentionConfig(**attention)))
    masked = batch()
    losses = model(masked)
    losses.total.backward()

    weights = {name: value.double() for name, value in model.state_dict().items()}
    trainable = {name: weights[name].requires_grad_() for name, _ in model.named_parameters()}
    patterns = {k: EYE if v == "within_modality" else v for k, v in attention.items()}
    expected = per_modality_losses(weights, masked.padded(), vocab, 8, patterns)
    expected.mean().backward()

    torch.testing.assert_close(losses.per_modality.double(), expected.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(losses.total.double(), expected.mean(), rtol=1e-5, atol=1e-7)
    for name, parameter in model.named_parameters():
        true = trainable[name].grad
        assert parameter.grad is not None, name
        error = (parameter.grad.double() - true).norm() / true.norm().clamp_min(1e-12)
        assert error < 1e-4, f"{name}: relative gradient error {error:.2e}"


def test_parameter_count_is_that_of_m4() -> None:
    config = ModelConfig(tiny().modalities, [65536] * 4, [256, 39, 256, 39])
    with torch.device("meta"):
        model = M4(config)
    assert model.num_parameters() == 176_083_840


def test_fixed_capacity_tail_changes_nothing() -> None:
    model = model_with_head(tiny())
    plain, tailed = batch(), batch(tail=11)
    gradients = []
    for masked in (plain, tailed):
        model.zero_grad()
        losses = model(masked)
        losses.total.backward()
        gradients.append([p.grad.clone() for p in model.parameters()] + [losses.per_modality, losses.total.detach()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_micro_batches_with_global_counts_add_up() -> None:
    model = model_with_head(tiny(vocab_sizes=(61, 61, 61, 61)))
    g = torch.Generator().manual_seed(2)
    padded = random_masked_batch(6, (12, 6, 12, 6), (6, 3, 9, 5), VOCAB, g).padded()
    whole = MaskedBatch.from_padded(padded, 4)
    parts = [MaskedBatch.from_padded({k: v[i : i + 2] for k, v in padded.items()}, 4) for i in (0, 2, 4)]
    whole_losses = model(whole)
    whole_losses.total.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    part_losses = [model(part, target_counts=whole_losses.counts) for part in parts]
    sum(losses.total for losses in part_losses).backward()
    torch.testing.assert_close(sum(x.per_modality for x in part_losses), whole_losses.per_modality)
    # Of many rows the products are others than of few, so roundings differ: in proportion to the largest gradient.
    for p, want in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("kernels", ["auto", "reference", "reference-matmul"])
def test_degenerate_batches_are_finite(kernels: str) -> None:
    model = model_with_head(tiny(kernels=kernels))
    empty_decoder = random_masked_batch(3, (9, 4, 9, 4), (0, 0, 0, 0), VOCAB, torch.Generator().manual_seed(0))
    losses = model(empty_decoder)
    assert losses.total == 0
    assert losses.counts.tolist() == [0, 0, 0, 0]
    empty_encoder = random_masked_batch(3, (0, 0, 0, 0), (4, 4, 4, 4), VOCAB, torch.Generator().manual_seed(0))
    losses = model(empty_encoder)
    losses.total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_normal_values_start_at_the_uniform_loss() -> None:
    torch.manual_seed(0)
    losses = M4(tiny(init="normal"))(batch())
    expected = torch.tensor(VOCAB).log()
    torch.testing.assert_close(losses.per_modality, torch.where(losses.counts > 0, expected, 0.0))


def test_logits_respect_the_vocabulary_and_agree_with_the_loss() -> None:
    model = model_with_head(tiny())
    masked = batch()
    logits = model.logits(masked)
    modality = masked.decoder.modalities
    assert (logits[modality == 1][:, 40:] == -torch.inf).all()
    nll = torch.nn.functional.cross_entropy(logits, masked.decoder.ids, reduction="none")
    means = torch.stack([nll[modality == m].mean() for m in range(4)])
    torch.testing.assert_close(model(masked).per_modality, means.detach())


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_bfloat16_autocast_is_close(kernels: str) -> None:
    model = model_with_head(tiny(kernels=kernels))
    expected = model(batch()).total
    with torch.autocast("cpu", torch.bfloat16):
        total = model(batch()).total
    total.backward()
    assert abs(total.item() - expected.item()) < 0.02 * expected.item()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_compiles_without_graph_break() -> None:
    model = model_with_head(tiny())
    masked = batch(tail=7)
    expected = model(masked)
    expected.total.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    losses = torch.compile(model, fullgraph=True, backend="aot_eager")(masked)
    losses.total.backward()
    torch.testing.assert_close(losses.per_modality, expected.per_modality)
    for p, want in zip(model.parameters(), gradients, strict=True):
        # Sums of some 30 tokens in another order, each of up to 64 products: rounding in proportion to the largest.
        torch.testing.assert_close(p.grad, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_the_loss_takes_a_share_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from m4kernels.ops.linear_cross_entropy.triton import plan

    # What a GPU is handed in a step of M4: a micro-batch of 96 samples, at its fixed length.
    x, weight = (torch.empty(rows, 640, device="meta") for rows in (9856, 65536))
    targets = torch.empty(9856, dtype=torch.int64, device="meta")
    for gigabytes, rows in ((141, 4928), (80, 4928), (24, 4928), (4, 1232)):
        monkeypatch.setattr(m4, "total_memory", lambda _, size=gigabytes: size * 10**9)
        room = m4.loss_workspace(torch.device("cuda", 0))
        call = LossArguments(x, weight, targets, None, None, -100, room, torch.bfloat16, True, True)
        assert plan(call).rows == rows
    assert m4.loss_workspace(torch.device("cpu")) == 2**28


def test_the_workspace_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def watched(*args: Any, **others: Any) -> Any:
        given.append(others["max_workspace_bytes"])
        return linear_cross_entropy(*args, **others)

    monkeypatch.setattr(m4, "linear_cross_entropy", watched)
    model = model_with_head(tiny())
    expected = model(batch()).total
    monkeypatch.setattr(m4, "loss_workspace", lambda device: {"cpu": 2**20, "meta": 2**21}[device.type])
    torch.testing.assert_close(model.to("cpu")(batch()).total, expected)
    assert given == [2**28, 2**20]
    assert model.to("meta").loss_workspace == 2**21
    with torch.device("meta"):
        assert M4(tiny()).loss_workspace == 2**21


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_sizes": (61, 40)}, "vocab_sizes has 2 entries, modalities has 4"),
        ({"max_seq_lens": (24, 0, 24, 12)}, "max_seq_lens must be positive"),
        ({"dim": 36}, "dim must be even and a multiple of head_dim=8, got 36"),
        ({"enc_depth": 0}, "enc_depth must be at least 1"),
        ({"kernels": "fast"}, "kernels must be one of auto, reference, reference-matmul, got 'fast'"),
        ({"attention": AttentionConfig(decoder="within")}, "attention.decoder must be 'full'"),
        ({"attention": AttentionConfig(cross=[[1, 0]])}, "attention.cross must be 'full', 'within_modality' or 4 rows"),
        ({"attention": AttentionConfig(encoder=[[2] * 4] * 4)}, "attention.encoder must hold only 0 and 1"),
    ],
)
def test_bad_configuration(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**change)
