"""The run directory: used from any folder, by one process, with room for a checkpoint; and runs that moved."""

import errno
import fcntl
import os
import shlex
import shutil
import subprocess

import pytest

from m4.checkpoint import newest_whole
from m4.config import load_config
from m4.errors import ConfigError
from m4.run import directory
from m4.run.directory import check_not_moved, check_room, only_process, resolve_paths
from m4.training.trainer import Trainer
from tests.runs import TINY, command, environment, run_command_line


@pytest.fixture
def config(tiny_config):
    return load_config(tiny_config, ["stop_after_steps=2"])[0]


@pytest.fixture
def project(tmp_path, token_root):
    """A folder with relative paths in its configuration, and another one beside it."""
    home = tmp_path / "home"
    home.mkdir()
    shutil.copytree(token_root, home / "tokens")
    (home / "tiny.yaml").write_text(f"{TINY}data: {{root: tokens}}\nstop_after_steps: 2\n")
    (tmp_path / "elsewhere").mkdir()
    return home


def _train(folder, config, *overrides):
    return run_command_line("m4.train", "--config", config, *overrides, cwd=folder)


def test_saved_paths_are_absolute(project, monkeypatch):
    monkeypatch.chdir(project)
    config = load_config("tiny.yaml", ["data.cache_dir=cache"])[0]
    config = resolve_paths(config)
    assert config.output_dir == str(project / "runs")
    assert (config.data.root, config.data.cache_dir) == (str(project / "tokens"), str(project / "cache"))
    assert config.data.sample_dir == str(project / "data/sample")
    assert resolve_paths(config) == config
    config.data.root = config.data.cache_dir = None
    assert resolve_paths(config).data.root is resolve_paths(config).data.cache_dir is None


def test_a_run_goes_on_from_any_folder(project):
    """With the saved configuration, or with other words for the same place."""
    assert _train(project, "tiny.yaml").returncode == 0
    elsewhere, run = project.parent / "elsewhere", project / "runs" / "tiny"
    for step, arguments in (
        (3, ("../home/runs/tiny/config.yaml",)),
        (4, (run / "config.yaml",)),
        (5, ("../home/tiny.yaml", "data.root=../home/tokens", "output_dir=../home/runs")),
    ):
        done = _train(elsewhere, *arguments, f"stop_after_steps={step}")
        assert done.returncode == 0, done.stderr
        assert "resuming from" in done.stderr
        path, meta = newest_whole(run)
        assert (meta["step"], path.parent.parent) == (step, run)
        assert meta["config"]["data"]["root"] == str(project / "tokens")
    assert list(elsewhere.iterdir()) == []


def test_a_run_that_moved_says_how_to_go_on(project):
    assert _train(project, "tiny.yaml").returncode == 0
    moved = project.parent / "moved runs" / "first"
    moved.parent.mkdir()
    (project / "runs" / "tiny").rename(moved)
    done = _train(project, moved / "config.yaml")
    assert done.returncode == 2
    assert shlex.join([f"output_dir={moved.parent}", "run_name=first"]) in done.stderr
    assert not (project / "runs" / "tiny").exists()
    done = _train(project, moved / "config.yaml", f"output_dir={moved.parent}", "run_name=first", "stop_after_steps=3")
    assert done.returncode == 0, done.stderr
    assert newest_whole(moved)[1]["step"] == 3


def test_a_moved_project_says_where_its_data_is(project):
    """Run and data moved together, the old place is gone: the saved configuration says what to add, and that works."""
    assert _train(project, "tiny.yaml", "data.cache_dir=cache").returncode == 0
    moved = project.rename(project.parent / "moved home")
    done = _train(moved, "runs/tiny/config.yaml")
    assert done.returncode == 2
    said = done.stderr.partition("to resume it here add ")[2].partition(", for a new run")[0]
    added = [f"output_dir={moved / 'runs'}", "run_name=tiny", f"data.root={moved / 'tokens'}"]
    assert shlex.split(said) == [*added, f"data.cache_dir={moved / 'cache'}"]
    done = _train(moved, "runs/tiny/config.yaml", *shlex.split(said), "stop_after_steps=3")
    assert done.returncode == 0, done.stderr
    assert newest_whole(moved / "runs" / "tiny")[1]["step"] == 3
    assert not project.exists()


