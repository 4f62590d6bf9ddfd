"""What a step is made of: kernels by name, and sums by what they are for, as torch.profiler sees them.

A replayed graph has no operators above its kernels, so that a name, and for matrix products the neighbours, say what a
kernel is for: the products around the kernels of the loss are those of the vocabulary.
"""

import importlib
import pkgutil
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

import m4kernels.ops
from benchmarks.device import ON_GPU
from benchmarks.gpu.folder import Folder
from benchmarks.measure import Run

REPLAYS = 3
ROWS = 70  # of a table; what is below them is in the sums
TRUNK, VOCABULARY, LOSS = "trunk products", "vocabulary products", "loss kernels"
# Ops of ours → what their kernels are for.
OF_OPS = {
    "adamw_step": "AdamW and clipping",
    "cross_modal_attention": "attention",
    "embedding": "embedding",
    "layer_norm": "LayerNorm",
    "linear": "GELU",  # what is of ours there surrounds a product
    "linear_cross_entropy": LOSS,
    "mask_tokens": "masking",
    "quantize_coords": "masking",
}
# The first that matches names the category; lower case. Of a fused kernel it is the dearest of what it names.
PATTERNS = (
    (TRUNK, r"nvjet|gemm|cutlass|xmma|splitk|cublas|gemv|aten::(add)?mm|aten::bmm|mkldnn|aten::linear"),
    ("masking", r"m4k::masking|m4k::quantize|mask_tokens"),
    (LOSS, r"linear_cross_entropy"),
    ("attention", r"flash|fmha|sdpa|cudnn.*attention|softmax|cross_modal_attention"),
    ("LayerNorm", r"layer_?norm|gammabeta|rowwisemoments"),
    ("AdamW and clipping", r"multi_tensor|adam|lpnorm|normtwo|norm_kernel|foreach|vector_norm"),
    ("GELU", r"gelu"),
    (
        "embedding",
        r"embedding|grad_weight|gather|scatter|index|radix|segment|unique|devicescan|devicereduce|sort|krn_",
    ),
    ("additions", r"functor_?(onself)?_add|aten::add|_add_"),
    ("casts and copies", r"copy|memcpy|memset|fillfunctor|aten::(fill|zero|cat|stack|clone)|catarray|fused_stack"),
)
OTHERS = "others"
# The kernels of the loss that read logits: so many products before them, and after them, are of the vocabulary.
READS_LOGITS = r"whole_rows|sweep|gradient_kernel|cross_entropy"
LOGITS_BEFORE, GRADIENTS_AFTER = 1, 2


class Launch(NamedTuple):
    """One kernel that ran. start and seconds: on the device's clock."""

    name: str
    start: float
    seconds: float


class Row(NamedTuple):
    """A kernel by its name, a step."""

    name: str
    category: str
    milliseconds: float
    launches: float
    mean_microseconds: float


class Table(NamedTuple):
    """What a step is made of.

    Args:
        milliseconds: of all kernels.
        launches: of all kernels.
        categories: milliseconds and launches by what they are for, the longest first.
        rows: by name, the longest first.
    """

    milliseconds: float
    launches: float
    categories: dict[str, tuple[float, float]]
    rows: list[Row]

    def lines(self) -> list[str]:
        lines = [f"{self.milliseconds:.3f} ms of kernels a step, {self.launches:.0f} launches"]
        lines += [f"{ms:9.3f} ms {count:8.1f}x  {name}" for name, (ms, count) in self.categories.items()]
        lines += ["by name: ms a step, launches, mean us, for, kernel"]
        lines += [
            f"{row.milliseconds:9.3f} ms {row.launches:8.1f}x {row.mean_microseconds:9.1f} us  "
            f"{row.category[:19]:<19}  {row.name[:150]}"
            for row in self.rows[:ROWS]
        ]
        return lines


def our_kernels() -> dict[str, str]:
    """Name of a Triton kernel of ours → the op it is of, or "a or b" where ops share a name; {} without Triton."""
    found: dict[str, str] = {}
    for op in (module.name for module in pkgutil.iter_modules(m4kernels.ops.__path__)):
        package = importlib.import_module(f"m4kernels.ops.{op}")
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("triton"):
                continue
            try:
                kernels = importlib.import_module(f"m4kernels.ops.{op}.{module.name}")
            except ImportError:  # no Triton here
                continue
            for name, value in vars(kernels).items():
                # A JITFunction, compiled or interpreted, that is not another module's.
                function = getattr(value, "fn", None)
                if hasattr(value, "arg_names") and getattr(function, "__module__", None) == kernels.__name__:
                    found[name] = f"{found[name]} or {op}" if name in found else op
    return found


