"""`SimpleMultimodalMasking`, which takes the place of nano4M's class of that name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate

from m4.compat.arguments import INTEGERS, read_flag, read_integer, read_modalities
from m4kernels import MaskedBatch, MaskingSpec, PackedTokens, mask_tokens
from m4kernels.segments import IGNORE_INDEX

SampleIds = Sequence[int] | Tensor


class SimpleMultimodalMasking:
    """nano4M's transform: tokens of one sample by modality → its padded, masked form.

    The rule is `m4kernels.mask_tokens`: the same budgets as nano4M's, drawn from counters. Which mask a sample gets is
    drawn from torch's default generator, which `torch.manual_seed` and a data loader's worker set, unless ``sample_id``
    decides it: then it is a pure function of (seed, epoch, sample_id).

    `collate` masks a whole batch at once, much faster: give the data set no transform, and the data loader
    ``collate_fn=masking.collate``.

    Args:
        modalities, vocab_sizes, max_seq_lens: one entry each a modality.
        input_alphas, target_alphas: Dirichlet concentrations, see `m4kernels.MaskingSpec`.
        input_tokens_range, target_tokens_range: (fewest, most), or one number for both; the most is the width that
            samples are padded to.
        overlap_vocab, overlap_posembs: True; ids and positions restart at 0 in every modality.
        include_unmasked_data_dict: also return what was given, under ``unmasked_data_dict``.
        seed: of the masks; not nano4M's.

    Raises:
        ValueError: an argument does not fit, or asks for what is not done here; the message names it.
    """

    def __init__(
        self,
        modalities: Sequence[str],
        vocab_sizes: Sequence[int],
        max_seq_lens: Sequence[int],
        input_alphas: Sequence[float],
        target_alphas: Sequence[float],
        input_tokens_range: int | Sequence[int],
        target_tokens_range: int | Sequence[int],
        overlap_vocab: bool = True,
        overlap_posembs: bool = True,
        include_unmasked_data_dict: bool = False,
        *,
        seed: int = 0,
    ) -> None:
        self.modalities, self.vocab_sizes, self.max_seq_lens = read_modalities(modalities, vocab_sizes, max_seq_lens)
        for name, value in (("overlap_vocab", overlap_vocab), ("overlap_posembs", overlap_posembs)):
            if not read_flag(name, value):
                raise ValueError(f"{name}: expected True, got False; modalities share ids and positions here")
        self.overlap_vocab = self.overlap_posembs = True
        self.include_unmasked_data_dict = read_flag("include_unmasked_data_dict", include_unmasked_data_dict)
        self.spec = MaskingSpec(
            tuple(self.max_seq_lens),
            input_alphas,  # type: ignore[arg-type]
            target_alphas,  # type: ignore[arg-type]
            _both_ends(input_tokens_range),
            _both_ends(target_tokens_range),
        )
        self.num_modalities = len(self.modalities)
        self.input_tokens_range, self.target_tokens_range = self.spec.input_tokens_range, self.spec.target_tokens_range
        self.seed = read_integer("seed", seed)
        self._limits = torch.tensor(self.vocab_sizes).repeat_interleave(torch.tensor(self.max_seq_lens))

    def __call__(self, data_dict: Mapping[str, Any], *, sample_id: int | None = None, epoch: int = 0) -> dict[str, Any]:
        """One sample, padded: ``enc_*`` of the width of ``input_tokens_range``, ``dec_*`` of ``target_tokens_range``.

        Args:
            data_dict: integer tensors (n,) by modality, 0 < n <= its max_seq_len; other entries are passed over.
            sample_id, epoch: decide the mask, if a sample_id is given.

        Returns:
            ``*_tokens`` (0, or -100 for targets, in the padding), ``*_positions``, ``*_modalities`` (0 there), int64,
            and ``*_pad_mask``, bool, True where a token is valid.

        Raises:
            ValueError: a modality is missing, or its tokens are of a wrong shape, dtype, length or value.
        """
        ids = None if sample_id is None else [sample_id]
        masked = self._masked(*self._rows([data_dict]), ids, epoch)
        sample: dict[str, Any] = {}
        for side, tokens, fill in (("enc", masked.encoder, 0), ("dec", masked.decoder, IGNORE_INDEX)):
            count, width = len(tokens.ids), tokens.segments.max_seqlen
            space = (0, width - count)
            sample[f"{side}_tokens"] = F.pad(tokens.ids, space, value=fill)
            sample[f"{side}_positions"] = F.pad(tokens.positions, space)
            sample[f"{side}_modalities"] = F.pad(tokens.modalities, space)
            sample[f"{side}_pad_mask"] = torch.arange(width) < count
        if self.include_unmasked_data_dict:
            sample["unmasked_data_dict"] = data_dict
        return sample

    def collate(
        self, samples: Sequence[Mapping[str, Any]], *, sample_ids: SampleIds | None = None, epoch: int = 0
    ) -> dict[str, Any]:
        """The padded batch (B, …) of samples that were not masked yet; arguments and errors as of a call.

        sample_ids: one for each sample.
        """
        if isinstance(samples, Mapping) or not len(samples):
            raise ValueError("collate: expected a list of at least one sample, each a dict of tokens by modality")
        batch: dict[str, Any] = dict(self.of_rows(*self._rows(samples), sample_ids=sample_ids, epoch=epoch))
        if self.include_unmasked_data_dict:
            batch["unmasked_data_dict"] = default_collate(list(samples))
        return batch

    def of_rows(
        self, rows: Tensor, lengths: Tensor | None = None, *, sample_ids: SampleIds | None = None, epoch: int = 0
    ) -> dict[str, Tensor]:
        """The padded batch of integer rows (B, L), modality after modality, of these lengths (B, M), by default full.

        sample_ids: one for each row.
        """
        return self._masked(rows, lengths, sample_ids, epoch).padded()

    def _masked(self, rows: Tensor, lengths: Tensor | None, sample_ids: SampleIds | None, epoch: int) -> MaskedBatch:
        if sample_ids is None:
            ids = torch.randint(2**63 - 1, (len(rows),))
        else:
            ids = torch.as_tensor(sample_ids, dtype=torch.int64).reshape(-1)
            if len(ids) != len(rows):
                raise ValueError(f"sample_ids: expected one for each of {len(rows)} samples, got {len(ids)}")
        masked = mask_tokens(rows, self.spec, seed=self.seed, sample_ids=ids, epoch=epoch, lengths=lengths)
        inputs = _padded_to(masked.encoder, self.input_tokens_range[1])
        return MaskedBatch(inputs, _padded_to(masked.decoder, self.target_tokens_range[1]))

    def _rows(self, samples: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor | None]:
        """(tokens (B, L), modality after modality, lengths (B, M) or None where all are full)."""
        found = [self._tokens(sample) for sample in samples]
        lengths = [[len(tokens) for tokens in row] for row in found]
        full = all(row == self.max_seq_lens for row in lengths)
        if full:
            rows = torch.stack([torch.cat(row) for row in found]).long()
        else:
            rows = torch.zeros((len(samples), self.spec.num_tokens), dtype=torch.int64)
            for row, parts in zip(rows, found, strict=True):
                for place, tokens in zip(row.split(self.max_seq_lens), parts, strict=True):
                    place[: len(tokens)] = tokens
        wrong = (rows < 0) | (rows >= self._limits)
        if bool(wrong.any()):
            number, slot = wrong.nonzero()[0].tolist()
            kind = int((slot >= torch.tensor(self.max_seq_lens).cumsum(0)).sum())
            raise ValueError(
                f"{self.modalities[kind]}: expected ids of 0 to {self.vocab_sizes[kind] - 1} (vocab_sizes), got "
                f"{int(rows[number, slot])}"
            )
        return rows, None if full else torch.tensor(lengths)

    def _tokens(self, sample: Mapping[str, Any]) -> list[Tensor]:
        """The tokens of each modality."""
        found = []
        for name, longest in zip(self.modalities, self.max_seq_lens, strict=True):
            if name not in sample:
                raise ValueError(f"{name}: the sample lacks this modality; it has {', '.join(map(str, sample))}")
            tokens = sample[name]
            if not isinstance(tokens, Tensor) or tokens.dim() != 1 or tokens.dtype not in INTEGERS:
                kind = f"a {type(tokens).__name__}"
                actual = f"{tokens.dtype} {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else kind
                raise ValueError(f"{name}: expected an integer tensor (n,) of tokens, got {actual}")
            if len(tokens) > longest:
                raise ValueError(f"{name}: expected at most {longest} tokens (max_seq_lens), got {len(tokens)}")
            found.append(tokens)
        return found


def _padded_to(tokens: PackedTokens, width: int) -> PackedTokens:
    """The same, padded to this width: that of the range, whatever a sample can hold."""
    return replace(tokens, segments=replace(tokens.segments, max_seqlen=width))


def _both_ends(ends: Any) -> Any:
    return (ends, ends) if isinstance(ends, int) else ends
