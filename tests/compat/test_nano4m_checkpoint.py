"""Weights under nano4M's names."""

import argparse
import math
import sys
import types
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from m4.checkpoint import load_nano4m, save_nano4m
from m4.compat import FourM
from m4.errors import CheckpointError
from m4.model import M4, AttentionConfig, ModelConfig
from m4kernels.cases import random_masked_batch
from tests.compat.nano4m_project import load_model_from_safetensors, resume
from tests.compat.padded_form import PaddedFourM

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


# Written for nano4M ---------------------------------------------------------------------------------------------------

BATCH = random_masked_batch(3, (5, 2, 5, 2), (3, 2, 3, 2), (32,) * 4, torch.Generator().manual_seed(0))


@pytest.fixture
def nano4m(monkeypatch):
    """A module by the name of nano4M's, with the padded form in the place of its class."""

    class Nano4M(PaddedFourM):
        def __init__(self, padding_idx, **arguments):
            kept = {name: value for name, value in arguments.items() if not name.endswith("_read_key")}
            super().__init__(**kept)
            self.read_keys = {name: value for name, value in arguments.items() if name.endswith("_read_key")}
            self.padding_idx = padding_idx

    module = types.ModuleType("nanofm.models.fourm")
    module.FourM = Nano4M
    for name in ("nanofm", "nanofm.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "nanofm.models.fourm", module)
    return Nano4M


def _trained(**changes) -> M4:
    torch.manual_seed(0)
    model = M4(replace(CONFIG, init="normal", **changes))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def _assert_same_losses(model, theirs):
    loss, metrics = theirs(BATCH.padded())
    losses = model(BATCH)
    torch.testing.assert_close(loss, losses.total, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch.stack(list(metrics.values())), losses.per_modality, rtol=1e-5, atol=1e-7)


def test_nano4m_loads_what_was_written(tmp_path, nano4m):
    model = _trained(mlp_ratio=2.0, enc_depth=1)
    assert save_nano4m(model, tmp_path / "new" / "first.safetensors") == tmp_path / "new" / "first.safetensors"
    theirs = load_model_from_safetensors(tmp_path / "new" / "first.safetensors")
    assert isinstance(theirs, nano4m)
    assert theirs.read_keys == {f"{name}_read_key": name for name in BATCH.padded()}
    _assert_same_losses(model, theirs)
    save_nano4m(model, str(tmp_path / "first.pth"))
    other = nano4m(
        padding_idx=-100,
        modalities=CONFIG.modalities,
        vocab_sizes=CONFIG.vocab_sizes,
        max_seq_lens=CONFIG.max_seq_lens,
        dim=DIM,
        enc_depth=1,
        dec_depth=DEPTH,
        head_dim=8,
        mlp_ratio=2.0,
    )
    resume(tmp_path / "first.pth", other)
    _assert_same_losses(model, other)


def test_fourm_is_written_with_its_own_arguments(tmp_path, nano4m):
    lists = {"modalities": ["a", "b"], "vocab_sizes": [20, 32], "max_seq_lens": [4, 6]}
    shape = {"dim": 16, "enc_depth": 1, "dec_depth": 1, "head_dim": 8}
    model = FourM(enc_tokens_read_key="mine", **lists, **shape, per_modality_loss_avg=False, padding_idx=-1)
    save_nano4m(model, tmp_path / "model.safetensors")
    theirs = load_model_from_safetensors(tmp_path / "model.safetensors")
    assert (theirs.modalities, theirs.per_modality_loss_avg, theirs.padding_idx) == (["a", "b"], False, -1)
    assert theirs.read_keys["enc_tokens_read_key"] == "mine"
    save_nano4m(model, tmp_path / "ours.safetensors", target="m4.compat.FourM")
    again = load_model_from_safetensors(tmp_path / "ours.safetensors")
    assert (again.vocab_sizes, again.read_keys, again.padding_idx) == ([20, 32], model.read_keys, -1)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_there_and_back(tmp_path, ending):
    model = _trained()
    again = load_nano4m(save_nano4m(model, tmp_path / f"model{ending}"), model.config)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert list(tmp_path.iterdir()) == [tmp_path / f"model{ending}"]


def test_a_checkpoint_of_nano4m_becomes_ours(weights):
    """The state dict of nano4M's list of names, biases and all, loads strictly, and is given back as it was."""
    model = FourM(modalities=CONFIG.modalities, vocab_sizes=CONFIG.vocab_sizes, max_seq_lens=CONFIG.max_seq_lens,
                  dim=DIM, enc_depth=DEPTH, dec_depth=DEPTH, head_dim=8)  # fmt: skip
    model.load_state_dict(weights)
    held = model.state_dict()
    assert set(held) == set(weights)
    assert all(torch.equal(value, held[name]) for name, value in weights.items())
    loss, _ = model(BATCH.padded())
    torch.testing.assert_close(loss, load_nano4m(weights, CONFIG)(BATCH).total)


def test_what_is_not_written(tmp_path):
    model = _trained()
    with pytest.raises(CheckpointError, match=r"model\.ckpt: expected a name that ends with \.pth or \.safetensors"):
        save_nano4m(model, tmp_path / "model.ckpt")
    sparse = _trained(attention=AttentionConfig(decoder="within_modality"))
    with pytest.raises(CheckpointError, match=r"full attention only, but attention\.decoder is 'within_modality'"):
        save_nano4m(sparse, tmp_path / "model.pth")
    save_nano4m(_trained(attention=AttentionConfig(decoder=[[1] * 4] * 4)), tmp_path / "full.pth")
    spoilt = _trained()
    spoilt.dec_mod_emb.weight.data[1, 2] = torch.nan
    with pytest.raises(CheckpointError, match=r"the weights of dec_mod_emb\.weight are not finite"):
        save_nano4m(spoilt, tmp_path / "model.pth")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file.model\.pth: cannot be written"):
        save_nano4m(model, tmp_path / "file" / "model.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full.pth"]
