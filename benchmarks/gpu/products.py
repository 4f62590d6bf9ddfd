"""Every matrix product of the step, alone: how fast the library is at its shape, and what all of them come to.

From a cold cache, in bfloat16, each in the layout that the step has it in. The head's products are also measured for
fewer rows at a time, as a smaller workspace of the loss would have them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.device import DEVICE, ON_GPU
from benchmarks.gpu import step
from benchmarks.gpu.folder import Folder
from benchmarks.measure import gpu_median, timed
from m4.batches.order import SampleOrder
from m4.batches.train import TrainBatches
from m4.build import masking_spec
from m4.model import M4, ModelConfig
from m4.schedule import Schedule

HEAD_ROWS = (512, 1024, 2304, 4608)  # besides all of a micro-batch's
BATCHES = (96, 480)
SECONDS = 0.05  # of measuring a product


class Layer(NamedTuple):
    """Linear layers of one shape.

    Args:
        name: of the layer.
        side: "encoder" or "decoder", whose tokens are the rows.
        columns: of the result.
        depth: of the input.
        number: layers like it.
    """

    name: str
    side: str
    columns: int
    depth: int
    number: int


class Product(NamedTuple):
    """One matrix product (rows x depth) times (depth x columns); number: in a step."""

    name: str
    rows: int
    depth: int
    columns: int
    number: int
    run: Callable[[], Tensor]


def layers_of(config: ModelConfig) -> list[Layer]:
    """The linear layers of a model, by shape, without the head: read from the model itself."""
    with torch.device("meta"):
        model = M4(config)
    found: dict[tuple[str, str, int, int], int] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "to_logits":
            # The decoder's context is the encoder's tokens.
            side = "encoder" if name.endswith(".kv_proj") or not name.startswith("decoder") else "decoder"
            key = (name.rpartition(".")[2], side, *module.weight.shape)
            found[key] = found.get(key, 0) + 1
    return [Layer(*key, count) for key, count in found.items()]


def rows_of(batches: TrainBatches) -> dict[str, int]:
    """Packed tokens of each side of a micro-batch, its tail included: of the sizes that a run has, the middle one."""
    assert batches.capacities is not None
    pairs = batches.capacities.pairs()
    return dict(zip(("encoder", "decoder"), map(int, pairs[len(pairs) // 2]), strict=True))


def products_of(layer: Layer, rows: int, *, wide: bool = False) -> list[Product]:
    """A layer forward, and its two products backward.

    Args:
        rows: of the input.
        wide: the weight's gradient is written in float32, as the loss has it.
    """

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)

    x, grad, weight = draw(rows, layer.depth), draw(rows, layer.columns), draw(layer.columns, layer.depth)
    # Products of a CPU have one dtype only.
    out: dict[str, Any] = {"out_dtype": torch.float32} if wide and ON_GPU else {}
    n, k, count = layer.columns, layer.depth, layer.number
    return [
        Product(f"{layer.name} forward", rows, k, n, count, lambda: torch.mm(x, weight.T)),
        Product(f"{layer.name} d input", rows, n, k, count, lambda: torch.mm(grad, weight, **out)),
        Product(f"{layer.name} d weight", n, rows, k, count, lambda: torch.mm(grad.T, x, **out)),
    ]


def measure(folder: Folder, samples: int, product: Product, *, of: str) -> float:
    """Measure one product and keep what was found; returns the seconds of all like it in a step."""
    seconds = gpu_median(product.run, seconds=SECONDS, clock=False)[0] if ON_GPU else timed(product.run)
    flop = 2 * product.rows * product.depth * product.columns
    values = {**product._asdict(), "microseconds": seconds * 1e6, "tflops": flop / seconds / 1e12}
    del values["run"]
    folder.append("product", samples=samples, of=of, **values)
    print(
        f"{samples:4} samples, {of}, {product.name:<24} {product.rows:6} x {product.depth:6} x {product.columns:6} "
        f"{product.number:3}x {seconds * 1e6:9.1f} us {flop / seconds / 1e12:7.1f} TFLOP/s",
        flush=True,
    )
    return seconds * product.number


def run(folder: Folder) -> None:
    """The stage "products"."""
    for samples in BATCHES:
        with folder.part(f"products of {samples} samples"):
            inputs = (step.recipe if ON_GPU else step.tiny)(samples, 1)
            config = inputs.config.model_config()
            rows = rows_of(batches_of(inputs))
            sums = {"trunk": 0.0, "head": 0.0}
            for layer in layers_of(config):
                for product in products_of(layer, rows[layer.side]):
                    sums["trunk"] += measure(folder, samples, product, of=f"trunk, {layer.side}")
            head = Layer("head", "decoder", config.vocabulary, config.dim, 1)
            for count in (rows["decoder"], *(HEAD_ROWS if samples == BATCHES[0] else ())):
                for product in products_of(head, count if ON_GPU else min(count, 64), wide=True):
                    seconds = measure(folder, samples, product, of="head")
                    sums["head"] += seconds if count == rows["decoder"] else 0.0
            folder.append("products", samples=samples, **{f"{name}_ms": s * 1e3 for name, s in sums.items()})
            print(f"{samples} samples: trunk {sums['trunk'] * 1e3:.2f} ms, head {sums['head'] * 1e3:.2f} ms a step")


def batches_of(inputs: step.Recipe) -> TrainBatches:
    """The micro-batches that a run of fixed shapes has; no model is made."""
    config = inputs.config
    order = SampleOrder(len(inputs.store), config.seed, config.data.order)
    schedule = Schedule.of(config, 1)
    return TrainBatches(inputs.store, order, masking_spec(config), config, schedule, DEVICE, fixed_shapes=True)
