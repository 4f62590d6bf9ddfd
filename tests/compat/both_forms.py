"""A small model in both forms, ours and the padded one of the tests, and batches for it."""

from typing import Any

import torch
from torch import Tensor

from m4.compat import FourM, SimpleMultimodalMasking
from tests.compat.padded_form import PaddedFourM

NAMES = ["tok_rgb", "coords", "tok_rgb_next", "coords_next"]
LENGTHS = [16, 9, 16, 9]
SIZES = [61, 40, 61, 40]
SHAPE = {"dim": 32, "enc_depth": 2, "dec_depth": 2, "head_dim": 8}
READ_KEYS = {
    f"{side}_{field}_read_key": f"{side}_{field}"
    for side in ("enc", "dec")
    for field in ("tokens", "modalities", "positions", "pad_mask")
}


def masking(**changes: Any) -> SimpleMultimodalMasking:
    arguments = {
        "modalities": NAMES,
        "vocab_sizes": SIZES,
        "max_seq_lens": LENGTHS,
        "input_alphas": [1.5, 1.5, 0.5, 0.5],
        "target_alphas": [0.5, 0.5, 1.5, 1.5],
        "input_tokens_range": [8, 24],
        "target_tokens_range": [6, 20],
    }
    return SimpleMultimodalMasking(**(arguments | changes))


def sample(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        name: torch.randint(size, (length,), generator=generator)
        for name, size, length in zip(NAMES, SIZES, LENGTHS, strict=True)
    }


def batch(seed: int = 0, samples: int = 6) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = range(samples * seed, samples * (seed + 1))
    return masking().collate([sample(g) for _ in range(samples)], sample_ids=ids)


def both(seed: int = 0, **changes: Any) -> tuple[FourM, PaddedFourM]:
    """Ours and the padded form with the same weights, the output layer's random too."""
    torch.manual_seed(seed)
    ours = FourM(**READ_KEYS, modalities=NAMES, vocab_sizes=SIZES, max_seq_lens=LENGTHS, **SHAPE, **changes)
    with torch.no_grad():
        ours.to_logits.weight.normal_(std=0.3)
        for name, parameter in ours.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.0 if "to_logits" in name else 0.05))
    average = changes.get("per_modality_loss_avg", True)
    padded = PaddedFourM(NAMES, SIZES, LENGTHS, **SHAPE, per_modality_loss_avg=average)
    padded.load_state_dict(ours.state_dict())  # strict: names, shapes and buffers are the same
    return ours, padded


def assert_same(ours: FourM, padded: PaddedFourM, b: dict[str, Tensor]) -> None:
    """Losses, metrics and gradients, against the padded form in float64."""
    truth = PaddedFourM(NAMES, SIZES, LENGTHS, **SHAPE, per_modality_loss_avg=padded.per_modality_loss_avg).double()
    truth.load_state_dict(padded.state_dict())
    loss, metrics = ours(b)
    loss.backward()
    true_loss, true_metrics = truth(b)
    true_loss.backward()
    assert loss.shape == ()
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-5, atol=1e-7)
    assert list(metrics) == list(true_metrics)
    for name, value in metrics.items():
        torch.testing.assert_close(value.double(), true_metrics[name].detach(), rtol=1e-5, atol=1e-7)
        assert not value.requires_grad
    for (name, ours_p), true_p in zip(ours.named_parameters(), truth.parameters(), strict=True):
        error = (ours_p.grad.double() - true_p.grad).norm() / true_p.grad.norm().clamp_min(1e-12)
        assert error < 1e-4, f"{name}: relative gradient error {error:.2e}"
