"""Files of configurations: text stays text, numbers are not bent, and whatever is no configuration is one line."""

import re

import pytest

from m4.config import load_config
from m4.config_values import Duration, read_value
from m4.errors import ConfigError


def _load(folder, text, *overrides):
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(path, list(overrides))[0]


WRITTEN = [
    "1234e56", "1e3", "007", "010", "on", "Yes", "12:30", "12:30:45", "0x1f", "0o17", "1_000", ".5", "1.", "+3", "inf",
    ".nan", "2001-01-01", "=", "<<", "'null'", '"~"', "!!str null",
]  # fmt: skip


@pytest.mark.parametrize("written", WRITTEN)
def test_text_is_what_was_written(tmp_path, written):
    text = re.sub(r"^!!str |['\"]", "", written)
    for line in (f"data: {{root: {written}}}", f"data.root: {written}", f"data:\n  root: {written} # comment"):
        assert _load(tmp_path, line).data.root == text
    quoted = written if written[0] in "'\"!" else f"'{written}'"
    assert _load(tmp_path, f"data: {{root: {quoted}}}").data.root == text
    assert _load(tmp_path, f"global_vars: {{x: {written}}}\ndata: {{root: '${{global_vars.x}}'}}").data.root == text


@pytest.mark.parametrize("quote", ["", "'", '"'])
@pytest.mark.parametrize(
    "number", ["010", "00", "0x10", "0b1", "0o7", "1_000", "1:30", "190:20:30", "1e3x", "٣", "1 2", "5-"]
)
@pytest.mark.parametrize("key", ["batch_size", "lr"])
def test_bent_numbers_are_refused(tmp_path, key, number, quote):
    with pytest.raises(ConfigError, match=f"^{key}: expected .*got '{re.escape(number)}'"):
        _load(tmp_path, f"{key}: {quote}{number}{quote}")
    with pytest.raises(ConfigError, match=f"^{key}: expected .*got '{re.escape(number)}'"):
        load_config("M4-config.yaml", [f"{key}={number}"])
    with pytest.raises(ConfigError, match=r"^vocab_sizes: expected a list of integers"):
        _load(tmp_path, f"vocab_sizes: [1, 2, 3, {quote}{number}{quote}]")


