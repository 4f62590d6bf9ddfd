"""``python -m m4.data``: synth, prepare, split, inspect, sample, pack, unpack."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
from functools import partial
from pathlib import Path
from typing import TypeVar

from m4.arguments import CommandParser, check_picture_path, number, whole
from m4.cli import exit_status, run_command
from m4.data.checks import MAX_SEED, MAX_WORKERS
from m4.data.framing import FRAMINGS
from m4.data.inspection.dataset_statistics import describe, read_all
from m4.data.inspection.sheet import compare_with_frames, sheet_of
from m4.data.layout import find_splits, read_meta
from m4.data.packed.index import is_packed
from m4.data.packed.packing import SHARD_ROWS, pack
from m4.data.packed.splits import split_packed
from m4.data.packed.unpacking import unpack
from m4.data.penn_action import list_videos
from m4.data.preparation.captions import CAPTIONS
from m4.data.preparation.options import PrepareOptions
from m4.data.preparation.pairs import SSIM_THRESHOLD
from m4.data.preparation.prepare import Summary, merge, prepare
from m4.data.preparation.sample import SAMPLE_VIDEOS, make_sample
from m4.data.split import FRACTIONS, UNITS, split_output_dataset
from m4.data.synthetic.clips import SynthOptions
from m4.data.synthetic.synth import synthesize
from m4.data.tokenizers import TOKENIZERS, tokenizer_of
from m4.device import DTYPES
from m4.errors import ConfigError
from m4.files import write_atomically
from m4.pictures.sheets import picture_bytes, picture_endings

Settings = TypeVar("Settings", SynthOptions, PrepareOptions)
_SEED, _WORKERS = whole(0, MAX_SEED), whole(1, MAX_WORKERS)
_MAX_ON_SHEET = 600  # three columns of 200 rows are as tall as a JPEG may be


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its status; see `m4.cli.exit_status`."""
    return exit_status(partial(_run, arguments))


def _run(arguments: list[str] | None) -> int:
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except OSError as error:
        if error.filename is None and error.errno is not None and not isinstance(error, BrokenPipeError):
            # A full disk does not say for which file.
            place = getattr(options, "out", None) or getattr(options, "root", "input/output")
            raise OSError(error.errno, error.strerror, str(place)) from error
        raise
    return 0


def _synth(options: argparse.Namespace) -> None:
    names = synthesize(options.out, _settings(SynthOptions, options), options.poses, options.workers)
    print(f"{len(names)} videos in {options.out}")


def _prepare(options: argparse.Namespace) -> None:
    settings = _settings(PrepareOptions, options)
    shard = options.shard or _rank()
    summary = prepare(options.penn_action, options.out, settings, options.workers, shard, packed=options.packed)
    _report(summary, options.out)


def _settings(kind: type[Settings], options: argparse.Namespace) -> Settings:
    """An object of a dataclass, of the options that go by the names of its fields."""
    names = [field.name for field in dataclasses.fields(kind)]
    return kind(**{name: getattr(options, name) for name in names if hasattr(options, name)})


def _rank() -> tuple[int, int]:
    """This process's shard under torchrun, else the whole."""
    try:
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        raise ValueError(
            f"RANK and WORLD_SIZE: expected numbers, found {os.environ.get('RANK')!r} and "
            f"{os.environ.get('WORLD_SIZE')!r}. Unset them, or name the shard with --shard i/n."
        ) from None
    if world > 1:
        logging.getLogger("m4.data").info("shard %d/%d, as torchrun's RANK and WORLD_SIZE say", rank, world)
    return rank, world


def _report(summary: Summary, out: Path) -> None:
    if summary.complete:
        splits = ", ".join(f"{split} {count}" for split, count in summary.splits.items())
        state = "" if summary.fresh else " (already there)"
        print(f"{summary.pairs} pairs of {summary.videos} videos in {out}{state}: {splits}")
    else:
        print(
            f"this shard is done: {summary.videos} videos are ready. The last shard to finish lays out the samples; "
            f"so does python -m m4.data split {out}"
        )
    _report_bad(summary.bad)


def _report_bad(bad: dict[str, str]) -> None:
    if bad:
        print(f"{len(bad)} bad videos were left out (run again once they are mended):")
        for name, reason in bad.items():
            print(f"  {name}: {reason}")