def category_of(name: str, ours: dict[str, str]) -> str:
    """What a kernel is for by its name alone; products count for the trunk."""
    if name in ours:
        return OF_OPS.get(ours[name], ours[name])
    lower = name.lower()
    return next((category for category, pattern in PATTERNS if re.search(pattern, lower)), OTHERS)


def categories_of(launches: Sequence[Launch], ours: dict[str, str]) -> list[str]:
    """What each launch is for; launches in the order in which they ran."""
    found = [category_of(launch.name, ours) for launch in launches]
    for at, launch in enumerate(launches):
        if found[at] == LOSS and re.search(READS_LOGITS, launch.name):
            _claim(found, launches, range(at - 1, -1, -1), LOGITS_BEFORE)
            _claim(found, launches, range(at + 1, len(launches)), GRADIENTS_AFTER)
    return found


def _claim(found: list[str], launches: Sequence[Launch], places: Iterable[int], count: int) -> None:
    """Give the next `count` products to the vocabulary, with the reductions that belong to them."""
    for at in places:
        product, reduction = found[at] in (TRUNK, VOCABULARY), "reduce" in launches[at].name.lower()
        if count == 0 and not (product and reduction):
            return
        if product:
            found[at] = VOCABULARY
            count -= not reduction


def table_of(launches: Sequence[Launch], replays: int, ours: dict[str, str] | None = None) -> Table:
    """The table of what ran in so many replays of a step."""
    launches = sorted(launches, key=lambda launch: launch.start)
    categories = categories_of(launches, our_kernels() if ours is None else ours)
    by_name: dict[tuple[str, str], list[float]] = defaultdict(list)
    by_category: dict[str, list[float]] = defaultdict(list)
    for launch, category in zip(launches, categories, strict=True):
        by_name[launch.name, category].append(launch.seconds)
        by_category[category].append(launch.seconds)
    rows = [
        Row(name, category, sum(times) / replays * 1e3, len(times) / replays, sum(times) / len(times) * 1e6)
        for (name, category), times in by_name.items()
    ]
    sums = {name: (sum(times) / replays * 1e3, len(times) / replays) for name, times in by_category.items()}
    return Table(
        sum(ms for ms, _ in sums.values()),
        len(launches) / replays,
        dict(sorted(sums.items(), key=lambda item: -item[1][0])),
        sorted(rows, key=lambda row: -row.milliseconds),
    )


def launches_of(events: Iterable[Any], device_type: str) -> list[Launch]:
    """The kernels among a profile's events; on a CPU its operators without what they call."""
    found = []
    for event in events:
        if event.device_type.name != device_type or (device_type == "CUDA" and _is_range(event)):
            continue
        whole = event.time_range.elapsed_us()
        seconds = (whole if device_type == "CUDA" else event.self_cpu_time_total) / 1e6
        found.append(Launch(event.name, event.time_range.start / 1e6, seconds))
    return found


def _is_range(event: Any) -> bool:
    """Whether it is no kernel but the time between two marks of the host, which kernels lie in."""
    return getattr(event, "is_user_annotation", False) or event.name.startswith(("ProfilerStep", "Optimizer."))


def profiled(run: Run, replays: int = REPLAYS) -> Table:
    """What so many runs are made of."""
    activity, device_type = (ProfilerActivity.CUDA, "CUDA") if ON_GPU else (ProfilerActivity.CPU, "CPU")
    with profile(activities=[activity]) as record:
        for _ in range(replays):
            run()
        if ON_GPU:
            torch.cuda.synchronize()
    return table_of(launches_of(record.events() or (), device_type), replays)


def keep_table(folder: Folder, title: str, run: Callable[[], Any]) -> Table:
    """Profile a step and keep its table."""
    table = profiled(run)
    folder.append("kernels", title=title, milliseconds=table.milliseconds, launches=table.launches)
    for category, (milliseconds, launches) in table.categories.items():
        folder.append("category", title=title, name=category, milliseconds=milliseconds, launches=launches)
    for row in table.rows[:ROWS]:
        folder.append("kernel", title=title, **{**row._asdict(), "name": row.name[:200]})
    folder.say(f"--- {title}")
    folder.say("\n".join(table.lines()) + "\n")
    return table
