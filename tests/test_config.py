"""The configuration: defaults, and one clear error for each fault."""

import dataclasses
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import m4.config as config_module
from m4.config import (
    ModelSection,
    TrainConfig,
    config_from_dict,
    config_to_yaml,
    load_config,
    parse_duration,
)
from m4.config_values import read_value
from m4.errors import ConfigError
from m4.model import ModelConfig
from m4.same_run import ANNOUNCED_KEYS, FREE_KEYS, FREE_SECTIONS
from tests.round_trip import assert_round_trip
from tests.runs import RECIPE, write_yaml


def test_recipe_file_holds_every_key_at_its_default():
    config, notes = load_config(RECIPE)
    assert notes == []
    assert config == dataclasses.replace(TrainConfig(), run_name="M4-config")
    written = RECIPE.read_text()
    missing = [f.name for f in dataclasses.fields(TrainConfig) if f"{f.name}:" not in written]
    assert missing == []


def test_recipe_values():
    config, _ = load_config(RECIPE)
    assert (config.batch_size, config.global_batch_size, config.num_tokens_per_sample) == (96, 512, 256)
    assert (config.total_tokens, config.token_warmup) == (3000, 500)
    assert (config.lr, config.min_lr, config.weight_decay, config.clip_grad) == (0.002, 1e-7, 0.05, 1.0)
    assert config.training_seconds == 52485
    assert config.total_samples == 11_718_750
    assert (config.eval_freq, config.save_ckpt_freq, config.dtype) == (25, 1000, "fp32")
    assert dataclasses.astuple(config.model)[:5] == (640, 8, 8, 64, 4)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["lr=1e-4", "model.dim=128", "data.root=/some/where", "training_time=100:00:01", "run_name=x"],
        ["model.attention={encoder: full, decoder: within_modality}", "clip_grad=null", "training_time=null"],
        ["input_alphas=[1,2,3,4]", "min_lr=1e-7", "seed=9"],
    ],
)
def test_resolved_config_reloads_as_the_same(tmp_path, overrides):
    config, _ = load_config(RECIPE, overrides)
    folder = tmp_path / config.run_name
    folder.mkdir()
    (folder / "config.yaml").write_text(config_to_yaml(config))
    assert load_config(folder / "config.yaml")[0] == config


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("training_time: 14:34:45", 52485),
        ("training_time: '14:34:45'", 52485),
        ("training_time: 52485", 52485),
        ("training_time: 08:00:01", 28801),
    ],
)
def test_training_time_forms(tmp_path, text, seconds):
    config, _ = load_config(write_yaml(tmp_path, text))
    assert config.training_seconds == seconds
    assert parse_duration(config.training_time) == seconds


def test_numbers_written_as_text_become_numbers(tmp_path):
    config, _ = load_config(
        write_yaml(tmp_path, "min_lr: '1e-7'\nlr: 2e-3\nbatch_size: '8'\ninput_alphas: [1, '1e0', 0, 1]")
    )
    assert (config.min_lr, config.lr, config.batch_size) == (1e-7, 0.002, 8)
    assert config.input_alphas == [1.0, 1.0, 0.0, 1.0]


def test_overrides_win_and_sections_merge():
    config, _ = load_config(RECIPE, ["model.dim=128", "lr=1e-7", "min_lr=0", "data.root=null", "log.wandb=true"])
    assert (config.model.dim, config.model.enc_depth, config.lr, config.log.wandb) == (128, 8, 1e-7, True)


