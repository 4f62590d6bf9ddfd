"""What the benchmarks of the ops measure on a GPU, one provider after another: first what the goals ask for, peers that
have to be compiled last."""

import importlib
from pathlib import Path

from benchmarks.device import ON_GPU
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
COMPILED = ("whole logits compiled", "FlexAttention")
# A loop over samples on the host, and PyTorch's loop in float64's clothes: they say little here, and take long.
SLOW = ("SDPA by sample", "reference")
ELSEWHERE = ("training_step",)  # measured by stages of their own


def suites() -> dict[str, Suite]:
    """By op, from all files of benchmarks that have one."""
    modules = (importlib.import_module(f"benchmarks.{path.stem}") for path in sorted(HERE.glob("bench_*.py")))
    found = {module.SUITE.op: module.SUITE for module in modules}
    return {op: suite for op, suite in found.items() if op not in ELSEWHERE}


def planned(known: dict[str, Suite], *, on_gpu: bool) -> list[tuple[str, str, str]]:
    """(op, case, provider) in the order in which they are measured."""
    cases = list(GOALS if on_gpu else REHEARSED)
    if on_gpu:
        cases += [
            (op, name)
            for op, suite in known.items()
            for name, case in suite.cases.items()
            if case.gpu and (op, name) not in GOALS
        ]
    early, late, last = [], [], []
    for op, case in cases:
        suite = known[op]
        for provider in suite.providers:
            if provider in suite.cases[case].without or (provider in SLOW and (op, case) not in cases[: len(GOALS)]):
                continue
            where = late if provider in COMPILED else last if provider in SLOW else early
            where.append((op, case, provider))
    goals = [entry for entry in early if entry[:2] in GOALS]
    return goals + late + [entry for entry in early if entry not in goals] + last


def run(folder: Folder) -> None:
    """The stage "peers"."""
    known = suites()
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
