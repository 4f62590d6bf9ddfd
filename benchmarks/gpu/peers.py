"""What the benchmarks of the ops measure on a GPU, one provider after another: first what the goals ask for, peers that
have to be compiled last."""

import importlib
from pathlib import Path

from benchmarks.device import ON_GPU, Unavailable
from benchmarks.gpu.folder import Folder
from benchmarks.suite import Suite, measured

HERE = Path(__file__).resolve().parents[1]
SECONDS = 0.3  # of measuring a provider
# Cases that the goals name, most important first; then all others that are for a GPU.
GOALS = (
    ("mask_tokens", "M4 batch 96"),
    ("quantize_coords", "1,000,000 samples"),
    ("cross_modal_attention", "encoder, batch 96"),
    ("cross_modal_attention", "decoder, batch 96"),
    ("cross_modal_attention", "cross, batch 96"),
    ("linear_cross_entropy", "M4 batch 96 (9,120 tokens)"),
)
REHEARSED = (
    ("mask_tokens", "1 sample"),
    ("quantize_coords", "1 sample"),
    ("cross_modal_attention", "small: 1 sample"),
    ("linear_cross_entropy", "tiny (32 x 16 x 100)"),
)
COMPILED = ("whole logits compiled", "FlexAttention")  # for ten seconds and more, by case
COMPILED_CASES = (
    ("linear_cross_entropy", "M4 batch 96 (9,120 tokens)"),
    ("cross_modal_attention", "encoder, batch 96"),
)
# Loops over samples on the host: they say little here, and take long.
SLOW = ("SDPA by sample", "reference")
ELSEWHERE = ("training_step",)  # measured by stages of their own


def suites(folder: Folder) -> dict[str, Suite]:
    """By op, from all files of benchmarks that have one and whose packages are here."""
    found = {}
    for path in sorted(HERE.glob("bench_*.py")):
        with folder.part(path.stem):
            try:
                suite = importlib.import_module(f"benchmarks.{path.stem}").SUITE
            except ModuleNotFoundError as error:
                raise Unavailable(f"{error.name} is not installed") from error
            found[suite.op] = suite
    return {op: suite for op, suite in found.items() if op not in ELSEWHERE}


def planned(known: dict[str, Suite], *, on_gpu: bool) -> list[tuple[str, str, str]]:
    """(op, case, provider) in the order in which they are measured."""
    goals = [entry for entry in (GOALS if on_gpu else REHEARSED) if entry[0] in known]
    others = [
        (op, name)
        for op, suite in known.items()
        for name, case in suite.cases.items()
        if on_gpu and case.gpu and (op, name) not in goals
    ]

    def rank(op: str, case: str, provider: str) -> int:
        if provider in SLOW:
            return 3
        if provider in COMPILED:
            return 2 if (op, case) in COMPILED_CASES else 4
        return 0 if (op, case) in goals else 1

    entries = [
        (op, case, provider)
        for op, case in [*goals, *others]
        for provider in known[op].providers
        if provider not in known[op].cases[case].without
    ]
    return sorted(entries, key=lambda entry: rank(*entry))


def run(folder: Folder) -> None:
    """The stage "peers"."""
    known = suites(folder)
    for op, case, provider in planned(known, on_gpu=ON_GPU):
        if not ON_GPU and provider in known[op].long:  # compiles for half a minute
            continue
        with folder.part(f"{op}, {case}, {provider}"):
            record = measured(known[op], case, provider, SECONDS)
            folder.time(record)
            print(
                f"{op}, {case:<30} {provider:<24} {record.seconds * 1e6:10.1f} us {record.rate:>16} "
                f"{record.share_of_floor:5.0%} of the floor, {record.peak_extra_bytes / 2**20:8.1f} MiB",
                flush=True,
            )
