"""One run of training: its parts, its loop, and what it does beside the steps: resume, evaluate, save, report."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple

import numpy as np
import torch

from m4.batches.mirror import Mirror
from m4.batches.order import SampleOrder
from m4.batches.train import TrainBatches
from m4.build import Stores, build_model, masking_spec, open_stores
from m4.checkpoint import RunIdentity, check_same_run, checkpoint_bytes, clean_temporaries
from m4.config import TrainConfig, config_to_dict, config_to_yaml
from m4.data.tokenizers import code_levels
from m4.device import TRAINING_DTYPES, HeapTrimmer, enough_memory, matmul_rate, pick_device
from m4.distributed import World
from m4.files import write_atomically
from m4.run.console import TrainingProgress, announce, announce_estimate
from m4.run.directory import check_room, only_run, resolve_paths, summarised_step, write_summary
from m4.run.metrics import RunLog
from m4.run.signals import Interrupted, StopSignals
from m4.run.state import LoopState
from m4.schedule import Schedule, learning_rate
from m4.training.contents import Trained
from m4.training.ema import AveragedWeights, averaged_model
from m4.training.evaluating import RunEvaluator
from m4.training.exchange import exchange_of
from m4.training.finite import (
    NON_FINITE_FILE,
    diverged,
    loss_that_is_not_finite,
    note_not_finite,
    state_that_is_not_finite,
    why_not_finite,
)
from m4.training.graphs import CudaGraphs, Recorder
from m4.training.guard import NotFinite
from m4.training.optimizer import build_optimizer
from m4.training.preflight import Probe, check_memory
from m4.training.profiling import StepProfiler
from m4.training.saving import Saver
from m4.training.start import load_initial_weights, starting_points_of
from m4.training.step import Execution, Figures, TrainStep

__all__ = ["Stores", "Trainer"]

log = logging.getLogger(__name__)

_LESS_MEMORY = "lower batch_size (global_batch_size stays the samples of a step) or the size of the model"


class Trainer:
    """A run: `run` trains it to its end. `train_step` alone is a step of the very same, and writes nothing.

    Args:
        config: the run.
        stores: its data; default what ``data`` says.
        device: default what ``device`` says.
        execution: how steps run; default what suits the device.
        resident: as in `m4.batches.rows.TokenRows`.
        world: the ranks that train together; default this process alone.
    Raises:
        ValueError: something in the configuration or its data cannot be run; nothing has been written.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        stores: Stores | None = None,
        device: torch.device | None = None,
        execution: Execution | None = None,
        resident: bool | None = None,
        world: World | None = None,
    ) -> None:
        self.config = config = resolve_paths(config)
        self.world = world = world or World()
        self.device = device = device or pick_device(config.device)
        self.execution = execution or Execution.of(config, device, world.size)
        self.schedule = Schedule.of(config, world.size)
        self.spec = masking_spec(config)
        check_memory(config, self.schedule, self.spec, device)
        self.stores = stores or open_stores(config, world)
        train, fixed = self.stores.train, self.execution.asynchronous
        self.identity = RunIdentity(train.fingerprint, self.schedule.samples_per_step, world.size)
        world.must_agree({**config_to_dict(config), "data fingerprint": train.fingerprint})
        with enough_memory(_LESS_MEMORY):
            self.model = build_model(config, device, code_levels(self.stores.meta))
            self.exchange = exchange_of(config, self.model, world, device)
            self.optimizer = build_optimizer(self.model, config)
            self.averaged = AveragedWeights(self.model, config.ema) if config.ema else None
            self.order = order = SampleOrder(len(train), config.seed, config.data.order)
            mirror = Mirror.of(config, self.stores.meta, train, device)
            self.batches = TrainBatches(
                train,
                order,
                self.spec,
                config,
                self.schedule,
                device,
                fixed_shapes=fixed,
                one_size=config.compile,
                resident=resident,
                mirror=mirror,
                world=world,
            )
            forward = torch.compile(self.model, dynamic=not fixed) if config.compile else self.model
            parts = (self.batches.capacity, self.averaged, self.exchange, self.schedule.accumulation)
            self.step = TrainStep(self.model, forward, self.optimizer, config, device, self.execution, *parts)
        self.probe = Probe(self.model, train, order, self.spec, config, device, mirror, self.exchange)
        self.state = LoopState()
        self.progress = TrainingProgress(config, self.schedule, self.state, device)
        self.stop = StopSignals(world)
        self.evaluator = RunEvaluator(config, self.stores, self.spec, device, self.stop.check, world, self.exchange)
        self.log: RunLog | None = None  # open while `run` runs
        self.trained = Trained(
            config, device, self.model, self.averaged, self.optimizer, self.step, self.exchange, self.state
        )
        self.saver = Saver(config, self.schedule, self.identity, world)
        self._checked_at = time.monotonic()

    def run(self, command: str) -> int:
        """Train from where the run stands to its end; returns the exit status, 128 + the signal's number after one.

        Args:
            command: what to type to resume.
        """
        with only_run(self.config.run_dir, self.world), self.stop, enough_memory(_LESS_MEMORY):
            self.resume()
            self.announce()
            if self.state.step >= self.schedule.steps:
                if summarised_step(self.config.run_dir) != self.state.step:  # the disk was full, or a kill came
                    self.summarise()
                log.info("the run is complete (%d steps); for another one set run_name=NAME", self.state.step)
                return 0
            if self.world.leads:
                self.log = RunLog(self.config.run_dir, self.config, self.saver.saved_step)
            with self.closing():
                try:
                    self.prepare()
                    self.loop()
                except Interrupted as interrupted:
                    self.optimizer.zero_grad(set_to_none=True)
                    log.info("stopping on %s after step %d; saving what is not saved yet", interrupted, self.state.step)
                    self.save()
                    log.info("to resume, give the same command again:\n  %s", command)
                    return interrupted.exit_status
        if self.state.step < self.schedule.steps:
            stop, steps = self.config.stop_after_steps, self.schedule.steps
            log.info("stopped at stop_after_steps=%d of %d steps; raise or drop it to go on", stop, steps)
        return 0

    def loop(self) -> None:
        """Step until the last one; evaluate and save when due."""
        config, state, schedule = self.config, self.state, self.schedule
        heap, profiler = HeapTrimmer(), StepProfiler(config, self.device, leads=self.world.leads)
        while True:
            last = state.step >= min(schedule.steps, config.stop_after_steps or schedule.steps)
            if last or state.step == 0 or schedule.due(config.eval_freq, state.step):
                self.evaluate()
            if last or schedule.due(config.save_ckpt_freq, state.step):
                self.save(try_later=not last)
            if last:
                return profiler.close()
            with self.stop.deferred():  # a step is finished before a signal stops it
                self.train_step()
            heap.step()
            profiler.step()
            self.stop.check_together()

    def train_step(self) -> Figures | None:
        """One optimiser step from where the state stands; returns its figures if they were read."""
        position = self.state.position + self.schedule.samples_per_step
        rate = learning_rate(self.schedule.tokens(position), self.config)
        meter = self.progress.meter
        with meter.data():
            inputs = self.batches.step(self.state.position)
        self.step.start(inputs.counts, rate)
        for batch in meter.each(inputs.micro_batches):
            self.step.micro_batch(batch.masked)
            self.progress.micro_batch(batch.samples, batch.valid_tokens)
        self.step.update()
        self.state.step += 1
        self.state.position = position
        self.progress.launched(None if inputs.targets is None else inputs.targets.tolist())
        with meter.data():
            self.batches.prepare(position)  # while the device is busy
        figures = self.report(rate, inputs.targets)
        self.step.release()
        return figures

    def report(self, rate: float, targets: np.ndarray | None) -> Figures | None:
        """Read, show and log the step just launched, if that is due: at log points, on a CPU after every step.

        Args:
            rate: the learning rate of the step.
            targets: (M,) of each modality in it, None if all have some.
        """
        due = self.state.step % self.config.log.every == 0 or self.state.step == self.schedule.steps
        if not due and self.execution.asynchronous:
            return None
        figures = self.check()
        assert figures is not None
        some = [True] * len(figures.losses) if targets is None else (targets > 0).tolist()
        given = figures.losses, figures.accuracies
        losses, accuracies = ([x if has else None for x, has in zip(xs, some, strict=True)] for xs in given)
        metrics = self.progress.step(losses, accuracies, figures.norm, rate)
        if due and self.log is not None:
            self.log.write("train", self.state.step, {**metrics, **self.progress.meter.figures()})
        return figures

    def check(self) -> Figures | None:
        """Wait for the steps that were launched, if any; note those that were not finite, and raise ValueError for the
        one that was one too many."""
        with self.world.waiting():  # a GPU waits for those of the others
            figures = self.step.read()
        if figures is None:
            return None
        for skipped in figures.skipped:
            self.state.skipped_steps += 1
            step, found = self.note_not_finite(skipped)
            count, most = self.state.skipped_steps, self.config.skip_non_finite
            log.warning("step %d: %s; its update is skipped (%d of at most %d in this run)", step, found, count, most)
        if not figures.finite:
            step, found = self.note_not_finite(NotFinite(figures.lost - 1, figures.losses, figures.norm))
            self.state.step -= figures.lost
            self.state.position -= figures.lost * self.schedule.samples_per_step
            if self.state.skipped_steps:
                found += f", after {self.state.skipped_steps} skipped steps"
            raise self.diverged(f"step {step}: {found}; its samples are named in {NON_FINITE_FILE}")
        now = time.monotonic()
        self.state.seconds += now - self._checked_at
        self._checked_at = now
        return figures

    def note_not_finite(self, found: NotFinite) -> tuple[int, str]:
        """Write down the samples of a step that was not finite; returns its number and what was not finite."""
        samples = self.schedule.samples_per_step
        step, ids = self.state.step - found.ago, np.arange(samples) + self.state.position - (found.ago + 1) * samples
        if self.log is not None:
            rows = self.order.rows(ids)
            note_not_finite(self.config, step, found, ids, rows, [self.stores.train.pids[row] for row in rows])
        return step, why_not_finite(found, self.config.modalities)

    def evaluate(self) -> None:
        """Figures on the evaluation split, unless this step has them already."""
        state = self.state
        if state.evaluated_step == state.step:
            return
        self.check()
        with self.progress.meter.apart():
            result, lines = self.evaluator.evaluate(self.model, averaged_model(self.averaged))
        found = loss_that_is_not_finite([x or 0.0 for x in result["per_modality"].values()], self.config.modalities)
        if found is not None:
            raise self.diverged(f"evaluation after step {state.step}: {found}")
        self.keep_evaluation(result)
        for line in lines:
            log.info("step %d  eval %s", state.step, line)

    def keep_evaluation(self, result: dict) -> None:
        """Log an evaluation of this step and keep it in the state."""
        state = self.state
        with self.stop.deferred():
            if self.log is not None:
                self.log.write("eval", state.step, {"tokens": self.schedule.tokens(state.position), **result})
            state.evaluation = result
            state.first_evaluation = state.first_evaluation or result
            state.evaluated_step = state.step

    def save(self, *, try_later: bool = False) -> None:
        """See to a checkpoint from which training can go on, unless there is one of this step; else raise ValueError.

        Args:
            try_later: as of `Saver.save`.
        """
        self.check()
        with self.progress.meter.apart():
            self.save_what_is_known(try_later=try_later)

    def save_what_is_known(self, *, try_later: bool) -> None:
        """`save`, once the steps that were launched are known to be finite."""
        if self.saver.has(self.state.step):
            return
        found = self.divergence()
        if found is not None:
            raise self.diverged(f"after step {self.state.step} {found}")
        with self.stop.deferred():
            self.saver.save(self.trained.contents(), self.log, try_later=try_later)

    def diverged(self, what: str) -> ValueError:
        """The error that ends this run, once it is known which checkpoints there are; all ranks call it."""
        self.saver.settle()
        return diverged(what, self.config)

    def resume(self) -> None:
        """Take up the best checkpoint from which training can go on, if there is one, else ``init_from``."""
        if self.world.leads:
            clean_temporaries(self.config.run_dir)
        for found_there in starting_points_of(self.config, self.world):
            path = found_there.path
            changes = check_same_run(path, found_there.meta, self.config, self.identity)
            self.trained.take_up(found_there)
            found = self.divergence()
            if found is None:
                self.trained.take_up_random(found_there)
                self.saver.saved_step = self.state.step
                for change in changes:
                    log.warning("%s", change)
                log.info("resuming from %s", path)
                return
            log.warning("skipping %s: %s, the run had diverged there", path, found)
            self.trained.start_over()
        load_initial_weights(self.model, self.config)
        if self.averaged is not None:
            self.averaged.start_over()

    def divergence(self) -> str | None:
        """What is not finite in the weights, the optimiser, or the losses and gradients of a few samples to come."""
        found = self.world.first(state_that_is_not_finite(self.model, self.optimizer))
        return found or self.world.first(self.probe.divergence(self.state.position))

    def announce(self) -> None:
        """Say what will run and keep its configuration in the run directory."""
        if self.world.leads:
            write_atomically(self.config.run_dir / "config.yaml", config_to_yaml(self.config).encode())
        parameters = sum(p.numel() for p in self.model.parameters())
        samples, ranks = (len(self.stores.train), len(self.stores.evaluation)), self.world.size
        announce(self.config, self.schedule, self.device, parameters=parameters, samples=samples, ranks=ranks)
        if self.batches.capacities:
            sizes = [" or ".join(map(str, side)) for side in astuple(self.batches.capacities)]
            log.info("micro-batches of %s input and %s target tokens", *sizes)

    def prepare(self) -> None:
        """What happens once before the first step: checks, an estimate of the time, recording, the clock."""
        if self.world.leads:
            check_room(self.config.run_dir, checkpoint_bytes(self.model, averaged=self.averaged is not None))
        log.info("smoke test: a few samples forward and backward")
        smoke = self.probe.smoke_test(self.state.position)
        size = self.config.batch_size
        announce_estimate(self.schedule, self.device, lambda n: smoke.recipe_seconds(n, size), smoke.per_sample)
        if self.execution.graphs:
            log.info("recording the step as CUDA graphs")
            with self.stop.deferred():
                self.record(CudaGraphs(self.device, beside_others=self.world.size > 1))
        peak = self.config.log.peak_tflops or matmul_rate(self.device, TRAINING_DTYPES[self.config.dtype]) / 1e12
        log.info("mfu is of %.3g TFLOP/s a device (log.peak_tflops; null: what a matrix product reaches here)", peak)
        self.progress.start(peak * 1e12 * self.world.size)
        self._checked_at = time.monotonic()

    def record(self, recorder: Recorder) -> None:
        """Record the step for batches of each size; parameters and moments stay as they are."""
        self.step.record(self.batches.examples(self.state.position), recorder)

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Close the bar, the loggers and what saves, and write the summary, however the block ends."""
        try:
            yield
        except BaseException:
            self.close()
            try:
                self.summarise()
            except OSError as error:  # the lesser of two errors
                log.error("%s", error)
            raise
        self.close()
        self.summarise()

    def close(self) -> None:
        """Close the bar, what saves, and the loggers; what they cannot write is said."""
        self.progress.close()
        self.saver.close()
        if self.log is not None:
            self.log.close()
            self.log = None

    def summarise(self) -> None:
        """Write the summary. Raises OSError with the remedy."""
        try:
            if self.world.leads:
                write_summary(self.config, self.schedule, self.state, self.device)
        except OSError as error:
            reason = f"{error.strerror}; mend that and give the same command again: it writes the summary"
            raise OSError(error.errno, reason, error.filename) from error
