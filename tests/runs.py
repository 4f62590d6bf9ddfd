"""A tiny token set and configuration, and the real command line in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPE = REPOSITORY / "M4-config.yaml"

MODALITIES = {"tok_rgb": 12, "coords": 6, "tok_rgb_next": 12, "coords_next": 6}
TINY = """
modalities: [tok_rgb, coords, tok_rgb_next, coords_next]
vocab_sizes: [64, 64, 64, 64]
max_seq_lens: [12, 6, 12, 6]
input_tokens_range: [6, 12]
target_tokens_range: [4, 12]
batch_size: 4
global_batch_size: 8
num_tokens_per_sample: 1000   # 8 samples a step: a step is 0.008 M counted tokens, the run is 20 steps
total_tokens: 0.16
token_warmup: 0.04
eval_freq: 0.04
save_ckpt_freq: 0.04
eval_samples: 6
keep_ckpts: 3
log: {tensorboard: false}
model: {dim: 16, head_dim: 8, enc_depth: 1, dec_depth: 1}
device: cpu
"""


def write_tokens(root: Path, split: str, samples: int, seed: int) -> None:
    """A split in the layout of the prepared data, flattened: the next frame repeats the reference."""
    random = np.random.default_rng(seed)
    for sample in range(samples):
        row = {name: random.integers(0, 50, length) for name, length in MODALITIES.items()}
        row["tok_rgb_next"], row["coords_next"] = row["tok_rgb"], row["coords"]
        for name, ids in row.items():
            folder = root / split / name / f"{sample:06d}"
            folder.mkdir(parents=True)
            np.save(folder / f"{name}.npy", ids.astype(np.uint16))


def write_config(path: Path, root: Path) -> Path:
    path.write_text(f"{TINY}data: {{root: {root}}}\noutput_dir: {path.parent / 'runs'}\n")
    return path


def write_yaml(folder: Path, text: str) -> Path:
    """A configuration file of this text."""
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def command(module: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def environment() -> dict[str, str]:
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


def run_command_line(module: str, *arguments: object, cwd: Path, **more) -> subprocess.CompletedProcess:
    """Run ``python -m module …`` and capture what it says."""
    return subprocess.run(
        command(module, *arguments), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=120, **more
    )
