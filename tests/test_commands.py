"""A user's slip with a command is one line that names the argument, said before any work; status 2 and no traceback."""

import dataclasses
import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

import m4.evaluate
import m4.generate
import m4.plots
from m4.cli import exit_status
from tests.saved_runs import metrics_line, save_run, saved_config

COMMANDS = {"evaluate": m4.evaluate.main, "generate": m4.generate.main, "plots": m4.plots.main}


@pytest.fixture
def call(monkeypatch, capsys):
    """A function: run a command line in this process; its status and what it wrote to stdout and stderr."""

    def run(command, *arguments):
        monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
        status = exit_status(COMMANDS[command])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def no_work(monkeypatch):
    """Predicting, evaluating and drawing fail the test."""

    def refuse(*_, **__):
        raise AssertionError("work was done before the arguments were checked")

    for name in ("m4.generate.generate", "m4.evaluation.report.evaluate", "m4.plots.loss_curves"):
        monkeypatch.setattr(name, refuse)


def _fault(result, *said):
    status, out, err = result
    assert (status, out) == (2, ""), err
    assert re.fullmatch(r"error: [^\n]+\n", err)
    for part in said:
        assert part in err


@pytest.mark.parametrize("command", ["evaluate", "generate"])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "tpu"], ["--device", "cpu, cuda, cuda:INDEX or auto", "'tpu'"]),
        (["--device", ""], ["--device", "''"]),
        (["--device", "cuda:-1"], ["--device", "'cuda:-1'"]),
        (["--device", "cuda:9"], ["--device", "cuda:9 is not there"]),
        (["--device", "cuda:2000000000000"], ["--device", "cuda:2000000000000"]),
        (["--split", "nosuch"], ["--split", "train or eval", "'nosuch'"]),
        (["--split", ""], ["--split", "''"]),
        (["--split", "../eval"], ["--split", "'../eval'"]),
        (["--data", "/nowhere"], ["--data", "'/nowhere'", "not there"]),
        (["--data", __file__], ["--data", "a file"]),
        (["--data", ""], ["--data", "''"]),
        (["--checkpoint", "step-7"], ["--checkpoint", "'step-7'", "step-00000003, step-00000005"]),
        (["--checkpoint", "/"], ["--checkpoint", "meta.json"]),
        (["--wrong"], ["--wrong", "--help"]),
    ],
)
def test_arguments_of_saved_runs(call, no_work, saved_run, tmp_path, command, arguments, said):
    out = ["--out", tmp_path / "g.png"] if command == "generate" else []
    _fault(call(command, "--run", saved_run, *out, *arguments), *said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--temperature", "nan"], ["--temperature", "0 … 1000000", "nan"]),
        (["--temperature", "-1"], ["--temperature", "-1"]),
        (["--temperature", "inf"], ["--temperature", "inf"]),
        (["--temperature", "-inf"], ["--temperature"]),
        (["--temperature", "1e30"], ["--temperature", "1e30"]),
        (["--temperature", "warm"], ["--temperature", "'warm'"]),
        (["--seed", str(2**64)], ["--seed", f"0 … {2**64 - 1}", str(2**64)]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--seed", "1.5"], ["--seed", "'1.5'"]),
        (["--seed", "9" * 5000], ["--seed", "…"]),
        (["--steps", "0"], ["--steps", "at least 1"]),
        (["--steps", str(10**9)], ["--steps", "1 … 295", str(10**9)]),
        (["--samples", "0"], ["--samples", "at least 1"]),
        (["--samples", "-3"], ["--samples", "-3"]),
        (["--samples", str(10**9)], ["--samples", "1 … 6", "eval", str(10**9)]),
        (["--samples", "2", "--pids", "000001"], ["--pids", "not allowed with", "--samples"]),
        (["--pids", "000001", "nosuch"], ["--pids", "eval, such as 000000, 000001, 000002", "'nosuch'"]),
        (["--given", "depth"], ["--given", "tok_rgb, coords, tok_rgb_next, coords_next", "'depth'"]),
        (["--wanted", "depth"], ["--wanted", "'depth'"]),
        (["--given", "coords,coords"], ["--given", "different names", "'coords,coords'"]),
        (["--given", ""], ["--given", "''"]),
        (["--wanted", "none"], ["--wanted", "name what to predict"]),
        (["--given", "coords", "--wanted", "tok_rgb,coords"], ["--given, --wanted", "coords in both"]),
        (["--given", "none", "--guidance", "2"], ["--guidance", "nothing is given"]),
        (["--guidance", "1e9"], ["--guidance", "0 … 1000"]),
        (["--wanted", "coords_next", "--steps", "40"], ["--steps", "1 … 39", "40"]),
        (["--top-p", "1.1"], ["--top-p", "0 … 1"]),
        (["--top-k", "0"], ["--top-k", "1 …"]),
        (["--schedule", "square"], ["--schedule", "cosine", "square"]),
        (["--order", "raster"], ["--order", "confidence", "raster"]),
        (["--temperature-schedule", "onex"], ["--temperature-schedule", "onex"]),
        (["--rollout", "0"], ["--rollout", "1 … 60"]),
        (["--rollout", "2", "--wanted", "coords", "--given", "tok_rgb"], ["--rollout", "tok_rgb_next, coords_next"]),
        (["--rollout", "2", "--given", "tok_rgb_next", "--wanted", "coords_next"], ["--rollout", "tok_rgb, coords"]),
        (["--image", "nowhere.png"], ["nowhere.png", "No such file"]),
        (["--image", __file__], [__file__, "a whole image file"]),
        (["--pose", "pose.json"], ["--pose", "--image"]),
        (["--image", __file__, "--given", "coords"], ["--given", "--pose FILE"]),
        (["--image", __file__, "--given", "coords_next", "--wanted", "coords"], ["--given", "prepared samples"]),
        (["--image", __file__, "--split", "eval"], ["--split", "--image"]),
        (["--image", __file__, "--pids", "000001"], ["--pids", "--image"]),
        (["--seconds", "0"], ["--seconds"]),
        (["--samples", "7"], ["--samples", "1 … 6", "eval", "7"]),
        (["--cosmos-dir", "/nowhere"], ["--cosmos-dir", "'/nowhere'"]),
        (["--out", "g.xyz"], ["--out", ".png, .jpg", ".npz, .json", "'g.xyz'"]),
        (["--out", "g"], ["--out", "'g'"]),
        (["--out", "."], ["--out", "folder"]),
        (["--out", f"{__file__}/g.png"], ["--out", "cannot be written"]),
        (["--out", "/proc/g.png"], ["--out", "/proc/g.png cannot be written"]),
        (["--out", f"{'g' * 300}.png"], ["--out", "cannot be written", "too long"]),
    ],
)
def test_arguments_of_generate(call, no_work, saved_run, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    _fault(call("generate", "--run", saved_run, "--out", "g.png", *arguments), *said)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_what_is_no_run(call, no_work, saved_run, tmp_path, command):
    out = ["--out", tmp_path / "g.png"]
    out = [] if command == "evaluate" else out
    _fault(call(command, *out), "--run", "required")
    _fault(call(command, "--run", tmp_path / "nowhere", *out), "--run", "nowhere", "not there")
    _fault(call(command, "--run", saved_run / "config.yaml", *out), "--run", "the file")
    _fault(call(command, "--run", "", *out), "--run", "''")
    _fault(call(command, "--run", saved_run.parent, *out), "--run", "holds no run; perhaps one of", str(saved_run))


def test_what_may_not_be_read_or_written(call, no_work, saved_run):
    saved_run.chmod(0o000)
    if os.access(saved_run, os.R_OK):
        saved_run.chmod(0o700)
        pytest.skip("permissions do not bind this user (root)")
    _fault(call("evaluate", "--run", saved_run), "--run", "permissions")
    saved_run.chmod(0o700)
    (saved_run / "checkpoints").chmod(0o000)
    _fault(call("evaluate", "--run", saved_run), "--run", "checkpoints may not be read")
    (saved_run / "checkpoints").chmod(0o700)
    saved_run.chmod(0o500)
    _fault(call("plots", "--run", saved_run), "--out", "loss.png cannot be written: Permission denied")
    _fault(call("evaluate", "--run", saved_run), str(saved_run / "evaluation-eval.json"), "Permission denied")
    saved_run.chmod(0o700)


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_max_samples(call, no_work, saved_run, value):
    _fault(call("evaluate", "--run", saved_run, "--max-samples", value), "--max-samples", value)


def test_every_kind_of_picture(call, saved_run, tmp_path):
    for ending in (".png", ".JPG", ".webp", ".pdf"):
        out = tmp_path / "new folder" / f"g{ending}"
        status, said, err = call("generate", "--run", saved_run, "--out", out, "--steps", 1, "--samples", 1)
        assert (status, err) == (0, "")
        assert f"wrote {out}: 1 samples" in said
        assert out.stat().st_size > 1000
    with Image.open(tmp_path / "new folder" / "g.png") as picture:
        assert picture.width > 3 * 256
    for ending in (".png", ".jpg", ".webp", ".pdf", ".svg"):
        assert call("plots", "--run", saved_run, "--out", tmp_path / f"curve{ending}")[0] == 0
        assert (tmp_path / f"curve{ending}").stat().st_size > 1000


def test_samples_do_not_depend_on_how_many_are_decoded_at_once(call, saved_run, tmp_path, monkeypatch):
    """Sampled in one batch of five and in batches of two."""
    pictures = []
    each = 4 * (295 + 2 * 295) * 16 * (16 + 4)
    for size in (5, 2):
        monkeypatch.setattr("m4.generation.decode._ACTIVATION_BYTES", size * each)
        out = tmp_path / f"{size}.png"
        arguments = ["--samples", 5, "--steps", 2, "--temperature", 1, "--seed", 2**64 - 1]
        assert call("generate", "--run", saved_run, "--out", out, *arguments)[0] == 0
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1]


