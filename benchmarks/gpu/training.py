"""Two hundred real steps on data that can be learnt: what the recipe's way of training comes to beside plainer ways.

Same seeds, samples and masks; bfloat16 in CUDA graphs against float32 step by step, and against the padded reference.
The configuration is built here, for a machine with a GPU may lack what reads configuration files.
"""

import statistics
import tempfile
import time
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.device import DEVICE, ON_GPU
from benchmarks.gpu import step
from benchmarks.gpu.folder import Folder
from m4.data.store import TokenStore
from m4.training.trainer import Stores, Trainer

READ_AT = (1, 20, 200)  # steps after which the loss is read
BATCH = 32
LR = 5e-4
# (what, dtype, kernels, in graphs, steps): the last ones are slow.
WAYS = (
    ("captured, bf16", "bf16", "auto", True, 200),
    ("eager, fp32", "fp32", "auto", False, 200),
    ("reference, fp32", "fp32", "reference", False, 20),
)
# Bits of bfloat16 lost in two hundred steps must not show: the mean loss of the last step, against float32's.
ALLOWED = 0.02


def recipe() -> step.Recipe:
    """A few thousand samples whose tokens are mostly of few ids, so that a model learns within two hundred steps."""
    inputs = (step.recipe if ON_GPU else step.tiny)(BATCH, 1)
    config = replace(inputs.config, lr=LR, token_warmup=inputs.config.batch_size * 256 * 20 / 1e6)
    tokens = inputs.store.tokens
    uniform = np.random.default_rng(1).random(tokens.shape)
    ids = np.minimum(-np.log(np.maximum(uniform, 1e-12)) * 6, min(config.vocab_sizes) - 1).astype(np.uint16)
    return step.Recipe(config, replace(inputs.store, tokens=ids))


def train(inputs: step.Recipe, dtype: str, kernels: str, captured: bool, steps: int) -> dict[str, Any]:
    """Losses after `READ_AT`, each the mean over the modalities, and how long it took."""
    given = inputs._replace(config=replace(inputs.config, dtype=dtype))
    trainer = step.trainer_of(given, kernels, recorder=step.graphs() if captured else None)
    start = time.perf_counter()
    losses = {}
    for done in range(1, steps + 1):
        trainer.train_step()
        if done in READ_AT:
            figures = trainer.check()
            assert figures is not None
            losses[done] = statistics.mean(figures.losses)
    return {"losses": losses, "seconds": time.perf_counter() - start}


def run_whole(inputs: step.Recipe, steps: int) -> dict[str, Any]:
    """A run from its start to its end, as `python -m m4.train` has it: checks, evaluation, checkpoint, summary."""
    with tempfile.TemporaryDirectory(prefix="m4-gpu-") as folder:
        log = replace(inputs.config.log, every=20, tensorboard=False)
        config = replace(
            inputs.config, output_dir=folder, run_name="run", stop_after_steps=steps, log=log, eval_samples=64,
            eval_generate_samples=0, training_time=None, device=DEVICE.type,
        )  # fmt: skip
        evaluation: TokenStore = replace(inputs.store, tokens=inputs.store.tokens[:64])
        trainer = Trainer(config, stores=Stores(inputs.store, evaluation))
        start = time.perf_counter()
        status = trainer.run("command")
        seconds = time.perf_counter() - start
        if status or trainer.state.step != steps:
            raise AssertionError(f"the run ended with status {status} after {trainer.state.step} of {steps} steps")
        return {"steps": steps, "seconds": seconds, "evaluation": trainer.state.evaluation}


def run(folder: Folder) -> None:
    """The stage "training"."""
    inputs = recipe()
    found: dict[str, dict[int, float]] = {}
    for name, dtype, kernels, captured, steps in WAYS:
        with folder.part(f"training, {name}"):
            result = train(inputs, dtype, kernels, captured, steps if ON_GPU else min(steps, 20))
            found[name] = result["losses"]
            folder.append("training", name=name, steps=steps, samples=inputs.config.batch_size, **result)
            print(f"{name}: losses {result['losses']} in {result['seconds']:.1f} s", flush=True)
    with folder.part("a run of the trainer"):
        folder.append("run", **run_whole(inputs, 60 if ON_GPU else 4))
    with folder.part("bfloat16 learns as float32 does"):
        half, single = found["captured, bf16"], found["eager, fp32"]
        last = max(single)
        apart = abs(half[last] - single[last]) / single[last]
        assert apart <= ALLOWED, f"after {last} steps {half[last]:.4f}, in float32 {single[last]:.4f}"
        assert half[last] < half[1], "the loss did not fall"
