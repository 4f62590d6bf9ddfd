"""Parallel decoding: whole modalities, within their ids, the same for the same seed."""

import pytest
import torch

from m4.generation.decode import MAX_SEED, MAX_TEMPERATURE, generate, predict_at_once
from m4.model import M4, ModelConfig

CONFIG = ModelConfig(
    modalities=["tok_rgb", "coords", "tok_rgb_next", "coords_next"],
    vocab_sizes=[32, 20, 32, 20],
    max_seq_lens=[5, 3, 5, 3],
    dim=16,
    head_dim=8,
    enc_depth=1,
    dec_depth=1,
)
GIVEN, WANTED = ["tok_rgb", "coords"], ["tok_rgb_next", "coords_next"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = M4(CONFIG).eval()
    with torch.no_grad():
        model.to_logits.weight.normal_()
    return model


@pytest.fixture
def tokens():
    return torch.randint(0, 20, (3, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 5, 8, 50])
def test_only_what_is_wanted_changes(model, tokens, steps, temperature):
    out = generate(model, tokens, given=GIVEN, wanted=WANTED, steps=steps, temperature=temperature)
    assert torch.equal(out[:, :8], tokens[:, :8])
    assert (out[:, 8:13] < 32).all()
    assert (out[:, 13:] < 20).all()
    assert torch.equal(out, generate(model, tokens, given=GIVEN, wanted=WANTED, steps=steps, temperature=temperature))


def test_what_is_wanted_is_not_read(model, tokens):
    other = tokens.clone()
    other[:, 8:] = 0
    assert torch.equal(
        generate(model, tokens, given=GIVEN, wanted=WANTED, steps=4)[:, 8:],
        generate(model, other, given=GIVEN, wanted=WANTED, steps=4)[:, 8:],
    )


def test_what_is_neither_stays_out(model, tokens):
    other = tokens.clone()
    other[:, 5:8] = 1
    both = [generate(model, t, given=["tok_rgb"], wanted=["coords_next"], steps=2) for t in (tokens, other)]
    assert torch.equal(both[0][:, 13:], both[1][:, 13:])
    assert torch.equal(both[0][:, :13], tokens[:, :13])


def test_one_token_a_step_follows_confidence(model, tokens):
    """With as many steps as tokens, each step keeps the likeliest id of the surest token, given all before it."""
    out = generate(model, tokens[:1], given=GIVEN, wanted=["coords_next"], steps=50)
    known = tokens[:1].clone()
    left = [13, 14, 15]
    names, known_names = ["coords_next"], [*GIVEN, "coords_next"]
    assert names[0] in known_names
    while left:
        logits = _logits(model, known, [*range(8), *(p for p in (13, 14, 15) if p not in left)], left)
        log_p = logits[:, :20].log_softmax(-1)
        surest = int(log_p.max(-1).values.argmax())
        known[0, left[surest]] = int(log_p[surest].argmax())
        left.pop(surest)
    assert torch.equal(out[:, 13:], known[:, 13:])


def _logits(model, tokens, visible, hidden):
    """Logits of single hidden positions of one sample, by the padded route."""
    from m4kernels import MaskedBatch

    lengths = torch.tensor(CONFIG.max_seq_lens)
    modality = torch.repeat_interleave(torch.arange(4), lengths)
    position = torch.cat([torch.arange(n) for n in CONFIG.max_seq_lens])
    padded = {}
    for prefix, chosen in (("enc", visible), ("dec", hidden)):
        index = torch.tensor(chosen)
        padded[f"{prefix}_tokens"] = tokens[:, index]
        padded[f"{prefix}_positions"] = position[index][None]
        padded[f"{prefix}_modalities"] = modality[index][None]
        padded[f"{prefix}_pad_mask"] = torch.ones(1, len(index), dtype=torch.bool)
    return model.logits(MaskedBatch.from_padded(padded, 4)).detach()


def test_id_limits(model, tokens):
    limits = torch.full((16,), 7)
    limits[-1] = 2
    out = generate(model, tokens, given=GIVEN, wanted=WANTED, id_limits=limits, steps=3, temperature=2.0)
    assert (out[:, 8:] < limits[8:]).all()


def test_only_logits_that_can_be_taken_are_computed(model, tokens, monkeypatch):
    heads = []
    linear, head = torch.nn.functional.linear, model.to_logits.weight

    def watched(x, w, b=None):
        if w.data_ptr() == head.data_ptr():
            heads.append(w.shape[0])
        return linear(x, w, b)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    generate(model, tokens, given=GIVEN, wanted=["coords_next"], steps=2, temperature=1.0)
    assert heads == [20, 20]


def test_median_where_ids_are_steps_of_a_scale(model, tokens):
    ordinal = torch.zeros(16, dtype=torch.bool)
    ordinal[13:15] = True
    out = generate(model, tokens[:1], given=GIVEN, wanted=["coords_next"], ordinal=ordinal, steps=1)
    p = _logits(model, tokens[:1], list(range(8)), [13, 14, 15])[:, :20].softmax(-1).double()
    for position, row in zip((13, 14), p, strict=False):
        median = int(out[0, position])
        assert row[:median].sum() < 0.5 + 1e-6
        assert row[: median + 1].sum() > 0.5 - 1e-6
    assert int(out[0, 15]) == int(p[2].argmax())


@pytest.mark.parametrize("limited", [False, True])
def test_all_at_once_is_one_step(model, tokens, limited):
    options = {"ordinal": torch.arange(16) % 2 > 0} if limited else {}
    if limited:
        options["id_limits"] = torch.tensor([32] * 5 + [20] * 3 + [9] * 5 + [20, 20, 2])
    for wanted in (WANTED, ["coords_next"]):
        expected = generate(model, tokens, given=GIVEN, wanted=wanted, steps=1, **options)
        assert torch.equal(predict_at_once(model, tokens, given=GIVEN, wanted=wanted, **options).tokens, expected)


def test_logits_are_held_for_a_few_tokens_at_a_time(model, tokens, monkeypatch):
    expected = predict_at_once(model, tokens, given=GIVEN, wanted=WANTED).tokens
    held = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr("m4.generation.decode._LOGITS_BYTES", 4 * 32 * 3)
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, w, b=None: held.append((x.shape[0], w.shape[0])) or linear(x, w, b)
    )
    assert torch.equal(predict_at_once(model, tokens, given=GIVEN, wanted=WANTED).tokens, expected)
    heads = [rows for rows, ids in held if ids in (20, 32)]
    assert len(heads) >= 8
    assert max(heads[-8:]) <= 4