# Each: override, then what the one error must say: the key, the value, and the nearest key or what is expected.
FAULTS = [
    ("learing_rate=0.1", ["learing_rate", "nearest known key is lr"]),
    ("epochs=3", ["epochs", "nearest known key is total_tokens"]),
    ("batch_sise=4", ["batch_sise", "4", "batch_size"]),
    ("model.dims=4", ["model.dims", "model.dim"]),
    ("dim=640", ["dim", "640", "model.dim"]),
    ("wandb=true", ["wandb", "log.wandb"]),
    ("model=3", ["model", "3", "enc_depth"]),
    ("data=[1]", ["data=[1]", "does not fit"]),
    ("lr=fast", ["lr", "fast", "number"]),
    ("lr=true", ["lr", "true", "number"]),
    ("lr=null", ["lr", "null", "number"]),
    ("lr=nan", ["lr", "nan", "finite"]),
    ("lr=0", ["lr", "0.0", "above 0"]),
    ("lr=-1", ["lr", "-1"]),
    ("vocab_lr_scale=0", ["vocab_lr_scale", "0.0", "above 0"]),
    ("vocab_eps=0", ["vocab_eps", "0.0", "1e-37 … 1"]),
    ("vocab_eps=2", ["vocab_eps", "2.0"]),
    ("coords_lr_scale=0", ["coords_lr_scale", "0.0", "above 0", "as vocab_lr_scale"]),
    ("coords_lr_scale=1001", ["coords_lr_scale", "1001", "at most 1000"]),
    ("coords_lr_scale=fast", ["coords_lr_scale", "fast", "number"]),
    ("model.init=fourrier", ["model.init", "fourrier", "fourier, normal"]),
    ("lr=", ["lr is empty", "number"]),
    ("lr", ["lr", "key=value"]),
    ("=3", ["=3", "key=value"]),
    ("batch_size=3.5", ["batch_size", "3.5", "integer"]),
    ("batch_size=0", ["batch_size", "0", "above 0"]),
    ("global_batch_size=-1", ["global_batch_size", "-1"]),
    ("num_tokens_per_sample=0", ["num_tokens_per_sample"]),
    ("compile=maybe", ["compile", "maybe", "true or false"]),
    ("modalities=tok_rgb", ["modalities", "tok_rgb", "list"]),
    ("modalities=[]", ["modalities", "at least one"]),
    ("modalities=[tok_rgb,coords,tok_rgb_next]", ["vocab_sizes", "3 values", "65536"]),
    ("modalities=[tok_rgb,coords,coords,coords_next]", ["modalities", "once"]),
    ("vocab_sizes=[1,2]", ["vocab_sizes", "4 values", "[1, 2]"]),
    ("vocab_sizes=[1,2,3,0]", ["vocab_sizes", "0"]),
    ("vocab_sizes=[1,2,3,65537]", ["vocab_sizes", "65537", "65536"]),
    ("vocab_sizes=[1,2,3,4.5]", ["vocab_sizes", "integers"]),
    ("max_seq_lens=[256,39,256]", ["max_seq_lens", "4 values"]),
    ("max_seq_lens=[256,39,256,-39]", ["max_seq_lens", "-39"]),
    ("input_alphas=[1,1,1]", ["input_alphas", "3 values", "4"]),
    ("target_alphas=[1,1,1,-1]", ["target_alphas", "-1"]),
    ("target_alphas=[0,0,0,0]", ["target_alphas", "positive", "[0.0, 0.0, 0.0, 0.0]"]),
    ("input_alphas=[.inf,0,0,0]", ["input_alphas", "inf"]),
    ("input_tokens_range=[256,96]", ["input_tokens_range", "[256, 96]", "fewest <= most"]),
    ("input_tokens_range=[96]", ["input_tokens_range", "two integers", "[96]"]),
    ("target_tokens_range=[39,591]", ["target_tokens_range", "591", "590"]),
    ("target_tokens_range=[0,256]", ["target_tokens_range", "at least 1"]),
    ("input_tokens_range=256", ["input_tokens_range", "list"]),
    ("total_tokens=500", ["token_warmup", "500", "less than total_tokens"]),
    ("token_warmup=3000", ["token_warmup", "3000"]),
    ("token_warmup=-1", ["token_warmup", "-1"]),
    ("total_tokens=0", ["total_tokens"]),
    ("min_lr=0.01", ["min_lr", "0.01", "0.002"]),
    ("weight_decay=-0.1", ["weight_decay", "-0.1"]),
    ("clip_grad=0", ["clip_grad"]),
    ("dtype=fp8", ["dtype", "fp16", "bf16"]),
    ("data.order=random", ["data.order", "feistel or sorted", "random"]),
    ("kernels=fast", ["kernels", "fast", "reference-matmul"]),
    ("device=tpu", ["device", "tpu", "cuda"]),
    ("training_time=soon", ["training_time", "soon"]),
    ("training_time=-3", ["training_time", "-3"]),
    ("training_time='1:99:00'", ["training_time", "1:99:00"]),
    ("eval_freq=0", ["eval_freq"]),
    ("save_ckpt_freq=-1", ["save_ckpt_freq"]),
    ("keep_ckpts=0", ["keep_ckpts"]),
    ("stop_after_steps=0", ["stop_after_steps"]),
    ("eval_samples=0", ["eval_samples"]),
    ("model.dim=100", ["model.dim", "100", "64"]),
    ("model.head_dim=0", ["model.head_dim"]),
    ("model.enc_depth=0", ["model.enc_depth"]),
    ("model.mlp_ratio=0", ["model.mlp_ratio"]),
    ("model.attention=full", ["model.attention", "full", "encoder"]),
    ("model.attention.encode=full", ["model.attention", "encode", "encoder"]),
    ("seed=-1", ["seed"]),
    ("run_name=a/b", ["run_name", "a/b"]),
    ("log.every=0", ["log.every"]),
    ("lr=${nowhere}", ["lr", "nowhere"]),
    ("lr=[", ["lr"]),
    # What the classes that are built from it refuse, and YAML, floats or memory would not bear.
    ("input_alphas=[0.005,1,1,1]", ["input_alphas", "0.01 to 1000", "0.005"]),
    ("target_alphas=[1,1,1,2000]", ["target_alphas", "0.01 to 1000", "2000"]),
    ("max_seq_lens=[262145,1,1,1]", ["max_seq_lens", "262144", "262145"]),
    ("batch_size=10000000000", ["batch_size", "at most 1,048,576", "10000000000"]),
    ("global_batch_size=10000000000", ["global_batch_size", "at most 1,048,576"]),
    ("model.dim=10000000000", ["model.dim", "65536", "10000000000"]),
    ("model.dec_depth=1000000", ["model.dec_depth", "at most 1024", "1000000"]),
    ("model.mlp_ratio=1e300", ["model.mlp_ratio", "hidden width", "1e+300"]),
    ("save_ckpt_freq=1e-320", ["save_ckpt_freq", "one token", "1e-320"]),
    ("eval_freq=1e-7", ["eval_freq", "one token", "1e-07"]),
    ("total_tokens=1e308", ["total_tokens", "1e+12", "1e+308"]),
    ("total_tokens=1e12", ["total_tokens", "99,999,999 steps", "1e+12"]),
    ("num_tokens_per_sample=9223372036854775808", ["num_tokens_per_sample", "64 bits"]),
    ("clip_grad=1e-320", ["clip_grad", "null", "1e-320"]),
    ("weight_decay=1e39", ["weight_decay", "1e+39"]),
    ("lr=1e39", ["lr", "float32", "1e+39"]),
    ("lr=-0.0", ["lr", "0.0"]),
    ("lr=???", ["lr", "???", "still to be given"]),
    ("model.attention={encoder: null}", ["model.attention.encoder", "full", "None"]),
    ("model.attention={encoder: 5}", ["model.attention.encoder", "full", "5"]),
    ("model.attention={cross: [[1,0],[0,1]]}", ["model.attention.cross", "4 rows", "[[1, 0], [0, 1]]"]),
    ("model.attention={encoder: {a: b}}", ["model.attention.encoder", "4 rows"]),
    ("model=5", ["model", "section", "'5'"]),
    ("model=null", ["model", "section", "null"]),
    ("model.dim.x=3", ["model.dim", "integer", "{x: 3}"]),
    ("a.b.c.d=1", ["a.b.c.d", "unknown key"]),
    ("model..dim=1", ["model..dim=1", "key=value"]),
    ("lr==3", ["lr", "two equals signs"]),
    ("modalities=a,b", ["modalities", "list", "[a, b]"]),
    ("modalities=[a,,b]", ["modalities", "cannot be read"]),
    ("modalities=[a,null,b,c]", ["modalities", "null", "each entry"]),
    ("input_alphas.7=1", ["input_alphas", "does not fit"]),
    ("output_dir=a\0b", ["output_dir", "NUL"]),
    ("output_dir=a\udcff", ["output_dir", "Unicode"]),
    ("device=cuda:123456", ["device", "cuda:INDEX"]),
    ("data.root=", ["data.root is empty; null means the sample set"]),
    ("dtype=", ["dtype is empty"]),
]


