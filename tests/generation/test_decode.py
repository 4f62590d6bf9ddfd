"""Parallel decoding: whole modalities, within their ids, the same for the same seed whatever else is decoded."""

import pytest
import torch

from m4.errors import CheckpointError
from m4.generation import decode
from m4.generation.decode import generate, predict_at_once, samples_at_once
from m4.generation.options import MAX_GUIDANCE, MAX_SEED, MAX_TEMPERATURE, Decoding
from m4.model import M4, ModelConfig
from m4.model.config import AttentionConfig

SHAPE = {
    "modalities": ["tok_rgb", "coords", "tok_rgb_next", "coords_next"],
    "vocab_sizes": [32, 20, 32, 20],
    "max_seq_lens": [5, 3, 5, 3],
    "dim": 16,
    "head_dim": 8,
    "enc_depth": 1,
    "dec_depth": 1,
}
CONFIG = ModelConfig(**SHAPE)
GIVEN, WANTED = ["tok_rgb", "coords"], ["tok_rgb_next", "coords_next"]


def model_of(config):
    torch.manual_seed(0)
    model = M4(config).eval()
    with torch.no_grad():
        model.to_logits.weight.normal_()
    return model


@pytest.fixture(scope="module")
def model():
    return model_of(CONFIG)


@pytest.fixture
def tokens():
    return torch.randint(0, 20, (3, 16), generator=torch.Generator().manual_seed(1))


def filled(model, tokens, given=GIVEN, wanted=WANTED, **settings):
    """`generate` with settings of `Decoding`, and others of its own."""
    own = {name: settings.pop(name) for name in ("id_limits", "ordinal", "sample_ids", "moment") if name in settings}
    return generate(model, tokens, given=given, wanted=wanted, decoding=Decoding(**{"steps": 3, **settings}), **own)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 5, 8])
@pytest.mark.parametrize("order", ["confidence", "random"])
def test_only_what_is_wanted_changes(model, tokens, steps, temperature, order):
    settings = {"steps": steps, "temperature": temperature, "order": order}
    out = filled(model, tokens, **settings)
    assert torch.equal(out[:, :8], tokens[:, :8])
    assert (out[:, 8:13] < 32).all()
    assert (out[:, 13:] < 20).all()
    assert torch.equal(out, filled(model, tokens, **settings))


def test_what_is_wanted_is_not_read(model, tokens):
    other = tokens.clone()
    other[:, 8:] = 0
    assert torch.equal(filled(model, tokens)[:, 8:], filled(model, other)[:, 8:])


def test_what_is_neither_stays_out(model, tokens):
    other = tokens.clone()
    other[:, 5:8] = 1
    both = [filled(model, t, ["tok_rgb"], ["coords_next"], steps=2) for t in (tokens, other)]
    assert torch.equal(both[0][:, 13:], both[1][:, 13:])
    assert torch.equal(both[0][:, :13], tokens[:, :13])


@pytest.mark.parametrize(("given", "wanted"), [(["coords_next"], ["tok_rgb"]), ([], SHAPE["modalities"])])
def test_any_from_any(model, tokens, given, wanted):
    out = filled(model, tokens, given, wanted, temperature=1.0)
    assert out.shape == tokens.shape
    assert not torch.equal(out, tokens)
    assert torch.equal(out[:, 13:], tokens[:, 13:]) == bool(given)


