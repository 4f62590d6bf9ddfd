"""The prediction of the next moment: of a run that was really trained, whatever the batch size, and of odd data."""

import dataclasses
import errno
import json
import shutil

import numpy as np
import pytest
import torch

from m4.batches.masked import fixed_batches
from m4.build import build_model, masking_spec
from m4.config import DataSection
from m4.data.layout import read_meta
from m4.evaluate import main as evaluate_main
from m4.evaluation.displacement import DisplacementHistogram
from m4.evaluation.next_moment import NextMoment, next_moment_of
from m4.evaluation.ranks import TargetRanks
from m4.evaluation.report import evaluate_run, report_table
from m4.evaluation.table import next_line
from m4.modalities import NEXT, REFERENCE, RowLayout
from m4.run.metrics import read_metrics
from m4.saved_run import SavedRun
from m4.training.trainer import Trainer
from m4kernels import MaskedBatch
from tests.saved_runs import IDS, LENGTHS, save_run, saved_config, write_data

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Poses that move by a few bins, frames of which some codes change; some joints are hidden."""
    root = write_data(tmp_path_factory.mktemp("moving") / "tokens", {"train": 12, "eval": 7})
    random = np.random.default_rng(1)
    for split in ("train", "eval"):
        for folder in (root / split / "coords").iterdir():
            places = [root / split / name / folder.name / "tokens.npy" for name in LENGTHS]
            frame, pose, next_frame, next_pose = (np.load(place).astype(int) for place in places)
            pose[26:], next_pose[26:] = random.integers(0, 5, (2, 13)) > 0
            next_pose[:26] = (pose[:26] + random.integers(-4, 5, 26)).clip(0, IDS - 1)
            next_frame = np.where(random.random(256) < 0.8, frame, next_frame)
            for place, tokens in zip(places, (frame, pose, next_frame, next_pose), strict=True):
                np.save(place, tokens.astype(np.uint16))
    return root


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    config = saved_config(data, tmp_path_factory.mktemp("runs"))
    config = dataclasses.replace(config, total_tokens=0.01024, token_warmup=0.001, eval_freq=0.005, eval_samples=4)
    config.model.init = "normal"  # so few steps teach no more than what is frequent
    assert Trainer(config).run("command") == 0
    return config.run_dir


@pytest.fixture(scope="module")
def report(trained):
    return evaluate_run(SavedRun.open(trained))


def test_every_figure(report, trained, data):
    assert json.loads((trained / "evaluation-eval.json").read_text()) == report
    pose, frame = report["next"]["pose"], report["next"]["frame"]
    three = {"error_px", "pck", "visibility_accuracy", "joints"}
    assert set(pose) == three | {"nats", "copy", "marginal", "displacement"}
    assert set(pose["copy"]) == set(pose["marginal"]) == three
    assert set(frame) == {"token_accuracy", "psnr", "ssim", "psnr_person", "copy"}
    assert set(frame["copy"]) == set(frame) - {"copy"}
    assert report["next"]["samples"] == 7
    assert 0.7 < frame["copy"]["token_accuracy"] < 0.9
    assert pose["copy"]["error_px"] < 4 < pose["marginal"]["error_px"]
    assert pose["displacement"]["nats"] < pose["nats"]
    assert 0 < pose["joints"] == pose["marginal"]["joints"] < 7 * 13
    table = report_table(report)
    for words in ("copying the reference", "median of the training set", "displacement histogram", "top 5", "PCK@0.2"):
        assert words in table
    assert "left out" not in table


def test_the_same_bits_on_every_call(report, trained):
    assert evaluate_run(SavedRun.open(trained)) == report


def test_losses_have_perplexity_and_ranks(report, trained):
    run = SavedRun.open(trained)
    assert report["perplexity"]["coords"] == pytest.approx(np.exp(report["per_modality"]["coords"]))
    for name in LENGTHS:
        assert 0 <= report["top1"][name] <= report["top5"][name] <= 1
    assert report["top5"]["coords_next"] > 0.2  # the visibility of most
    assert run.config.batch_size == 4


def _enliven(model):
    """Weights under which every input matters."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5, generator=random)


@pytest.fixture
def parts(trained, data):
    run = SavedRun.open(trained)
    return NextMoment(run.config, read_meta(data)), run.model(), run.open_split("eval"), run.open_split("train")


def test_the_batch_size_decides_nothing(parts):
    moment, model, store, train = parts
    one, seven = (moment.predict(model, store, 7, CPU, batch_size=size) for size in (1, 7))
    assert np.array_equal(one.predicted, seven.predicted)
    assert np.array_equal(one.true, seven.true)
    assert one.pose_nats == pytest.approx(seven.pose_nats, abs=1e-5)  # sums of another order
    figures = [moment.all_figures(prediction, train, moment.tokenizer()) for prediction in (one, seven)]
    for found in figures:
        found["pose"].pop("nats")
    assert figures[0] == figures[1]