@pytest.mark.parametrize(
    ("number", "value"),
    [
        ("8", 8.0),
        ("+3", 3.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("1e-3", 0.001),
        ("1E+3", 1000.0),
        ("1.5e0", 1.5),
        (" 2 ", 2.0),
    ],
)
def test_numbers_are_read_as_meant(tmp_path, number, value):
    assert _load(tmp_path, f"lr: {number}").lr == value
    assert _load(tmp_path, f"lr: '{number}'").lr == value
    assert load_config("M4-config.yaml", [f"lr={number}"])[0].lr == value
    if number.strip("+ ").isdigit():
        assert _load(tmp_path, f"batch_size: {number}").batch_size == value


@pytest.mark.parametrize("number", [".inf", "-.inf", "inf", "nan", ".NaN", "1e400", "infinity"])
def test_only_finite_numbers(tmp_path, number):
    with pytest.raises(ConfigError, match=r"^lr: expected a number, got .*finite"):
        _load(tmp_path, f"lr: {number}")


@pytest.mark.parametrize(
    ("written", "value"), [("on", True), ("yes", True), ("TRUE", True), ("0", False), ("'no'", False)]
)
def test_flags(tmp_path, written, value):
    assert _load(tmp_path, f"compile: {written}").compile is value
    with pytest.raises(ConfigError, match="compile: expected true or false, got 'y'"):
        _load(tmp_path, "compile: y")


@pytest.mark.parametrize("value", ["1:30", "0", "0:00:00", "0.2", "1:60:00", "-1", "1e300", "inf", "1:2:3:4", True, -5])
def test_what_is_no_duration(value):
    with pytest.raises(ValueError, match="expected hours:minutes:seconds or a number of seconds"):
        read_value(Duration, value)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "top level .* got nothing"),
        ("# lr: 1", "got nothing"),
        ("null", "got nothing"),
        ("5", "top level .* got '5'"),
        ("1e3", "got '1e3'"),
        ("just words", "got 'just words'"),
        ("- a\n- b", "top level .* got a list"),
        ("lr: [1, 2", "not valid YAML: line 1, column 10"),
        ("lr: 1\nseed: 2\nlr: 2", "line 3, column 1: the key lr is given twice, first in line 1"),
        ("model:\n  dim: 64\n  'dim': 64", "line 3, column 3: the key dim is given twice"),
        ("model: {dim: 64}\nmodel.dim: 64", r"model\.dim: given twice"),
        ("model.dim: 64\nmodel: {dim: 64}", "model: given twice"),
        ("\tlr: 1", "line 1, column 1: .*'.t'"),
        ("lr: 1\n---\nlr: 2", "another document"),
        ("? [a]\n: b", "a key must be a text"),
        ("null: 3", "a key must be a text"),
        ("lr: !thing 3", "line 1, column 5: .*!thing"),
        ("lr: !!python/name:os.system", "python"),
        ("lr: !!set {a}", "lr: expected text, a list or a section, got a set"),
        (b"\x00\x01\x02", "not valid YAML: .*special characters"),
        (b"\xff\xff\xff", "not valid YAML"),
        (b"lr: 1\xe4", "not valid YAML"),
        (BOMB, "more than 250,000 values"),
        ("a: &a [*a]", "a: more than .* levels"),
        ("model: &m {dim: *m}", "levels"),
        ("[" * 2000, "nested too deeply"),
        ("lr: ${seeds}", "lr: .*seeds.* not found"),
        ("lr: ${min_lr}\nmin_lr: ${lr}", "lr: Recursive"),
        ("lr: '${'", "lr: "),
        ("lr: 1" + " " * 2_000_000, "more than 2,000,000 bytes"),
    ],
    ids=lambda text: ascii(text)[:20],
)
def test_what_is_no_configuration(tmp_path, text, said):
    with pytest.raises(ConfigError, match=said) as caught:
        _load(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'run.yaml'}: ")
    assert "\n" not in str(caught.value)


def test_what_cannot_be_opened(tmp_path):
    for path, said in (
        (tmp_path / "absent.yaml", "no such"),
        (tmp_path, "got a folder"),
        (tmp_path / ("x" * 300), "too long"),
        ("a\0b", "null byte"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_config(path)


def test_a_value_to_be_filled_in(tmp_path):
    with pytest.raises(
        ConfigError, match=r"lr: expected a number, got '\?\?\?'; \?\?\? stands for .* still to be given"
    ):
        _load(tmp_path, "lr: ???")
    assert _load(tmp_path, "lr: ???", "lr=0.5").lr == 0.5


def test_a_value_left_out(tmp_path):
    for text in ("data:\n  root:\n  cache_dir: x", "data: {root: }", "data: {root: ''}"):
        with pytest.raises(ConfigError, match=r"^data\.root is empty; null means the sample set$"):
            _load(tmp_path, text)
    assert _load(tmp_path, "data:\n  root:", "data.root=/given").data.root == "/given"
    with pytest.raises(ConfigError, match="log: expected a section with the keys every"):
        _load(tmp_path, "log:\nlr: 0.1")


def test_yaml_in_every_form(tmp_path):
    encoded = ("\ufefflr: 0.01", "lr: 0.01\r\nseed: 3\r\n", "lr: 0.01".encode("utf-16"))
    styles = ("{lr: 0.01}", "lr: |\n  0.01\n", "<<: {lr: 0.02}\nlr: 0.01", "lr: !!float 0.01", "--- \nlr: 0.01\n...\n")
    for text in (*encoded, *styles):
        assert _load(tmp_path, text).lr == 0.01


def test_dotted_keys_and_interpolation(tmp_path):
    text = "model.dim: 128\nmodel: {head_dim: '${half}', enc_depth: 3}\nhalf: 64"
    with pytest.raises(ConfigError, match="half: unknown key"):
        _load(tmp_path, text)
    config = _load(tmp_path, text.replace("half", "global_vars.half"), "model.dim=256")
    assert (config.model.dim, config.model.head_dim, config.model.enc_depth) == (256, 64, 3)