def padded_logits(model, tokens, visible, hidden):
    """Logits of single hidden positions of one sample, by the padded route."""
    from m4kernels import MaskedBatch

    lengths = torch.tensor(CONFIG.max_seq_lens)
    modality = torch.repeat_interleave(torch.arange(4), lengths)
    position = torch.cat([torch.arange(n) for n in CONFIG.max_seq_lens])
    padded = {}
    for prefix, chosen in (("enc", visible), ("dec", hidden)):
        index = torch.tensor(chosen, dtype=torch.int64)
        padded[f"{prefix}_tokens"] = tokens[:, index]
        padded[f"{prefix}_positions"] = position[index][None]
        padded[f"{prefix}_modalities"] = modality[index][None]
        padded[f"{prefix}_pad_mask"] = torch.ones(1, len(index), dtype=torch.bool)
    return model.logits(MaskedBatch.from_padded(padded, 4)).detach()


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("attention", ["full", "within_modality", [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0] * 4]])
def test_one_token_a_step_follows_confidence(tokens, guidance, attention):
    """With as many steps as tokens, each step keeps the likeliest id of the surest token, given all before it; with
    guidance, logits move away from those without what is given."""
    model = model_of(ModelConfig(**SHAPE, attention=AttentionConfig(encoder=attention)))
    out = filled(model, tokens[:1], wanted=["coords_next"], steps=3, guidance=guidance)
    known, left = tokens[:1].clone(), [13, 14, 15]
    while left:
        told = [p for p in (13, 14, 15) if p not in left]
        given = padded_logits(model, known, [*range(8), *told], left)[:, :20]
        alone = padded_logits(model, known, told, left)[:, :20]
        log_p = (alone + guidance * (given - alone)).log_softmax(-1)
        surest = int(log_p.max(-1).values.argmax())
        known[0, left[surest]] = int(log_p[surest].argmax())
        left.pop(surest)
    assert torch.equal(out[:, 13:], known[:, 13:])


def test_id_limits(model, tokens):
    limits = torch.full((16,), 7)
    limits[-1] = 2
    out = filled(model, tokens, id_limits=limits, temperature=2.0)
    assert (out[:, 8:] < limits[8:]).all()


def test_random_order_computes_the_logits_of_each_token_once(model, tokens, monkeypatch):
    rows = {"confidence": [], "random": []}
    plain = decode.choose
    for order, seen in rows.items():
        monkeypatch.setattr(decode, "choose", lambda y, *rest, seen=seen: seen.append(len(y)) or plain(y, *rest))
        filled(model, tokens, order=order, schedule="constant", steps=4)
    assert rows == {"confidence": [24, 18, 12, 6], "random": [6, 6, 6, 6]}


def test_random_order_is_not_that_of_confidence(model, tokens):
    orders = []
    for seed in range(8):
        out = filled(model, tokens, order="random", steps=8, seed=seed)
        orders.append(tuple(out[:, 8:].flatten().tolist()))
    assert len(set(orders)) > 1  # at temperature 0 only the order differs between seeds


def test_median_where_ids_are_steps_of_a_scale(model, tokens):
    ordinal = torch.zeros(16, dtype=torch.bool)
    ordinal[13:15] = True
    out = filled(model, tokens[:1], wanted=["coords_next"], ordinal=ordinal, steps=1)
    p = padded_logits(model, tokens[:1], list(range(8)), [13, 14, 15])[:, :20].softmax(-1).double()
    for position, row in zip((13, 14), p, strict=False):
        median = int(out[0, position])
        assert row[:median].sum() < 0.5 + 1e-6
        assert row[: median + 1].sum() > 0.5 - 1e-6
    assert int(out[0, 15]) == int(p[2].argmax())


def test_all_at_once_is_one_step(model, tokens):
    limits = torch.tensor([32] * 5 + [20] * 3 + [9] * 5 + [20, 20, 2])
    for options in ({}, {"ordinal": torch.arange(16) % 2 > 0, "id_limits": limits}):
        for wanted in (WANTED, ["coords_next"]):
            expected = filled(model, tokens, wanted=wanted, steps=1, **options)
            assert torch.equal(predict_at_once(model, tokens, given=GIVEN, wanted=wanted, **options).tokens, expected)


def test_seeds_differ_only_when_sampling(model, tokens):
    assert torch.equal(filled(model, tokens, seed=1), filled(model, tokens, seed=2))
    hot = [filled(model, tokens, temperature=1.0, **which) for which in ({}, {"seed": 2}, {"moment": 1})]
    assert len({tuple(out.flatten().tolist()) for out in hot}) == 3


SETTINGS = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 2.0, "top_k": 5, "order": "random"},
    {"temperature": 1.0, "guidance": 3.0},
]


