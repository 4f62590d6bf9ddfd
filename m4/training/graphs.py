"""CUDA graphs: functions of static tensors, recorded once and replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

Function = Callable[[], None]


class Recorder(Protocol):
    """Turns functions of static tensors into functions that do the same faster."""

    def warm_up(self, function: Function) -> None:
        """Run it once, as preparation."""

    def record(self, function: Function) -> Function:
        """Record it without running it."""


class CudaGraphs:
    """CUDA graphs on one stream and in one memory pool. They are replayed one at a time and share no tensor but those
    that outlive them, so the memory of one may serve the others.

    Args:
        beside_others: whether threads of NCCL ask the device for events meanwhile, which must not end a recording.
    """

    def __init__(self, device: torch.device, *, beside_others: bool = False) -> None:
        self._device = device
        self._mode = "thread_local" if beside_others else "global"
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, function: Function) -> None:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            function()
        current.wait_stream(self._stream)

    def record(self, function: Function) -> Function:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode=self._mode):
            function()
        return graph.replay
