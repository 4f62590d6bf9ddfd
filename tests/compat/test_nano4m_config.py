"""The nested nano4M YAML as it stands."""

import pytest

from m4.config import config_to_yaml, load_config
from m4.errors import ConfigError

NESTED = """
run_name: auto
output_dir: ./outputs/auto
global_vars:
  batch_size: 96
  modalities: [tok_rgb, coords, tok_rgb_next, coords_next]
  vocab_sizes: [65536, 65536, 65536, 65536]
  max_seq_lens: [256, 39, 256, 39]
  input_alphas: [1.5, 1.5, 0.5, 0.5]
  target_alphas: [0.5, 0.5, 1.5, 1.5]
  input_tokens_range: [96, 256]
  target_tokens_range: [39, 256]
batch_size: ${global_vars.batch_size}
total_tokens: 3000
warmup_tokens: 500
num_tokens_per_sample: 256
lr: 0.002
min_lr: '1e-7'
weight_decay: 0.05
clip_grad: 1.0
dtype: fp32
eval_freq: 25
save_ckpt_freq: 1000
log_wandb: false
wandb_project: poses
wandb_entity: us
wandb_run_name: auto
model_config:
  _target_: somewhere.models.FourM
  enc_tokens_read_key: enc_tokens
  dec_pad_mask_read_key: dec_pad_mask
  modalities: ${global_vars.modalities}
  vocab_sizes: ${global_vars.vocab_sizes}
  max_seq_lens: ${global_vars.max_seq_lens}
  dim: 512
  enc_depth: 6
  dec_depth: 7
  head_dim: 32
  per_modality_loss_avg: true
train_loader_config: &loader
  _target_: somewhere.data.create_dataloader
  root_dir: /data/poses
  split: train
  modalities: ${global_vars.modalities}
  vocab_sizes: ${global_vars.vocab_sizes}
  max_seq_lens: ${global_vars.max_seq_lens}
  input_alphas: ${global_vars.input_alphas}
  target_alphas: ${global_vars.target_alphas}
  input_tokens_range: ${global_vars.input_tokens_range}
  target_tokens_range: ${global_vars.target_tokens_range}
  sample_from_k_augmentations: 1
  text_tokenizer_path: gpt2
  text_max_length: 256
  overlap_vocab: true
  overlap_posembs: true
  batch_size: ${global_vars.batch_size}
  infinite: true
  num_workers: 10
  pin_memory: true
  shuffle: true
  drop_last: true
  distributed: true
eval_loader_config:
  <<: *loader
  split: eval
  infinite: false
  shuffle: false
"""


@pytest.fixture
def nested(tmp_path):
    path = tmp_path / "M4-nested.yaml"
    path.write_text(NESTED)
    return path


def test_read_as_it_stands(nested):
    config, notes = load_config(nested)
    assert (config.batch_size, config.token_warmup, config.min_lr) == (96, 500, 1e-7)
    assert (config.model.dim, config.model.enc_depth, config.model.dec_depth, config.model.head_dim) == (512, 6, 7, 32)
    assert (config.data.root, config.data.train_split, config.data.eval_split) == ("/data/poses", "train", "eval")
    assert (config.log.wandb, config.log.wandb_project, config.log.wandb_entity) == (False, "poses", "us")
    assert (config.run_name, config.output_dir) == ("M4-nested", "./outputs")
    text = "\n".join(notes)
    for key in ("warmup_tokens", "model_config._target_", "model_config.enc_tokens_read_key", "log_wandb", "output_dir",
                "train_loader_config.num_workers", "eval_loader_config.split", "global_vars.batch_size"):  # fmt: skip
        assert sum(note.startswith(f"{key}:") for note in notes) == 1, (key, text)
    assert all("\n" not in note for note in notes)