@pytest.mark.parametrize(("override", "said"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_fault_names_key_value_and_remedy(override, said):
    with pytest.raises(ConfigError) as caught:
        load_config(RECIPE, [override])
    message = str(caught.value)
    assert "\n" not in message
    for part in said:
        assert part in message


@pytest.mark.parametrize("key", sorted(config_module._schema()))
def test_no_value_is_an_error_for_every_key(key):
    with pytest.raises(ConfigError, match=rf"^{re.escape(key)} is empty; "):
        load_config(RECIPE, [f"{key}="])


def test_keys_that_may_be_null():
    optional = {key for key, kind in config_module._schema().items() if read_or_none(kind) is None}
    assert optional == set(config_module._NULL_MEANS)
    for key in config_module._schema():
        if key in optional:
            load_config(RECIPE, [f"{key}=null"])
        else:
            with pytest.raises(ConfigError, match=rf"^{re.escape(key)}: expected .*, got null"):
                load_config(RECIPE, [f"{key}=null"])


def read_or_none(kind):
    try:
        return read_value(kind, None)
    except ValueError:
        return "refused"


@given(
    st.sampled_from(sorted(config_module._schema())),
    st.text(max_size=20) | st.floats().map(repr) | st.integers().map(str),
)
@settings(max_examples=300, deadline=None)
def test_whatever_is_typed_is_read_or_refused_by_name(key, typed):
    said = f"{key}: read"
    try:
        load_config(RECIPE, [f"{key}={typed}"])
    except ConfigError as error:
        said = str(error)
    named = re.match(rf"({RECIPE}: )?([\w.]+)( is empty;|:|=)", said)
    assert named, said
    assert named[2].startswith(tuple(config_module._schema())), said
    assert "\n" not in said


def test_a_key_given_twice_is_said():
    config, notes = load_config(RECIPE, ["lr=1e-3", "seed=1", "lr=2e-3"])
    assert config.lr == 0.002
    assert notes == ["lr: given 2 times on the command line; the last one counts"]


def test_defaults_of_the_model_stand_once():
    section, shape = dataclasses.asdict(ModelSection()), TrainConfig().model_config()
    assert section.pop("attention") is None
    assert section == {name: getattr(shape, name) for name in section}
    assert shape == ModelConfig(shape.modalities, shape.vocab_sizes, shape.max_seq_lens)


def test_made_in_python_it_is_checked_too(tmp_path):
    with pytest.raises(ConfigError, match=r"run_name: expected the name of a folder.*got '\.\.'"):
        TrainConfig(run_name="..")
    with pytest.raises(ConfigError, match=r"model\.dim: expected an integer, got '1e3'"):
        TrainConfig(model=ModelSection(dim="1e3"))
    with pytest.raises(ConfigError, match=r"model: expected a section with the keys dim, .*, got \{dim: 64\}"):
        TrainConfig(model={"dim": 64})
    config = TrainConfig(total_tokens=3000, output_dir=tmp_path)
    assert (config.total_tokens, config.output_dir) == (3000.0, str(tmp_path))
    config.run_name = "../elsewhere"
    with pytest.raises(ConfigError, match="run_name"):
        _ = config.run_dir


@pytest.mark.parametrize(
    "tree", [5, [], None, {"batch_sise": 4}, {"model": 4}, {"lr": True}, {"run_name": 1e3}, {3: 4}]
)
def test_dicts_are_checked_too(tree):
    with pytest.raises(ConfigError):
        config_from_dict(tree)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("small.yaml", "small"),
        ("1e3.yaml", "1e3"),
        ("007.yml", "007"),
        ("on.yaml", "on"),
        ("null.yaml", "null"),
        ("12:30.yaml", "12:30"),
        ("my config.yaml", "my config"),
        ("übung.yaml", "übung"),
        ("some run/config.yaml", "some run"),
        (f"{'x' * 240}.yaml", "x" * 240),
    ],
    ids=lambda text: ascii(text)[:20],
)
def test_run_name_follows_the_file(tmp_path, file, name):
    """And stays the same in config.yaml and in the meta data of a checkpoint."""
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text("lr: 0.001")
    config, _ = load_config(path)
    assert config.run_name == name
    assert config.run_dir.name == name
    assert_round_trip(config, tmp_path)
    path.write_text("run_name: other")
    assert load_config(path)[0].run_name == "other"


