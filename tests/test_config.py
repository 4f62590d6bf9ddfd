"""The configuration: defaults, forms of YAML, and one clear error for each fault."""

import dataclasses
from pathlib import Path

import pytest

from m4.config import TrainConfig, config_to_yaml, load_config, parse_duration
from m4.errors import ConfigError
from tests.runs import REPOSITORY

RECIPE = REPOSITORY / "M4-config.yaml"


def _write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


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
    config, _ = load_config(_write(tmp_path, text))
    assert config.training_seconds == seconds
    assert parse_duration(config.training_time) == seconds


def test_numbers_written_as_text_become_numbers(tmp_path):
    config, _ = load_config(
        _write(tmp_path, "min_lr: '1e-7'\nlr: 2e-3\nbatch_size: '8'\ninput_alphas: [1, '1e0', 0, 1]")
    )
    assert (config.min_lr, config.lr, config.batch_size) == (1e-7, 0.002, 8)
    assert config.input_alphas == [1.0, 1.0, 0.0, 1.0]


def test_overrides_win_and_sections_merge():
    config, _ = load_config(RECIPE, ["model.dim=128", "lr=1e-7", "min_lr=0", "data.root=null", "log.wandb=true"])
    assert (config.model.dim, config.model.enc_depth, config.lr, config.log.wandb) == (128, 8, 1e-7, True)


# Each: override, then what the one error must say: the key, the value, and the nearest key or what is expected.
FAULTS = [
    ("batch_sise=4", ["batch_sise", "4", "batch_size"]),
    ("model.dims=4", ["model.dims", "model.dim"]),
    ("dim=640", ["dim", "640", "model.dim"]),
    ("wandb=true", ["wandb", "log.wandb"]),
    ("model=3", ["model", "3", "enc_depth"]),
    ("data=[1]", ["data=[1]", "does not fit"]),
    ("lr=fast", ["lr", "fast", "number"]),
    ("lr=true", ["lr", "True", "number"]),
    ("lr=null", ["lr", "None", "number"]),
    ("lr=nan", ["lr", "nan", "finite"]),
    ("lr=0", ["lr", "0.0", "above 0"]),
    ("lr=-1", ["lr", "-1"]),
    ("lr=", ["lr", "number"]),
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
    ("input_alphas=[1,1,1]", ["input_alphas", "4 values"]),
    ("target_alphas=[1,1,1,-1]", ["target_alphas", "-1"]),
    ("target_alphas=[0,0,0,0]", ["target_alphas", "above 0"]),
    ("input_alphas=[.inf,0,0,0]", ["input_alphas", "inf"]),
    ("input_tokens_range=[256,96]", ["input_tokens_range", "[256, 96]", "lowest"]),
    ("input_tokens_range=[96]", ["input_tokens_range", "two values"]),
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
    ("dtype=fp16", ["dtype", "fp16", "bf16"]),
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
]


@pytest.mark.parametrize(("override", "said"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_fault_names_key_value_and_remedy(override, said):
    with pytest.raises(ConfigError) as caught:
        load_config(RECIPE, [override])
    message = str(caught.value)
    assert "\n" not in message
    for part in said:
        assert part in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr: [1, 2", "not valid YAML"),
        ("- a\n- b", "top level"),
        ("lr: 1\nlr: 2", "lr"),
        ("just words", ""),
    ],
)
def test_broken_file(tmp_path, text, said):
    path = _write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_binary_file(tmp_path):
    with pytest.raises(ConfigError, match="no such"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError):
        load_config(tmp_path / "run.yaml")


def test_run_name_follows_the_file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text("lr: 0.001")
    assert load_config(path)[0].run_name == "small"
    path.write_text("run_name: other")
    assert load_config(path)[0].run_name == "other"
