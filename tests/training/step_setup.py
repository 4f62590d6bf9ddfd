"""What the tests of the training step share: a step with its model and feed, and what stands for a GPU."""

import traceback

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from m4.batches.order import SampleStream
from m4.batches.train import Feed
from m4.build import build_model, data_root, masking_spec, open_split
from m4.run.metrics import read_metrics
from m4.schedule import Schedule
from m4.training.optimizer import build_optimizer
from m4.training.step import Execution, TrainStep

CPU = torch.device("cpu")
OPS = ("mask_tokens", "cross_modal_attention", "linear_cross_entropy")
AS_ON_A_GPU = Execution(asynchronous=True, graphs=False)
needs_cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class PlainRecorder:
    """Stands for `CudaGraphs`: what it records is the function itself."""

    def __init__(self):
        self.recorded = 0

    def warm_up(self, function):
        function()

    def record(self, function):
        self.recorded += 1
        return function


class ForbidReading(TorchDispatchMode):
    """Refuse whatever would make the host wait for a GPU: values of tensors, and shapes that depend on values.

    Kernels are taken as they are: those of a CPU may read their tensors, on a GPU CUDA watches.
    """

    FORBIDDEN = (
        "aten._local_scalar_dense",
        "aten.nonzero",
        "aten.masked_select",
        "aten.unique",
        "aten._unique2",
        "aten.is_nonzero",
        "aten.equal",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if any(name.startswith(f"{forbidden}.") for forbidden in self.FORBIDDEN) and not any(
            "m4kernels/ops" in frame.filename for frame in traceback.extract_stack()
        ):
            raise AssertionError(f"{name} reads values on the host")
        if name.startswith("aten.index") and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in (args[1] if len(args) > 1 else ()) or ()
        ):
            raise AssertionError(f"{name} with a boolean mask has a shape that depends on values")
        return func(*args, **(kwargs or {}))


class Setup:
    """A model with a non-zero head, its optimiser, and feeds of both kinds."""

    def __init__(self, config, device=CPU, execution=AS_ON_A_GPU, fixed_shapes=True):
        self.config, self.device = config, device
        self.plan = Schedule.of(config, 1)
        store = open_split(config, data_root(config), "train")
        self.feed = Feed(
            store,
            SampleStream(len(store), config.seed),
            masking_spec(config),
            config,
            self.plan,
            device,
            fixed_shapes=fixed_shapes,
            resident=True,
        )
        self.model = build_model(config, device)
        with torch.no_grad():
            self.model.to_logits.weight.copy_(
                torch.randn(self.model.to_logits.weight.shape, generator=torch.Generator().manual_seed(1)) * 0.1
            )
        self.optimizer = build_optimizer(self.model, config)
        forward = torch.compile(self.model, dynamic=not fixed_shapes) if config.compile else self.model
        self.step = TrainStep(self.model, forward, self.optimizer, config, device, execution, self.feed.capacity)

    def run(self, steps, first=0):
        """Figures of each step."""
        figures = []
        for index in range(first, first + steps):
            self.launch(index)
            figures.append(self.step.read())
        return figures

    def launch(self, index):
        inputs = self.feed.step(index * self.plan.samples_per_step)
        self.step.start(inputs.counts, 1e-3 * (index + 1))
        for batch in inputs.micro_batches:
            self.step.micro_batch(batch.masked)
        self.step.update()

    def record(self, recorder):
        self.step.record(self.feed.example(0), recorder, self.plan.accumulation)
        return self

    def weights(self):
        return {name: p.detach().cpu().clone() for name, p in self.model.named_parameters()}


def assert_same(a, b, **tolerance):
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def logged_losses(config):
    lines = read_metrics(config.run_dir / "metrics.jsonl")
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}
