"""`python -m benchmarks.moving`: what a nano4M project gains by `m4.compat`, as a table in Markdown.

The steps are those of nano4M's training loop: `loss, metrics = model(batch)`, backward, clipping, torch's AdamW, zeroed
gradients. The padded form is `FourM(kernels=…)`, the same weights with dense masks and whole logits, in the way of
nano4M (matmul and masked softmax) and with SDPA; every form gets the same batches, and they are timed in turns. Memory
is the most that tensors take beyond weights, gradients and moments. Masking is nano4M's rule in PyTorch, sample after
sample, beside ours: called for each sample as nano4M calls it, and for a batch by `collate`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.device import DEVICE
from benchmarks.measure import alternate
from benchmarks.peers.mask_nano4m import MaskNano4M
from benchmarks.results import write_figures
from m4.arguments import CommandParser, number, whole
from m4.cli import run_command
from m4.compat import FourM, SimpleMultimodalMasking
from m4.config import TrainConfig, load_config
from m4.model.config import KERNELS
from m4kernels.testing import peak_extra_memory

FORMS = {"auto": "`m4.compat`", "reference-matmul": "padded, matmul", "reference": "padded, SDPA"}


def masking_of(config: TrainConfig) -> SimpleMultimodalMasking:
    """The transform of a recipe."""
    return SimpleMultimodalMasking(
        config.modalities,
        config.vocab_sizes,
        config.max_seq_lens,
        config.input_alphas,
        config.target_alphas,
        config.input_tokens_range,
        config.target_tokens_range,
    )


def random_samples(config: TrainConfig, count: int) -> list[dict[str, Tensor]]:
    """Tokens that every modality allows."""
    chance = torch.Generator().manual_seed(0)
    sizes = list(zip(config.modalities, config.vocab_sizes, config.max_seq_lens, strict=True))
    return [
        {name: torch.randint(size, (length,), generator=chance) for name, size, length in sizes} for _ in range(count)
    ]


class Steps:
    """Training steps of one model in each of its forms.

    Args:
        dtype: of autocast, float32 for none.
    """

    def __init__(self, config: TrainConfig, dtype: torch.dtype) -> None:
        shape = config.model
        self.model = FourM(
            modalities=config.modalities,
            vocab_sizes=config.vocab_sizes,
            max_seq_lens=config.max_seq_lens,
            dim=shape.dim,
            enc_depth=shape.enc_depth,
            dec_depth=shape.dec_depth,
            head_dim=shape.head_dim,
            mlp_ratio=shape.mlp_ratio,
        ).to(DEVICE)
        self._parameters = list(self.model.parameters())
        self._optimizer = torch.optim.AdamW(self._parameters, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.05)
        self._dtype = dtype

    def step(self, kernels: str, batch: dict[str, Tensor]) -> None:
        self.model.config = replace(self.model.config, kernels=kernels)
        self._gradients(batch)
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)  # so that every form finds them there

    def _gradients(self, batch: dict[str, Tensor]) -> None:
        with torch.autocast(DEVICE.type, self._dtype, enabled=self._dtype != torch.float32):
            loss, _ = self.model(batch)
        loss.backward()


def of_steps(config: TrainConfig, samples: int, seconds: float, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """{form: {"s": median seconds of a step, "bytes": its memory}}"""
    batch = masking_of(config).collate(random_samples(config, samples), sample_ids=range(samples))
    batch = {name: values.to(DEVICE) for name, values in batch.items()}
    steps = Steps(config, dtype)
    steps.step("auto", batch)  # makes gradients and moments
    runs: dict[str, Callable[[], Any]] = {form: partial(steps.step, form, batch) for form in FORMS}
    assert set(runs) == set(KERNELS)
    times = alternate(runs, seconds=seconds)
    return {form: {"s": times[form], "bytes": peak_extra_memory(run, DEVICE.type)} for form, run in runs.items()}


def of_masking(config: TrainConfig, samples: int, seconds: float) -> dict[str, float]:
    """Median seconds of masking a batch, by who does it."""
    given, masking = random_samples(config, samples), masking_of(config)
    rows = torch.stack([torch.cat([sample[name] for name in config.modalities]) for sample in given])
    theirs = MaskNano4M(masking.spec)
    return alternate(
        {
            "nano4M's rule": lambda: theirs(rows),
            "transform": lambda: torch.utils.data.default_collate([masking(sample) for sample in given]),
            "collate": lambda: masking.collate(given),
        },
        seconds=seconds,
    )


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    padded = [form for form in FORMS if form != "auto"]
    lines = [
        f"| | {' | '.join(FORMS[form] for form in padded)} | {FORMS['auto']} | times |",
        f"| --- |{' --- |' * (len(padded) + 2)}",
    ]
    for samples, forms in found["steps"].items():
        for title, key, unit in (("a step of {} samples", "s", 1.0), ("its memory, GB", "bytes", 1e9)):
            values = [forms[form][key] / unit for form in (*padded, "auto")]
            times = ", ".join(f"{value / values[-1]:.1f}" for value in values[:-1])
            cells = " | ".join(f"{value:.3g}{' s' if key == 's' else ''}" for value in values)
            lines.append(f"| {title.format(samples)} | {cells} | {times} |")
    masks = found["masking"]
    first, each, together = (masks[name] for name in ("nano4M's rule", "transform", "collate"))
    lines += [
        f"| masking {found['masked']} samples, one after the other | {first * 1e3:.1f} ms | "
        f"| {each * 1e3:.1f} ms | {first / each:.1f} |",
        f"| the same, together by `collate` | | | {together * 1e3:.2f} ms | {first / together:.0f} |",
    ]
    return "\n".join(lines)


def measure(config: TrainConfig, samples: list[int], masked: int, seconds: float, dtype: torch.dtype) -> dict[str, Any]:
    """All figures of a recipe."""
    return {
        "masked": masked,
        "masking": of_masking(config, masked, seconds),
        "steps": {str(count): of_steps(config, count, seconds, dtype) for count in samples},
    }


def main() -> int:
    parser = CommandParser(prog="python -m benchmarks.moving", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--config", type=Path, default=Path("M4-config.yaml"), help="the recipe (default M4-config.yaml)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--samples", type=whole(1), nargs="+", default=[4, 16], help="of a step (default 4 16)")
    parser.add_argument("--masked", type=whole(1), default=96, help="samples that are masked (default 96)")
    parser.add_argument(
        "--seconds", type=number(0), default=60.0, help="of timing each row, at least two turns (default 60)"
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of autocast (default fp32: none)")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    arguments = parser.parse_intermixed_args()
    config, _ = load_config(arguments.config, arguments.overrides)
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    found = measure(config, arguments.samples, arguments.masked, arguments.seconds, dtype)
    print(table(found))
    if arguments.out:
        write_figures(arguments.out, found)
    return 0


if __name__ == "__main__":
    run_command(main)
