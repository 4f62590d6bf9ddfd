"""What the ranks of a step tell each other: the sum of their gradients and losses, once a step.

Every rank's loss is divided by the counts of the whole step, so the sum over ranks, not their mean, is what one process
has after as many micro-batches. `Replicated` (``parallel: ddp``) holds the whole model on every rank and sums gradients
in buckets; where nothing is captured each goes out as soon as the last backward pass has filled it. `Sharded`
(``parallel: fsdp``) holds a part of every matrix (FSDP2, Zhao et al. 2023) and sums what that part needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from m4.checkpoint_files import HasWeights, Weights
from m4.config import TrainConfig
from m4.distributed import World
from m4.distributed.shards import gathered
from m4.errors import ConfigError
from m4.model import M4

BUCKET_BYTES = 25 << 20  # as torch's DDP has it: large enough that latency is nothing, small enough to overlap


class Exchange:
    """One process: its gradients and losses are those of the step."""

    @contextmanager
    def backward(self, *, last: bool) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch that is run, not replayed; ``last`` of its step."""
        yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around forward passes without a backward pass: `M4.forward`, then also `M4.decode` and the output layer. All
        ranks make as many of them."""
        yield

    def gradients(self, total: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Within `backward`: the gradients of ``total``, or this rank's parts of them, beside those of the step."""
        # Not into `.grad`, which belongs to the step: graphs know it by its address.
        return torch.autograd.grad(total, parameters, allow_unused=True)

    def whole(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[HasWeights, dict[str, Any]]:
        """What has the weights, and the optimiser's state, as one process has them; all ranks call it, the first one
        uses it."""
        return model, optimizer.state_dict()

    def finish(self, figures: Tensor) -> None:
        """After the last micro-batch: make gradients, and figures of the step in place, the sums over all ranks."""

    def norm(self, parameters: Sequence[Tensor]) -> Tensor:
        """() the norm of all gradients together."""
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


class Replicated(Exchange):
    """Sums gradients over ranks that hold the same parameters."""

    def __init__(self, model: nn.Module, world: World, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._world = world
        # A backward pass ends with what a forward pass begins with, so the last parameters are ready first.
        trained = [p for p in reversed(list(model.parameters())) if p.requires_grad]
        self._buckets = _buckets(trained, bucket_bytes)
        self._place = {p: index for index, bucket in enumerate(self._buckets) for p in bucket}
        self._flat = [_flat(bucket) for bucket in self._buckets]
        self._overlaps = False
        self._missing: list[int] = []  # gradients of each bucket that are not there yet
        self._sums: list[Any] = []  # begun, in the order of the buckets, which all ranks keep
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(self._is_ready)

    @contextmanager
    def backward(self, *, last: bool) -> Iterator[None]:
        self._missing = [len(bucket) for bucket in self._buckets]
        self._overlaps = last
        try:
            yield
        finally:
            self._overlaps = False

    def finish(self, figures: Tensor) -> None:
        with self._world.waiting():
            while len(self._sums) < len(self._buckets):  # all of them in a captured step
                self._begin()
            self._sums.append(self._world.sum_of(figures))
            for begun in self._sums:
                begun.wait()
        for bucket, flat in zip(self._buckets, self._flat, strict=True):
            if flat is not None:
                torch._foreach_copy_(_gradients(bucket), _views(flat, bucket))
        self._sums = []

    def _is_ready(self, parameter: Tensor) -> None:
        if not self._overlaps:
            return
        self._missing[self._place[parameter]] -= 1
        while len(self._sums) < len(self._buckets) and self._missing[len(self._sums)] == 0:
            with self._world.waiting():
                self._begin()

    def _begin(self) -> None:
        """Begin the sum of the next bucket."""
        index = len(self._sums)
        bucket, flat = self._buckets[index], self._flat[index]
        gradients = _gradients(bucket)
        if flat is not None:
            torch._foreach_copy_(_views(flat, bucket), gradients)
        self._sums.append(self._world.sum_of(gradients[0] if flat is None else flat))


def _buckets(parameters: Sequence[Tensor], most: int) -> list[list[Tensor]]:
    """Parameters in this order in buckets of at most so many bytes; larger ones alone."""
    buckets: list[list[Tensor]] = []
    size = most
    for p in parameters:
        bytes_of_it = p.numel() * p.element_size()
        if size + bytes_of_it > most:
            buckets.append([])
            size = 0
        buckets[-1].append(p)
        size += bytes_of_it
    return buckets


def _gradients(bucket: Sequence[Tensor]) -> list[Tensor]:
    """Those of its parameters; 0 where this rank has no use for one."""
    for p in bucket:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    return [p.grad for p in bucket if p.grad is not None]


def _flat(bucket: Sequence[Tensor]) -> Tensor | None:
    """What a bucket's gradients are copied to; a gradient that is alone is summed where it is."""
    if len(bucket) == 1:
        return None
    return torch.zeros(sum(p.numel() for p in bucket), dtype=bucket[0].dtype, device=bucket[0].device)


def _views(flat: Tensor, bucket: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([p.numel() for p in bucket])
    return [part.view_as(p) for part, p in zip(parts, bucket, strict=True)]


class Sharded(Exchange):
    """Divides the parameters of every block, and those of the rest, over the ranks; `model` is changed in place."""

    def __init__(self, model: M4, world: World, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self._world = world
        with world.waiting():
            mesh = init_device_mesh(device.type, (world.size,))
        for module in [*model.encoder.blocks, *model.decoder.blocks, model]:
            part: Any = fully_shard(module, mesh=mesh)
            part.set_gradient_divide_factor(1.0)  # sums, see above …
            part.set_force_sum_reduction_for_comms(True)  # … in the only way that gloo knows
        self._root: Any = model

    @contextmanager
    def backward(self, *, last: bool) -> Iterator[None]:
        self._root.set_requires_gradient_sync(last)
        with self._world.waiting():  # parameters are fetched block by block
            yield

    def gradients(self, total: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor | None]:
        # Between steps, which free their gradients; the whole weights, of which autograd knows, are not at hand here.
        total.backward()
        found = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        return found

    def whole(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[HasWeights, dict[str, Any]]:
        with self._world.waiting():
            weights = gathered(model.state_dict(), keep=self._world.leads)
            return Weights(weights), gathered(optimizer.state_dict(), keep=self._world.leads)

    def finish(self, figures: Tensor) -> None:
        with self._world.waiting():
            self._world.sum_of(figures).wait()

    def norm(self, parameters: Sequence[Tensor]) -> Tensor:
        with self._world.waiting():
            norm: Any = super().norm(parameters)
            return norm.full_tensor()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        with self._world.waiting():
            self._root.unshard()
            yield
            self._root.reshard()


def exchange_of(config: TrainConfig, model: M4, world: World, device: torch.device) -> Exchange:
    """What ``parallel`` asks for; under fsdp the model is divided here, so its optimiser is made afterwards.

    Raises:
        ConfigError: naming the key that does not go with it.
    """
    if world.size == 1:
        return Exchange()
    if config.parallel == "ddp":
        return Replicated(model, world)
    for key, value, allowed in (
        ("kernels", config.kernels, ("auto",)),
        ("cuda_graphs", config.cuda_graphs, ("auto", "off")),
        ("compile", config.compile, (False,)),
        ("ema", config.ema, (0.0,)),  # averages are of whole weights
        ("optimizer", config.optimizer, ("adamw",)),  # Muon orthogonalises whole matrices
        ("dtype", config.dtype, ("fp32", "bf16")),  # fp16 looks for overflow in whole gradients
    ):
        if value not in allowed:
            shown = f"{allowed[0]:g}" if isinstance(allowed[0], float) else str(allowed[0]).lower()
            raise ConfigError(f"{key}: {value} does not go with parallel=fsdp; set {key}={shown} or parallel=ddp")
    return Sharded(model, world, device)