def test_nats_are_those_of_the_whole_pose_given_the_whole_reference(parts):
    moment, model, store, _ = parts
    layout = RowLayout.of(model.config)
    total = 0.0
    for row in range(3):
        tokens = store.batch([row])
        lengths = torch.tensor(layout.max_seq_lens)
        modality, position = layout.modality_ids(), layout.positions()
        padded = {}
        for side, chosen in (("enc", modality < 2), ("dec", modality == 3)):
            padded |= {
                f"{side}_tokens": tokens[:, chosen],
                f"{side}_positions": position[chosen][None],
                f"{side}_modalities": modality[chosen][None],
                f"{side}_pad_mask": torch.ones(1, int(chosen.sum()), dtype=torch.bool),
            }
        logits = model.logits(MaskedBatch.from_padded(padded, len(lengths))).detach().double()
        total += float(torch.nn.functional.cross_entropy(logits, tokens[0, modality == 3], reduction="sum"))
    assert moment.predict(model, store, 3, CPU).pose_nats == pytest.approx(total / (3 * 39), rel=1e-5)


def _drawn(parts, futures, samples=7, **more):
    moment, model, store, _ = parts
    return moment.futures(model, store, samples, CPU, futures=futures, **more)


def test_futures_are_those_of_the_seed_the_row_and_their_number(parts):
    _enliven(parts[1])
    drawn = _drawn(parts, 3)
    assert drawn.shape == (3, 7, 39)
    assert np.array_equal(_drawn(parts, 3), drawn)
    assert np.array_equal(_drawn(parts, 2), drawn[:2])
    assert np.array_equal(_drawn(parts, 3, batch_size=1), drawn)
    assert np.array_equal(_drawn(parts, 1, samples=4), drawn[:1, :4])
    assert drawn[..., 26:].max() <= 1
    assert not np.array_equal(drawn[0], drawn[1])
    moment = parts[0]
    moment.config = dataclasses.replace(moment.config, eval_seed=1)
    assert not np.array_equal(_drawn(parts, 3), drawn)


def test_futures_do_not_see_the_successor(parts):
    moment, model, store, train = parts
    _enliven(model)
    drawn = _drawn(parts, 2)
    blind = np.array(store.tokens)
    for name in NEXT:
        blind[:, moment.layout.span(name)] = 1
    assert np.array_equal(_drawn((moment, model, dataclasses.replace(store, tokens=blind), train), 2), drawn)


def test_the_nearest_of_several_futures(trained, report, parts, monkeypatch, capsys):
    """More draws come nearer; all other figures stay as they are."""
    found = []
    for futures in (1, 4):
        monkeypatch.setattr("sys.argv", ["evaluate", "--run", str(trained), "--samples", str(futures)])
        assert evaluate_main() == 0
        found.append(json.loads((trained / "evaluation-eval.json").read_text()))
    table = capsys.readouterr().out
    for one, four in (
        [some["next"]["pose"] for some in found],
        [some["next"]["pose"]["displacement"] for some in found],
    ):
        assert (one["nearest"]["samples"], four["nearest"]["samples"]) == (1, 4)
        assert 0 < four["nearest"]["error_px"] < one["nearest"]["error_px"]
    for words in ("nearest of 4 drawn", "the same of the histogram"):
        assert words in table
    drawn = found[1]["next"]["pose"]
    assert drawn["displacement"]["nearest"]["error_px"] < drawn["nearest"]["error_px"]  # of a model hardly trained
    moment, model, store, train = parts
    prediction = moment.predict(model, store, 7, CPU)
    figures = moment.all_figures(prediction, train, None, _drawn(parts, 4))
    assert figures["pose"]["nearest"] == found[1]["next"]["pose"]["nearest"]
    for some in found:
        del some["next"]["pose"]["nearest"], some["next"]["pose"]["displacement"]["nearest"]
        assert some == report


def test_a_number_of_futures_that_is_none(trained, monkeypatch):
    for typed in ("-1", "2000", "few"):
        monkeypatch.setattr("sys.argv", ["evaluate", "--run", str(trained), "--samples", typed])
        with pytest.raises(ValueError, match="--samples: expected"):
            evaluate_main()


