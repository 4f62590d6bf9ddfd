"""Fixtures for all tests."""

import dataclasses
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from m4.config import DataSection, LogSection, ModelSection, TrainConfig
from tests.runs import REPOSITORY, TINY, write_config, write_tokens
from tests.saved_runs import save_run, saved_config, write_data

# Without a GPU, Triton kernels are tested through Triton's interpreter. Triton reads this when it is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread for PyTorch and the compiled kernels; ask for it where threads would wait for a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder beside the repository with real Penn Action labels and video frames."""
    shared = REPOSITORY.parent / "shared"
    if not shared.is_dir():
        pytest.skip(f"real data not at hand: {shared} does not exist")
    return shared


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, with setuptools.setup switched off."""
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("m4_setup", REPOSITORY / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def token_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tokens")
    write_tokens(root, "train", 11, seed=0)
    write_tokens(root, "eval", 7, seed=1)
    return root


@pytest.fixture
def tiny_config(tmp_path, token_root) -> Path:
    return write_config(tmp_path / "tiny.yaml", token_root)


@pytest.fixture
def tiny_train_config(tmp_path, token_root) -> TrainConfig:
    """The same as `tiny_config`, made without omegaconf, which a machine with a GPU may lack."""
    values = yaml.safe_load(TINY)
    values["model"], values["log"] = ModelSection(**values["model"]), LogSection(**values["log"])
    data = DataSection(root=str(token_root), cache_dir=str(tmp_path / "cache"))
    return TrainConfig(**values, data=data, run_name="tiny", output_dir=str(tmp_path / "runs"))


@pytest.fixture
def config(tiny_train_config):
    """Vocabularies of different sizes, so that limits of classes are at work."""
    return dataclasses.replace(tiny_train_config, vocab_sizes=[64, 60, 64, 60])


@pytest.fixture(scope="session")
def picture_data(tmp_path_factory) -> Path:
    """Tokens that pictures can be made of. Read only."""
    return write_data(tmp_path_factory.mktemp("pictures") / "tokens", {"train": 5, "eval": 6})


@pytest.fixture
def saved_run(tmp_path, picture_data) -> Path:
    """The folder of a run with two checkpoints, its data elsewhere."""
    return save_run(saved_config(picture_data, tmp_path / "runs"))
