"""The comparison of bf16 with fp32: its three runs, what it writes and when it fails."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import precision
from m4.config import load_config
from m4.errors import ConfigError
from tests.runs import REPOSITORY

LOSSES = {"fp32": [2.0, 1.0], "bf16": [2.01, 0.995], "control": [2.0, 1.02]}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """In place of training: (dtype, learning rate) of each run, which has the losses above."""
    runs: list[tuple[str, float]] = []

    def pretend(command: list[str]) -> int:
        config = load_config(command[4], command[5:])[0]
        runs.append((config.dtype, config.lr))
        config.run_dir.mkdir(parents=True)
        lines = [
            {"kind": "train", "step": step, "loss": loss} for step, loss in enumerate(LOSSES[config.run_name], start=1)
        ]
        (config.run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return 0

    monkeypatch.setattr(precision, "execute", pretend)
    return runs


@pytest.mark.parametrize(("within", "status"), [("1", 0), ("0.4", 1)])
def test_a_control_says_what_a_small_change_grows_to(
    tmp_path: Path,
    trained: list[tuple[str, float]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    within: str,
    status: int,
) -> None:
    recipe = str(REPOSITORY / "M4-tiny.yaml")
    words = ["--config", recipe, "--steps", "2", "--out", str(tmp_path), "--within", within, "--set", "lr=0.5"]
    monkeypatch.setattr(sys, "argv", ["precision", *words])
    assert precision.main() == status  # bf16 is 0.5 % off, the control 2 %
    assert trained == [("fp32", 0.5), ("bf16", 0.5), ("fp32", pytest.approx(0.50005, rel=1e-9))]
    written = json.loads((tmp_path / "precision.json").read_text())
    assert written["losses"] == LOSSES
    assert written["difference_percent"] == {
        "bf16": pytest.approx([0.5, 0.5]),
        "control": pytest.approx([0.0, 2.0]),
    }
    said = capsys.readouterr().out
    assert "bf16: 0.50 % off fp32 in the mean of 2 steps, 0.50 % at most" in said
    assert "control: 1.00 % off fp32 in the mean of 2 steps, 2.00 % at most, 1 steps above" in said
    assert (tmp_path / "precision.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("losses", [[1.0], [1.0, None], []])
def test_runs_that_cannot_be_compared(
    tmp_path: Path, trained: list[tuple[str, float]], monkeypatch: pytest.MonkeyPatch, losses: list[float]
) -> None:
    monkeypatch.setitem(LOSSES, "bf16", losses)
    with pytest.raises(ConfigError, match=r"steps; remove the runs|does not have a finite loss of every step"):
        precision.compare(REPOSITORY / "M4-tiny.yaml", 2, tmp_path, [])