def _split(options: argparse.Namespace) -> None:
    summary = merge(options.root, options.fractions, options.seed, options.unit)
    if summary is not None:
        totals = summary.splits
    else:
        seed = 42 if options.seed is None else options.seed
        divide = split_packed if is_packed(options.root) else split_output_dataset
        totals = divide(options.root, options.fractions, seed, options.unit or "video")
    print(", ".join(f"{split} {count}" for split, count in totals.items()))
    _report_bad(summary.bad if summary else {})


def _inspect(options: argparse.Namespace) -> None:
    root = Path(options.root)
    sheet = None if options.no_sheet else options.sheet or root / "contact_sheet.png"
    if sheet is not None:
        if options.samples > _MAX_ON_SHEET:
            raise ConfigError(f"--samples: expected 1 … {_MAX_ON_SHEET} on one sheet, got {options.samples}")
        find_splits(root)  # before a folder is made for the sheet
        check_picture_path("--sheet", sheet, picture_endings())
    source = options.penn_action or (root / "videos" if (root / "videos/frames").is_dir() else None)
    if source is not None:
        list_videos(source)  # a wrong folder is found before any work
    splits = read_all(root)
    print(describe(root, splits))
    if source is None and sheet is None:
        return
    tokenizer = tokenizer_of(read_meta(root), options.tokenizer, options.cosmos_dir)
    if source is not None:
        for line in compare_with_frames(root, splits, source, options.samples, tokenizer):
            print(line)
    if sheet is not None:
        picture = sheet_of(root, splits, options.samples, tokenizer)
        write_atomically(sheet, picture_bytes(picture, sheet.suffix))
        print(f"contact sheet: {sheet}")


def _pack(options: argparse.Namespace) -> None:
    names = [name for name, _ in options.modality]
    if len(set(names)) < len(names):
        raise ConfigError(f"--modality: expected different names, got {', '.join(names)}")
    packed = pack(
        options.roots,
        options.out,
        modalities=dict(options.modality),
        prefix=options.prefix,
        shard_rows=options.shard_rows,
    )
    splits = ", ".join(f"{split} {count}" for split, count in packed.splits.items())
    there = f" ({packed.present} were there already)" if packed.present else ""
    print(f"{packed.added} samples packed into {options.out}{there}: {splits}")


def _unpack(options: argparse.Namespace) -> None:
    splits = unpack(options.root, options.out)
    print(f"samples in {options.out}: {', '.join(f'{split} {count}' for split, count in splits.items())}")


def _sample(options: argparse.Namespace) -> None:
    print(
        f"=== Embedded sample set: {options.videos} animated videos (not real footage), made on the spot in "
        f"{options.out} ===",
        flush=True,
    )
    _report(make_sample(options.out, options.videos, options.workers), options.out)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m m4.data", description="Make and look at training data.")
    commands = parser.add_subparsers(dest="command", required=True)

    synth = commands.add_parser("synth", help="write animated videos in the Penn Action layout")
    synth.add_argument("--out", type=_path, required=True)
    synth.add_argument("--videos", type=whole(1), required=True)
    synth.add_argument("--poses", type=_path, help="folder of Penn Action labels to re-enact")
    synth.add_argument("--seed", type=_SEED, default=0)
    synth.add_argument("--frames", type=_frames, help="frames per video, N or FEWEST-MOST (with --poses: at most N)")
    synth.add_argument("--size", type=_size, help="frame size WxH; default a mixture of Penn Action's")
    synth.add_argument("--scenes", type=whole(1), default=SynthOptions.scenes, help="number of different backgrounds")
    synth.add_argument("--steady", action="store_true", help="tripod cameras only")
    synth.add_argument("--workers", type=_WORKERS, default=1)
    synth.set_defaults(run=_synth)

    make = commands.add_parser("prepare", help="turn videos into token samples")
    make.add_argument("--penn-action", type=_path, required=True, help="folder with frames/ and labels/")
    make.add_argument("--out", type=_path, required=True)
    make.add_argument("--tokenizer", choices=TOKENIZERS, default="fsq")
    make.add_argument(
        "--cosmos-dir",
        type=_home,
        help="folder with encoder.jit and decoder.jit; default the Hugging Face cache",
    )
    make.add_argument("--cosmos-dtype", choices=DTYPES, help="default bf16 on a GPU, fp32 on a CPU")
    make.add_argument("--captions", choices=CAPTIONS, default="label")
    make.add_argument(
        "--blip-dir", type=_home, help="folder with BLIP and its processor; default the Hugging Face cache"
    )
    make.add_argument("--framing", choices=FRAMINGS, default="subject")
    make.add_argument("--ssim-threshold", type=float, default=SSIM_THRESHOLD)
    make.add_argument("--split-unit", choices=UNITS, default="video")
    make.add_argument("--seed", type=_SEED, default=42)
    make.add_argument("--workers", type=_WORKERS, default=1)
    make.add_argument("--shard", type=_shard, help="i/n, i from 0: do every n-th video; default torchrun's rank")
    make.add_argument("--packed", action="store_true", help="shards and an index in place of a folder a sample")
    make.set_defaults(run=_prepare)

    split = commands.add_parser("split", help="merge shards, or divide samples into train, eval and test anew")
    split.add_argument("root", type=_path)
    split.add_argument("--fractions", type=number(0, 1), nargs=3, default=FRACTIONS, metavar=("TRAIN", "EVAL", "TEST"))
    split.add_argument("--seed", type=_SEED, help="default: that of prepare, or 42")
    split.add_argument("--unit", choices=UNITS, help="default: that of prepare, or video")
    split.set_defaults(run=_split)

    inspect = commands.add_parser("inspect", help="print statistics and draw a contact sheet")
    inspect.add_argument("root", type=_path)
    inspect.add_argument("--sheet", type=_path, help="default ROOT/contact_sheet.png")
    inspect.add_argument("--no-sheet", action="store_true", help="statistics only")
    inspect.add_argument("--samples", type=whole(1), default=12, help="samples on the sheet and compared with frames")
    inspect.add_argument("--penn-action", type=_path, help="the videos, to compare with; default ROOT/videos if there")
    inspect.add_argument("--tokenizer", choices=TOKENIZERS, help="default that of meta.json, or fsq")
    inspect.add_argument("--cosmos-dir", type=_home, help="folder with decoder.jit, for data made with cosmos")
    inspect.set_defaults(run=_inspect)

    _add_packing(commands)

    sample = commands.add_parser("sample", help="make the embedded sample set")
    sample.add_argument("--out", type=_path, required=True)
    sample.add_argument("--videos", type=whole(1), default=SAMPLE_VIDEOS)
    sample.add_argument("--workers", type=_WORKERS, default=2)
    sample.set_defaults(run=_sample)
    return parser