def test_run_name_of_a_config_file_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "config.yaml").write_text("lr: 0.001")
    monkeypatch.chdir(tmp_path / "here")
    assert load_config("config.yaml")[0].run_name == "here"
    assert load_config("../here/config.yaml")[0].run_name == "here"


NO_NAMES = ["..", ".", ".hidden", "-x", "a/b", "a\\b", "a\nb", " a", "a ", "a#b", "$x", "x" * 256, "ü" * 128]


@pytest.mark.parametrize("name", NO_NAMES, ids=lambda name: ascii(name)[:20])
def test_names_that_are_no_run(tmp_path, name):
    """Whatever they come from, they are refused before anything is written."""
    said = "run_name: expected the name of a folder"
    with pytest.raises(ConfigError, match=said):
        load_config(RECIPE, [f"run_name={name}"])
    with pytest.raises(ConfigError, match=said):
        load_config(write_yaml(tmp_path, f"run_name: {json.dumps(name)}"))
    with pytest.raises(ConfigError, match=said):
        config_from_dict({"run_name": name})
    if "/" not in name and len(name) < 100:
        path = tmp_path / f"{name}.yaml"
        path.write_text("lr: 0.001")
        with pytest.raises(ConfigError, match=f"{said}.*which is the name of .*; set run_name=NAME"):
            load_config(path)
        assert load_config(path, ["run_name=given"])[0].run_name == "given"


def test_no_rate_for_coordinates_without_any():
    names = ["modalities=[tok_rgb,tok_rgb_next,a,b]"]
    assert load_config(RECIPE, [*names, "vocab_lr_scale=0.5"])[0].coords_lr_scale is None
    with pytest.raises(
        ConfigError, match=r"^coords_lr_scale: expected null: as vocab_lr_scale, .*no coordinates.*1\.0"
    ):
        load_config(RECIPE, [*names, "coords_lr_scale=1"])


def test_wandb_takes_no_colon():
    with pytest.raises(ConfigError, match=r"run_name: .* log\.wandb.*'12:30'"):
        load_config(RECIPE, ["run_name=12:30", "log.wandb=true"])


def test_the_recipe_says_what_may_change_on_resuming():
    comment = RECIPE.read_text().partition("\nmodalities:")[0]

    def named(before):
        return set(re.findall(r"\w[\w.]*\w", re.split(r"\.\s", comment.partition(before)[2])[0]))

    assert named("may change:") == FREE_KEYS | FREE_SECTIONS
    assert named("diverged:") == ANNOUNCED_KEYS
