"""What an evaluation writes and prints."""

import json

import pytest

from m4.evaluation.report import evaluate_run, report_table
from m4.evaluation.unigram import Unigram
from m4.saved_run import SavedRun
from tests.saved_runs import write_data


def test_a_file_a_split(saved_run, picture_data):
    run = SavedRun.open(saved_run)
    report = evaluate_run(run)
    assert json.loads((saved_run / "evaluation-eval.json").read_text()) == report
    assert (report["split"], report["samples"], report["checkpoint"]) == ("eval", 6, "step-00000005")
    assert report["data_root"] == str(picture_data)
    assert evaluate_run(run) == report
    assert evaluate_run(run, "train")["samples"] == 5
    assert sorted(path.name for path in saved_run.glob("evaluation-*")) == [
        "evaluation-eval.json",
        "evaluation-train.json",
    ]


def test_the_first_samples_only(saved_run):
    run = SavedRun.open(saved_run)
    report = evaluate_run(run, max_samples=5)
    assert report["samples"] == 5
    assert "the first 5 of 6 samples" in report_table(report)
    assert evaluate_run(run, max_samples=50)["samples"] == 6
    whole = report_table(evaluate_run(run))
    assert "split eval: 6 samples" in whole


def test_other_data_is_said(saved_run, tmp_path, caplog):
    evaluate_run(SavedRun.open(saved_run))
    assert "not what this run was trained on" not in caplog.text
    other = write_data(tmp_path / "other", {"train": 2, "eval": 2})
    assert evaluate_run(SavedRun.open(saved_run, data=other))["samples"] == 2
    assert f"train in {other} is not what this run was trained on" in caplog.text


def test_figures_that_nothing_decides_are_null(saved_run, monkeypatch):
    nothing = Unigram(1.0, float("nan"), float("nan"))
    monkeypatch.setattr("m4.evaluation.losses.unigram_baseline", lambda *_: nothing)
    evaluate_run(SavedRun.open(saved_run), max_samples=1)

    def refuse(name):
        raise AssertionError(name)

    report = json.loads((saved_run / "evaluation-eval.json").read_text(), parse_constant=refuse)
    assert report["unigram"]["coords"] == {"entropy": 1.0, "cross_entropy": None, "uniform_weight": None}


def test_a_split_that_is_not_there(saved_run):
    with pytest.raises(ValueError, match="--split: expected train or eval"):
        evaluate_run(SavedRun.open(saved_run), "../eval")
