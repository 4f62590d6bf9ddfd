"""What torchrun says in the environment."""

import pytest

from m4.distributed import World, count_from_environment
from m4.errors import ConfigError


@pytest.mark.parametrize("text", ["", " ", "two", "1.0", "-1", "1e3", "٣", "9" * 5000])
def test_what_is_no_number_of_processes(monkeypatch, text):
    monkeypatch.setenv("WORLD_SIZE", text)
    with pytest.raises(ConfigError, match=r"^WORLD_SIZE: expected a number, got"):
        World.from_environment()


def test_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert World.from_environment() == World(rank=0, size=1)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert World.from_environment() == World(rank=0, size=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE: training runs in one process, got 2"):
        World.from_environment()
    assert count_from_environment("WORLD_SIZE", 1) == 2
