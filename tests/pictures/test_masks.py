"""Pictures of masks, attention and schedule show what the rule draws."""

import numpy as np
import pytest
import torch
from PIL import Image

import m4.plots
from m4.batches.states import INPUT, TARGET, UNUSED, mask_states
from m4.cli import exit_status
from m4.pictures.masks import attention_patterns, mask_layouts, schedule_curve
from m4kernels import mask_tokens


def test_states_are_those_of_the_masking_rule(config):
    spec = config.masking_spec()
    states = mask_states(config, 5)
    assert states.shape == (5, spec.num_tokens)
    tokens = torch.arange(spec.num_tokens).expand(5, -1)  # a token is its place
    batch = mask_tokens(tokens, spec, seed=config.seed, sample_ids=torch.arange(5))
    for state, half in ((INPUT, batch.encoder), (TARGET, batch.decoder)):
        ends = half.segments.cu_seqlens.tolist()
        for sample in range(5):
            expected = half.ids[ends[sample] : ends[sample + 1]].tolist()
            assert sorted(expected) == np.flatnonzero(states[sample] == state).tolist()
    assert (states == UNUSED).any()


def test_a_cell_a_token():
    states = np.array([[0, 1], [2, 1], [0, 0]])
    figure = mask_layouts([{"a": states, "b": states.T}] * 2)
    meshes = [axes.collections[0].get_array() for axes in figure.axes]
    assert len(meshes) == 4
    np.testing.assert_array_equal(meshes[0][::-1], states)  # drawn from below
    assert [axes.get_xlabel() for axes in figure.axes] == ["2 input, 1 target"] * 4


def test_pairs_that_may_look_at_each_other():
    allow = np.array([[True, False], [True, True]])
    panels = {
        "cross": (np.array([2, 1]), np.array([1, 3]), allow),
        "empty": (np.array([0, 0]), np.array([1, 3]), allow),
    }
    figure = attention_patterns(["a", "b"], panels)
    shown = figure.axes[0].images[0].get_array()
    np.testing.assert_array_equal(shown, [[1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    assert figure.axes[0].get_title() == "cross\n3 x 4: 50% of pairs"
    assert "no pairs" in figure.axes[1].get_title()


def test_schedule():
    figure = schedule_curve([0, 1, 2], [0.0, 1.0, 0.5], {"evaluation": [1, 2]})
    assert figure.axes[0].lines[1].get_xdata().tolist() == [1, 2]


@pytest.fixture
def call(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
        return exit_status(m4.plots.main), capsys.readouterr().err

    return run


@pytest.mark.parametrize("what", ["masks", "attention", "schedule"])
def test_the_command(call, saved_run, tmp_path, what):
    assert call("--run", saved_run, "--what", what, "--samples", 2) == (0, "")
    assert call("--config", saved_run / "config.yaml", "--what", what, "--out", tmp_path / "a.png")[0] == 0
    with Image.open(saved_run / f"{what}.png") as ours, Image.open(tmp_path / "a.png") as of_the_recipe:
        assert ours.size[0] == of_the_recipe.size[0] > 300


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", "M4-tiny.yaml"], "--run: losses are of a run"),
        (["--config", "M4-tiny.yaml", "--what", "masks"], "--out: name the picture"),
        (["--config", "nowhere.yaml", "--what", "masks", "--out", "/tmp/a.png"], "nowhere.yaml"),
        (["--what", "masks"], "--run --config"),
        (["--run", "RUN", "--what", "tokens"], "--what"),
        (["--run", "RUN", "--what", "masks", "--samples", "41"], "--samples: expected 1 … 40"),
    ],
)
def test_mistakes(call, saved_run, arguments, said):
    status, err = call(*(saved_run if part == "RUN" else part for part in arguments))
    assert status == 2
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1