def test_nothing_of_the_successor_is_read(parts):
    moment, model, store, _ = parts
    _enliven(model)
    whole = moment.predict(model, store, 7, CPU)
    blind = np.array(store.tokens)
    for name in NEXT:
        blind[:, moment.layout.span(name)] = 1
    other = moment.predict(model, dataclasses.replace(store, tokens=blind), 7, CPU)
    assert np.array_equal(other.predicted, whole.predicted)
    for name in REFERENCE:
        blind[:, moment.layout.span(name)] = 0
    third = moment.predict(model, dataclasses.replace(store, tokens=blind), 7, CPU)
    assert not np.array_equal(third.predicted[:, moment.layout.span(NEXT[0])], whole.predicted[:, 295:551])


def test_only_ids_of_the_data_are_predicted(parts, data):
    """Codes below the tokenizer's, visibility 0 or 1, though the model knows more ids."""
    moment, model, store, _ = parts
    meta = {**read_meta(data), "modalities": {name: {"vocab_size": IDS} for name in LENGTHS}}
    meta["modalities"]["tok_rgb_next"] = {"vocab_size": 3}
    _enliven(model)
    predicted = NextMoment(moment.config, meta).predict(model, store, 7, CPU).predicted
    assert predicted[:, 295:551].max() < 3
    assert predicted[:, -13:].max() == 1
    assert predicted[:, 551:577].max() > 1


def test_the_displacements_of_the_report(report, parts):
    moment, _, store, train = parts
    pose = [moment.layout.span(name) for name in moment.pose]
    histogram = DisplacementHistogram(*(np.array(train.tokens[:, span]) for span in pose), IDS)
    nats = histogram.nats(*(np.array(store.tokens[:, span]) for span in pose))
    assert nats.shape == (7, 39)
    assert report["next"]["pose"]["displacement"]["nats"] == pytest.approx(nats.mean())


def test_evaluations_of_a_training_run_say_pixels(trained, parts):
    moment, model, store, _ = parts
    lines = [line for line in read_metrics(trained / "metrics.jsonl") if line["kind"] == "eval"]
    assert len(lines) > 1
    assert lines[-1]["next"] == moment.figures(moment.predict(model, store, 7, CPU))
    assert lines[0]["next"]["pose"]["copy"] == lines[-1]["next"]["pose"]["copy"]
    assert json.loads((trained / "summary.json").read_text())["evaluation"]["next"] == lines[-1]["next"]


def test_a_line_of_the_log(parts):
    moment, model, store, _ = parts
    figures = moment.figures(moment.predict(model, store, 7, CPU))
    line = next_line(figures)
    assert line.startswith(
        f"next pose {figures['pose']['error_px']:.2f} px (copying {figures['pose']['copy']['error_px']:.2f})"
    )
    assert line.endswith("; 7 samples")
    assert next_line({"samples": 3, "frame": figures["frame"]}).startswith("next frame tokens ")


def test_they_change_nothing_of_the_training(trained, tmp_path):
    config = dataclasses.replace(SavedRun.open(trained).config, output_dir=str(tmp_path), eval_generate_samples=0)
    assert Trainer(config).run("command") == 0
    names = [next((run / "checkpoints").iterdir()) / "model.safetensors" for run in (trained, tmp_path / "small")]
    assert names[0].read_bytes() == names[1].read_bytes()
    without = read_metrics(config.run_dir / "metrics.jsonl")
    assert not any("next" in line for line in without)
    kept = ("kind", "step", "loss", "per_modality", "grad_norm")
    assert [[line.get(k) for k in kept] for line in read_metrics(trained / "metrics.jsonl")] == [
        [line.get(k) for k in kept] for line in without
    ]


