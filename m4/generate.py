"""Predict the next frame and skeleton, and draw them: ``python -m m4.generate --run runs/NAME --out picture.png``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from m4.build import build_model, data_root, open_split, pick_device
from m4.checkpoint import load_run, load_weights
from m4.cli import run_command
from m4.config import ConfigError
from m4.model import M4
from m4.picture import NEXT, REFERENCE, id_limits, joint_positions, prediction_picture, read_meta, tokenizer_of
from m4kernels import MaskedBatch, PackedTokens, Segments


@torch.no_grad()
def generate(
    model: M4,
    tokens: Tensor,
    *,
    given: Sequence[str],
    wanted: Sequence[str],
    id_limits: Tensor | None = None,
    ordinal: Tensor | None = None,
    steps: int = 12,
    temperature: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Fill in whole modalities by confidence-ordered parallel decoding (MaskGIT, Chang et al. 2022).

    In each step all missing tokens are predicted at once from what is known; the surest ones are kept, as many as a
    cosine schedule allows, and are known from then on.

    Args:
        tokens: int64 (B, L), modality after modality; read for ``given``, ignored for ``wanted``.
        given, wanted: names of the modalities that are known and to be predicted; others stay out of it.
        id_limits: int64 (L,), ids allowed at each position are below it; default the modality's vocabulary.
        ordinal: bool (L,), where ids are steps of a scale: there temperature 0 takes the median of the predicted
            distribution, whose expected distance from the truth is least, instead of the likeliest id. Default nowhere.
        steps: forward passes, at least 1; each keeps at least one token of every sample.
        temperature: 0 takes the likeliest id (or the median); above, ids and the order of keeping are sampled.
        seed: with the sample's place in the batch, decides the sampling.
    Returns:
        int64 (B, L), ``tokens`` with the wanted modalities predicted.
    Raises:
        ValueError: a modality is unknown, both given and wanted, or none is wanted; steps or temperature out of range.
    """
    config = model.config
    names = list(config.modalities)
    unknown = sorted({*given, *wanted} - set(names))
    if unknown or set(given) & set(wanted) or not wanted:
        raise ValueError(
            f"given {list(given)}, wanted {list(wanted)}: expected different modalities of {names}, at least one wanted"
        )
    if steps < 1 or temperature < 0:
        raise ValueError(f"expected steps >= 1 and temperature >= 0, got steps {steps}, temperature {temperature}")
    device = tokens.device
    lengths = torch.tensor(list(config.max_seq_lens), device=device)
    modality = torch.repeat_interleave(torch.arange(len(names), device=device), lengths)  # (L,)
    position = torch.cat([torch.arange(n, device=device) for n in config.max_seq_lens])  # (L,)
    if id_limits is None:
        id_limits = torch.tensor(list(config.vocab_sizes), device=device)[modality]

    if ordinal is None:
        ordinal = torch.zeros_like(modality, dtype=torch.bool)

    filled = tokens.clone()
    known = torch.isin(modality, torch.tensor([names.index(n) for n in given], device=device)).expand(tokens.shape)
    missing = torch.isin(modality, torch.tensor([names.index(n) for n in wanted], device=device)).expand(tokens.shape)
    known, missing = known.clone(), missing.clone()  # bool (B, L)
    total = int(missing[0].sum())
    generators = [torch.Generator().manual_seed((seed << 20) + sample) for sample in range(len(tokens))]
    left = total
    for step in range(steps):
        batch = MaskedBatch(
            _pack(filled, known, modality, position, len(names)), _pack(filled, missing, modality, position, len(names))
        )
        logits = model.logits(batch).float().unflatten(0, (len(tokens), left))  # (B, left, V)
        limits = id_limits.expand(tokens.shape)[missing].view(len(tokens), left, 1)
        logits = logits.masked_fill(torch.arange(logits.shape[-1], device=device) >= limits, -torch.inf)
        on_scale = ordinal.expand(tokens.shape)[missing].view(len(tokens), left)
        ids, confidence = _choose(logits, on_scale, temperature * (1 - step / steps), generators)
        remaining = min(left - 1, math.floor(total * math.cos(math.pi / 2 * (step + 1) / steps)))
        keep = confidence.topk(left - remaining, dim=1).indices  # (B, kept), indices into the missing tokens
        places = missing.nonzero()[:, 1].view(len(tokens), left).gather(1, keep)
        filled.scatter_(1, places, ids.gather(1, keep))
        known.scatter_(1, places, True)
        missing.scatter_(1, places, False)
        left = remaining
        if left == 0:
            break
    return filled


