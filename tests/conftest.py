"""Fixtures for all tests."""

import os
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]

# Without a GPU, Triton kernels are tested through Triton's interpreter. Triton reads this when it is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder beside the repository with real Penn Action labels and video frames."""
    shared = REPOSITORY.parent / "shared"
    if not shared.is_dir():
        pytest.skip(f"real data not at hand: {shared} does not exist")
    return shared