def _part(data, tmp_path, *names):
    """A run that was saved untrained, of these modalities."""
    config = saved_config(data, tmp_path)
    keys = ("vocab_sizes", "max_seq_lens", "input_alphas", "target_alphas")
    places = [list(LENGTHS).index(name) for name in names]
    total = sum(LENGTHS[name] for name in names)
    config = dataclasses.replace(
        config,
        modalities=list(names),
        input_tokens_range=[1, total // 2],
        target_tokens_range=[1, total // 2],
        **{key: [getattr(config, key)[place] for place in places] for key in keys},
    )
    return save_run(config)


@pytest.mark.parametrize(
    ("names", "there", "left_out"),
    [
        (("coords", "coords_next"), {"pose"}, "next frame: the run has no tok_rgb and no tok_rgb_next"),
        (("tok_rgb", "tok_rgb_next"), {"frame"}, "next pose: the run has no coords and no coords_next"),
        (("tok_rgb", "coords", "coords_next"), {"pose"}, "next frame: the run has no tok_rgb_next"),
        (("coords_next",), set(), "next pose: the run has no coords"),
    ],
)
def test_a_run_of_some_modalities(data, tmp_path, caplog, names, there, left_out):
    report = evaluate_run(SavedRun.open(_part(data, tmp_path, *names)), futures=2)
    assert set(report["next"]) - {"samples", "left_out"} == there
    assert "pose" not in there or report["next"]["pose"]["nearest"]["samples"] == 2
    assert left_out in report_table(report)
    assert "figures of the " + left_out in caplog.text
    assert "psnr_person" not in report["next"].get("frame", {}) or "pose" in there


def test_without_the_tokenizer(data, trained, tmp_path, caplog, monkeypatch):
    root = tmp_path / "cosmos"
    shutil.copytree(data, root)
    meta = json.loads((root / "meta.json").read_text())
    meta["options"]["tokenizer"] = "cosmos"
    (root / "meta.json").write_text(json.dumps(meta))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    report = evaluate_run(SavedRun.open(trained, data=root))
    assert set(report["next"]["frame"]) == {"token_accuracy", "copy"}
    assert list(report["next"]["frame"]["copy"]) == ["token_accuracy"]
    assert "Cosmos" in caplog.text
    assert "left out, the next frame pixels: " in report_table(report)


def _edited(data, root, **sizes):
    shutil.copytree(data, root)
    meta = json.loads((root / "meta.json").read_text())
    meta["modalities"] |= {name: {"vocab_size": size} for name, size in sizes.items()}
    (root / "meta.json").write_text(json.dumps(meta))
    return root


def test_a_disk_that_fills_up_does_not_take_the_table_with_it(trained, monkeypatch, capsys):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("m4.evaluation.report.write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        evaluate_run(SavedRun.open(trained))
    assert "nats a token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"coords": 256}, "meta.json: expected the same number of bins in coords and coords_next, got 256 and 512"),
        ({"coords": 8192, "coords_next": 8192}, "vocab_sizes: the run knows 512 ids of coords_next, the data has 8192"),
        ({"coords": 400, "coords_next": 400}, "eval/coords: expected joints in 400 bins, as meta.json says, got 5"),
    ],
)
def test_another_number_of_bins_is_an_error(data, trained, tmp_path, caplog, sizes, said):
    run = SavedRun.open(trained, data=_edited(data, tmp_path / "other", **sizes))
    with pytest.raises(ValueError, match=said) as caught:
        evaluate_run(run)
    assert "\n" not in str(caught.value)
    assert next_moment_of(run.config, read_meta(run.root), run.open_split("eval")) is None
    assert said.split(",")[0] in caplog.text


def test_a_split_without_samples(data, trained, tmp_path, monkeypatch):
    root = tmp_path / "empty"
    shutil.copytree(data, root)
    for folder in (root / "eval").iterdir():
        shutil.rmtree(folder)
        folder.mkdir()
    monkeypatch.setattr("sys.argv", ["evaluate", "--run", str(trained), "--data", str(root)])
    with pytest.raises(ValueError, match=r"eval.*expected samples.*none"):
        evaluate_main()


def test_visibility_of_another_kind_leaves_poses_out(config, caplog):
    """Tokens that are no poses (`tests.runs`) train and are evaluated as before, and it is said."""
    caplog.set_level("INFO")
    config.data = DataSection(root=config.data.root, cache_dir=config.data.cache_dir)
    trainer = Trainer(config)
    assert trainer.evaluator.next_moment is None
    trainer.evaluate()
    assert "next" not in trainer.state.evaluation
    assert "evaluations say nothing of the next pose" in caplog.text


def test_an_untrained_head_is_no_oracle(trained):
    """All ids equally likely: the first counts as the likeliest, not every one."""
    run = SavedRun.open(trained)
    model = build_model(run.config, CPU).eval()
    ranks = TargetRanks(model, run.config, CPU)
    spec, store = masking_spec(run.config), run.open_split("eval")
    batches = fixed_batches(store, spec, seed=0, batch_size=3, max_samples=None, device=CPU)
    targets = torch.cat([batch.decoder.ids[batch.decoder.modalities == 3] for batch in ranks.watch(batches)])
    assert ranks.accuracy(1)["coords_next"] == pytest.approx((targets < 1).double().mean().item())
    assert ranks.accuracy(5)["coords_next"] == pytest.approx((targets < 5).double().mean().item())


def test_tokens_that_are_no_moments_are_evaluated_without_them(config, caplog):
    assert Trainer(dataclasses.replace(config, stop_after_steps=1)).run("command") == 0
    report = evaluate_run(SavedRun.open(config.run_dir))
    assert report["next"] == {"samples": 0, "left_out": report["next"]["left_out"]}
    assert list(report["next"]["left_out"]) == ["frame", "pose"]
    assert "left out, the next frame: tok_rgb and tok_rgb_next have 12 and 12 tokens a sample" in report_table(report)
