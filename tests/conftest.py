"""Fixtures for all tests."""

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder beside the repository with real Penn Action labels and video frames."""
    shared = REPOSITORY.parent / "shared"
    if not shared.is_dir():
        pytest.skip(f"real data not at hand: {shared} does not exist")
    return shared