def _add_packing(commands: argparse._SubParsersAction) -> None:
    packing = commands.add_parser("pack", help="pack data sets into shards that training reads without listing files")
    packing.add_argument("roots", type=_path, nargs="+", metavar="ROOT", help="in folders, or packed (to merge)")
    packing.add_argument("--out", type=_path, required=True, help="what is packed there already is added to")
    packing.add_argument(
        "--modality",
        type=_modality,
        action="append",
        default=[],
        metavar="NAME[:TOKENS]",
        help="which, in this order (repeat it), and their tokens a sample; default all",
    )
    packing.add_argument("--prefix", default="", help="put before the names of samples and videos")
    packing.add_argument("--shard-rows", type=whole(1), default=SHARD_ROWS, help="samples of a shard at most")
    packing.set_defaults(run=_pack)

    unpacking = commands.add_parser("unpack", help="write a packed data set as folders again")
    unpacking.add_argument("root", type=_path)
    unpacking.add_argument("--out", type=_path, required=True)
    unpacking.set_defaults(run=_unpack)


def _path(text: str) -> Path:
    """A path as typed, with ~; an empty one, from a variable that is not set, would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got nothing (an empty variable?)")
    return Path(os.path.expanduser(text))


_home = os.path.expanduser  # a path, or the name of a repository


def _modality(text: str) -> tuple[str, int | None]:
    name, found, tokens = text.rpartition(":")
    if not found:
        return text, None
    if not name or not tokens.isdecimal() or int(tokens) < 1:
        raise argparse.ArgumentTypeError(f"expected NAME or NAME:TOKENS such as depth:256, got {text!r}")
    return name, int(tokens)


def _numbers(text: str, separator: str, example: str) -> tuple[int, int]:
    first, found, second = text.partition(separator)
    if not (found and first.isdecimal() and second.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected {example}, got {text!r}")
    return int(first), int(second)


def _shard(text: str) -> tuple[int, int]:
    return _numbers(text, "/", "i/n such as 0/4")


def _size(text: str) -> tuple[int, int]:
    width, height = _numbers(text.lower(), "x", "WIDTHxHEIGHT such as 480x270")
    return height, width


def _frames(text: str) -> tuple[int, int]:
    return (int(text), int(text)) if text.isdecimal() else _numbers(text, "-", "N or FEWEST-MOST")


if __name__ == "__main__":
    run_command(main)
