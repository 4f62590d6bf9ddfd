"""The arguments of one linear_cross_entropy call, checked; what every backend receives."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from m4kernels._dtypes import compute_dtype
from m4kernels.backend import Backend

OP = "linear_cross_entropy"
OPERAND_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class LossArguments(NamedTuple):
    """One call of the op; shapes as in `api.linear_cross_entropy`.

    Args:
        compute_dtype: the dtype that x and weight are rounded to before they are multiplied; None for their own.
        x_grad, weight_grad: whether the gradient with respect to x, to weight, is wanted.
    """

    x: Tensor  # (T, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (T,)
    token_weight: Tensor | None  # (T,)
    vocab_limit: Tensor | None  # (T,)
    ignore_index: int
    max_workspace_bytes: int
    compute_dtype: torch.dtype | None
    x_grad: bool
    weight_grad: bool

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def operand_dtype(self) -> torch.dtype:
        """What the matrix products multiply."""
        return self.x.dtype if self.compute_dtype is None else self.compute_dtype

    @property
    def result_dtype(self) -> torch.dtype:
        """What sums, loss and gradients are held in: float64 for float64 operands, else float32."""
        return compute_dtype(self.operand_dtype)

    def check_structure(self) -> None:
        """Raise ValueError where shapes, dtypes or devices do not fit; reads no values."""
        x, weight = self.x, self.weight
        for name, matrix, shape in (("x", x, "(T, D)"), ("weight", weight, "(V, D)")):
            if matrix.dim() != 2:
                raise ValueError(f"{OP}: {name} must have shape {shape}, got {tuple(matrix.shape)}")
            if not matrix.is_floating_point():
                raise ValueError(f"{OP}: {name} must be floating, got {matrix.dtype}")
        if x.shape[1] != weight.shape[1]:
            raise ValueError(f"{OP}: x has D = {x.shape[1]}, weight has D = {weight.shape[1]}; expected the same")
        if weight.shape[0] < 1:
            raise ValueError(f"{OP}: weight must have at least one class, got {tuple(weight.shape)}")
        if self.compute_dtype is None and x.dtype != weight.dtype:
            raise ValueError(f"{OP}: x is {x.dtype}, weight {weight.dtype}; expected the same dtype")
        if self.operand_dtype not in OPERAND_DTYPES:
            name = "x" if self.compute_dtype is None else "compute_dtype"
            raise ValueError(f"{OP}: {name} must be float32, float64, bfloat16 or float16, got {self.operand_dtype}")
        tokens = (x.shape[0],)
        for name, vector in (
            ("targets", self.targets),
            ("token_weight", self.token_weight),
            ("vocab_limit", self.vocab_limit),
        ):
            if vector is not None and vector.shape != tokens:
                raise ValueError(f"{OP}: {name} must have shape {tokens}, got {tuple(vector.shape)}")
        if self.targets.dtype != torch.int64:
            raise ValueError(f"{OP}: targets must be torch.int64, got {self.targets.dtype}")
        if self.token_weight is not None and not self.token_weight.is_floating_point():
            raise ValueError(f"{OP}: token_weight must be floating, got {self.token_weight.dtype}")
        if self.vocab_limit is not None and self.vocab_limit.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{OP}: vocab_limit must be torch.int32 or torch.int64, got {self.vocab_limit.dtype}")
        for name, tensor in (
            ("weight", weight),
            ("targets", self.targets),
            ("token_weight", self.token_weight),
            ("vocab_limit", self.vocab_limit),
        ):
            if tensor is not None and tensor.device != x.device:
                raise ValueError(f"{OP}: {name} is on {tensor.device}, x on {x.device}; expected one device")

    def check_values(self) -> None:
        """Refuse targets and limits out of range: on the CPU with a ValueError that names the token, elsewhere with a
        device assertion, which waits for nothing."""
        classes = self.weight.shape[0]
        valid = self.targets != self.ignore_index
        limit: Tensor | int = classes if self.vocab_limit is None else self.vocab_limit
        wrong = valid & ((self.targets < 0) | (self.targets >= limit))
        if self.vocab_limit is not None:
            wrong |= valid & (self.vocab_limit > classes)
        if self.x.device.type != "cpu":
            self.check_on_device(~wrong.any())
        elif bool(wrong.any()):
            raise self.value_error(int(wrong.nonzero()[0]))

    def check_on_device(self, right: Tensor) -> None:
        """Assert on the device that targets and limits are in range, as `right`, () bool, says; waits for nothing."""
        classes = self.weight.shape[0]
        torch._assert_async(
            right, f"{OP}: a target is outside [0, vocab_limit) or a vocab_limit exceeds {classes} classes"
        )

    def value_error(self, t: int) -> ValueError:
        """What is wrong with token t, whose target or limit is out of range."""
        classes = self.weight.shape[0]
        limit = classes if self.vocab_limit is None else int(self.vocab_limit[t])
        if limit > classes:
            return ValueError(f"{OP}: vocab_limit[{t}] is {limit}, but weight has only {classes} classes")
        return ValueError(
            f"{OP}: targets[{t}] is {int(self.targets[t])}; expected 0 <= target < {limit} (vocab_limit of that token),"
            f" or {self.ignore_index} to ignore it"
        )

    def divide_workspace(self, fixed: int, per_row: int) -> tuple[int, int]:
        """(bytes for rows, classes converted at a time).

        A weight that the matrix product cannot read as it lies is converted a block of classes at a time, so that its
        copy, too, fits the workspace.

        Args:
            fixed: bytes that do not depend on the size of a chunk.
            per_row: bytes of one token over all classes.

        Raises:
            ValueError: `max_workspace_bytes` does not hold one token and one class.
        """
        classes, dim = self.weight.shape
        per_class = 0 if self._weight_as_it_lies else 2 * dim * self.result_dtype.itemsize
        room = self.max_workspace_bytes - fixed
        if room < per_row + per_class:
            raise self.too_little_workspace(fixed + per_row + per_class)
        if not per_class:
            return room, classes
        block = min(classes, max(1, min(room // 4, room - per_row) // per_class))
        return room - block * per_class, block

    def too_little_workspace(self, need: int) -> ValueError:
        """`max_workspace_bytes` does not hold the `need` bytes of one token and one class."""
        classes, dim = self.weight.shape
        return ValueError(
            f"{OP}: max_workspace_bytes is {self.max_workspace_bytes}, but {self.x.shape[0]} tokens over {classes} "
            f"classes of dimension {dim} need at least {need}"
        )

    def weight_blocks(self, block: int, classes: int) -> Iterator[tuple[slice, Tensor]]:
        """The first `classes` rows of the weight, `block` at a time, as the matrix products want them."""
        if block >= classes and self._weight_as_it_lies:
            yield slice(0, classes), self.weight if classes == self.weight.shape[0] else self.weight[:classes]
            return
        for first in range(0, classes, block):
            part = slice(first, min(first + block, classes))
            yield part, self.weight[part].to(self.operand_dtype).to(self.result_dtype).contiguous()

    @property
    def _weight_as_it_lies(self) -> bool:
        """Whether the matrix product reads the weight without a copy."""
        weight, dtype = self.weight, self.result_dtype
        return reads_as_it_lies(weight) and weight.dtype == dtype and self.operand_dtype == dtype


class LossBackend(Backend, Protocol):
    """What a backend of this op has."""

    def linear_cross_entropy(self, call: LossArguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(loss (), nll (T,), correct bool (T,), d loss / d x (T, D), d loss / d weight (V, D)); the floating ones in
        `call.result_dtype`, a gradient that is not wanted has shape (0,)"""


def reads_as_it_lies(matrix: Tensor) -> bool:
    """Whether the library's matrix product reads a matrix with these strides without a copy."""
    (rows, columns), (down, across) = matrix.shape, matrix.stride()
    return (across == 1 and down >= columns) or (down == 1 and across >= rows)
