"""What guards a run does so on all ranks alike: skipped steps, averages, saves that fail, other starting points."""

import json

import pytest
import torch
from safetensors.torch import load_file

from m4.checkpoint import EMA_FILE, MODEL_FILE, newest_whole, step_folders
from m4.config import load_config
from m4.distributed import World
from m4.run.metrics import read_metrics
from m4.training.finite import NON_FINITE_FILE
from tests.rank_program import GUARDED, train
from tests.ranks import run_ranks
from tests.runs import write_config
from tests.training.step_setup import assert_same


@pytest.fixture(scope="module")
def trained(tmp_path_factory, token_root):
    """Runs of 20 steps of 8 samples, two a micro-batch, by one process and by two ranks."""
    folder = tmp_path_factory.mktemp("guards")
    path = write_config(folder / "tiny.yaml", token_root)
    text = path.read_text().replace("batch_size: 4\n", "batch_size: 2\n", 1)
    for ranks in ("1", "2"):
        (folder / ranks).mkdir()
        (folder / ranks / "tiny.yaml").write_text(text.replace(str(folder / "runs"), str(folder / ranks)))
    config, _ = load_config(folder / "1" / "tiny.yaml")
    assert [train(config, World(), name) for name in ("ddp", "skips", "fp16", "ema", "muon")] == [""] * 5
    outcomes = run_ranks(2, "tests.rank_program", folder / "2" / "tiny.yaml", "ddp", "two-one-four", *GUARDED)
    for status, said in outcomes:
        assert status == 0, said
    assert outcomes[1][1] == "", "one rank speaks"
    return folder


def _lines(run_dir, kind="train"):
    return [line for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == kind]


def _losses(run_dir):
    return [line["loss"] for line in _lines(run_dir)]


def _weights(run_dir, name=MODEL_FILE):
    path, meta = newest_whole(run_dir)
    assert meta["step"] == 20
    return load_file(path / name)


def _state(run_dir):
    return torch.load(newest_whole(run_dir)[0] / "state.pt", weights_only=True)


def test_accuracies_are_those_of_one_process(trained):
    """Of the first steps, before sums in another order decide which id is the likeliest."""
    lines = [_lines(trained / ranks / "ddp")[:5] for ranks in ("1", "2")]
    for one, many in zip(*lines, strict=True):
        assert many["accuracy"] == pytest.approx(one["accuracy"])
        assert many["mfu"] > 0
    assert any(share for line in lines[0] for share in line["accuracy"].values())


@pytest.mark.parametrize("name", ["skips", "fsdp-skips"])
def test_all_ranks_skip_the_step_that_one_of_them_spoilt(trained, name):
    """It is noted once, with the samples of the whole step, and all go on as one process does."""
    one, many = trained / "1" / "skips", trained / "2" / name
    assert [line["skipped_steps"] for line in _lines(many)] == [0] * 4 + [1] * 16
    assert _lines(many)[4]["grad_norm"] is None
    noted = [[json.loads(line) for line in (r / NON_FINITE_FILE).read_text().splitlines()] for r in (one, many)]
    assert [line["step"] for line in noted[1]] == [5]
    assert noted[1][0]["sample_ids"] == list(range(32, 40))
    for key in ("sample_ids", "rows", "pids", "split"):
        assert noted[1][0][key] == noted[0][0][key]
    sound = [place for place in range(20) if place != 4]  # of the spoilt step, one process spoils all the samples
    losses = [[_losses(r)[place] for place in sound] for r in (one, many)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert_same(_weights(one), _weights(many), rtol=2e-3, atol=2e-5)


def test_an_overflow_on_one_rank_halves_the_scale_of_all(trained):
    one, many = trained / "1" / "fp16", trained / "2" / "fp16"
    assert _state(many)["scaling"] == _state(one)["scaling"]
    assert _state(many)["scaling"]["scale"] == 2.0**15
    assert [line["skipped_steps"] for line in _lines(many)] == [0] * 20
    losses = [[loss for place, loss in enumerate(_losses(r)) if place != 4] for r in (one, many)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_averages_are_those_of_one_process(trained):
    """Resumed after seven steps, too."""
    one, many = trained / "1" / "ema", trained / "2" / "ema"
    assert_same(_weights(one, EMA_FILE), _weights(many, EMA_FILE), rtol=2e-3, atol=2e-5)
    assert_same(_weights(trained / "2" / "ddp"), _weights(many), rtol=0, atol=0)
    for a, b in zip(_lines(one, "eval"), _lines(many, "eval"), strict=True):
        assert b["ema"]["loss"] == pytest.approx(a["ema"]["loss"], rel=1e-6)


def test_muon_is_that_of_one_process(trained):
    """As far as torch's goes, which works in bfloat16."""
    losses = [_losses(trained / ranks / "muon") for ranks in ("1", "2")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_checkpointed_activations_go_with_divided_weights(trained):
    assert _losses(trained / "2" / "fsdp-checkpointing") == pytest.approx(_losses(trained / "1" / "ddp"), rel=1e-6)


def test_all_ranks_go_on_where_the_first_cannot_save(trained):
    full, usual = trained / "2" / "full", trained / "2" / "ddp"
    assert [path.name[-2:] for path in step_folders(full)] == ["15", "20"]
    assert_same(_weights(usual), _weights(full), rtol=0, atol=0)


def test_all_ranks_end_where_the_last_save_fails(trained):
    texts = [(trained / "2" / f"full-at-the-end.{rank}.said").read_text() for rank in range(2)]
    assert texts[0] == texts[1] == "[Errno 28] No space left on device: 'state.pt'"
    assert newest_whole(trained / "2" / "full-at-the-end")[1]["step"] == 15


def test_all_ranks_go_on_from_a_checkpoint_that_is_named(trained):
    """The bits of two ranks that were never interrupted."""
    branch = trained / "2" / "branch"
    assert _lines(branch)[0]["step"] == 8
    assert_same(_weights(trained / "2" / "ddp"), _weights(branch), rtol=0, atol=0)


def test_all_ranks_start_from_given_weights(trained):
    before, begun = _lines(trained / "2" / "ddp", "eval")[-1], _lines(trained / "2" / "fsdp-from", "eval")[0]
    assert (before["step"], begun["step"]) == (20, 0)
    assert begun["loss"] == pytest.approx(before["loss"], rel=1e-6)