@pytest.mark.parametrize("attention", ["full", "within_modality"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_sample_is_the_same_in_any_batch(settings, attention):
    """To the last bit: the number of rows of a matrix product decides nothing."""
    model = model_of(ModelConfig(**SHAPE, attention=AttentionConfig(encoder=attention)))
    tokens = torch.randint(0, 20, (40, 16), generator=torch.Generator().manual_seed(1))
    ids = torch.arange(40) * 3 + 2**33
    together = filled(model, tokens, sample_ids=ids, **settings)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    shuffled = torch.empty_like(together)
    for some in order.split([1, 2, 30, 7]):
        shuffled[some] = filled(model, tokens[some], sample_ids=ids[some], **settings)
    assert torch.equal(together, shuffled)


def test_many_samples_are_decoded_some_at_a_time(model, tokens, monkeypatch):
    many = tokens.repeat(7, 1)
    expected = filled(model, many, temperature=1.0)
    each = 4 * (8 + 2 * 8) * CONFIG.dim * (16 + CONFIG.mlp_ratio)
    monkeypatch.setattr(decode, "_ACTIVATION_BYTES", 5 * each)
    assert samples_at_once(model, decode.RowLayout.of(CONFIG), GIVEN, WANTED) == 5
    sizes = []
    outputs = decode.StepModel.outputs
    monkeypatch.setattr(
        decode.StepModel, "outputs", lambda self, t, *rest: sizes.append(len(t)) or outputs(self, t, *rest)
    )
    assert torch.equal(filled(model, many, temperature=1.0), expected)
    assert sizes == [size for size in (5, 5, 5, 5, 1) for _ in range(3)]
    assert filled(model, tokens[:0]).shape == (0, 16)


@pytest.mark.parametrize(
    ("attention", "encoded"),  # tokens of a sample that go through the encoder, call by call
    [
        ("full", [8, 11, 14]),
        ("within_modality", [8, 3, 6]),
        ([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]], [8, 3, 6]),
        ([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 1, 1]], [5, 3, 6, 9]),  # coords reads what is wanted
    ],
)
def test_the_encoder_does_again_only_what_may_change(tokens, attention, encoded):
    model = model_of(ModelConfig(**SHAPE, attention=AttentionConfig(encoder=attention)))
    seen, context = [], model.context
    model.context = lambda visible: seen.append(len(visible.ids) / 18) or context(visible)
    filled(model, tokens.repeat(6, 1), schedule="constant")
    assert seen == encoded


@pytest.mark.parametrize(
    "fault",
    [{"given": ["captions"]}, {"wanted": []}, {"wanted": ["coords"]}, {"given": [], "guidance": 2.0}],
)
def test_names_that_cannot_be_decoded(model, tokens, fault):
    with pytest.raises(ValueError, match="expected"):
        filled(model, tokens, **{"given": GIVEN, "wanted": WANTED, **fault})


@pytest.mark.parametrize(
    "fault",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature_schedule": "onex"},
        {"schedule": "square"},
        {"order": "raster"},
        {"top_k": 0},
        {"top_p": 1.5},
        {"top_p": float("nan")},
        {"guidance": -1.0},
        {"guidance": float("inf")},
        {"seed": -1},
        {"seed": 2**64},
        {"steps": 0},
        {"steps": 9},
        {"moment": -1},
        {"moment": 4096},
        {"sample_ids": torch.arange(2)},
    ],
)
def test_a_setting_out_of_range_is_named(model, tokens, fault):
    with pytest.raises(ValueError, match=f"^{next(iter(fault))}: expected"):
        filled(model, tokens, **fault)


def test_hot_sampling_stays_within_the_ids(model, tokens):
    settings = {"temperature": MAX_TEMPERATURE, "seed": MAX_SEED, "guidance": MAX_GUIDANCE}
    out = filled(model, tokens, id_limits=torch.full((16,), 3), **settings)
    assert (out[:, 8:] < 3).all()


def test_weights_that_are_not_finite(tokens):
    model = model_of(CONFIG)
    with torch.no_grad():
        model.to_logits.weight[3, 3] = float("nan")
    for settings in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}):
        with pytest.raises(CheckpointError, match="not finite"):
            filled(model, tokens, **settings)
