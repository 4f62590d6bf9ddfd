"""What every operator of a training step takes, and the least that its work could take: for `benchmarks.profile_step`.

Operators are seen by a `TorchDispatchMode`, below autograd, one after another in the thread that calls them. Each is
sorted into a part of the step by its name, its shapes, and whether a backward pass or the update is at work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Parts of a step, in the order of the table.
FORWARD, GRAD_X, GRAD_WEIGHT = "linear, forward", "linear, d x", "linear, d weight"
ATTENTION, ATTENTION_BACKWARD = "attention, forward", "attention, backward"
LOSS, NORMS, EMBEDDING, GELU = "output layer and loss", "norms", "embedding", "GELU"
UPDATE, SUMS, OTHERS = "norm of gradients, optimizer", "additions", "other operators"
PARTS = (
    *(FORWARD, GRAD_X, GRAD_WEIGHT, ATTENTION, ATTENTION_BACKWARD),
    *(LOSS, NORMS, GELU, EMBEDDING, SUMS, UPDATE, OTHERS),
)

_OF_NAME = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": ATTENTION,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": ATTENTION_BACKWARD,
    "m4kernels::cross_modal_attention": ATTENTION,
    "m4kernels::cross_modal_attention_backward": ATTENTION_BACKWARD,
    "m4kernels::cross_modal_attention_qkvpacked": ATTENTION,
    "m4kernels::cross_modal_attention_qkvpacked_backward": ATTENTION_BACKWARD,
    "m4kernels::cross_modal_attention_kvpacked": ATTENTION,
    "m4kernels::cross_modal_attention_kvpacked_backward": ATTENTION_BACKWARD,
    "m4kernels::linear_cross_entropy": LOSS,
    "m4kernels::linear_cross_entropy_gradient": LOSS,
    "aten::native_layer_norm": NORMS,
    "aten::native_layer_norm_backward": NORMS,
    "m4kernels::add_layer_norm": NORMS,
    "m4kernels::add_layer_norm_backward": NORMS,
    "aten::gelu": GELU,
    "aten::gelu_backward": GELU,
    "aten::embedding": EMBEDDING,
    "aten::embedding_dense_backward": EMBEDDING,
    "m4kernels::embedding": EMBEDDING,
    "m4kernels::embedding_backward": EMBEDDING,
    "aten::add": SUMS,
    "aten::add_": SUMS,
}
_PRODUCTS = ("aten::mm", "aten::addmm")


@dataclass(frozen=True)
class Rates:
    """What the machine does at best, measured by the clock of the profile."""

    products: float  # FLOP a second of the best float32 product at hand
    copying: float  # bytes a second, read plus written


@dataclass
class Row:
    """Calls of one operator on tensors of the same shapes."""

    part: str
    name: str
    shapes: str
    calls: int = 0
    seconds: float = 0.0
    flop: float = 0.0
    bytes: float = 0.0

    def floor(self, rates: Rates) -> float:
        """Seconds: the products, or reading and writing each tensor once, whichever takes longer."""
        return max(self.flop / rates.products, self.bytes / rates.copying)


@dataclass
class Sizes:
    """What tells the operators of a model apart."""

    tokens: frozenset[int]  # rows of the matrices that tokens are the rows of
    widths: frozenset[int]  # slots of a padded sample
    vocabulary: int


@dataclass
class Profile(TorchDispatchMode):
    """The rows of the steps that run within it.

    Args:
        sizes: of the model and its batch.
        clock: seconds; one that other processes do not disturb where a thread works alone.
    """

    sizes: Sizes
    clock: Callable[[], float]
    rows: dict[tuple[str, str, str], Row] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self._updating = False

    @contextmanager
    def update(self) -> Iterator[None]:
        """What runs within belongs to the optimiser."""
        self._updating = True
        try:
            yield
        finally:
            self._updating = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name == "m4kernels::linear_backward" and args[6] and args[7]:
            return self._each_gradient(func, args)
        return self._timed(func, args, kwargs or {}, self._part_of(name, args))

    def _each_gradient(self, func: Any, args: tuple[Any, ...]) -> Any:
        """One call for each of the two gradients that a call is to give."""
        x_only, weight_only = (*args[:6], True, False, *args[8:]), (*args[:6], False, True, False, *args[9:])
        dx, _, dbias = self._timed(func, x_only, {}, GRAD_X)
        _, dweight, _ = self._timed(func, weight_only, {}, GRAD_WEIGHT)
        return dx, dweight, dbias

    def _timed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], part: str) -> Any:
        start = self.clock()
        result = func(*args, **kwargs)
        seconds = self.clock() - start
        name = func._schema.name
        key = (part, name, _shapes(args))
        row = self.rows.setdefault(key, Row(*key))
        row.calls += 1
        row.seconds += seconds
        row.flop += self._flop(func, args)
        row.bytes += _bytes(func, args, result)
        return result

    def _part_of(self, name: str, args: tuple[Any, ...]) -> str:
        if self._updating:
            return UPDATE
        tensors = [x for x in args if isinstance(x, Tensor)]
        if any(self._are_logits(x) for x in tensors):
            return LOSS
        if name in _PRODUCTS:
            a, b = args[-2:]
            if self.sizes.vocabulary in (*a.shape, *b.shape):
                return LOSS
            if not _in_backward():
                return FORWARD
            # Autograd transposes x or the gradient for the sum over tokens.
            return GRAD_WEIGHT if a.stride(0) == 1 and a.shape[1] in self.sizes.tokens else GRAD_X
        if name in ("m4kernels::linear", "m4kernels::linear_backward"):
            return FORWARD if name == "m4kernels::linear" else GRAD_X if args[6] else GRAD_WEIGHT
        if name == "aten::bmm" or any(map(self._are_scores, tensors)):  # attention as products, and its softmax
            return ATTENTION_BACKWARD if _in_backward() else ATTENTION
        return _OF_NAME.get(name, OTHERS)

    def _are_logits(self, x: Tensor) -> bool:
        return x.dim() > 1 and x.shape[-1] == self.sizes.vocabulary and prod(x.shape[:-1]) in self.sizes.tokens

    def _are_scores(self, x: Tensor) -> bool:
        """Whether they are whole attention weights (B, H, Nq, Nk), or such of all heads one after another."""
        return x.dim() in (3, 4) and x.shape[-3] > 1 and set(x.shape[-2:]) <= self.sizes.widths

    def _flop(self, func: Any, args: tuple[Any, ...]) -> float:
        """Floating-point operations of the products in a call; a multiplication and an addition are two."""
        name = func._schema.name
        if name in (*_PRODUCTS, "aten::bmm"):
            a, b = args[-2:]
            return 2.0 * a.numel() * b.shape[-1]
        if name == "m4kernels::linear":
            return 2.0 * args[0].numel() * args[1].shape[0]
        if name == "m4kernels::linear_backward":
            return 2.0 * (args[6] + args[7]) * args[1].numel() * args[2].shape[0]
        if name == "m4kernels::linear_cross_entropy":
            x, weight, targets, _, limit = args[:5]
            classes = float(len(targets) * len(weight)) if limit is None else float(limit.sum())
            return 2.0 * (1 + args[8] + args[9]) * classes * x.shape[1]  # logits, and the gradients that are wanted
        if name.startswith("m4kernels::cross_modal_attention"):
            of_name = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=True)}
            return (5 if name.endswith("_backward") else 2) * _flop_of_attention(of_name)
        if name in _OF_NAME and _OF_NAME[name] in (ATTENTION, ATTENTION_BACKWARD):  # padded: (B, H, N, Dh)
            backward = _OF_NAME[name] == ATTENTION_BACKWARD
            q, k = args[1:3] if backward else args[:2]
            return (5 if backward else 2) * 2.0 * q.numel() * k.shape[2]
        return 0.0


def _in_backward() -> bool:
    return torch._C._current_autograd_node() is not None


def _flop_of_attention(args: dict[str, Any]) -> float:
    """Of one product over all pairs of a query and a key that it may attend to; self-attention has `qkv` and `counts`
    for `q` and those of queries and keys."""
    q_counts, k_counts = (args["counts" if "counts" in args else name] for name in ("q_counts", "k_counts"))
    heads, head_dim = args["qkv" if "qkv" in args else "q"].shape[-2:]
    allow = args["allow"]
    if allow is None:
        pairs = (q_counts.sum(1).double() * k_counts.sum(1).double()).sum()
    else:
        pairs = torch.einsum("bm,mn,bn->", q_counts.double(), allow.double(), k_counts.double())
    return 2.0 * float(pairs) * heads * head_dim


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)


def _shapes(args: tuple[Any, ...]) -> str:
    """Of the first three tensors; of lists how many."""
    said = []
    for value in args:
        if isinstance(value, Tensor):
            said.append("x".join(map(str, value.shape)) or "()")
        elif isinstance(value, (list, tuple)) and any(isinstance(x, Tensor) for x in value):
            said.append(f"{len(value)} tensors")
    return " ".join(said[:3])


def _bytes(func: Any, args: tuple[Any, ...], result: Any) -> float:
    """Each tensor that goes in read once, each that comes out or is changed written once; views are none."""
    given = list(_tensors(args))
    changed: list[Tensor] = []
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            changed.extend(_tensors(value))
    theirs = {x.untyped_storage().data_ptr() for x in given}
    made = [x for x in _tensors(result) if x.untyped_storage().data_ptr() not in theirs]
    if not made and not changed and any(True for _ in _tensors(result)):
        return 0.0
    if func._schema.name in ("aten::embedding", "m4kernels::embedding"):  # not the whole weight
        return float(2 * result.nbytes)
    return float(sum(x.nbytes for x in (*given, *changed, *made)))