def test_what_the_masks_left_out_is_said(call, picture_data, tmp_path, caplog):
    config = saved_config(picture_data, tmp_path / "masked")
    run = save_run(dataclasses.replace(config, input_alphas=[4.0, 1.0, 0.0, 0.0], target_alphas=[0.0, 0.0, 1.0, 3.0]))

    def warnings(*options):
        caplog.clear()
        assert call("generate", "--run", run, "--out", tmp_path / "g.npz", "--samples", 1, *options)[0] == 0
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    assert warnings() == []  # in one step
    with np.load(tmp_path / "g.npz") as arrays:
        assert json.loads(str(arrays["about"]))["steps"] == 1
    (later,) = warnings("--steps", 2)
    assert "never showed tok_rgb_next, coords_next" in later
    assert "--steps 1" in later
    asked, shown = warnings("--given", "coords,coords_next", "--wanted", "tok_rgb,tok_rgb_next", "--steps", 1)
    assert "(target_alphas) never asked for tok_rgb:" in asked
    assert "(input_alphas) never showed coords_next:" in shown


def _with_next(text):
    return metrics_line("eval", 1).replace("}\n", f', "next": {text}}}\n') + metrics_line("train", 1)


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        (metrics_line("train", 1) + "{broken}\n" + metrics_line("train", 2), [":2: ", "{broken}"]),
        (metrics_line("train", 1) + "[1, 2]\n", [":2: ", "[1, 2]"]),
        ('{"kind": "train", "step": 1}\n', [":1: ", "tokens, loss and per_modality"]),
        (metrics_line("train", 1).replace("6.0", '"six"'), [":1: ", "six"]),
        (metrics_line("eval", 1), ["no training step"]),
        (_with_next('{"pose": {"error_px": "far", "copy": {"error_px": 1.0}}}'), [":1: ", "next.pose", "far"]),
        (_with_next('{"pose": {"error_px": 2.0}}'), [":1: ", "next.pose"]),
        (_with_next("7"), [":1: ", "next.pose"]),
        ("", ["no training step"]),
        ("\udcff\udcfe\n", [":1: "]),
    ],
)
def test_plots_of_damaged_metrics(call, no_work, saved_run, metrics, said):
    (saved_run / "metrics.jsonl").write_bytes(metrics.encode("utf-8", "surrogateescape"))
    _fault(call("plots", "--run", saved_run), str(saved_run / "metrics.jsonl"), *said)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"unigram": []}', '{"unigram": {"coords": {}}}', '{"unigram": {"coords": 3}}', "\xff"],
)
def test_plots_of_a_damaged_evaluation(call, no_work, saved_run, text):
    path = saved_run / "evaluation-eval.json"
    path.write_bytes(text.encode("latin-1"))
    _fault(call("plots", "--run", saved_run), str(path), "m4.evaluate --run")


def test_plots_shows_the_unigrams_of_the_evaluation_split(call, saved_run, monkeypatch):
    shown = {}
    monkeypatch.setattr("m4.plots.loss_curves", lambda train, evaluations, unigram: shown.update(unigram) or _figure())
    config = (saved_run / "config.yaml").read_text()
    (saved_run / "config.yaml").write_text(config.replace('eval_split: "eval"', "eval_split: test"))
    for split, value in (("eval", 1.0), ("test", 2.0)):
        unigram = {"coords": {"cross_entropy": value}, "tok_rgb": {"cross_entropy": None}}
        (saved_run / f"evaluation-{split}.json").write_text(json.dumps({"unigram": unigram}))
    assert call("plots", "--run", saved_run)[0] == 0
    assert shown == {"coords": 2.0}


def _figure():
    from matplotlib.figure import Figure

    return Figure()


def test_a_gpu_that_cannot_be_used(call, no_work, saved_run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    said = "CUDA unknown error - this may be due to an incorrectly set up environment"

    def fail(*_, **__):
        raise RuntimeError(f"{said}\nmore")

    monkeypatch.setattr(torch, "empty", fail)
    _fault(call("evaluate", "--run", saved_run, "--device", "cuda"), "--device: cuda cannot be used", said)
