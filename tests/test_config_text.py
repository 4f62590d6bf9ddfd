"""A configuration as text: whatever is in its values, it is read as it was written and typed."""

import re
import sys

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from m4.config import (
    DataSection,
    LogSection,
    ModelSection,
    TrainConfig,
    config_from_dict,
    config_to_dict,
    config_to_yaml,
    format_duration,
    load_config,
)
from m4.errors import ConfigError
from tests.round_trip import assert_round_trip
from tests.runs import RECIPE

AWKWARD = [
    "null", "~", "Null", "1e3", "1234e56", "007", "010", "0x1f", "0o17", "1_000", "12:30", "12:30:45", "on", "off",
    "yes", "no", "y", "True", ".inf", ".nan", "2001-01-01", "=", "<<", "-", "?", ": ", "a: b", "#x", "a #x", " a", "a ",
    "\ta\n", "a\nb", "\n", "[a]", "{a: b}", "'a'", '"a"', "'", '"', "\\", "a\\", "${lr}", "${", "\\${x}", "\\\\${x}",
    "$${x}", "${oc.env:HOME}", "$x", "%", "@", "`", "&a", "*a", "!a", "|", ">", ".", "..", "ü", "日本", "🦴", "\x7f",
    "\x85", "\u2028", "\ufeff", "\ufffe", "\x1b[0m", "x" * 5000, "a " * 300, "---", "...",
]  # fmt: skip
TEXT_KEYS = [
    "data.root",
    "data.sample_dir",
    "data.train_split",
    "output_dir",
    "log.wandb_project",
    "log.wandb_run_name",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("round-trip")


def _with_texts(text):
    data = DataSection(root=text, sample_dir=text, cache_dir=text, train_split=text, eval_split=text)
    log = LogSection(wandb_project=text, wandb_entity=text, wandb_run_name=text)
    return TrainConfig(data=data, log=log, output_dir=text, run_name="x", modalities=[text, "b", "c", "d"])


@pytest.mark.parametrize("text", AWKWARD, ids=lambda text: ascii(text)[:20])
def test_awkward_text_is_kept(folder, text):
    assert_round_trip(_with_texts(text), folder)


@given(st.text() | st.text("\\${}a:'\"# \n", max_size=12))
@settings(max_examples=200, deadline=None)
def test_any_text_is_kept_or_refused(folder, text):
    try:
        config = _with_texts(text)
    except ConfigError:
        assert text in ("", "???", "b", "c", "d") or "\0" in text
    else:
        assert_round_trip(config, folder)


@given(st.sampled_from(TEXT_KEYS), st.sampled_from(AWKWARD) | st.text(max_size=12))
@settings(max_examples=300, deadline=None)
def test_text_on_the_command_line_is_what_was_typed(key, text):
    assume(text not in ("", "???", "null", "Null", "NULL") and not text.startswith("="))
    assume("${" not in text and "\0" not in text and not re.fullmatch(r"'.*'|\".*\"", text, re.DOTALL))
    section, _, name = key.rpartition(".")
    config, _ = load_config(RECIPE, [f"{key}={text}"])
    assert getattr(getattr(config, section) if section else config, name) == text


def test_quotes_and_interpolation_on_the_command_line():
    quoted = {"'null'": "null", '"a\\tb"': "a\tb", "'it''s'": "it's", "'a'b'": "'a'b'"}
    for typed, text in {**quoted, "${seed}": "0", "\\${seed}": "${seed}", "x${seed}y": "x0y"}.items():
        assert load_config(RECIPE, [f"data.root={typed}"])[0].data.root == text


@given(
    st.builds(
        dict,
        lr=st.floats(1e-30, 1e30),
        min_lr=st.just(0.0),
        weight_decay=st.floats(0, 1e38),
        clip_grad=st.none() | st.floats(1e-30, 1e30),
        total_tokens=st.floats(1e-6, 1e4),
        token_warmup=st.just(0.0),
        eval_freq=st.floats(1e-6, 1e300),
        seed=st.integers(0, 2**63 - 1),
        compile=st.booleans(),
        eval_samples=st.none() | st.integers(1, 2**60),
        input_alphas=st.lists(st.just(0.0) | st.floats(0.01, 1000), min_size=4, max_size=4).filter(any),
        training_time=st.none() | st.integers(1, 10**9).map(format_duration),
    )
)
@settings(max_examples=100, deadline=None)
def test_any_number_is_kept(folder, values):
    assert_round_trip(TrainConfig(**values, run_name="x", data=DataSection(root="r")), folder)


def test_saved_configurations_need_no_omegaconf(monkeypatch):
    """A machine that only trains, evaluates or generates may lack it."""
    monkeypatch.setitem(sys.modules, "omegaconf", None)
    config = TrainConfig(run_name="1e3", data=DataSection(root="${x}"))
    assert config_from_dict(config_to_dict(config)) == config
    assert 'run_name: "1e3"' in config_to_yaml(config)


def test_attention_is_kept(folder):
    matrix = [[int(i <= j) for j in range(4)] for i in range(4)]
    for attention in (None, {}, {"encoder": "full", "cross": matrix}, {"decoder": "within_modality"}):
        config = TrainConfig(model=ModelSection(attention=attention), run_name="x", data=DataSection(root="r"))
        assert_round_trip(config, folder)
    typed = f"model.attention={{cross: {matrix}, decoder: within_modality}}"
    config, _ = load_config(RECIPE, [typed])
    assert config.model.attention == {"cross": matrix, "decoder": "within_modality"}
    assert config.model_config().attention.encoder == "full"
