"""What the tests of the training step share: steps of the trainer, and what stands for a GPU."""

import dataclasses
import traceback

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from m4.run.metrics import read_metrics
from m4.training.step import Execution
from m4.training.trainer import Trainer

CPU = torch.device("cpu")
OPS = ("mask_tokens", "cross_modal_attention", "linear_cross_entropy")
AS_ON_A_GPU = Execution(asynchronous=True, graphs=False)
ON_A_CPU = Execution(asynchronous=False, graphs=False)
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


class Steps:
    """Steps of the real trainer, of a model with a non-zero head; figures are read when a test wants them."""

    def __init__(self, config, device=CPU, execution=AS_ON_A_GPU):
        config = dataclasses.replace(config, log=dataclasses.replace(config.log, every=10**9))
        self.trainer = Trainer(config, device=device, execution=execution, resident=execution.asynchronous)
        self.model, self.optimizer, self.step = self.trainer.model, self.trainer.optimizer, self.trainer.step
        self.batches = self.trainer.batches
        with torch.no_grad():
            self.model.to_logits.weight.copy_(
                torch.randn(self.model.to_logits.weight.shape, generator=torch.Generator().manual_seed(1)) * 0.1
            )

    def run(self, steps):
        """Figures of each step."""
        return [self.launch() or self.step.read() for _ in range(steps)]

    def launch(self):
        """One step; its figures, if they were read."""
        return self.trainer.train_step()

    def record(self, recorder):
        self.trainer.record(recorder)
        return self

    def weights(self):
        return {name: p.detach().cpu().clone() for name, p in self.model.named_parameters()}


def assert_same(a, b, **tolerance):
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def logged_losses(config):
    lines = read_metrics(config.run_dir / "metrics.jsonl")
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}
