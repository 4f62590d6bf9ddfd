"""`FourM`, which takes the place of nano4M's class of that name.

It is constructed and called as nano4M's, has parameters and buffers of the same names and shapes, and gives the same
losses. Underneath, a padded batch is packed and goes through `m4.model.m4.M4`: no work is done for padding, and the
logits are never held whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m4.compat.arguments import read_flag, read_integer, read_modalities, read_number
from m4.compat.padded_batch import Bounds, Names, Slots, pack, read_side
from m4.compat.roar import Draw, draw, roar_order
from m4.model import M4, AttentionConfig, ModelConfig
from m4.model.init import INIT_STD, normal
from m4.model.layers import DecoderBlock
from m4.model.m4 import sum_by_modality
from m4kernels import MaskedBatch
from m4kernels.segments import IGNORE_INDEX

_FIELDS = [f"{side}_{field}" for field in ("tokens", "modalities", "positions", "pad_mask") for side in ("enc", "dec")]
# Parts that nano4M's classes register last, in this order; the others are in the order of ours.
_LAST_OF = {
    DecoderBlock: ("self_attn", "cross_attn", "mlp"),
    M4: ("decoder", "dec_context_proj", "to_logits", "enc_norm", "dec_norm"),
}
DEFAULT_READ_KEYS = {f"{field}_read_key": field for field in _FIELDS}


class FourM(M4):
    """nano4M's FourM: ``loss, metrics = model(batch)``.

    ``batch`` is nano4M's padded batch, eight tensors (B, N) and (B, N'), True in the pad masks where a token is valid.
    ``loss`` is () and differentiable; ``metrics`` has the mean cross-entropy of every modality by its name, detached, 0
    where the batch has no target of it. Unlike ``M4``, all modalities predict over the whole vocabulary, as in nano4M.

    Args:
        enc_tokens_read_key, …, dec_pad_mask_read_key: under which keys the batch has its tensors. A batch without pad
            masks is valid throughout.
        modalities, vocab_sizes, max_seq_lens: one entry each a modality; the shared vocabulary is the largest.
        dim, enc_depth, dec_depth, head_dim, mlp_ratio: see `m4.model.ModelConfig`.
        use_bias: False; the layers here have none.
        padding_idx: the target that counts for nothing.
        init_std: standard deviation of the initial weights; the output layer starts at 0.
        per_modality_loss_avg: the loss is the mean over the modalities of their mean cross-entropies; else the mean
            over all targets, and ``metrics`` is empty.
        attention, kernels, activation_checkpointing: not nano4M's, see `m4.model.ModelConfig`.

    Raises:
        ValueError: an argument does not fit, or asks for what is not done here; the message names it.
    """

    def __init__(
        self,
        enc_tokens_read_key: str = "enc_tokens",
        dec_tokens_read_key: str = "dec_tokens",
        enc_modalities_read_key: str = "enc_modalities",
        dec_modalities_read_key: str = "dec_modalities",
        enc_positions_read_key: str = "enc_positions",
        dec_positions_read_key: str = "dec_positions",
        enc_pad_mask_read_key: str = "enc_pad_mask",
        dec_pad_mask_read_key: str = "dec_pad_mask",
        modalities: Sequence[str] = (),
        vocab_sizes: Sequence[int] = (),
        max_seq_lens: Sequence[int] = (),
        dim: int = 512,
        enc_depth: int = 8,
        dec_depth: int = 8,
        head_dim: int = 64,
        mlp_ratio: float = 4.0,
        use_bias: bool = False,
        padding_idx: int = IGNORE_INDEX,
        init_std: float = INIT_STD,
        per_modality_loss_avg: bool = True,
        *,
        attention: Mapping[str, Any] | None = None,
        kernels: str = "auto",
        activation_checkpointing: bool = False,
    ) -> None:
        given = dict(locals())
        read_keys = {name: given[name] for name in DEFAULT_READ_KEYS}
        for name, key in read_keys.items():
            if not isinstance(key, str):
                raise ValueError(f"{name}: expected the name of a key, got {key!r}")
        names, sizes, lengths = read_modalities(modalities, vocab_sizes, max_seq_lens)
        vocabulary, ignored = max(sizes), read_integer("padding_idx", padding_idx)
        if read_flag("use_bias", use_bias):
            raise ValueError("use_bias: expected False, got True; the layers of m4 have no biases")
        if 0 <= ignored < vocabulary:
            raise ValueError(f"padding_idx: expected no id of the vocabulary of {vocabulary}, got {padding_idx}")
        std = read_number("init_std", init_std)
        if std <= 0:
            raise ValueError(f"init_std: expected a number above 0, got {init_std}")
        averaged = read_flag("per_modality_loss_avg", per_modality_loss_avg)
        config = ModelConfig(
            names,
            [vocabulary] * len(sizes),  # no modality's classes are limited
            lengths,
            read_integer("dim", dim),
            read_integer("enc_depth", enc_depth),
            read_integer("dec_depth", dec_depth),
            read_integer("head_dim", head_dim),
            read_number("mlp_ratio", mlp_ratio),
            attention=AttentionConfig.of(attention),
            init="normal",
            kernels=kernels,
            activation_checkpointing=read_flag("activation_checkpointing", activation_checkpointing),
        )
        super().__init__(config)
        if std != INIT_STD:
            normal(self.modules(), std)
            nn.init.zeros_(self.to_logits.weight)
        self._hold_as_nano4m()
        self.modalities, self.vocab_sizes, self.max_seq_lens = names, sizes, lengths
        self.num_modalities, self.vocab_size, self.max_posemb_len = len(names), vocabulary, max(lengths)
        self.padding_idx, self.init_std, self.per_modality_loss_avg = ignored, std, averaged
        self.read_keys = read_keys  # of the constructor → of the batch
        self._enc_names, self._dec_names = (
            Names(*(read_keys[f"{side}_{field}_read_key"] for field in Names._fields)) for side in ("enc", "dec")
        )
        self._bounds = Bounds(vocabulary, self.max_posemb_len, self.num_modalities)

    def _hold_as_nano4m(self) -> None:
        """Buffers and the order of parameters, by which an optimizer's state is saved, become nano4M's."""
        for module in list(self.modules()):
            if isinstance(module, nn.LayerNorm):  # norms without biases keep zeros in their place
                del module.bias
                module.register_buffer("bias", torch.zeros_like(module.weight))
            for name in _LAST_OF.get(M4 if module is self else type(module), ()):
                layer = getattr(module, name)
                delattr(module, name)
                setattr(module, name, layer)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.enc_tok_emb.weight.device

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters, by default without those of the embeddings and the output layer."""
        of_vocabulary = (self.enc_tok_emb, self.enc_mod_emb, self.dec_mod_emb, self.to_logits)
        left_out = sum(layer.weight.numel() for layer in of_vocabulary) if non_embedding else 0
        return self.num_parameters() - left_out

    def forward(self, data_dict: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:  # type: ignore[override]
        """(loss, metrics) of a padded batch.

        Raises:
            ValueError: the batch lacks a tensor, or one has a shape, dtype or value that does not fit; the message
                names its key.
        """
        enc = pack(self._enc_names, self._bounds, *read_side(data_dict, self._enc_names))
        dec = pack(self._dec_names, self._bounds, *read_side(data_dict, self._dec_names), self.padding_idx)
        if enc.shape[0] != dec.shape[0]:
            raise ValueError(
                f"{self._dec_names.tokens} has {dec.shape[0]} samples, {self._enc_names.tokens} {enc.shape[0]}: "
                "expected as many"
            )
        targets = dec.tokens
        counts = sum_by_modality(targets.ids != IGNORE_INDEX, targets.modalities, self.num_modalities).long()
        batch = MaskedBatch(enc.tokens, targets)
        if self.per_modality_loss_avg:
            losses = super().forward(batch, counts)
            return losses.total, dict(zip(self.modalities, losses.per_modality.unbind(), strict=True))
        # The mean over M modalities of sums over all targets' number is a M-th of the mean over all targets.
        losses = super().forward(batch, counts.sum().expand(self.num_modalities))
        return self.num_modalities * losses.total, {}

    def forward_encoder(
        self,
        enc_input_tokens: Tensor,  # (B, N)
        enc_input_modalities: Tensor,  # (B, N)
        enc_input_positions: Tensor,  # (B, N)
        enc_pad_mask: Tensor | None = None,  # (B, N)
    ) -> tuple[Tensor, Tensor]:
        """(encoder output (B, N, D), position embeddings (B, N, D)), both 0 in the padding."""
        slots = self._visible(enc_input_tokens, enc_input_modalities, enc_input_positions, enc_pad_mask)
        x, positions = self.encode(slots.tokens)
        return slots.put_back(x), slots.put_back(positions)

    def forward_model(
        self,
        enc_input_tokens: Tensor,  # (B, N)
        enc_input_modalities: Tensor,  # (B, N)
        enc_input_positions: Tensor,  # (B, N)
        dec_input_modalities: Tensor,  # (B, N')
        dec_input_positions: Tensor,  # (B, N')
        enc_pad_mask: Tensor | None = None,  # (B, N)
        dec_pad_mask: Tensor | None = None,  # (B, N')
    ) -> Tensor:
        """Logits (B, N', V), held whole, 0 in the padding. Raises ValueError as `forward`."""
        visible = self._visible(enc_input_tokens, enc_input_modalities, enc_input_positions, enc_pad_mask)
        wanted = pack(
            self._dec_names._replace(modalities="dec_input_modalities", positions="dec_input_positions"),
            self._bounds,
            None,
            dec_input_positions,
            dec_input_modalities,
            dec_pad_mask,
        )
        return wanted.put_back(self.to_logits(self._decoded(visible, wanted)))

    def get_unmasking_schedule(self, total_tokens: int, num_steps: int = 8) -> list[int]:
        """Tokens that each step draws: as many in all, the rest of the division in the last.

        Raises:
            ValueError: there are fewer tokens than steps, or no step.
        """
        if not 1 <= num_steps <= total_tokens:
            raise ValueError(f"num_steps: expected 1 to {total_tokens}, the number of tokens, got {num_steps}")
        each = total_tokens // num_steps
        return [each] * (num_steps - 1) + [total_tokens - each * (num_steps - 1)]

    @torch.no_grad()
    def generate_one_modality_roar(
        self,
        enc_input_tokens: Tensor,  # (B, N)
        enc_input_positions: Tensor,  # (B, N)
        enc_input_modalities: Tensor,  # (B, N)
        target_mod: str,
        num_steps: int = 8,
        temp: float = 1.0,
        top_p: float = 0.0,
        top_k: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw a whole modality in random order, some tokens a step, each step seeing what the former ones drew.

        Random numbers are torch's: `torch.manual_seed` decides them. Unlike nano4M's, it takes many samples at a time,
        each with an order of its own, and draws no id beyond ``vocab_sizes`` of the modality.

        Args:
            target_mod: its name; no token of it may be among the inputs.
            num_steps: 1 to the modality's length.
            temp, top_p, top_k: see `m4.compat.roar.Draw`.

        Returns:
            The tokens of the modality (B, its length), int64, in order; and the inputs with them, in the order they
            were drawn: tokens, positions, modalities (B, N + its length).

        Raises:
            ValueError: an argument does not fit; the message names it.
        """
        if target_mod not in self.modalities:
            raise ValueError(f"target_mod: expected one of {', '.join(self.modalities)}, got {target_mod!r}")
        rule = Draw(temp, top_p, top_k)
        kind = self.modalities.index(target_mod)
        schedule = self.get_unmasking_schedule(self.max_seq_lens[kind], num_steps)
        self._visible(enc_input_tokens, enc_input_modalities, enc_input_positions, None)  # its errors first
        if bool((enc_input_modalities == kind).any()):
            raise ValueError(f"enc_input_modalities: tokens of {target_mod}, which is to be generated, are among them")
        samples = len(enc_input_tokens)
        order = roar_order(samples, self.max_seq_lens[kind], enc_input_tokens.device)
        tokens, positions, modalities = (
            values.long() for values in (enc_input_tokens, enc_input_positions, enc_input_modalities)
        )
        head = self.to_logits.weight[: self.vocab_sizes[kind]]
        for step in order.split(schedule, dim=1):
            kinds = torch.full_like(step, kind)
            wanted = pack(self._dec_names, self._bounds, None, step, kinds, None)
            y = wanted.put_back(self._decoded(self._visible(tokens, modalities, positions, None), wanted))
            drawn = draw(F.linear(y.flatten(0, 1), head), rule).unflatten(0, step.shape)
            tokens, positions, modalities = (
                torch.cat(both, dim=1) for both in ((tokens, drawn), (positions, step), (modalities, kinds))
            )
        generated = tokens[:, -order.shape[1] :]
        return torch.empty_like(generated).scatter_(1, order, generated), tokens, positions, modalities

    def forward_decoder(self, *_: Any, **__: Any) -> NoReturn:
        """Raises NotImplementedError."""
        raise NotImplementedError(
            "FourM.forward_decoder: packed tokens go from the encoder to the decoder, a padded context cannot; call "
            "forward_model, which gives the logits"
        )

    def compute_ce_loss(self, *_: Any, **__: Any) -> NoReturn:
        """Raises NotImplementedError."""
        raise NotImplementedError(
            "FourM.compute_ce_loss: the loss is computed without holding the logits; call the model, or "
            "torch.nn.functional.cross_entropy on what forward_model gives"
        )

    def _visible(self, tokens: Tensor, modalities: Tensor, positions: Tensor, mask: Tensor | None) -> Slots:
        names = Names("enc_input_tokens", "enc_input_positions", "enc_input_modalities", "enc_pad_mask")
        return pack(names, self._bounds, tokens, positions, modalities, mask)

    def _decoded(self, visible: Slots, wanted: Slots) -> Tensor:
        """Decoder output (T, D) of the wanted tokens."""
        if visible.shape[0] != wanted.shape[0]:
            raise ValueError(
                f"dec_input_modalities: expected {visible.shape[0]} samples, as of the encoder, got {wanted.shape[0]}"
            )
        return self.answer(wanted.tokens, self.context(visible.tokens), visible.tokens.segments)
