"""One optimiser step: forward and backward of its micro-batches, clipping, AdamW; captured as CUDA graphs on a GPU.

The step is three functions of static tensors, `_first` and `_next` micro-batch and `_update`, which never ask the
device for a value. Run one after another they are an eager step; recorded they are three graphs to replay, for each
shape. What the host wants to know is kept on the device until `read`. A loss or gradient that is not finite is noticed
there too (`m4.training.guard`): the optimiser then leaves parameters and moments as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from m4.config import TrainConfig
from m4.device import autocast, keep_freed_memory
from m4.errors import ConfigError
from m4.model import M4, CountedLosses
from m4.training.adamw import AdamW, clip_factor
from m4.training.ema import AveragedWeights
from m4.training.exchange import Exchange
from m4.training.graphs import Function, Recorder
from m4.training.guard import Guard, NotFinite
from m4.training.optimizer import MuonAndAdamW, keep_rates_on, set_learning_rate
from m4kernels import MaskedBatch
from m4kernels.ops.linear import copies
from m4kernels.processor import slow_bf16

log = logging.getLogger(__name__)


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
        _check_precision(config.dtype, device)
        if config.optimizer == "muon" and on_gpu:
            if config.cuda_graphs == "on":
                raise ConfigError(
                    "cuda_graphs: on cannot capture optimizer=muon: torch's Muon has no capturable form; use "
                    "cuda_graphs=auto, which then runs the step eagerly, or optimizer=adamw"
                )
            log.info("optimizer: muon runs the step eagerly, not as CUDA graphs: torch's Muon has no capturable form")
            return cls(asynchronous=True, graphs=False)
        wanted = config.cuda_graphs == "on" or (config.cuda_graphs == "auto" and config.kernels == "auto")
        wanted = wanted and (ranks == 1 or config.parallel == "ddp")
        return cls(asynchronous=on_gpu, graphs=on_gpu and wanted)


def _check_precision(dtype: str, device: torch.device) -> None:
    """Raise ConfigError for a half precision that the device lacks, or that it has a better one for; say which dtype is
    much faster there."""
    if dtype == "fp16" and device.type != "cuda":
        raise ConfigError(
            f"dtype: fp16 is for GPUs without bfloat16, the device is {device}; use dtype=bf16 or dtype=fp32"
        )
    if device.type == "cpu" and dtype == "bf16" and (why := slow_bf16()) is not None:
        log.warning("dtype: bf16 is slower than fp32 on this processor: %s; use dtype=fp32", why)
    if device.type == "cuda" and dtype == "fp32":
        log.warning(
            "dtype: fp32 leaves the tensor cores of %s idle, which multiply bfloat16 about ten times as fast; "
            "use dtype=bf16",
            device,
        )
    if device.type != "cuda" or dtype == "fp32":
        return
    major, minor = torch.cuda.get_device_capability(device)
    if dtype == "bf16" and major < 8:
        raise ConfigError(
            f"dtype: bf16 needs a GPU of compute capability 8.0 or more, {device} has {major}.{minor}; "
            "use dtype=fp16 or dtype=fp32"
        )
    if dtype == "fp16" and major >= 8:
        raise ConfigError(
            f"dtype: fp16 is for GPUs without bfloat16, {device} (compute capability {major}.{minor}) has it; "
            "use dtype=bf16, which needs no scaling of the loss"
        )


@dataclass(frozen=True)
class Figures:
    """What `TrainStep.read` found."""

    losses: list[float]  # (M,), of the last step; of the one that stops the run, if `finite` is False
    norm: float  # of the gradient before clipping, of the same step
    updates: int  # steps since the last `read` that changed the parameters
    lost: int  # steps since the last `read` that stop the run: one was not finite, the others came after it
    finite: bool
    skipped: tuple[NotFinite, ...] = ()  # since the last `read`: not finite, and passed over
    accuracies: Sequence[float] = ()  # (M,), shares of right predictions in the last step; () where it stops the run


class _Recorded(NamedTuple):
    """A step as it was recorded for one shape."""

    batch: MaskedBatch  # the static one, whose values the functions read
    first: Function
    further: Function | None  # of the micro-batches after the first; None where there is none
    update: Function


class TrainStep:
    """Runs optimiser steps: `start`, a `micro_batch` for each, `update`; `read` when the host wants to know.

    Args:
        model: the model that is trained.
        forward: its forward pass, perhaps compiled.
        optimizer: of its parameters, as `build_optimizer` makes it.
        config: the run.
        device: where the model is.
        execution: how steps run.
        capacity: (inputs, targets) of the micro-batch that a compiled forward pass is for, if for one. Another runs
            uncompiled: compiling takes longer than the few steps that need it.
        averaged: of the model's weights, to be kept up to date.
        exchange: between the ranks of the run.
        micro_batches: of a step and rank.
    """

    def __init__(
        self,
        model: M4,
        forward: Callable[..., CountedLosses],
        optimizer: AdamW | MuonAndAdamW,
        config: TrainConfig,
        device: torch.device,
        execution: Execution,
        capacity: tuple[int, int] | None = None,
        averaged: AveragedWeights | None = None,
        exchange: Exchange | None = None,
        micro_batches: int = 1,
    ) -> None:
        if device.type == "cpu":
            keep_freed_memory()
        self._capacity, self._averaged = capacity, averaged
        self._exchange, self._micro_batches = exchange or Exchange(), micro_batches
        self._model, self._forward, self._optimizer = model, forward, optimizer
        self._config, self._device, self._execution = config, device, execution
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        modalities = len(config.modalities)
        self._counts = torch.ones(modalities, dtype=torch.int64, device=device)
        # Of this step so far, and of this rank until `update`: losses, and right predictions of each modality.
        self._sums = torch.zeros(2, modalities, device=device)
        self._losses, self._correct = self._sums
        self._norm = torch.zeros((), device=device)
        # Scales the loss of fp16 so that small gradients do not become 0; for other precisions it does nothing.
        self._scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "fp16")
        self._fresh_scaling = self._scaler.state_dict()
        self._one = torch.ones((), device=device)
        self._guard = Guard(modalities, config.skip_non_finite, device)
        self._recorded: list[_Recorded] = []  # one for each shape; the gradients of the last are the parameters'
        self._replayed: _Recorded | None = None  # that of this step, if it is one
        self._done = 0  # micro-batches of this step
        self._launched = 0  # steps that the device was given since the last `read`
        optimizer.found_inf = self._guard.found_inf
        if execution.asynchronous:  # the rate, too, is read on the device
            keep_rates_on(optimizer, device)

    def record(self, batches: Sequence[MaskedBatch], recorder: Recorder) -> None:
        """Record the step for micro-batches of the shapes of each batch; parameters and moments stay as they are.

        What is recorded for one shape has gradients of its own, which `update` alone reads: so those of one may lie
        where those of another did.

        Args:
            batches: their values are used for warming up.
            recorder: `CudaGraphs`, or what stands for it where there is no GPU.
        """
        scaling = self._scaler.state_dict()
        self._guard.close()  # so that warming up updates nothing, yet makes the optimiser's moments
        for batch in batches:
            static = batch.clone()
            first, further = partial(self._first, static), partial(self._next, static)
            self._counts.copy_(batch.decoder.segments.counts.sum(0).clamp(min=1))
            for function in (first, further, self._update, first, further):
                recorder.warm_up(function)
            self._optimizer.zero_grad(set_to_none=True)
            for group in self._optimizer.param_groups:
                group["capturable"] = True
            replay = recorder.record(first)
            replay_further = recorder.record(further) if self._micro_batches > 1 else None
            self._recorded.append(_Recorded(static, replay, replay_further, recorder.record(self._update)))
        self._guard.open()
        self._scaler.load_state_dict(scaling)
        self._sums.zero_()
        self._norm.zero_()

    def scaling(self) -> dict[str, Any]:
        """What `start_at` wants to know of the scale of the loss: {} but for fp16."""
        return self._scaler.state_dict()

    def start_at(self, skipped: int, scaling: dict[str, Any] | None = None) -> None:
        """Go on with a run that skipped so many steps that were not finite and had such a `scaling` (default: anew)."""
        self._guard.start_at(skipped)
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(scaling or self._fresh_scaling)

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
        copies.begin()  # weights stay as they are until `update`

    def micro_batch(self, batch: MaskedBatch) -> None:
        """Forward and backward; all of a step have the same shapes."""
        if not self._done:
            known = (recorded for recorded in self._recorded if batch.has_shapes_of(recorded.batch))
            self._replayed = next(known, None)
        if self._replayed is not None:
            static, function = self._replayed.batch, self._replayed.further if self._done else self._replayed.first
            if function is None or not batch.has_shapes_of(static):
                raise ValueError("the micro-batches of a step must have the same shapes, and be as many as was said")
            for of_graph, given in zip(static.tensors(), batch.tensors(), strict=True):
                of_graph.copy_(given)
            function()
        else:
            if not self._done:  # graphs know the gradients by their addresses
                self._optimizer.zero_grad(set_to_none=not self._recorded)
            last = self._done == self._micro_batches - 1
            self._forward_backward(batch, first=not self._done, last=last)
        self._done += 1

    def update(self) -> None:
        """Clip and update, unless something was not finite."""
        copies.end()
        self._exchange.finish(self._sums)
        recorded = self._replayed or (self._recorded[-1] if self._recorded else None)
        update = self._update if recorded is None else recorded.update
        update()
        self._launched += 1

    def read(self) -> Figures | None:
        """Wait for the device and see how the steps since the last `read` went; None where there was none."""
        if not self._launched:
            return None
        modalities = len(self._losses)
        accuracy = self._correct / self._counts
        found = torch.cat([self._losses, accuracy, self._norm.unsqueeze(0), self._guard.figures()]).tolist()
        losses, accuracies, norm = found[:modalities], found[modalities : 2 * modalities], found[2 * modalities]
        verdict = self._guard.read(found[2 * modalities + 1 :])
        self._launched = 0
        if verdict.stopped is not None:
            stopped = verdict.stopped
            return Figures(
                stopped.losses, stopped.norm, verdict.updates, stopped.ago + 1, False, tuple(verdict.skipped)
            )
        return Figures(losses, norm, verdict.updates, 0, True, tuple(verdict.skipped), accuracies)

    def release(self) -> None:
        """Free the gradients, unless graphs own them."""
        if not self._recorded:
            self._optimizer.zero_grad(set_to_none=True)

    def _first(self, batch: MaskedBatch) -> None:
        # Without gradients to add to, the backward pass hands over its own, which a graph then writes anew each time.
        self._optimizer.zero_grad(set_to_none=True)
        self._forward_backward(batch, first=True)

    def _next(self, batch: MaskedBatch) -> None:
        self._forward_backward(batch, first=False)

    def _forward_backward(self, batch: MaskedBatch, *, first: bool, last: bool = False) -> None:
        usual = self._capacity in (None, (len(batch.encoder.ids), len(batch.decoder.ids)))
        forward = self._forward if usual else self._model
        with self._exchange.backward(last=last):
            with autocast(self._config.dtype, self._device):
                result = forward(batch, target_counts=self._counts, count_correct=True)
            self._scaler.scale(result.total).backward()
        sums = torch.stack([result.per_modality.detach(), result.correct])
        self._sums.copy_(sums if first else self._sums + sums)

    def _update(self) -> None:
        # Losses and gradients are those of all ranks by now, so all of them decide alike.
        self._scaler.unscale_(self._optimizer)
        norm = self._exchange.norm(self._parameters)
        self._norm.copy_(norm)
        # A scale above 1 may be to blame for a gradient that is not finite: it is halved, and the step left out.
        self._guard.check(self._losses, norm, self._scaler.scale(self._one) > 1)
        self._optimizer.grad_factor = clip_factor(norm, self._config.clip_grad)
        self._optimizer.step()
        if self._averaged is not None:
            self._averaged.update(self._guard.found_inf)
        self._scaler.update()
