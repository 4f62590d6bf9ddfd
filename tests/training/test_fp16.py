"""float16 with a scaled loss: on a CPU, where products stay in float32, the same bits, for it is a power of 2."""

import dataclasses

import pytest
import torch

from m4.errors import ConfigError
from m4.training.step import Execution
from tests.training.step_setup import AS_ON_A_GPU, PlainRecorder, Steps, assert_same


@pytest.fixture
def config(tiny_train_config):
    return tiny_train_config


@pytest.mark.parametrize("recorded", [False, True])
def test_scaling_by_a_power_of_two_changes_nothing(config, recorded):
    weights = []
    for dtype in ("fp32", "fp16"):
        setup = Steps(dataclasses.replace(config, dtype=dtype))
        if recorded:
            setup.record(PlainRecorder())
        figures = setup.run(3)
        assert [one.updates for one in figures] == [1, 1, 1]
        weights.append(setup.weights())
    assert_same(*weights, rtol=0, atol=0)
    assert setup.step.scaling()["scale"] == 2.0**16
    assert setup.step.scaling()["_growth_tracker"] == 3


def test_an_overflow_halves_the_scale_and_is_not_counted(config):
    setup = Steps(dataclasses.replace(config, dtype="fp16"))
    spoil = [False]
    setup.model.dec_norm.weight.register_hook(lambda gradient: gradient * torch.inf if spoil[0] else gradient)
    setup.run(1)
    before = setup.weights()
    spoil[0] = True
    (figures,) = setup.run(1)
    assert (figures.finite, figures.updates, figures.lost, figures.skipped) == (True, 0, 0, ())
    assert_same(before, setup.weights(), rtol=0, atol=0)
    assert setup.step.scaling()["scale"] == 2.0**15
    # A gradient that no scale makes finite ends the run once the scale is 1.
    for _ in range(15):
        (figures,) = setup.run(1)
        assert figures.finite
    assert setup.step.scaling()["scale"] == 1.0
    (figures,) = setup.run(1)
    assert not figures.finite
    assert_same(before, setup.weights(), rtol=0, atol=0)


def test_the_scale_is_resumed(config):
    first, second = (Steps(dataclasses.replace(config, dtype="fp16")) for _ in range(2))
    first.run(2)
    first.step._scaler.update(new_scale=64.0)
    second.step.start_at(0, first.step.scaling())
    second.run(1)
    assert second.step.scaling() == first.step.scaling() | {"_growth_tracker": 3}
    plain = Steps(config)
    plain.step.start_at(0, first.step.scaling())  # a run that went over to another precision
    assert plain.step.scaling() == {}


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "said"),
    [
        ("cpu", None, "fp16", "fp16 is for GPUs without bfloat16, the device is cpu; use dtype=bf16"),
        ("cuda", (9, 0), "fp16", "has it; use dtype=bf16"),
        ("cuda", (7, 0), "bf16", "use dtype=fp16 or dtype=fp32"),
        ("cuda", (7, 0), "fp16", None),
        ("cuda", (8, 0), "bf16", None),
    ],
)
def test_where_each_precision_is_for(config, monkeypatch, device, capability, dtype, said):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    config = dataclasses.replace(config, dtype=dtype)
    if said is None:
        assert Execution.of(config, torch.device(device)) == dataclasses.replace(AS_ON_A_GPU, graphs=True)
        return
    with pytest.raises(ConfigError, match=rf"dtype: .*{said}"):
        Execution.of(config, torch.device(device))