def test_home_folder(config, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config.output_dir, config.data.root, config.data.cache_dir = "~/runs", "~/data", "~"
    config.data.sample_dir = "~/sample"
    found = resolve_paths(config)
    assert (found.output_dir, found.data.root) == (str(tmp_path / "runs"), str(tmp_path / "data"))
    assert (found.data.cache_dir, found.data.sample_dir) == (str(tmp_path), str(tmp_path / "sample"))


def test_a_new_run_from_a_saved_configuration(config, tmp_path):
    assert Trainer(config).run("command") == 0
    saved = config.run_dir / "config.yaml"
    check_not_moved(saved, load_config(saved)[0], [])
    other = load_config(saved, ["run_name=other"])[0]
    check_not_moved(saved, other, ["run_name=other"])
    with pytest.raises(ConfigError, match="for a new run add run_name=NAME"):
        check_not_moved(saved, other, ["lr=0.1"])


@pytest.mark.parametrize(
    "name", ["with space", "quote'\"s", "$(touch x);&", "a=b,c:d", "Übung-练习", "line\nfeed", "-rf", "{x}", "%s%d"]
)
def test_odd_characters_in_the_folder(config, tmp_path, name):
    """They reach the disk as they are, and the saved configuration means them."""
    config.output_dir, config.log.tensorboard = str(tmp_path / name), True
    assert Trainer(config).run("command") == 0
    saved = load_config(tmp_path / name / "tiny" / "config.yaml", ["stop_after_steps=3"])[0]
    assert saved.output_dir == str(tmp_path / name)
    assert Trainer(saved).run("command") == 0
    assert newest_whole(config.run_dir)[1]["step"] == 3
    assert any(config.run_dir.glob("events.out.tfevents.*"))


def test_two_trainings_in_one_folder(config, tiny_config):
    """Of two commands, or of two words for one folder; the first is not disturbed."""
    with only_process(config.run_dir):
        os.symlink(config.output_dir, tiny_config.parent / "link")
        done = run_command_line(
            "m4.train", "--config", tiny_config, f"output_dir={tiny_config.parent / 'link'}", cwd=tiny_config.parent
        )
    assert done.returncode == 2
    assert "another process is training there; wait, or set run_name=NAME" in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error")]) == 1
    assert sorted(path.name for path in config.run_dir.iterdir()) == [".lock", "checkpoints"]


def test_a_file_system_without_locks_is_named(config, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(ConfigError, match=r"\.lock: this file system cannot lock files \(No locks available\)"):
        Trainer(config).run("command")


@pytest.mark.parametrize("name", ["", "checkpoints"])
def test_a_file_where_a_folder_should_be(config, name):
    (config.run_dir.parent).mkdir()
    if name:
        config.run_dir.mkdir()
    (config.run_dir / name).write_text("a file") if name else config.run_dir.write_text("a file")
    with pytest.raises(ValueError, match=rf"{config.run_dir / name}: expected a folder that can be written"):
        Trainer(config).run("command")


def test_no_room_for_a_checkpoint_is_said_before_any_work(config, monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000)
    monkeypatch.setattr(directory.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(Trainer, "loop", lambda _: pytest.fail("training"))
    with pytest.raises(ConfigError, match=r"runs/tiny: 0.00 GB are free .*a checkpoint takes .*output_dir"):
        Trainer(config).run("command")


def test_a_file_system_that_does_not_tell_its_size(config, monkeypatch):
    monkeypatch.setattr(directory.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))
    config.output_dir = str(config.run_dir)
    check_room(config.run_dir, 10**9)


def test_a_run_directory_that_vanishes_is_one_line(config, tiny_config):
    """The first save after hours finds no folder: the error names what is not there."""
    trainer = Trainer(config)
    trainer.progress.start = lambda _: shutil.rmtree(config.run_dir)
    with pytest.raises(OSError, match=r"No such file or directory.*runs/tiny/metrics.jsonl"):
        trainer.run("command")


def test_a_read_only_run_directory(tiny_config):
    if os.geteuid() == 0:
        pytest.skip("root writes anywhere")
    (tiny_config.parent / "runs").mkdir(mode=0o500)
    done = subprocess.run(
        command("m4.train", "--config", tiny_config), env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "expected a folder that can be written to" in done.stderr
