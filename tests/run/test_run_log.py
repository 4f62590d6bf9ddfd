"""The record of a run: whole at every checkpoint, and independent of what becomes of the other loggers."""

import contextlib
import json
import logging
import resource
import sys
import threading
import types

import pytest
import torch.utils.tensorboard

from m4.config import load_config
from m4.errors import ConfigError
from m4.run import loggers
from m4.run.loggers import flat_figures
from m4.run.metrics import MetricsFile, RunLog, read_metrics, truncate_metrics
from m4.training.trainer import Trainer


@pytest.fixture
def config(tiny_config):
    return load_config(tiny_config, ["stop_after_steps=6", "log.every=1"])[0]


@pytest.fixture
def log(config, caplog):
    caplog.set_level(logging.INFO, logger="m4")
    return caplog


@contextlib.contextmanager
def _room_for(size):
    """Files may have so many bytes: beyond them the kernel takes a part of a write, then refuses, as a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_lines_wait_while_the_disk_is_full(tmp_path, log):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    lines = [{"kind": "train", "step": step, "loss": 1.0} for step in range(6)]
    file.append(lines[0])
    with _room_for(60):
        for line in lines[1:4]:
            file.append(line)
        assert (tmp_path / "metrics.jsonl").stat().st_size == 60  # cut in the middle of a line
        assert read_metrics(tmp_path / "metrics.jsonl") == lines[:1]
        with pytest.raises(OSError, match=r"cannot be written: File too large.*mend that.*metrics.jsonl"):
            file.flush()
        assert sum("lines wait in memory" in message for message in log.messages) == 1
    for line in lines[4:]:
        file.append(line)
    file.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == lines
    assert "nothing is missing" in log.text


def test_a_record_that_was_removed_is_begun_anew(tmp_path, log):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.append({"step": 1})
    path.unlink()
    for step in (2, 3):
        file.append({"step": step})
    file.close()
    assert read_metrics(path) == [{"step": 2}, {"step": 3}]
    assert sum("was removed while this run wrote to it" in message for message in log.messages) == 1


def test_what_is_lost_at_the_end_is_said(tmp_path, log):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    with _room_for(0):
        for step in range(3):
            file.append({"kind": "train", "step": step})
        file.close()
    assert any("3 lines since the last save are lost" in message for message in log.messages)


def test_no_checkpoint_without_its_lines(config, log, monkeypatch):
    """A run whose record cannot be written saves nothing and tries at the next save; the last has to succeed."""
    config.save_ckpt_freq, config.eval_freq = 0.016, 100
    write = MetricsFile.flush

    def full_from_step_3(self):
        if b'"step": 3' in self._waiting:
            raise OSError(28, "No space left on device", str(self._path))
        write(self)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "flush", full_from_step_3)
        with pytest.raises(OSError, match="No space left on device"):
            Trainer(config).run("command")
    assert [path.name for path in (config.run_dir / "checkpoints").iterdir()] == ["step-00000002"]
    assert "NOT SAVED after step 4" in log.text
    assert "5 lines since the last save are lost" in log.text  # four steps and the last evaluation
    assert Trainer(config).run("command") == 0
    lines = read_metrics(config.run_dir / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_a_summary_that_cannot_be_written_is_said(config, log, monkeypatch):
    from m4.training import trainer

    def full(*_):
        raise OSError(28, "No space left on device", "summary.json")

    monkeypatch.setattr(trainer, "write_summary", full)
    config.stop_after_steps = None
    with pytest.raises(OSError, match=r"No space left on device; .*the same command again.*summary\.json"):
        Trainer(config).run("command")
    assert not (config.run_dir / "summary.json").exists()
    monkeypatch.undo()
    assert Trainer(config).run("command") == 0
    assert json.loads((config.run_dir / "summary.json").read_text())["steps"] == 20


def test_a_summary_beside_a_greater_error_is_only_said(config, log, monkeypatch):
    from m4.training import trainer

    def full(*_):
        raise OSError(28, "No space left on device", "summary.json")

    def broken(*_):
        raise ValueError("broken")

    monkeypatch.setattr(trainer, "write_summary", full)
    monkeypatch.setattr(Trainer, "train_step", broken)
    with pytest.raises(ValueError, match="broken"):
        Trainer(config).run("command")
    assert "No space left on device; mend that" in log.text


@pytest.mark.parametrize(
    "bad", [b"{half", b"[1]", b"{}", b"", b'{"kind": "train"}', b'{"step": "3"}', b"\x00\x00", b"\xff\xfe{}"]
)
def test_a_bad_line_is_named(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bad + b'\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: expected a JSON object with a step.*delete that line"):
        read_metrics(path)


def test_lines_end_at_line_feeds_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "name": "a\u2028b\x85c"}, {"step": 2}]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    truncate_metrics(path, 2)
    assert read_metrics(path) == lines


def _import_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


def _broken_package(monkeypatch):
    def broken(*_, **__):
        raise TypeError("Descriptors cannot be created directly.\n\nIf this call came from a _pb2.py file …")

    monkeypatch.setattr(torch.utils.tensorboard, "SummaryWriter", broken)


def _no_permission(monkeypatch):
    def refused(path, **_):
        raise PermissionError(13, "Permission denied", f"{path}/events.out.tfevents.1")

    monkeypatch.setattr(torch.utils.tensorboard, "SummaryWriter", refused)


@pytest.mark.parametrize("fault", [_import_error, _broken_package, _no_permission])
def test_broken_tensorboard_is_one_line_before_any_work(config, monkeypatch, fault):
    config.log.tensorboard = True
    monkeypatch.setattr(Trainer, "prepare", lambda _: pytest.fail("work before the loggers are open"))
    fault(monkeypatch)
    with pytest.raises(ConfigError, match=r"log.tensorboard: true, but it does not start.*log.tensorboard=false") as e:
        Trainer(config).run("command")
    assert "\n" not in str(e.value)
    monkeypatch.undo()
    config.log.tensorboard = False
    assert Trainer(config).run("command") == 0


class Wandb(types.ModuleType):
    """Stands for the package: `init` gives a run whose methods may fail."""

    def __init__(self, init_error=None, log_error=None, finish_error=None):
        super().__init__("wandb")
        self.init_error, self.log_error, self.finish_error = init_error, log_error, finish_error
        self.logged, self.finished = [], 0

    def init(self, **_):
        if self.init_error:
            raise self.init_error
        return self

    def log(self, figures, step):
        if self.log_error and step >= 3:
            raise self.log_error
        self.logged.append((step, figures))

    def finish(self):
        self.finished += 1
        if self.finish_error:
            raise self.finish_error


@pytest.mark.parametrize(
    "package",
    [
        None,
        types.ModuleType("wandb"),  # a folder `wandb` in the current one, which wandb makes, is taken for the package
        Wandb(init_error=RuntimeError("api_key not configured (no-tty).\nCall wandb.login(key=[your_api_key])")),
        Wandb(init_error=ConnectionError()),
    ],
    ids=["absent", "empty", "no key", "offline"],
)
def test_wandb_that_does_not_start_is_one_line_before_any_work(config, monkeypatch, package):
    config.log.wandb = True
    monkeypatch.setattr(Trainer, "prepare", lambda _: pytest.fail("work before the loggers are open"))
    monkeypatch.setitem(sys.modules, "wandb", package)
    said = r"log.wandb: true, but it does not start: \w+.*pip install wandb.*wandb login.*log.wandb=false"
    with pytest.raises(ConfigError, match=said) as caught:
        Trainer(config).run("command")
    assert "\n" not in str(caught.value)


def test_wandb_that_fails_in_the_middle_costs_only_itself(config, log, monkeypatch):
    package = Wandb(log_error=ConnectionError("the server has gone"))
    monkeypatch.setitem(sys.modules, "wandb", package)
    config.log.wandb = True
    assert Trainer(config).run("command") == 0
    (said,) = [message for message in log.messages if "Weights & Biases" in message]
    assert said == (
        "Weights & Biases failed at step 3 (ConnectionError: the server has gone); training goes on without it, "
        "metrics.jsonl has every figure"
    )
    assert {step for step, _ in package.logged} == {0, 1, 2}
    assert package.logged[1][1]["train/per_modality/coords"] > 0
    assert [line["step"] for line in read_metrics(config.run_dir / "metrics.jsonl") if line["kind"] == "train"] == [
        *range(1, 7)
    ]


def test_wandb_that_fails_at_the_end_is_said(config, log, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Wandb(finish_error=TimeoutError("no answer")))
    config.log.wandb = True
    assert Trainer(config).run("command") == 0
    assert "Weights & Biases may lack the last steps (TimeoutError: no answer)" in log.text


def test_tensorboard_on_a_full_disk_costs_only_itself(config, log, capfd, tmp_path):
    """Its thread ends with the error, which is said once and without a traceback."""
    hook = threading.excepthook
    writer = loggers.TensorBoard(tmp_path, -1)
    held: list[loggers.Logger] = [writer]
    with _room_for(200):
        for step in range(1000):
            loggers.write_to_loggers(held, step, {"train/loss": 1.0})
            if held:
                with contextlib.suppress(Exception):
                    writer._writer.flush()
    assert held == []
    (said,) = [message for message in log.messages if "TensorBoard failed" in message]
    assert "File too large" in said
    assert threading.excepthook is hook
    assert "Traceback" not in "".join(capfd.readouterr())


def test_threads_of_others_still_show_their_errors(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: shown.append(arguments.exc_type))
    writer = loggers.TensorBoard(tmp_path, -1)
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    writer.close()
    assert shown == [ZeroDivisionError]


def test_loggers_are_closed_where_the_record_cannot_be_opened(config, monkeypatch):
    package = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", package)
    config.log.wandb = True
    (config.run_dir / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(OSError, match=r"metrics.jsonl"):
        RunLog(config.run_dir, config, -1)
    assert package.finished == 1


def test_figures_of_any_depth_have_a_name():
    pose = {"error_px": 3.0, "pck": {"0.1": 0.5}}
    values = {"loss": 1.0, "per_modality": {"a": None, "b": 2.0}, "next": {"pose": pose}}
    assert flat_figures("eval", values) == {
        "eval/loss": 1.0,
        "eval/per_modality/b": 2.0,
        "eval/next/pose/error_px": 3.0,
        "eval/next/pose/pck/0.1": 0.5,
    }


def test_a_modality_without_a_target_in_a_step_has_no_value(config):
    """The mean counts it as 0, as the model does."""
    config.target_alphas = [0.0, 0.02, 0.02, 0.02]
    config.batch_size = config.global_batch_size = 1
    assert Trainer(config).run("command") == 0
    lines = [line for line in read_metrics(config.run_dir / "metrics.jsonl") if line["kind"] == "train"]
    losses = [line["per_modality"] for line in lines]
    assert {loss["tok_rgb"] for loss in losses} == {None}
    assert any(loss["coords"] is None for loss in losses)
    assert any(loss["coords"] is not None for loss in losses)
    for line in lines:
        values = list(line["per_modality"].values())
        assert 0 not in values
        assert line["loss"] == pytest.approx(sum(value or 0.0 for value in values) / 4)