def _pack(tokens: Tensor, chosen: Tensor, modality: Tensor, position: Tensor, modalities: int) -> PackedTokens:
    """The chosen (bool (B, L)) tokens, sample after sample."""
    place = chosen.nonzero()[:, 1]
    one_hot = torch.nn.functional.one_hot(modality, modalities)
    segments = Segments.from_counts(chosen.long() @ one_hot)
    return PackedTokens(tokens[chosen], position[place], modality[place], segments)


def _choose(
    logits: Tensor, ordinal: Tensor, temperature: float, generators: list[torch.Generator]
) -> tuple[Tensor, Tensor]:
    """An id for each row of (B, T, V) logits, and how sure it is: its log-probability, with noise if sampling.

    Where ordinal (B, T) and not sampled, the id is the median, as sure as the likeliest id.
    """
    log_p = logits.log_softmax(-1)
    if temperature == 0:
        confidence, ids = log_p.max(-1)
        medians = (log_p.exp().cumsum(-1) < 0.5).sum(-1)
        return torch.where(ordinal, medians, ids), confidence

    def gumbel(shape: torch.Size) -> Tensor:
        noise = torch.stack([torch.rand(shape[1:], generator=g) for g in generators])
        return -torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7))).to(logits.device)

    ids = (log_p + temperature * gumbel(log_p.shape)).argmax(-1)
    confidence = log_p.gather(-1, ids[..., None])[..., 0]
    return ids, confidence + temperature * gumbel(confidence.shape)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m m4.generate", description="Predict the next frame and skeleton of samples and draw them."
    )
    parser.add_argument("--run", type=Path, required=True, help="run directory, for example runs/M4-tiny")
    parser.add_argument("--out", type=Path, required=True, help="picture to write, for example prediction.png")
    parser.add_argument("--split", help="split to take samples from (default: the run's evaluation split)")
    parser.add_argument("--samples", type=int, default=4, help="samples, spread over the split (default 4)")
    parser.add_argument("--steps", type=int, default=12, help="decoding steps (default 12)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): the likeliest; above: sampled")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    parser.add_argument("--device", help="cpu, cuda or auto (default: as the run was configured)")
    parser.add_argument("--cosmos-dir", type=Path, help="folder of the Cosmos tokenizer, for data prepared with it")
    arguments = parser.parse_args()
    if not arguments.run.is_dir():
        raise ConfigError(f"--run: {arguments.run} is not a run directory")
    if arguments.samples < 1:
        raise ConfigError(f"--samples: expected at least 1, got {arguments.samples}")
    config, checkpoint = load_run(arguments.run)
    missing = [name for name in (*REFERENCE, *NEXT) if name not in config.modalities]
    if missing:
        raise ConfigError(f"--run: {arguments.run} was trained without {', '.join(missing)}; there is nothing to draw")
    device = pick_device(arguments.device or config.device)
    root = data_root(config)
    meta = read_meta(root)
    store = open_split(config, root, arguments.split or config.data.eval_split)
    model = build_model(config, device).eval()
    load_weights(checkpoint, model)
    rows = np.unique(np.linspace(0, len(store) - 1, arguments.samples).round().astype(int))
    true = store.batch(rows).to(device)
    predicted = generate(
        model,
        true,
        given=REFERENCE,
        wanted=NEXT,
        id_limits=id_limits(meta, config).to(device),
        ordinal=joint_positions(config).to(device),
        steps=arguments.steps,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )
    picture = prediction_picture(true, predicted, meta, config, tokenizer_of(meta, arguments.cosmos_dir))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(arguments.out)
    print(f"wrote {arguments.out}: {len(rows)} samples of {checkpoint}")
    return 0


if __name__ == "__main__":
    run_command(main)