def test_seeds_differ_only_when_sampling(model, tokens):
    def sampled(**kwargs):
        return generate(model, tokens, given=GIVEN, wanted=WANTED, steps=3, **kwargs)

    assert torch.equal(sampled(seed=1), sampled(seed=2))
    assert not torch.equal(sampled(seed=1, temperature=1.0), sampled(seed=2, temperature=1.0))


@pytest.mark.parametrize(
    "fault",
    [
        {"given": ["captions"]},
        {"wanted": []},
        {"wanted": ["coords"]},
        {"steps": 0},
        {"temperature": -1.0},
    ],
)
def test_faults(model, tokens, fault):
    with pytest.raises(ValueError, match="expected"):
        generate(model, tokens, **{"given": GIVEN, "wanted": WANTED, **fault})


@pytest.mark.parametrize(
    "fault",
    [
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"seed": -1},
        {"seed": 2**44},
        {"first_sample": -1},
        {"first_sample": 2**20},
        {"steps": 0},
    ],
)
def test_a_number_out_of_range_is_named(model, tokens, fault):
    with pytest.raises(ValueError, match=f"^{next(iter(fault))}: expected"):
        generate(model, tokens, given=GIVEN, wanted=WANTED, **fault)


def test_hot_sampling_stays_within_the_ids(model, tokens):
    limits = torch.full((16,), 3)
    out = generate(
        model, tokens, given=GIVEN, wanted=WANTED, id_limits=limits, temperature=MAX_TEMPERATURE, seed=MAX_SEED
    )
    assert (out[:, 8:] < 3).all()


def test_a_sample_is_the_same_in_any_batch(model, tokens):
    whole = generate(model, tokens, given=GIVEN, wanted=WANTED, temperature=1.0, steps=3)
    parts = [
        generate(model, tokens[i : i + 1], given=GIVEN, wanted=WANTED, temperature=1.0, steps=3, first_sample=i)
        for i in range(3)
    ]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize(("given", "wanted"), [(["nothing"], ["coords"]), (["coords"], ["coords"]), (["coords"], [])])
@pytest.mark.parametrize("decode", [generate, predict_at_once])
def test_names_that_cannot_be_decoded(model, decode, given, wanted):
    tokens = torch.zeros(1, sum(model.config.max_seq_lens), dtype=torch.int64)
    with pytest.raises(ValueError, match="expected different modalities"):
        decode(model, tokens, given=given, wanted=wanted)
