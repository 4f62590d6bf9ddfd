"""`FourM.generate_one_modality_roar`: what it draws, in which order, and what it refuses."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from m4.compat.roar import Draw, draw
from tests.compat.both_forms import LENGTHS, NAMES, SIZES, both

pytestmark = pytest.mark.usefixtures("one_thread")


def given(samples: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions and modalities of the whole tok_rgb."""
    tokens = torch.randint(61, (samples, 16), generator=torch.Generator().manual_seed(3))
    return tokens, torch.arange(16).expand(samples, -1), torch.zeros_like(tokens)


def test_one_modality_after_the_other() -> None:
    """The chain of nano4M's notebooks: what was generated is given to the next."""
    ours, _ = both()
    known = given()
    for target, steps in (("coords_next", 4), ("coords", 9), ("tok_rgb_next", 1)):
        kind, before = NAMES.index(target), known[0].shape[1]
        tokens, *known = ours.generate_one_modality_roar(*known, target_mod=target, num_steps=steps, temp=2.0)
        assert tokens.shape == (1, LENGTHS[kind])
        assert bool((tokens < SIZES[kind]).all() & (tokens >= 0).all())  # the shared vocabulary is larger
        assert known[0].shape == (1, before + LENGTHS[kind])
        chosen = known[2] == kind
        order = known[1][chosen].argsort()
        assert torch.equal(known[1][chosen][order], torch.arange(LENGTHS[kind]))
        assert torch.equal(known[0][chosen][order], tokens[0])
    assert torch.equal(known[0][:, :16], given()[0])


def test_each_step_takes_what_the_model_says() -> None:
    """At temperature 0, all steps but one replayed by the padded form: its likeliest ids are those drawn."""
    ours, padded = both()
    schedule = ours.get_unmasking_schedule(16, 5)
    assert schedule == [3, 3, 3, 3, 4]
    _, *known = ours.generate_one_modality_roar(*given(), target_mod="tok_rgb_next", num_steps=5, temp=0.0)
    end = 16
    for count in schedule:
        seen, new = slice(0, end), slice(end, end + count)
        b = {"enc_tokens": known[0][:, seen], "enc_positions": known[1][:, seen], "enc_modalities": known[2][:, seen]}
        b |= {"dec_positions": known[1][:, new], "dec_modalities": known[2][:, new]}
        assert torch.equal(padded.logits(b).argmax(-1), known[0][:, new])
        end += count


def test_seed_decides_and_samples_differ() -> None:
    ours, _ = both()

    def generated(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return ours.generate_one_modality_roar(*given(3), "coords", num_steps=3, temp=1.5)[0]

    first = generated(0)
    assert first.shape == (3, 9)
    assert torch.equal(first, generated(0))
    assert not torch.equal(first, generated(1))
    assert ours.to_logits.weight.grad is None


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        (Draw(1.0), [0, 1, 2, 3, 4]),
        (Draw(1.0, top_k=2), [3, 1]),
        (Draw(1.0, top_k=0.6), [3, 1, 0]),
        (Draw(1.0, top_k=1.0), [0, 1, 2, 3, 4]),
        (Draw(1.0, top_p=0.45), [3, 1]),
        (Draw(1.0, top_p=0.35), [3]),
        (Draw(1.0, top_p=1.0), [0, 1, 2, 3, 4]),
        (Draw(2.0, top_p=0.45), [3, 1]),  # the share is that at temperature 1
        (Draw(1.0, top_p=0.45, top_k=1), [3]),
        (Draw(0.0), [3]),
        (Draw(0.0, top_k=3), [3]),
    ],
)
def test_draws(rule: Draw, kept: list[int]) -> None:
    p = torch.tensor([0.15, 0.25, 0.1, 0.4, 0.1], dtype=torch.float64)
    torch.manual_seed(0)
    drawn = draw(p.log().float().expand(20000, -1), rule).bincount(minlength=5).double()
    assert sorted(kept) == drawn.nonzero().flatten().tolist()
    q = torch.zeros_like(p)
    q[kept] = p[kept] ** (1 / rule.temp if rule.temp else 1)
    q /= q.sum()
    deviation = (20000 * q * (1 - q)).sqrt()
    assert bool(((drawn - 20000 * q).abs() <= 5 * deviation).all())  # once in a million


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target_mod": "depth"}, "target_mod: expected one of tok_rgb, .*got 'depth'"),
        ({"target_mod": "tok_rgb"}, "enc_input_modalities: tokens of tok_rgb, which is to be generated, are among"),
        ({"num_steps": 0}, "num_steps: expected 1 to 9, the number of tokens, got 0"),
        ({"num_steps": 10}, "num_steps: expected 1 to 9"),
        ({"temp": -1.0}, "temp: expected a number of at least 0, got -1.0"),
        ({"temp": math.nan}, "temp: expected a number"),
        ({"temp": math.inf}, "temp: expected a finite number"),
        ({"top_p": 1.5}, "top_p: expected a number of at least 0 and at most 1, got 1.5"),
        ({"top_k": 2.5}, "top_k: expected an integer, or a fraction of at most 1, got 2.5"),
        ({"enc_input_tokens": torch.full((1, 16), 61)}, "enc_input_tokens: expected 0 to 60"),
        ({"enc_input_positions": torch.zeros(1, 3)}, "enc_input_positions: expected an integer tensor"),
    ],
)
def test_generation_that_does_not_fit(changes: dict[str, Any], said: str) -> None:
    ours, _ = both()
    tokens, positions, modalities = given()
    arguments: dict[str, Any] = {
        "enc_input_tokens": tokens,
        "enc_input_positions": positions,
        "enc_input_modalities": modalities,
        "target_mod": "coords",
    }
    with pytest.raises(ValueError, match=said):
        ours.generate_one_modality_roar(**(arguments | changes))
