"""The training step as the trainer runs it on a GPU: masking, forward, backward, clipping, AdamW, in bfloat16.

Timed by the clock, from an idle GPU to an idle GPU: eager, compiled, and captured as CUDA graphs, against the padded
references (eager, as nano4M trains). Every provider gets the same samples and masks.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.device import DEVICE, ON_GPU
from benchmarks.measure import Run, Work
from benchmarks.suite import Case, Suite
from m4.batches.packing import drawn_counts
from m4.build import masking_spec
from m4.config import ModelSection, TrainConfig
from m4.data.store import TokenStore
from m4.model.flops import training_flop
from m4.schedule import Schedule
from m4.training.graphs import CudaGraphs, Function, Recorder
from m4.training.step import Execution
from m4.training.trainer import Stores, Trainer

SAMPLES = 8192  # of the token store
TINY = ModelSection(dim=16, enc_depth=1, dec_depth=1, head_dim=8)


class Unrecorded:
    """In the place of CUDA graphs where there is no GPU: what it records is the function itself."""

    def warm_up(self, function: Function) -> None:
        function()

    def record(self, function: Function) -> Function:
        return function


def graphs() -> Recorder:
    """What records a step here."""
    return CudaGraphs(DEVICE) if ON_GPU else Unrecorded()


class Recipe(NamedTuple):
    """A run and random tokens for it."""

    config: TrainConfig
    store: TokenStore


def recipe(batch_size: int, micro_batches: int, model: ModelSection | None = None) -> Recipe:
    """The M4 recipe in bfloat16 with a step of `micro_batches` x `batch_size` samples.

    A step takes as long whatever the initial values, so they are those that take no time.
    """
    config = TrainConfig(
        batch_size=batch_size,
        global_batch_size=batch_size * micro_batches,
        dtype="bf16",
        model=model or ModelSection(init="normal"),
        run_name="benchmark",
    )
    tokens = np.random.default_rng(0).integers(0, 64_000, (SAMPLES, sum(config.max_seq_lens)), dtype=np.uint16)
    return Recipe(config, TokenStore(tokens=tokens, fingerprint="", pids=()))


def tiny(batch_size: int, micro_batches: int) -> Recipe:
    """The same in all but size: a rehearsal takes milliseconds a step."""
    large = recipe(min(batch_size, 2), min(micro_batches, 2), TINY)
    config = replace(
        large.config,
        vocab_sizes=[64] * 4,
        max_seq_lens=[16, 6, 16, 6],
        input_tokens_range=[6, 12],
        target_tokens_range=[4, 12],
    )
    return Recipe(config, replace(large.store, tokens=large.store.tokens[:32, :44] % 64))


def work(inputs: Recipe) -> Work:
    """Matrix products of the packed tokens, the mean of a hundred steps; attention's own share is below 3 %."""
    config = inputs.config
    samples = Schedule.of(config, 1).samples_per_step
    drawn = drawn_counts(masking_spec(config), seed=config.seed, sample_ids=np.arange(100 * samples))
    visible, targets = (counts.sum(0) / 100 for counts in drawn)
    amount = training_flop(config.model_config(), float(visible.sum()), targets.tolist())
    return Work(amount, "FLOP", "FLOP = 6 x (packed tokens x weights that multiply them)")


def trainer_of(
    inputs: Recipe,
    kernels: str = "auto",
    *,
    compiled: bool = False,
    recorder: Recorder | None = None,
    device: torch.device = DEVICE,
) -> Trainer:
    """A trainer whose steps are read only when somebody asks."""
    log = replace(inputs.config.log, every=10**9)
    config = replace(inputs.config, kernels=kernels, compile=compiled, log=log)
    execution = Execution(asynchronous=True, graphs=recorder is not None)
    trainer = Trainer(config, stores=Stores(inputs.store, inputs.store), device=device, execution=execution)
    if recorder is not None:
        trainer.record(recorder)
    return trainer


def suite() -> Suite:
    """The benchmark on a GPU."""
    providers: dict[str, Callable[[Recipe], Run]] = {
        "captured, compiled": lambda inputs: trainer_of(inputs, compiled=True, recorder=CudaGraphs(DEVICE)).train_step,
        "captured": lambda inputs: trainer_of(inputs, recorder=CudaGraphs(DEVICE)).train_step,
        "compiled": lambda inputs: trainer_of(inputs, compiled=True).train_step,
        "auto": lambda inputs: trainer_of(inputs).train_step,
        "reference": lambda inputs: trainer_of(inputs, "reference").train_step,
        "reference-matmul": lambda inputs: trainer_of(inputs, "reference-matmul").train_step,
    }
    return Suite(
        "training_step",
        {
            "M4, 96 samples": Case(lambda: recipe(96, 1), work, gpu=True),
            "M4, 5 x 96 samples": Case(
                lambda: recipe(96, 5), work, without=("compiled", "reference", "reference-matmul"), gpu=True
            ),
        },
        providers,
        guards=(("captured", "reference"), ("captured", "reference-matmul")),
        clock=True,
    )
