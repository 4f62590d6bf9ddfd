"""The training step in all its forms, back to back: time, share of the best product rate, memory, and the loss that it
comes to."""

import statistics
import time
from typing import NamedTuple

import torch

from benchmarks.device import ON_GPU
from benchmarks.gpu import products, step
from benchmarks.gpu.folder import Folder
from benchmarks.gpu.kernel_table import keep_table
from benchmarks.measure import product_rate, timed
from benchmarks.results import Record
from m4.training.trainer import Trainer

STEPS = 20  # after which the loss is read, whatever the form and the size
ALONE = 5  # steps timed one by one


class Form(NamedTuple):
    """One way to run the step.

    Args:
        provider: as the suite calls it.
        samples: of a micro-batch.
        micro_batches: of a step.
        rounds: steps timed back to back.
    """

    provider: str
    samples: int
    micro_batches: int = 1
    rounds: int = STEPS

    @property
    def case(self) -> str:
        times = f"{self.micro_batches} x " if self.micro_batches > 1 else ""
        return f"M4, {times}{self.samples} samples"


FORMS = (
    Form("captured", 96),
    Form("captured", 480, rounds=8),
    Form("captured", 96, 5, rounds=8),
    Form("auto", 96),
    Form("reference", 96, rounds=8),
)
COMPILED = (Form("captured, compiled", 96), Form("captured, compiled", 480, rounds=8))
TABLES = (Form("captured", 96), Form("captured", 480))


def recipe_of(form: Form) -> step.Recipe:
    """Its run and tokens; tiny ones where there is no GPU."""
    return (step.recipe if ON_GPU else step.tiny)(form.samples, form.micro_batches)


def trainer_of(form: Form, inputs: step.Recipe) -> Trainer:
    kernels = form.provider if form.provider.startswith("reference") else "auto"
    recorder = step.graphs() if form.provider.startswith("captured") else None
    return step.trainer_of(inputs, kernels, compiled="compiled" in form.provider, recorder=recorder)


def measured(folder: Folder, form: Form) -> Trainer:
    """Measure a form and keep what was found; returns its trainer."""
    before = time.perf_counter()
    held = torch.cuda.memory_reserved() if ON_GPU else 0
    inputs = recipe_of(form)
    trainer = trainer_of(form, inputs)
    timed(trainer.train_step)
    ready = time.perf_counter() - before
    for _ in range(STEPS - 1):
        trainer.train_step()
    figures = trainer.check()
    assert figures is not None
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()

    def back_to_back() -> None:
        for _ in range(form.rounds):
            trainer.train_step()

    seconds = timed(back_to_back) / form.rounds
    alone = statistics.median(timed(trainer.train_step) for _ in range(ALONE))
    work, samples = step.work(inputs), trainer.schedule.samples_per_step
    reserved = torch.cuda.memory_reserved() - held if ON_GPU else 0
    folder.time(Record.of("training_step", form.case, form.provider, seconds, form.rounds, work, reserved))
    folder.append(
        "step",
        case=form.case,
        provider=form.provider,
        milliseconds=seconds * 1e3,
        milliseconds_alone=alone * 1e3,
        samples_a_second=samples / seconds,
        tflops=work.amount / seconds / 1e12,
        of_product_rate=work.amount / seconds / product_rate(),
        # Without what graphs own, which is theirs for good and among what is reserved.
        allocated_bytes=torch.cuda.max_memory_allocated() if ON_GPU else 0,
        reserved_bytes=reserved,
        ready_seconds=ready,
        rows=products.rows_of(trainer.batches),
        recipe_minutes=trainer.schedule.steps * seconds / 60,
        losses_after=STEPS,
        losses=figures.losses,
        norm=figures.norm,
    )
    print(
        f"{form.case}, {form.provider}: {seconds * 1e3:.2f} ms, {samples / seconds:.0f} samples/s, "
        f"loss {statistics.mean(figures.losses):.4f} after {STEPS} steps",
        flush=True,
    )
    return trainer


def forms(folder: Folder) -> None:
    """The stage "step"."""
    for form in FORMS:
        with folder.part(f"{form.case}, {form.provider}"):
            measured(folder, form)


def compiled(folder: Folder) -> None:
    """The stage "compiled step": each form and what it is made of, since the next may take too long to compile."""
    for form in COMPILED:
        with folder.part(f"{form.case}, {form.provider}"):
            trainer = measured(folder, form)
            keep_table(folder, f"{form.case}, {form.provider}", trainer.train_step)
            del trainer


def tables(folder: Folder) -> None:
    """The stage "kernel table": what the captured step is made of."""
    for form in TABLES:
        with folder.part(f"kernels, {form.case}, {form.provider}"):
            trainer = trainer_of(form, recipe_of(form))
            for _ in range(3):
                timed(trainer.train_step)
            keep_table(folder, f"{form.case}, {form.provider}", trainer.train_step)
            del trainer
