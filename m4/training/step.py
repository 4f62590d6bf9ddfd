"""One optimiser step: forward and backward of its micro-batches, clipping, AdamW; captured as CUDA graphs on a GPU.

The step is three functions of static tensors, `_first` and `_next` micro-batch and `_update`, which never ask the
device for a value. Run one after another they are an eager step; recorded they are three graphs to replay. What the
host wants to know is kept on the device until `read`. A loss or gradient that is not finite is noticed there too: from
then on the optimiser leaves parameters and moments as they are, until the host reads of it and stops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from m4.config import TrainConfig
from m4.device import autocast
from m4.errors import ConfigError
from m4.model import M4, Losses
from m4.training.exchange import Exchange
from m4.training.graphs import Function, Recorder
from m4.training.optimizer import set_learning_rate
from m4kernels import MaskedBatch


@dataclass(frozen=True)
class Execution:
    """How steps run.

    Args:
        asynchronous: micro-batches of one shape, and figures read at log points only; else after every step.
        graphs: as CUDA graphs.
    """

    asynchronous: bool
    graphs: bool

    @classmethod
    def of(cls, config: TrainConfig, device: torch.device, ranks: int = 1) -> Execution:
        """Asynchronous on a GPU; graphs as ``cuda_graphs`` says: auto is on for the kernels, off for the references and
        where a step exchanges parts of the model all along."""
        on_gpu = device.type == "cuda"
        if config.cuda_graphs == "on" and not on_gpu:
            raise ConfigError(f"cuda_graphs: on needs a GPU, the device is {device}; use cuda_graphs=auto")
        if on_gpu and config.dtype == "bf16":
            major, minor = torch.cuda.get_device_capability(device)
            if major < 8:
                raise ConfigError(
                    f"dtype: bf16 needs a GPU of compute capability 8.0 or more, {device} has {major}.{minor}; "
                    "use dtype=fp32"
                )
        wanted = config.cuda_graphs == "on" or (config.cuda_graphs == "auto" and config.kernels == "auto")
        wanted = wanted and (ranks == 1 or config.parallel == "ddp")
        return cls(asynchronous=on_gpu, graphs=on_gpu and wanted)


@dataclass(frozen=True)
class Figures:
    """What `TrainStep.read` found."""

    losses: list[float]  # (M,), of the last step; of the first that was not finite, if one was not
    norm: float  # of the gradient before clipping, of the same step
    updates: int  # steps since the last `read` that changed the parameters
    lost: int  # steps since the last `read` that did not: one was not finite, the others came after it
    finite: bool


class TrainStep:
    """Runs optimiser steps: `start`, a `micro_batch` for each, `update`; `read` when the host wants to know.

    Args:
        model: the model that is trained.
        forward: its forward pass, perhaps compiled.
        optimizer: of its parameters; must heed ``found_inf`` (torch's fused AdamW does).
        config: the run.
        device: where the model is.
        execution: how steps run.
        capacity: (inputs, targets) of the usual micro-batch, if there is one. A larger one runs uncompiled: compiling
            takes longer than the few steps that need it.
        exchange: between the ranks of the run.
        micro_batches: of a step and rank.
    """

    def __init__(
        self,
        model: M4,
        forward: Callable[..., Losses],
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        device: torch.device,
        execution: Execution,
        capacity: tuple[int, int] | None = None,
        exchange: Exchange | None = None,
        micro_batches: int = 1,
    ) -> None:
        self._capacity = capacity
        self._exchange, self._micro_batches = exchange or Exchange(), micro_batches
        self._model, self._forward, self._optimizer = model, forward, optimizer
        self._config, self._device, self._execution = config, device, execution
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        modalities = len(config.modalities)
        self._counts = torch.ones(modalities, dtype=torch.int64, device=device)
        self._step_losses = torch.zeros(modalities, device=device)  # of this step so far, of this rank
        self._losses = torch.zeros(modalities, device=device)
        self._norm = torch.zeros((), device=device)
        self._bad = torch.zeros((), device=device)  # 1 from the first step on that was not finite
        self._updates = torch.zeros((), device=device)
        self._batch: MaskedBatch | None = None  # the static one
        self._recorded: dict[str, Function] = {}
        self._done = 0  # micro-batches of this step
        self._launched = 0  # steps that the device was given since the last `read`
        optimizer.found_inf = self._bad  # type: ignore[attr-defined]
        if execution.asynchronous:  # the rate, too, is read on the device
            for group in optimizer.param_groups:
                group["lr"] = torch.zeros((), device=device)

    def record(self, batch: MaskedBatch, recorder: Recorder) -> None:
        """Record the step for micro-batches of the shapes of `batch`; parameters and moments stay as they are.

        Args:
            batch: any batch; its values are used for warming up.
            recorder: `CudaGraphs`, or what stands for it where there is no GPU.
        """
        self._batch = batch.clone()
        self._counts.copy_(batch.decoder.segments.counts.sum(0).clamp(min=1))
        self._bad.fill_(1.0)  # so that warming up updates nothing, yet makes the optimiser's moments
        for function in (self._first, self._next, self._update, self._first, self._next):
            recorder.warm_up(function)
        self._optimizer.zero_grad(set_to_none=True)
        for group in self._optimizer.param_groups:
            group["capturable"] = True
        recorded = {"first": recorder.record(self._first)}
        if self._micro_batches > 1:
            recorded["next"] = recorder.record(self._next)
        recorded["update"] = recorder.record(self._update)
        self._recorded = recorded
        for figure in (self._bad, self._losses, self._norm, self._updates):
            figure.zero_()

    def start(self, counts: Tensor, rate: float) -> None:
        """Begin a step.

        Args:
            counts: (M,) int64, at least 1: targets of the whole step, so that accumulated gradients are those of one
                big batch.
            rate: the learning rate.
        """
        self._counts.copy_(counts, non_blocking=True)
        set_learning_rate(self._optimizer, rate)
        self._done = 0

    def micro_batch(self, batch: MaskedBatch) -> None:
        """Forward and backward."""
        recorded = self._recorded.get("next" if self._done else "first")
        if recorded is not None and self._batch is not None and batch.has_shapes_of(self._batch):
            for static, given in zip(self._batch.tensors(), batch.tensors(), strict=True):
                static.copy_(given)
            recorded()
        else:
            if not self._done:  # graphs know the gradients by their addresses
                self._optimizer.zero_grad(set_to_none=not self._recorded)
            last = self._done == self._micro_batches - 1
            self._forward_backward(batch, first=not self._done, last=last)
        self._done += 1

    def update(self) -> None:
        """Clip and update, unless something was not finite."""
        self._exchange.finish(self._step_losses)
        self._recorded.get("update", self._update)()
        self._launched += 1

    def read(self) -> Figures | None:
        """Wait for the device and see how the steps since the last `read` went; None where there was none."""
        if not self._launched:
            return None
        *losses, norm, bad, updates = torch.cat(
            [self._losses, torch.stack([self._norm, self._bad, self._updates])]
        ).tolist()
        self._updates.zero_()
        lost, self._launched = self._launched - round(updates), 0
        return Figures(losses, norm, round(updates), lost, not bad)

    def release(self) -> None:
        """Free the gradients, unless graphs own them."""
        if not self._recorded:
            self._optimizer.zero_grad(set_to_none=True)

    def _first(self) -> None:
        # Without gradients to add to, the backward pass hands over its own, which a graph then writes anew each time.
        self._optimizer.zero_grad(set_to_none=True)
        assert self._batch is not None
        self._forward_backward(self._batch, first=True)

    def _next(self) -> None:
        assert self._batch is not None
        self._forward_backward(self._batch, first=False)

    def _forward_backward(self, batch: MaskedBatch, *, first: bool, last: bool = False) -> None:
        usual = self._capacity in (None, (len(batch.encoder.ids), len(batch.decoder.ids)))
        forward = self._forward if usual else self._model
        with self._exchange.backward(last=last):
            with autocast(self._config.dtype, self._device):
                result = forward(batch, target_counts=self._counts)
            result.total.backward()
        losses = result.per_modality.detach()
        self._step_losses.copy_(losses if first else self._step_losses + losses)

    def _update(self) -> None:
        self._losses.copy_(torch.where(self._bad > 0, self._losses, self._step_losses))
        norm = self._exchange.clip(self._parameters, self._config.clip_grad)
        finite = torch.isfinite(self._losses).all() & torch.isfinite(norm)
        self._norm.copy_(torch.where(self._bad > 0, self._norm, norm))
        self._bad.copy_(torch.maximum(self._bad, (~finite).float()))
        self._updates.add_(1.0 - self._bad)
        self._optimizer.step()
