"""What the GPU is to reach, beside what was measured."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from m4.model import ModelConfig

Records = Sequence[dict[str, Any]]
OURS = ("as trained", "cuda", "triton", "cpp", "auto")  # the loss as the trainer calls it, else by backend
ENCODER, DECODER, CROSS = (f"{kind}, batch 96" for kind in ("encoder", "decoder", "cross"))
LOSS = "M4 batch 96 (9,120 tokens)"
STEPS = ("captured, compiled", "captured")


class Goal(NamedTuple):
    """One number to reach.

    Args:
        what: is measured.
        wanted: the number, with its unit, as it is said.
        limit: the number itself.
        at_most: whether less is better.
        measured: what the records say of it; None where they say nothing.
        shown: how a number is written.
    """

    what: str
    wanted: str
    limit: float
    at_most: bool
    measured: Callable[[Records], float | None]
    shown: str = "{:.2f}"

    def line(self, records: Records) -> str:
        value = self.measured(records)
        if value is None:
            return f"{'not measured':<13} {self.what}: wanted {self.wanted}"
        reached = value <= self.limit if self.at_most else value >= self.limit
        return f"{'reached' if reached else 'MISSED':<13} {self.what}: {self.shown.format(value)}, wanted {self.wanted}"


def times(records: Records, op: str, case: str) -> dict[str, dict[str, Any]]:
    """What each provider took on a case, the last time that it was measured."""
    return {r["provider"]: r for r in records if r["kind"] == "time" and (r["op"], r["case"]) == (op, case)}


def own(records: Records, op: str, case: str, field: str = "seconds") -> float | None:
    """A figure of our fastest backend on a case."""
    found = times(records, op, case)
    return next((found[name][field] for name in OURS if name in found), None)


def ratio(records: Records, op: str, case: str, peer: str, field: str = "seconds") -> float | None:
    """A peer's figure over ours."""
    ours, theirs = own(records, op, case, field), times(records, op, case).get(peer)
    return None if ours is None or theirs is None or not ours else theirs[field] / ours


def attention_calls(records: Records) -> float | None:
    """Milliseconds of the attention of a step of 96 samples, forward and backward."""
    parts = [own(records, "cross_modal_attention", case) for case in (ENCODER, DECODER, CROSS)]
    depths = (ModelConfig.enc_depth, ModelConfig.dec_depth, ModelConfig.dec_depth)
    if any(part is None for part in parts):
        return None
    return 1e3 * sum(depth * (part or 0.0) for depth, part in zip(depths, parts, strict=True))


def attention_over(peer: str) -> Callable[[Records], float | None]:
    """The smallest ratio among the three kinds of attention."""

    def measured(records: Records) -> float | None:
        found = [ratio(records, "cross_modal_attention", case, peer) for case in (ENCODER, DECODER, CROSS)]
        known = [value for value in found if value is not None]
        return min(known) if known else None

    return measured


def loss_memory(records: Records) -> float | None:
    """Our memory over that of the leanest peer with whole logits."""
    peers = ("F.linear_cross_entropy", "whole logits packed", "whole logits compiled")
    found = [ratio(records, "linear_cross_entropy", LOSS, peer, "peak_extra_bytes") for peer in peers]
    known = [1 / value for value in found if value]
    return max(known) if known else None


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def best_step(records: Records, case: str) -> float | None:
    """Seconds of the fastest captured step."""
    found = times(records, "training_step", case)
    known = [found[name]["seconds"] for name in STEPS if name in found]
    return min(known) if known else None


def recipe(records: Records) -> float | None:
    """Minutes of the whole recipe at the best step measured, steps alone."""
    found = [r["recipe_minutes"] for r in records if r["kind"] == "step" and r["provider"] in STEPS]
    return min(found) if found else None


GOALS = (
    Goal(
        "quantize_coords of 1,000,000 samples, share of the copy bandwidth", "at least 0.80", 0.8, False,
        lambda r: own(r, "quantize_coords", "1,000,000 samples", "share_of_floor"),
    ),
    Goal(
        "mask_tokens, a batch of 96, microseconds", "at most 15", 15.0, True,
        lambda r: _scaled(own(r, "mask_tokens", "M4 batch 96"), 1e6), "{:.1f}",
    ),
    Goal("cross_modal_attention, 24 calls forward and backward, ms", "at most 1.95", 1.95, True, attention_calls),
    Goal("cross_modal_attention over padded SDPA", "at least 3", 3.0, False, attention_over("SDPA padded")),
    Goal("cross_modal_attention over varlen_attn", "at least 1.4", 1.4, False, attention_over("varlen_attn")),
    Goal(
        "linear_cross_entropy of 9,120 tokens, ms", "at most 4.3", 4.3, True,
        lambda r: _scaled(own(r, "linear_cross_entropy", LOSS), 1e3),
    ),
    Goal("linear_cross_entropy, share of its leanest peer's memory", "at most 0.25", 0.25, True, loss_memory),
    Goal(
        "a training step of 96 samples in bf16, ms", "at most 21", 21.0, True,
        lambda r: _scaled(best_step(r, "M4, 96 samples"), 1e3), "{:.1f}",
    ),
    Goal("the whole recipe, minutes of steps", "at most 38", 38.0, True, recipe, "{:.1f}"),
)  # fmt: skip


def lines(records: Records) -> list[str]:
    """All goals, and what came of them. The numbers were set for an H200."""
    card = next((r["environment"]["gpu"] for r in records if r["kind"] == "session"), None)
    title = f"=== goals, set for an H200; measured on {card}"
    if card is None:
        title, records = "=== goals; a rehearsal measures tiny inputs on a CPU, and so none of them", ()
    return [title, *(goal.line(records) for goal in GOALS)]
