"""docs/moving-from-nano4m.md: its code runs, from top to bottom, and its lines do what it says."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from m4.compat import FourM
from tests.compat import nano4m_project
from tests.compat.padded_form import PaddedFourM
from tests.runs import REPOSITORY

pytest.importorskip("omegaconf")  # which the project is read with; a machine with a GPU may lack it
from tests.compat.test_moving import project  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = (REPOSITORY / "docs/moving-from-nano4m.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved_run: Path) -> None:
    """In a project's folder with a run, and a checkpoint that nano4M wrote."""
    code = blocks("python")
    assert len(code) == 6
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/first").symlink_to(saved_run)
    theirs = PaddedFourM(["tok_rgb", "coords"], [64000, 8192], [256, 39], 64, 2, 2, 32)
    torch.save({"model": theirs.state_dict(), "iteration": 9}, tmp_path / "checkpoint-final.pth")
    names: dict[str, Any] = {}
    for block in code:
        exec(block, names)
    assert isinstance(names["model"], FourM)
    assert names["model"].to_logits.weight.grad.any()
    assert torch.equal(names["ours"].to_logits.weight, theirs.to_logits.weight)
    assert set(names["batch"]) == {f"{side}_{field}" for side in ("enc", "dec")
                                   for field in ("tokens", "positions", "modalities", "pad_mask")}  # fmt: skip
    assert names["pose"].shape == (1, 39)
    again = FourM(**_arguments(names["config"]))
    nano4m_project.resume(tmp_path / "first.pth", again)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in names["trained"].state_dict().items())
    assert (tmp_path / "first.safetensors").stat().st_size > 0


def _arguments(config: Any) -> dict[str, Any]:
    model = config.model_config()
    names = ("modalities", "vocab_sizes", "max_seq_lens", "dim", "enc_depth", "dec_depth", "head_dim")
    return {name: getattr(model, name) for name in names}


def test_the_two_lines(project: Path) -> None:  # noqa: F811
    """They are those of the configuration that tests/compat/test_moving.py trains with."""
    (text,) = blocks("yaml")
    said, trained = yaml.safe_load(text), yaml.safe_load(project.read_text())
    assert list(said) == ["model_config", "train_loader_config"]
    for section, keys in said.items():
        assert keys == {"_target_": trained[section]["_target_"]}


def test_what_it_says_of_arguments() -> None:
    """The order of nano4M's constructor, by which they may be given without names."""
    read_keys = ["enc_tokens", "dec_tokens", "enc_modalities", "dec_modalities", "enc_positions", "dec_positions",
                 "enc_pad_mask", "dec_pad_mask"]  # fmt: skip
    model = FourM(*read_keys, ["a"], [8], [4], 16, 1, 2, 8, 2.0, False, -100, 0.02, False)
    assert (model.modalities, model.config.dim, model.config.enc_depth, model.config.dec_depth) == (["a"], 16, 1, 2)
    assert (model.config.mlp_ratio, model.per_modality_loss_avg) == (2.0, False)
    assert model.read_keys == {f"{name}_read_key": name for name in read_keys}