def test_equals_the_flat_form(nested, tmp_path):
    config, _ = load_config(nested)
    flat = tmp_path / "flat.yaml"
    flat.write_text(config_to_yaml(config))
    again, notes = load_config(flat)
    assert again == config
    assert notes == []


@pytest.mark.parametrize(
    ("override", "batch_size"),
    [("batch_size=8", 8), ("global_vars.batch_size=8", 8), ("train_loader_config.batch_size=8", None)],
)
def test_override_of_an_interpolated_value(nested, override, batch_size):
    if batch_size is None:  # the top-level value, written in the file, now says something else
        assert load_config(nested, [override])[0].batch_size == 8
    else:
        assert load_config(nested, [override])[0].batch_size == batch_size


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("per_modality_loss_avg: true", "per_modality_loss_avg: false", ["per_modality_loss_avg", "false", "true"]),
        ("overlap_vocab: true", "overlap_vocab: false", ["overlap_vocab", "false"]),
        ("overlap_posembs: true", "overlap_posembs: 3", ["overlap_posembs", "3"]),
        ("  dim: 512", "  dimension: 512", ["model_config.dimension", "512", "model_config.dim"]),
        ("  num_workers: 10", "  num_worker: 10", ["num_worker", "num_workers"]),
        (
            "warmup_tokens: 500",
            "warmup_tokens: 500\ntoken_warmup: 300",
            ["warmup_tokens", "500", "token_warmup", "300"],
        ),
        (
            "  split: eval",
            "  split: eval\n  root_dir: /other",
            ["eval_loader_config.root_dir", "/other", "/data/poses"],
        ),
        ("${global_vars.input_alphas}", "[1, 1, 1, 1]", ["input_alphas", "[1, 1, 1, 1]"]),
        ("${global_vars.max_seq_lens}", "${global_vars.max_seq_len}", ["max_seq_len"]),
        ("model_config:", "model: 3\nmodel_config:", ["model", "section"]),
        ("warmup_tokens: 500", "warmup_tokens: 0500", ["warmup_tokens: expected a number, got '0500'"]),
        ("warmup_tokens: 500", "warmup_tokens:", ["warmup_tokens is empty"]),
        ("  root_dir: /data/poses", "  root_dir:", ["train_loader_config.root_dir is empty"]),
        ("  dim: 512", "  dim: 512\n  dim: 256", ["the key dim is given twice"]),
        ("model_config:", "model_config: FourM\nother:", ["model_config", "FourM"]),
    ],
)
def test_what_cannot_be_honoured_is_refused(nested, old, new, said):
    assert old in NESTED
    nested.write_text(NESTED.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load_config(nested)
    for part in said:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_and_numbers_keep_their_meaning(nested):
    """Text is not taken for a number on its way to our key, and numbers agree however they are written."""
    text = NESTED.replace("root_dir: /data/poses", "root_dir: 007").replace("poses\nwandb", "1e3\nwandb")
    text = text.replace("warmup_tokens: 500", "warmup_tokens: 500\ntoken_warmup: 5e2").replace(": true", ": True")
    nested.write_text(text)
    config, _ = load_config(nested)
    assert (config.data.root, config.log.wandb_project, config.token_warmup) == ("007", "1e3", 500.0)
    assert (
        load_config(nested, ["train_loader_config.root_dir=on", "eval_loader_config.root_dir=on"])[0].data.root == "on"
    )
    assert load_config(nested, ["wandb_project=12:30"])[0].log.wandb_project == "12:30"
    with pytest.raises(ConfigError, match=r"train_loader_config\.root_dir is empty"):
        load_config(nested, ["train_loader_config.root_dir="])


@pytest.mark.parametrize(
    ("folder", "ours"), [("./outputs/auto", "./outputs"), ("/auto", "/"), ("auto", "."), ("x", "x")]
)
def test_output_dir_of_one_run(nested, folder, ours):
    nested.write_text(NESTED.replace("./outputs/auto", folder))
    assert load_config(nested)[0].output_dir == ours
