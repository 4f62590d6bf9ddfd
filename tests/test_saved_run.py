"""Runs that were moved, or are looked at from elsewhere: evaluated and generated from, without side effects."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from m4.evaluate import main as evaluate_main
from m4.generate import main as generate_main
from m4.run.directory import moved_along
from m4.saved_run import SavedRun
from tests.saved_runs import edit_saved_config, save_run, saved_config, write_data


@pytest.fixture
def command(monkeypatch):
    """Call a command with arguments, as from a shell."""

    def call(main, *arguments):
        monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
        return main()

    return call


def _files(*folders):
    return sorted(str(path) for folder in folders for path in folder.rglob("*") if ".cache" not in path.parts)


def test_a_moved_run_evaluates_and_generates_from_anywhere(saved_run, tmp_path, monkeypatch, command):
    moved = tmp_path / "elsewhere" / "renamed"
    moved.parent.mkdir()
    saved_run.rename(moved)
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    assert command(evaluate_main, "--run", moved) == 0
    assert json.loads((moved / "evaluation-eval.json").read_text())["samples"] == 6
    assert command(generate_main, "--run", moved, "--out", tmp_path / "out.png", "--steps", 1, "--samples", 1) == 0
    assert _files(cwd, saved_run.parent) == []


@pytest.mark.parametrize("data", ["root", "sample_dir"])
def test_a_project_that_moved_with_its_data(tmp_path, monkeypatch, data, caplog):
    """Saved paths are absolute; run and data, moved together, are found as they lay to each other."""
    project = tmp_path / "home" / "project"
    config = saved_config(write_data(project / "data" / "tokens", {"train": 3, "eval": 2}), project / "runs")
    folder = save_run(config, steps=(1,))
    edit_saved_config(folder, **({} if data == "root" else {"root": None, "sample_dir": config.data.root}))
    assert SavedRun.open(folder).root == project / "data" / "tokens"
    moved = project.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    for run in (moved / "runs" / "small", Path("moved/runs/small")):
        assert SavedRun.open(run).root == moved / "data" / "tokens"
    # The place that was saved goes first, and where neither is there, both are named.
    write_data(Path(config.data.root), {"eval": 1})
    assert SavedRun.open(moved / "runs" / "small").root == project / "data" / "tokens"
    shutil.rmtree(project)
    shutil.rmtree(moved / "data")
    with pytest.raises(
        ValueError, match=rf"is not in {project}/data/tokens or {moved}/data/tokens; name it with --data"
    ):
        SavedRun.open(moved / "runs" / "small")


def test_paths_that_share_only_the_root_did_not_move_together(tmp_path):
    config = saved_config(Path("/somewhere/data"), Path("/elsewhere/runs"))
    assert moved_along(tmp_path / "small", config, config.data.root) is None


def _old_run(tmp_path, **data):
    """A run of an older version, started in tmp_path/project with relative paths."""
    project = tmp_path / "project"
    root = write_data(project / "data" / "tokens", {"train": 3, "eval": 2})
    folder = save_run(saved_config(root, project / "runs"), steps=(1,))
    edit_saved_config(folder, output_dir="runs", **data)
    return project, folder


@pytest.mark.parametrize("data", [{"root": "data/tokens"}, {"root": None, "sample_dir": "data/tokens"}])
def test_relative_data_of_an_old_run(tmp_path, monkeypatch, data):
    project, folder = _old_run(tmp_path, **data)
    for cwd in (project, tmp_path, folder, project / "runs"):
        monkeypatch.chdir(cwd)
        assert SavedRun.open(folder).root.resolve() == project / "data" / "tokens"
    # Where the run was started goes before a folder of the same name where the command is called.
    other = tmp_path / "other"
    write_data(other / "data" / "tokens", {"eval": 1})
    monkeypatch.chdir(other)
    assert SavedRun.open(folder).root.resolve() == project / "data" / "tokens"
    # Moved away from there, only the current folder is left to look in.
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    monkeypatch.chdir(project)
    assert SavedRun.open(moved).root.resolve() == project / "data" / "tokens"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"is not in .*data/tokens.*--data ROOT"):
        SavedRun.open(moved)
    assert SavedRun.open(moved, data=project / "data" / "tokens").root == project / "data" / "tokens"


def test_the_sample_set_is_used_or_missed_but_never_made(saved_run, picture_data, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    before = _files(tmp_path)
    edit_saved_config(saved_run, root=None, sample_dir=str(tmp_path / "no sample"), sample_videos=7)
    made = r"--data ROOT, or make it: python -m m4.data sample --out '.*no sample' --videos 7"
    with pytest.raises(ValueError, match=made):
        SavedRun.open(saved_run)
    assert _files(tmp_path) == before
    edit_saved_config(saved_run, root=None, sample_dir=str(picture_data))
    assert SavedRun.open(saved_run).root == picture_data
    assert "sample set" in caplog.text
    assert "training on" not in caplog.text


def test_a_cache_folder_that_is_gone_is_not_made_anew(saved_run, tmp_path):
    edit_saved_config(saved_run, cache_dir=str(tmp_path / "gone" / "cache"))
    assert len(SavedRun.open(saved_run).open_split("eval")) == 6
    assert not (tmp_path / "gone").exists()
    (tmp_path / "kept").mkdir()
    edit_saved_config(saved_run, cache_dir=str(tmp_path / "kept"))
    assert len(SavedRun.open(saved_run).open_split("eval")) == 6
    assert any((tmp_path / "kept").iterdir())


def test_checkpoints_by_name_and_by_path(saved_run, tmp_path):
    newest, older = SavedRun.open(saved_run), SavedRun.open(saved_run, checkpoint=Path("step-00000003"))
    assert (newest.checkpoint_name, older.checkpoint_name) == ("step-00000005", "step-00000003")
    weights = [run.model().to_logits.weight for run in (newest, older)]
    assert not torch.equal(*weights)
    by_path = SavedRun.open(saved_run, checkpoint=saved_run / "checkpoints" / "step-00000003")
    assert torch.equal(by_path.model().to_logits.weight, weights[1])
    shutil.copytree(older.checkpoint, tmp_path / "copy")
    copy = SavedRun.open(saved_run, checkpoint=tmp_path / "copy")
    assert copy.checkpoint_name == str(tmp_path / "copy")
    assert torch.equal(copy.model().to_logits.weight, weights[1])


def test_damaged_checkpoints_are_named(saved_run):
    folder = saved_run / "checkpoints" / "step-00000003"
    meta = json.loads((folder / "meta.json").read_text())
    for text, said in (
        ("{", "cannot be read"),
        (json.dumps({**meta, "config": {**meta["config"], "dim": 3}}), "dim: unknown key"),
        (json.dumps({**meta, "config": [1]}), "config is a list, expected dict"),
        (json.dumps({key: value for key, value in meta.items() if key != "config"}), "lacks 'config'"),
    ):
        (folder / "meta.json").write_text(text)
        with pytest.raises(ValueError, match=f"step-00000003.*{said}"):
            SavedRun.open(saved_run, checkpoint=folder)
    shutil.rmtree(saved_run / "checkpoints" / "step-00000005")
    (folder / "meta.json").write_text("{")
    with pytest.raises(ValueError, match=r"--run: .*no whole checkpoint"):
        SavedRun.open(saved_run)
