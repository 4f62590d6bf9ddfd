"""A disk that is full at a save: training goes on and saves later; the last save has to succeed."""

import dataclasses
import logging
import resource

import pytest
from safetensors.torch import load_file

from m4.checkpoint import newest_whole, step_folders
from m4.training.trainer import Trainer
from tests.training.step_setup import assert_same

STEP = 0.008


@pytest.fixture(params=[True, False], ids=["background", "at once"])
def config(tiny_train_config, caplog, request):
    caplog.set_level(logging.INFO, logger="m4")
    return dataclasses.replace(
        tiny_train_config, total_tokens=6 * STEP, token_warmup=STEP, eval_freq=100, save_ckpt_freq=2 * STEP,
        eval_samples=1, eval_generate_samples=0, async_checkpoints=request.param,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _restore_limit():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _full_in(trainer, steps):
    """Files can have 20,000 bytes only while these steps are the last ones done, as on a disk that fills up."""
    save, (_, hard) = trainer.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(**keywords):
        limit = 20_000 if trainer.state.step in steps else hard
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            save(**keywords)
            trainer.saver.settle()  # what a thread writes, too, while there is no room
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    trainer.save = limited
    return trainer


def test_training_goes_on_and_the_next_save_succeeds(config, caplog):
    assert _full_in(Trainer(config), {4}).run("command") == 0
    (loud, later) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert loud.getMessage().startswith("NOT SAVED after step 4: ")
    assert "File too large" in loud.getMessage()
    assert "the next save is tried after step 6" in later.getMessage()
    assert [path.name for path in step_folders(config.run_dir)] == ["step-00000002", "step-00000006"]
    usual = dataclasses.replace(config, run_name="usual")
    assert Trainer(usual).run("command") == 0
    weights = [load_file(newest_whole(c.run_dir)[0] / "model.safetensors") for c in (config, usual)]
    assert_same(*weights, rtol=0, atol=0)


def test_the_last_save_has_to_succeed(config):
    with pytest.raises(ValueError, match=r"step-00000006: cannot be written: .*File too large.*earlier checkpoints"):
        _full_in(Trainer(config), {4, 6}).run("command")
    assert newest_whole(config.run_dir)[1]["step"] == 2
    assert not list((config.run_dir / "checkpoints").glob(".tmp-*"))
    assert Trainer(config).run("command") == 0
    assert newest_whole(config.run_dir)[1]["step"] == 6


def test_a_save_for_a_signal_has_to_succeed(config):
    trainer = _full_in(Trainer(config), {3})
    update = trainer.step.update

    def update_and_signal():
        update()
        if trainer.state.step == 2:
            trainer.stop.received = 15

    trainer.step.update = update_and_signal
    with pytest.raises(ValueError, match=r"step-00000003: cannot be written"):
        trainer.run("command")
    assert newest_whole(config.run_dir)[1]["step"] == 2


def test_next_due_agrees_with_due(config):
    schedule = Trainer(config).schedule
    for every in (STEP, 1.5 * STEP, 2 * STEP, 0.03, 7 * STEP):
        for step in range(6):
            expected = next((later for later in range(step + 1, 7) if schedule.due(every, later)), 6)
            assert schedule.next_due(every, step) == expected
