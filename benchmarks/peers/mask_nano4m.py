"""nano4M's masking rule in plain PyTorch, one sample after another, as a data loader's worker does it."""

import torch
from torch import Tensor
from torch.distributions import Dirichlet

from m4kernels import MaskingSpec
from m4kernels.segments import IGNORE_INDEX

NEVER = 1e-9  # what an alpha of 0 counts as


class MaskNano4M:
    """The rule with one spec; the random numbers are torch's own.

    Args:
        spec: lengths, alphas and ranges.
    """

    def __init__(self, spec: MaskingSpec) -> None:
        self.spec = spec
        self.input_dirichlet = Dirichlet(torch.tensor([alpha or NEVER for alpha in spec.input_alphas]))
        self.target_dirichlet = Dirichlet(torch.tensor([alpha or NEVER for alpha in spec.target_alphas]))

    def __call__(self, tokens: Tensor) -> dict[str, Tensor]:
        """tokens (B, L) → nano4M's padded batch, the `enc_*` and `dec_*` tensors of `MaskedBatch.padded`."""
        samples = [self.sample(row) for row in tokens]
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}

    def sample(self, tokens: Tensor) -> dict[str, Tensor]:
        """tokens (L,) → its padded tensors."""
        spec = self.spec
        available = torch.tensor(spec.max_seq_lens)
        inputs = self._budgets(self.input_dirichlet, spec.input_tokens_range, available)
        targets = self._budgets(self.target_dirichlet, spec.target_tokens_range, available - inputs)
        chosen: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {"enc": [], "dec": []}
        for m, values in enumerate(tokens.split(list(spec.max_seq_lens))):
            order = torch.randperm(len(values))
            for half, positions in (
                ("enc", order[: inputs[m]]),
                ("dec", order[inputs[m] : inputs[m] + targets[m]]),
            ):
                positions = positions.sort().values
                chosen[half].append((values[positions], positions, torch.full_like(positions, m)))
        most = {"enc": spec.input_tokens_range[1], "dec": spec.target_tokens_range[1]}
        return self._pad(chosen["enc"], most["enc"], "enc", 0) | self._pad(
            chosen["dec"], most["dec"], "dec", IGNORE_INDEX
        )

    @staticmethod
    def _budgets(dirichlet: Dirichlet, ends: tuple[int, int], available: Tensor) -> Tensor:
        n = torch.randint(ends[0], ends[1] + 1, ()).item()
        budgets = (dirichlet.sample() * n).floor().long()
        for _ in range(int(n - budgets.sum())):
            budgets[dirichlet.sample().argmax()] += 1
        return torch.minimum(budgets, available)

    @staticmethod
    def _pad(parts: list[tuple[Tensor, Tensor, Tensor]], size: int, half: str, fill: int) -> dict[str, Tensor]:
        ids, positions, modalities = (torch.cat(part).long() for part in zip(*parts, strict=True))
        space = (0, size - len(ids))
        return {
            f"{half}_tokens": torch.nn.functional.pad(ids, space, value=fill),
            f"{half}_positions": torch.nn.functional.pad(positions, space),
            f"{half}_modalities": torch.nn.functional.pad(modalities, space),
            f"{half}_pad_mask": torch.arange(size) < len(ids),
        }
