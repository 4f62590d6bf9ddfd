"""Fill in modalities from others, or roll a motion out: ``python -m m4.generate --run RUN --out next.png``."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from m4.arguments import CommandParser, add_saved_run, check_picture_path, existing_folder, number, whole
from m4.cli import run_command
from m4.data.following import following_rows, rows_followed
from m4.data.layout import read_meta, require_meta
from m4.data.store import TokenStore
from m4.data.tokenizers import tokenizer_of
from m4.errors import ConfigError
from m4.generation.decode import generate, samples_at_once
from m4.generation.estimates import CodeValues
from m4.generation.files import endings, is_drawn, write_result
from m4.generation.horizons import TrueMoments, horizon_errors
from m4.generation.inputs import Inputs, picture_inputs, row_array, rows_of, spread_rows
from m4.generation.moments import IMAGES, Painter, check_drawable
from m4.generation.options import (
    MAX_GUIDANCE,
    MAX_SEED,
    MAX_TEMPERATURE,
    MAX_TOP_K,
    ORDERS,
    STEPS,
    Decoding,
    default_steps,
)
from m4.generation.results import Filled, Result, RolledOut
from m4.generation.rollout import check_rollout, roll_out
from m4.generation.schedules import SCHEDULES
from m4.modalities import NEXT, REFERENCE, RowLayout
from m4.model import M4
from m4.run.console import show_progress
from m4.saved_run import SavedRun

log = logging.getLogger(__name__)

_SAMPLES = 4
_MOST_ROWS = 60  # a picture of more rows is taller than some formats allow, and than anyone looks at
_MOST_MOMENTS = 60  # as wide, for the same reason
_MOST_PICTURES = 720  # on one: 150 MB
_SECONDS = 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    return Generation(_arguments(arguments)).run()


class Generation:
    """One call of the command: everything is checked when it is made, before any work.

    Raises:
        ConfigError, DataError, CheckpointError: naming the argument or the file that cannot be used.
    """

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.saved = SavedRun.asked_for(asked)
        self.layout = RowLayout.of(self.saved.config)
        self.given, self.wanted = self._names()
        self.decoding = self._decoding()
        if asked.rollout:
            check_rollout(self.layout, self.given, self.wanted)
        drawn = [path for path in asked.out if is_drawn(path)]
        used = [*self.given, *self.wanted]
        if drawn:
            check_drawable(self.layout, used, self.saved.folder)
        needs_images = asked.image is not None or (bool(drawn) and bool(set(used) & set(IMAGES)))
        self.meta = require_meta(self.saved.root) if drawn or needs_images else read_meta(self.saved.root)
        self.split = None if asked.image else self.saved.split_name(asked.split)
        tokenizer = tokenizer_of(self.meta, cosmos_dir=asked.cosmos_dir) if needs_images else None
        self.painter = Painter(self.layout, self.meta, tokenizer)
        self.store: TokenStore | None = None
        self.inputs = self._inputs()
        if drawn:
            self._check_size()

    def run(self) -> int:
        self._say_what_was_not_trained()
        model = self.saved.model()
        result = self._rolled_out(model) if self.asked.rollout else self._filled(model)
        about = self._about()
        for path in self.asked.out:
            write_result(path, result, about, self.asked.seconds)
        if isinstance(result, RolledOut) and result.errors is not None:
            print("\n".join(result.errors.lines()))
        for path in self.asked.out:
            print(f"wrote {path}: {len(self.inputs.names)} samples of {self.saved.checkpoint}")
        return 0

    def _names(self) -> tuple[list[str], list[str]]:
        """Modalities that are given and wanted; those of the reference and next moment where none were named."""
        there, asked = self.layout.modalities, self.asked
        for option, names in (("--given", asked.given), ("--wanted", asked.wanted)):
            for name in names or ():
                if name not in there:
                    raise ConfigError(f"{option}: expected modalities of the run, {', '.join(there)}; got {name!r}")
        wanted = asked.wanted if asked.wanted is not None else [name for name in NEXT if name in there]
        if not wanted:
            raise ConfigError(f"--wanted: name what to predict, of {', '.join(there)}; the run has no next moment")
        known = REFERENCE[:1] if asked.image is not None and asked.pose is None else REFERENCE
        given = asked.given if asked.given is not None else [n for n in known if n in there and n not in wanted]
        both = [name for name in given if name in wanted]
        if both:
            raise ConfigError(f"--given, --wanted: expected different modalities, got {', '.join(both)} in both")
        if asked.image is not None and set(given) - set(known):
            lacking = ", ".join(name for name in given if name not in known)
            more = "a pose comes with --pose FILE" if lacking == REFERENCE[1] else "take prepared samples"
            raise ConfigError(f"--given: --image gives {', '.join(known)}, not {lacking}; {more}")
        return given, wanted

    def _say_what_was_not_trained(self) -> None:
        """The masks of a run decide what it learns; a modality that they leave out is predicted, or read, untrained."""

        def left_out(names: Sequence[str], alphas: Sequence[float]) -> str:
            of_name = dict(zip(self.layout.modalities, alphas, strict=True))
            return ", ".join(name for name in names if of_name[name] == 0)

        config = self.saved.config
        asked, shown = config.target_alphas, config.input_alphas
        if never := left_out(self.wanted, asked):
            log.warning("the masks of this run (target_alphas) never asked for %s: the prediction is untrained", never)
        if never := left_out(self.given, shown):
            log.warning("the masks of this run (input_alphas) never showed %s: what is given is read untrained", never)
        if self.decoding.steps > 1 and (never := left_out(self.wanted, shown)):
            log.warning(
                "the masks of this run (input_alphas) never showed %s, which steps after the first read: --steps 1 is "
                "what it was trained for",
                never,
            )

    def _decoding(self) -> Decoding:
        tokens = sum(self.layout[name].length for name in self.wanted)
        steps = self.asked.steps
        if steps is not None and steps > tokens:
            names = " and ".join(self.wanted)
            raise ConfigError(f"--steps: expected 1 … {tokens}, one for each token of {names}, got {steps}")
        if self.asked.guidance != 1 and not self.given:
            raise ConfigError("--guidance: nothing is given that could guide; name it with --given, or leave this out")
        chosen = {field.name: getattr(self.asked, field.name) for field in dataclasses.fields(Decoding)}
        return Decoding(**{**chosen, "steps": steps or default_steps(self.saved.config, self.wanted, tokens)})

    def _inputs(self) -> Inputs:
        asked = self.asked
        if asked.image is not None:
            assert self.painter.tokenizer is not None
            return picture_inputs(self.layout, self.meta, self.painter.tokenizer, asked.image, asked.pose)
        assert self.split is not None
        self.store = self.saved.open_split(self.split)
        if asked.pids:
            return Inputs.of_split(self.store, rows_of(self.store, asked.pids, self.split))
        samples = asked.samples or min(_SAMPLES, len(self.store))
        among = rows_followed(self._following(), asked.rollout, samples) if asked.rollout else None
        return Inputs.of_split(self.store, spread_rows(self.store, samples, self.split, among))

    def _following(self) -> np.ndarray:
        assert self.store is not None
        assert self.split is not None
        return following_rows(self.saved.root, self.split, self.store.pids)

    def _check_size(self) -> None:
        """Raise ConfigError where the samples are more than fit a picture."""
        samples, moments = len(self.inputs.names), 1 + (self.asked.rollout or 0)
        option = "--pids" if self.asked.pids else "--samples"
        rows = samples * (2 if self.asked.rollout else 1)
        most = min(_MOST_ROWS // (2 if self.asked.rollout else 1), max(1, _MOST_PICTURES // (2 * moments)))
        if rows > _MOST_ROWS or (self.asked.rollout and 2 * samples * moments > _MOST_PICTURES):
            moments_text = f" of {moments - 1} moments" if self.asked.rollout else ""
            raise ConfigError(
                f"{option}: expected at most {most} samples{moments_text} on a picture, got {samples}; "
                "a file that ends in .npz holds any number"
            )

    def _options(self) -> dict[str, Any]:
        device = self.saved.device
        return {
            "given": self.given,
            "wanted": self.wanted,
            "id_limits": self.layout.id_limits(self.meta).to(device),
            "ordinal": self.layout.ordinal().to(device),
            "code_values": CodeValues.of(self.layout, self.meta, device),
            "decoding": self.decoding,
        }

    def _in_batches(self, model: M4, work: Callable[[Tensor, Tensor], Tensor], axis: int) -> np.ndarray:
        """What ``work`` makes of all samples (tokens (B, L), ids (B,)), some at a time, joined along an axis."""
        guided = self.decoding.guidance != 1
        at_once = samples_at_once(model, self.layout, self.given, self.wanted, guided=guided)
        samples = len(self.inputs.names)
        parts = [slice(first, min(first + at_once, samples)) for first in range(0, samples, at_once)]
        shown = show_progress(parts, "decoding", samples, size=lambda part: part.stop - part.start)
        device = self.saved.device
        done = [row_array(work(self.inputs.batch(part).to(device), self.inputs.ids[part].to(device))) for part in shown]
        return np.concatenate(done, axis=axis)

    def _filled(self, model: M4) -> Result:
        options = self._options()
        rows = self._in_batches(model, lambda tokens, ids: generate(model, tokens, sample_ids=ids, **options), 0)
        return Filled(self.painter, self.inputs, self.given, self.wanted, rows)

    def _rolled_out(self, model: M4) -> Result:
        options, moments = self._options(), self.asked.rollout
        rows = self._in_batches(
            model, lambda tokens, ids: roll_out(model, tokens, moments, sample_ids=ids, **options), 1
        )
        result = RolledOut(self.painter, self.inputs, self.given, self.wanted, rows)
        poses = REFERENCE[1], NEXT[1]
        if self.store is None or self.inputs.rows is None or NEXT[1] not in self.wanted or not self._has(poses):
            return result
        true = TrueMoments.of(self.store, self.inputs.rows, self._following(), moments, self.layout, self.meta)
        predicted = rows[:, :, self.layout.span(NEXT[1])]
        errors = horizon_errors(predicted, true, self.store, self.inputs.rows, self.layout, self.meta)
        return dataclasses.replace(result, store=self.store, true=true, errors=errors)

    def _has(self, names: Sequence[str]) -> bool:
        return all(name in self.layout.modalities for name in names)

    def _about(self) -> dict[str, Any]:
        """What was asked for, for the files that hold text."""
        source = {"image": str(self.asked.image)} if self.asked.image is not None else {"split": self.split}
        return {
            "checkpoint": str(self.saved.checkpoint),
            "averaged": self.saved.averaged,
            **source,
            "given": list(self.given),
            "wanted": list(self.wanted),
            "rollout": self.asked.rollout,
            **dataclasses.asdict(self.decoding),
            "samples": list(self.inputs.names),
        }


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m m4.generate",
        description="Fill in modalities of samples from others, by default the next frame and pose from the reference; "
        "or roll a motion out. What is drawn is a function of the seed and the sample, whatever is drawn beside it.",
    )
    add_saved_run(parser)
    kinds = ", ".join(endings())
    out = f"file to write, by its ending ({kinds}); several may be given"
    parser.add_argument("--out", type=Path, action="append", required=True, metavar="FILE", help=out)
    what = parser.add_argument_group("what")
    given = f"modalities that are known, with commas between; none: nothing (default {','.join(REFERENCE)})"
    what.add_argument("--given", type=_names, metavar="NAMES", help=given)
    wanted = f"modalities to predict (default {','.join(NEXT)})"
    what.add_argument("--wanted", type=_names, metavar="NAMES", help=wanted)
    rollout = f"feed the predicted moment back so many times, 1 … {_MOST_MOMENTS}, and compare with the true motion"
    what.add_argument("--rollout", type=whole(1, _MOST_MOMENTS), metavar="N", help=rollout)
    whose = what.add_mutually_exclusive_group()
    samples = f"samples, spread over the split (default {_SAMPLES}; at most {_MOST_ROWS} on a picture); with --rollout "
    samples += "those whose video goes on for as long, if there are"
    whose.add_argument("--samples", type=whole(1), metavar="N", help=samples)
    whose.add_argument("--pids", nargs="+", metavar="PID", help="samples of the split by name")
    whose.add_argument("--image", type=Path, metavar="FILE", help="a picture of your own as the reference frame")
    pose = "its pose, JSON as docs/generating.md shows (default: the pose is not known)"
    what.add_argument("--pose", type=Path, metavar="FILE", help=pose)
    _add_decoding(parser.add_argument_group("how"))
    cosmos = "folder of the Cosmos tokenizer, for data prepared with it"
    parser.add_argument("--cosmos-dir", type=existing_folder, help=cosmos)
    seconds = f"that an animation shows each moment (default {_SECONDS})"
    parser.add_argument("--seconds", type=number(0.02, 60), default=_SECONDS, help=seconds)
    asked = parser.parse_args(arguments)
    if asked.pose is not None and asked.image is None:
        parser.error("--pose: is of a picture; give --image FILE")
    if asked.image is not None and asked.split is not None:
        parser.error("--split: a picture is in none; leave it out, or leave --image out")
    for path in asked.out:
        check_picture_path("--out", path, endings())
    return asked


def _add_decoding(how: argparse._ArgumentGroup) -> None:
    default = Decoding()
    steps = f"decoding steps (default {STEPS}; 1 where training never showed what is wanted)"
    how.add_argument("--steps", type=whole(1), metavar="S", help=steps)
    kept = f"tokens that each step keeps: as many in each, more and more, few at first (default {default.schedule})"
    how.add_argument("--schedule", choices=SCHEDULES, default=default.schedule, help=kept)
    order = f"which tokens are kept first (default {default.order})"
    how.add_argument("--order", choices=ORDERS, default=default.order, help=order)
    temperature = "0 (default): the likeliest, of joints the median; above: sampled"
    how.add_argument("--temperature", type=number(0, MAX_TEMPERATURE), default=0.0, metavar="T", help=temperature)
    heat = f"from step to step (default {default.temperature_schedule}, falling to 0)"
    how.add_argument("--temperature-schedule", choices=SCHEDULES, default=default.temperature_schedule, help=heat)
    how.add_argument("--top-k", type=whole(1, MAX_TOP_K), metavar="K", help="sample among the K likeliest ids")
    top_p = "sample among the fewest ids that have this probability (default 1: all)"
    how.add_argument("--top-p", type=number(0, 1), default=1.0, metavar="P", help=top_p)
    guidance = "of what is given, classifier-free: 1 (default) as trained, above: followed more closely"
    how.add_argument("--guidance", type=number(0, MAX_GUIDANCE), default=1.0, metavar="G", help=guidance)
    how.add_argument("--seed", type=whole(0, MAX_SEED), default=0, help="of the sampling (default 0)")


def _names(text: str) -> list[str]:
    names = [] if text == "none" else text.split(",")
    if "" in names or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"expected different names with commas between, or none, got {text!r}")
    return names


if __name__ == "__main__":
    run_command(main)
