"""One M4 training step of the trainer (forward, backward, clipping, AdamW) of the full-size model, against the padded
references."""

import functools
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.device import ON_GPU, require_bf16
from benchmarks.gpu import step as gpu_step
from benchmarks.measure import Run, Work
from benchmarks.steps import use_kernels
from benchmarks.suite import Case, Suite, test_guard, test_time  # noqa: F401
from m4.batches.train import MicroBatch, StepBatches
from m4.config import TrainConfig
from m4.data.store import TokenStore
from m4.model.flops import training_flop
from m4.training.trainer import Stores, Trainer
from m4kernels import MaskedBatch, PackedTokens, Segments
from m4kernels.cases import M4_INPUT_MEANS, M4_MAX_SEQ_LENS, M4_TARGET_MEANS, random_packed

VOCABULARY = (65536,) * 4
BF16 = ("auto, bf16", "reference, bf16")
WIDTH = 256  # slots of a padded sample


def masked_batch(samples: int) -> MaskedBatch:
    """Samples with the mean numbers of tokens that M4's masking rule gives."""
    g = torch.Generator().manual_seed(0)

    def half(means: tuple[float, ...]) -> PackedTokens:
        counts = torch.tensor(means).round().int().expand(samples, -1).clone()
        return random_packed(Segments.from_counts(counts, max_seqlen=WIDTH), VOCABULARY, g)

    return MaskedBatch(half(M4_INPUT_MEANS), half(M4_TARGET_MEANS))


class OneStep:
    """In the place of the trainer's batches: every step is of the same micro-batch."""

    def __init__(self, batch: MaskedBatch) -> None:
        self._batch = batch

    def step(self, position: int) -> StepBatches:
        encoder, decoder = self._batch.encoder, self._batch.decoder
        micro_batch = MicroBatch(self._batch, decoder.segments.batch_size, len(encoder.ids) + len(decoder.ids))
        return StepBatches(decoder.segments.counts.sum(0).clamp(min=1), iter([micro_batch]))

    def prepare(self, position: int) -> None:
        """It is at hand."""


@functools.cache
def trainer() -> Trainer:
    """One for all providers: 176 M parameters, their gradients and two moments are 2.8 GB."""
    config = TrainConfig(batch_size=1, global_batch_size=1, device="cpu", run_name="benchmark")
    config.log.every = 10**9  # nothing is said
    rows = np.zeros((1, sum(M4_MAX_SEQ_LENS)), dtype=np.uint16)
    store = TokenStore(tokens=rows, fingerprint="", pids=())
    return Trainer(config, stores=Stores(store, store))


def step(kernels: str, dtype: str = "fp32") -> Callable[[MaskedBatch], Run]:
    def prepare(batch: MaskedBatch) -> Run:
        if dtype == "bf16":
            require_bf16()
        one = trainer()

        def run() -> None:
            use_kernels(one, kernels, dtype)
            one.batches = OneStep(batch)  # type: ignore[assignment]
            one.train_step()

        return run

    return prepare


def work(batch: MaskedBatch) -> Work:
    """Matrix products of the packed tokens, attention's own share being below 3 %; AdamW, which reads 4 numbers a
    parameter and writes 3."""
    config, targets = TrainConfig().model_config(), batch.decoder.segments.counts.sum(0).tolist()
    amount = training_flop(config, len(batch.encoder.ids), targets)
    parameters = sum(p.numel() for p in trainer().model.parameters())
    formula = "FLOP = 6 x (packed tokens x weights that multiply them); floor: these, and 28 bytes a parameter"
    return Work(amount, "FLOP", formula, 28.0 * parameters)


CPU_SUITE = Suite(
    "training_step",
    {
        "M4, 2 samples": Case(lambda: masked_batch(2), work, full=True),
        "M4, 4 samples": Case(lambda: masked_batch(4), work),
        "M4, 16 samples": Case(lambda: masked_batch(16), work, without=BF16),
        "M4, 16 samples, bf16": Case(
            lambda: masked_batch(16), work, without=("reference", "reference-matmul"), full=True
        ),
    },
    {
        "auto": step("auto"),
        "reference": step("reference"),
        "reference-matmul": step("reference-matmul"),
        "auto, bf16": step("auto", "bf16"),
        "reference, bf16": step("reference", "bf16"),
    },
    guards=(
        ("auto", "reference"),
        ("auto", "reference-matmul"),
        ("auto, bf16", "auto"),
        ("auto, bf16", "reference, bf16"),
    ),
)

SUITE = gpu_step.suite() if ON_GPU else CPU_SUITE
