"""Weights under nano4M's names."""

import argparse
import math

import pytest
import torch
from safetensors.torch import save_file

from m4.checkpoint import load_nano4m
from m4.errors import CheckpointError
from m4.model import ModelConfig

DIM, VOCABULARY, MODALITIES, LONGEST, DEPTH = 16, 32, 4, 12, 2
CONFIG = ModelConfig(
    modalities=["tok_rgb", "coords", "tok_rgb_next", "coords_next"],
    vocab_sizes=[32, 32, 32, 32],
    max_seq_lens=[12, 6, 12, 6],
    dim=DIM,
    head_dim=8,
    enc_depth=DEPTH,
    dec_depth=DEPTH,
)


@pytest.fixture
def weights():
    """A state dict written down from nano4M's list of names and shapes, zero LayerNorm biases included."""
    shapes = {
        "enc_tok_emb.weight": (VOCABULARY, DIM),
        "enc_mod_emb.weight": (MODALITIES, DIM),
        "dec_mod_emb.weight": (MODALITIES, DIM),
        "dec_context_proj.weight": (DIM, DIM),
        "dec_context_proj.bias": (DIM,),
        "enc_norm.weight": (DIM,),
        "dec_norm.weight": (DIM,),
        "to_logits.weight": (VOCABULARY, DIM),
    }
    for i in range(DEPTH):
        block = f"encoder.blocks.{i}"
        shapes |= {f"{block}.norm1.weight": (DIM,), f"{block}.norm2.weight": (DIM,)}
        shapes |= {f"{block}.attn.qkv_proj.weight": (3 * DIM, DIM), f"{block}.attn.attn_out_proj.weight": (DIM, DIM)}
        shapes |= {f"{block}.mlp.fc1.weight": (4 * DIM, DIM), f"{block}.mlp.fc2.weight": (DIM, 4 * DIM)}
        block = f"decoder.blocks.{i}"
        shapes |= {f"{block}.{norm}.weight": (DIM,) for norm in ("norm1", "query_norm", "context_norm", "norm2")}
        shapes |= {f"{block}.self_attn.qkv_proj.weight": (3 * DIM, DIM)}
        shapes |= {f"{block}.self_attn.attn_out_proj.weight": (DIM, DIM)}
        shapes |= {
            f"{block}.cross_attn.q_proj.weight": (DIM, DIM),
            f"{block}.cross_attn.kv_proj.weight": (2 * DIM, DIM),
        }
        shapes |= {f"{block}.cross_attn.attn_out_proj.weight": (DIM, DIM)}
        shapes |= {f"{block}.mlp.fc1.weight": (4 * DIM, DIM), f"{block}.mlp.fc2.weight": (DIM, 4 * DIM)}
    random = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    state |= {name.replace(".weight", ".bias"): torch.zeros(DIM) for name in shapes if "norm" in name}
    state["pos_emb"] = torch.tensor(
        [
            [f(p / 10000 ** (i / (DIM // 2))) for f in (math.sin, math.cos) for i in range(DIM // 2)]
            for p in range(LONGEST)
        ]
    )
    return state


def _check(model, weights):
    held = model.state_dict()
    for name, tensor in weights.items():
        if name in held:
            assert torch.equal(held[name], tensor), name
        else:
            assert name.endswith("norm.bias") or "norm" in name, name
    assert set(held) <= set(weights)


def test_state_dict(weights):
    _check(load_nano4m(weights, CONFIG), weights)


def test_pth_with_the_model_inside(tmp_path, weights):
    content = {"model": weights, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "checkpoint.pth")
    _check(load_nano4m(tmp_path / "checkpoint.pth", CONFIG), weights)


def test_bare_pth_and_safetensors(tmp_path, weights):
    torch.save(weights, tmp_path / "checkpoint.pth")
    save_file(weights, tmp_path / "model.safetensors")
    _check(load_nano4m(tmp_path / "checkpoint.pth", CONFIG), weights)
    _check(load_nano4m(str(tmp_path / "model.safetensors"), CONFIG), weights)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_wrapped_names(weights, prefix):
    _check(load_nano4m({prefix + name: tensor for name, tensor in weights.items()}, CONFIG), weights)


def test_position_table_may_be_left_out(weights):
    table = weights.pop("pos_emb")
    torch.testing.assert_close(load_nano4m(weights, CONFIG).pos_emb, table, rtol=0, atol=1e-6)


def test_all_faults_in_one_error(weights):
    del weights["encoder.blocks.1.norm1.weight"], weights["to_logits.weight"]
    weights["encoder.blocks.2.norm1.weight"] = torch.zeros(DIM)
    weights["enc_tok_emb.weight"] = torch.zeros(7, DIM)
    with pytest.raises(CheckpointError) as caught:
        load_nano4m(weights, CONFIG)
    for part in (
        "missing encoder.blocks.1.norm1.weight (16,)",
        "missing to_logits.weight (32, 16)",
        "unexpected encoder.blocks.2.norm1.weight",
        "enc_tok_emb.weight: expected shape (32, 16), got (7, 16)",
    ):
        assert part in str(caught.value)


def test_bias_that_is_not_zero_is_refused(weights):
    weights["decoder.blocks.0.query_norm.bias"][3] = 1e-3
    with pytest.raises(CheckpointError, match=r"decoder\.blocks\.0\.query_norm\.bias: expected a zero"):
        load_nano4m(weights, CONFIG)


class _NotTensors:
    pass


def test_unreadable_files(tmp_path, weights):
    torch.save(weights, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("not weights at all")
    torch.save({"model": _NotTensors()}, tmp_path / "pickle.pth")
    torch.save({"model": {"a": 1}}, tmp_path / "numbers.pth")
    for name in ("cut.pth", "empty.pth", "text.safetensors", "pickle.pth", "numbers.pth", "absent.pth"):
        with pytest.raises(CheckpointError, match=name):
            load_nano4m(tmp_path / name, CONFIG)
