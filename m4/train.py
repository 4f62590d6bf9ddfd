"""Train M4: ``python -m m4.train --config M4-config.yaml [key=value …]``."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from m4.batches.masked import fixed_batches
from m4.batches.order import SampleStream
from m4.batches.train import Feed
from m4.build import build_model, data_root, masking_spec, open_split
from m4.checkpoint import RunIdentity, check_same_run, clean_temporaries, load_checkpoint, newest_whole, save_checkpoint
from m4.cli import run_command
from m4.config import TrainConfig, config_to_yaml, load_config
from m4.device import HeapTrimmer, pick_device
from m4.distributed import World
from m4.evaluation.losses import evaluate
from m4.files import write_atomically
from m4.model import M4
from m4.run.console import TrainingProgress, announce, announce_estimate, show_progress
from m4.run.directory import only_process, write_summary
from m4.run.metrics import RunLog
from m4.run.signals import Interrupted, StopSignals
from m4.run.state import LoopState
from m4.schedule import Schedule, learning_rate
from m4.training.graphs import CudaGraphs
from m4.training.optimizer import build_optimizer, load_optimizer_state
from m4.training.preflight import check_finite, smoke_test
from m4.training.step import Execution, Figures, TrainStep

log = logging.getLogger("m4.train")


def train(config: TrainConfig, command: str) -> int:
    """Run, or resume where the run stopped; returns the exit status (130 after Ctrl-C)."""
    world = World.from_environment()
    device = pick_device(config.device)
    execution = Execution.of(config, device)
    schedule = Schedule.of(config, world.size)
    root = data_root(config)
    store = open_split(config, root, config.data.train_split)
    eval_store = open_split(config, root, config.data.eval_split)
    spec = masking_spec(config)
    run_dir = config.run_dir

    with only_process(run_dir), StopSignals() as stop:
        model = build_model(config, device)
        optimizer = build_optimizer(model, config)
        stream = SampleStream(len(store), config.seed)
        state = LoopState()
        identity = RunIdentity(store.fingerprint, schedule.samples_per_step)
        clean_temporaries(run_dir)
        resumed = newest_whole(run_dir)
        if resumed is not None:
            path, meta = resumed
            check_same_run(path, meta, config, identity)
            saved = load_checkpoint(path, model)
            load_optimizer_state(optimizer, saved["optimizer"])
            state = LoopState(**saved["loop"])
            _set_random_state(saved["random"])
            log.info("resuming from %s", path)
        saved_step = state.step if resumed else -1
        write_atomically(run_dir / "config.yaml", config_to_yaml(config).encode())
        parameters = sum(p.numel() for p in model.parameters())
        announce(config, schedule, device, parameters=parameters, samples=(len(store), len(eval_store)))
        if state.step >= schedule.steps:
            log.info("the run is complete (%d steps); for another one set run_name=NAME", state.step)
            return 0

        unread, tick = 0, time.monotonic()  # steps that the device was given and the host has not heard of

        def check_steps() -> Figures | None:
            """Wait for the steps that the device was given and raise if one of them was not finite."""
            nonlocal unread, tick
            if not unread:
                return None
            figures = step.read()
            lost, unread = unread - figures.updates, 0
            if not figures.finite:
                state.step -= lost
                state.position -= lost * schedule.samples_per_step
                _stop_on_non_finite(figures, model, config, state.step + 1)
            state.seconds, tick = state.seconds + time.monotonic() - tick, time.monotonic()
            return figures

        def save() -> None:
            nonlocal saved_step
            check_steps()
            if saved_step == state.step:
                return
            with stop.deferred():
                contents = {"optimizer": optimizer.state_dict(), "loop": asdict(state), "random": _random_state()}
                path = save_checkpoint(run_dir, state.step, model, contents, config, identity)
                saved_step = state.step
                log.info("saved %s", path)

        def evaluate_now() -> None:
            check_steps()
            log.info("evaluating on %s", config.data.eval_split)
            batches = fixed_batches(
                eval_store,
                spec,
                seed=config.eval_seed,
                batch_size=config.batch_size,
                max_samples=config.eval_samples,
                device=device,
            )
            model.eval()
            samples = min(len(eval_store), config.eval_samples or len(eval_store))
            shown = show_progress(batches, "evaluating", samples, size=lambda b: b.decoder.segments.batch_size)
            result = evaluate(model, shown, config, device, after_batch=stop.check)
            model.train()
            with stop.deferred():
                run_log.write("eval", state.step, {"tokens": schedule.tokens(state.position), **asdict(result)})
                state.evaluation = asdict(result)
                state.first_evaluation = state.first_evaluation or state.evaluation
                state.evaluated_step = state.step
            log.info("step %d  eval %s", state.step, result)

        run_log = RunLog(run_dir, config, state.step if resumed else -1)
        progress = TrainingProgress(config, schedule, state, device)
        try:
            positions = np.arange(config.batch_size) + state.position
            smoke = smoke_test(model, store, stream.rows(positions), positions, spec, config, device)
            announce_estimate(
                schedule, device, lambda samples: smoke.recipe_seconds(samples, config.batch_size), smoke.per_sample
            )
            feed = Feed(store, stream, spec, config, schedule, device, fixed_shapes=execution.asynchronous)
            forward = torch.compile(model, dynamic=not execution.asynchronous) if config.compile else model
            step = TrainStep(model, forward, optimizer, config, device, execution, feed.capacity)
            if feed.capacity:
                log.info("micro-batches of %d input and %d target tokens", *feed.capacity)
            if execution.graphs:
                log.info("recording the step as CUDA graphs")
                with stop.deferred():
                    step.record(feed.example(state.position), CudaGraphs(device), schedule.accumulation)
            heap = HeapTrimmer()
            progress.start()
            tick = time.monotonic()
            while True:
                last = state.step >= min(schedule.steps, config.stop_after_steps or schedule.steps)
                evaluation_due = last or state.step == 0 or schedule.due(config.eval_freq, state.step)
                if evaluation_due and state.evaluated_step != state.step:
                    evaluate_now()
                if last or schedule.due(config.save_ckpt_freq, state.step):
                    save()
                if last:
                    break

                rate = learning_rate(schedule.tokens(state.position + schedule.samples_per_step), config)
                inputs = feed.step(state.position)
                step.start(inputs.counts, rate)
                for batch in inputs.micro_batches:
                    stop.check()
                    step.micro_batch(batch.masked)
                    progress.micro_batch(batch.samples, batch.valid_tokens)
                with stop.deferred():  # parameters, loop state and metrics go together
                    step.update()
                    state.step += 1
                    state.position += schedule.samples_per_step
                    unread += 1
                    feed.prepare(state.position)  # while the device is busy
                    log_due = state.step % config.log.every == 0 or state.step == schedule.steps
                    if log_due or not execution.asynchronous:
                        figures = check_steps()
                        assert figures is not None
                        metrics = progress.step(figures.losses, figures.norm, rate)
                        if log_due:
                            run_log.write("train", state.step, metrics)
                    step.release()
                heap.step()
                stop.check()
        except Interrupted as interrupted:
            optimizer.zero_grad(set_to_none=True)
            log.info("stopping on %s after step %d", interrupted, state.step)
            save()
            log.info("to resume, give the same command again:\n  %s", command)
            return interrupted.exit_status
        finally:
            progress.close()
            run_log.close()
            write_summary(config, schedule, state, device)
    if state.step < schedule.steps:
        log.info("stopped at stop_after_steps=%d of %d steps; raise or drop it to go on", state.step, schedule.steps)
    return 0


def _stop_on_non_finite(figures: Figures, model: M4, config: TrainConfig, step: int) -> NoReturn:
    newest = newest_whole(config.run_dir)
    kept = f"the newest checkpoint is {newest[0]}" if newest else "there is no earlier checkpoint"
    advice = f"stopped before the update and saved nothing of it; {kept}; try a lower lr, a longer token_warmup or fp32"
    try:
        check_finite(torch.tensor(figures.losses), model, config.modalities, f"step {step}")
    except ValueError as error:
        raise ValueError(f"{error}; {advice}") from None
    raise ValueError(f"step {step}: the losses are finite but the gradient norm is {figures.norm}; {advice}")


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m m4.train", description="Train M4, or resume where it stopped.")
    parser.add_argument("--config", required=True, type=Path, help="YAML file: flat, or nested as nano4M's")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example lr=0.001 model.dim=128")
    arguments = parser.parse_intermixed_args()
    config, notes = load_config(arguments.config, arguments.overrides)
    for note in notes:
        log.info("%s", note)
    return train(config, shlex.join(["python", "-m", "m4.train", *sys.argv[1:]]))


if __name__ == "__main__":
    run_command(main)
