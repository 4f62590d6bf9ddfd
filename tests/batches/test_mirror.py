"""Mirrored training samples: which they are, what their tokens are, and that every way to read rows gives the same."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from m4.batches.masked import mask_rows
from m4.batches.mirror import Mirror
from m4.batches.order import SampleOrder
from m4.batches.train import TrainBatches
from m4.build import masking_spec
from m4.checkpoint import newest_whole
from m4.config import ModelSection, TrainConfig
from m4.data.store import TokenStore
from m4.data.tokenizers import mirrored_codes
from m4.errors import CheckpointError
from m4.modalities import BINS, IMAGE_CODES, RowLayout, mirror_image, mirror_joints
from m4.schedule import Schedule
from m4.training.trainer import Stores, Trainer

CPU = torch.device("cpu")
META = {"options": {"tokenizer": "fsq"}}
SAMPLES = 11
GOLDEN = [0, 1, 0, 0, 1, 1, 0, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 1]  # samples 0 … 19 under seed 0


@pytest.fixture
def config(tmp_path):
    return TrainConfig(
        batch_size=4,
        global_batch_size=8,
        total_tokens=0.01,
        token_warmup=0.001,
        eval_freq=10.0,
        eval_samples=4,
        save_ckpt_freq=10.0,
        training_time=None,
        input_tokens_range=[20, 60],
        target_tokens_range=[10, 40],
        model=ModelSection(dim=8, head_dim=8, enc_depth=1, dec_depth=1),
        output_dir=str(tmp_path),
        run_name="mirrored",
        device="cpu",
    )


@pytest.fixture
def mirrored(config):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, mirror=True))


@pytest.fixture
def store(config):
    random = np.random.default_rng(0)
    tokens = np.empty((SAMPLES, sum(config.max_seq_lens)), np.uint16)
    layout = RowLayout.of(config)
    for modality, span in zip(layout.described, layout.spans, strict=True):
        tokens[:, span] = random.integers(0, modality.vocab_size, (SAMPLES, modality.length))
        tokens[:, span][:, modality.visibility] %= 2
    return TokenStore(tokens=tokens, fingerprint="random", pids=tuple(map(str, range(SAMPLES))))


def by_hand(rows):
    """Rows (B, 590) with each modality mirrored by its own rule."""
    codes = torch.from_numpy(mirrored_codes(META))
    frame, pose, next_frame, next_pose = torch.from_numpy(rows.astype(np.int64)).split([256, 39, 256, 39], dim=1)
    parts = [mirror_image(frame, codes), mirror_joints(pose, BINS)]
    return torch.cat([*parts, mirror_image(next_frame, codes), mirror_joints(next_pose, BINS)], dim=1)


def test_which_samples_are_mirrored_is_golden(config, store):
    """A change here breaks the resumption of every mirrored run."""
    mirror = Mirror(config, META, store, CPU)
    assert mirror.chosen(np.arange(20)).astype(int).tolist() == GOLDEN
    far = np.array([2**40 + 5, 7, 2**62])
    assert mirror.chosen(far).shape == (3,)
    assert mirror.chosen(far)[1] == GOLDEN[7]
    assert (mirror.chosen(np.arange(20).reshape(4, 5)).ravel() == mirror.chosen(np.arange(20))).all()


def test_half_of_the_samples_are_and_the_seed_decides(config, store):
    mirror = Mirror(config, META, store, CPU)
    many = mirror.chosen(np.arange(40_000))
    assert abs(many.mean() - 0.5) < 4 * 0.5 / np.sqrt(40_000)
    pairs = many[:-1] == many[1:]  # neither alternating nor in runs
    assert abs(pairs.mean() - 0.5) < 4 * 0.5 / np.sqrt(40_000)
    other = Mirror(dataclasses.replace(config, seed=1), META, store, CPU).chosen(np.arange(40_000))
    assert abs((other == many).mean() - 0.5) < 4 * 0.5 / np.sqrt(40_000)
    high = Mirror(dataclasses.replace(config, seed=2**40), META, store, CPU).chosen(np.arange(40_000))
    assert abs((high == many).mean() - 0.5) < 4 * 0.5 / np.sqrt(40_000)


@pytest.mark.parametrize("dtype", [np.uint16, np.int64])
def test_the_chosen_rows_are_mirrored_and_no_others(config, store, dtype):
    mirror = Mirror(config, META, store, CPU)
    tokens = torch.from_numpy(store.tokens.astype(dtype))
    chosen = torch.arange(SAMPLES) % 3 == 0
    result = mirror(tokens, chosen)
    assert result.dtype == tokens.dtype
    expected = torch.where(chosen[:, None], by_hand(store.tokens), torch.from_numpy(store.tokens.astype(np.int64)))
    assert torch.equal(result.long(), expected)
    assert (result.numpy()[chosen.numpy()] != store.tokens[chosen.numpy()]).mean() > 0.8


def test_masked_rows_are_those_of_a_mirrored_store(config, store):
    """The same masks of other tokens."""
    mirror, spec = Mirror(config, META, store, CPU), masking_spec(config)
    rows, ids = np.array([3, 1, 4, 1, 5]), np.array([90, 7, 2, 8, 10**12])
    chosen = mirror.chosen(ids)
    assert 0 < chosen.sum() < 5
    turned = np.where(chosen[:, None], by_hand(store.tokens[rows]).numpy(), store.tokens[rows]).astype(np.uint16)
    plain = mask_rows(dataclasses.replace(store, tokens=turned), np.arange(5), ids, spec, seed=0, device=CPU)
    batch = mask_rows(store, rows, ids, spec, seed=0, device=CPU, mirror=mirror)
    for ours, theirs in ((batch.encoder, plain.encoder), (batch.decoder, plain.decoder)):
        assert torch.equal(ours.ids, theirs.ids)
        assert torch.equal(ours.positions, theirs.positions)


def tokens_of_steps(config, store, *, fixed, resident=None, steps=3):
    """Of each step the sorted (modality, position, id) of all inputs and of all targets."""
    schedule, order = Schedule.of(config, 1), SampleOrder(len(store), config.seed)
    mirror = Mirror.of(config, META, store, CPU)
    spec = masking_spec(config)
    batches = TrainBatches(
        store, order, spec, config, schedule, CPU, fixed_shapes=fixed, resident=resident, mirror=mirror
    )
    found = []
    for step in range(steps):
        halves = ([], [])
        for batch in batches.step(step * schedule.samples_per_step).micro_batches:
            for half, into in zip((batch.masked.encoder, batch.masked.decoder), halves, strict=True):
                packed = int(half.segments.cu_seqlens[-1])
                columns = (half.modalities, half.positions, half.ids)
                into.append(torch.stack([column[:packed].long() for column in columns], dim=1).numpy())
        found.append([sorted(map(tuple, np.concatenate(half).tolist())) for half in halves])
    return found


def test_every_way_to_read_gives_the_same_rows(mirrored, config, store):
    ragged = tokens_of_steps(mirrored, store, fixed=False)
    for resident in (False, True):
        assert tokens_of_steps(mirrored, store, fixed=True, resident=resident) == ragged
    for batch_size in (1, 8):
        other = dataclasses.replace(mirrored, batch_size=batch_size)
        assert tokens_of_steps(other, store, fixed=False) == ragged
    plain = tokens_of_steps(config, store, fixed=False)
    assert plain != ragged
    assert plain == tokens_of_steps(config, store, fixed=True)


def train(config, store):
    assert Trainer(config, stores=Stores(store, store, META)).run("command") == 0
    return load_file(newest_whole(config.run_dir)[0] / "model.safetensors")


def test_a_run_resumes_to_the_same_bits_and_is_another_run_than_a_plain_one(mirrored, config, store):
    whole = train(dataclasses.replace(mirrored, run_name="whole", stop_after_steps=4), store)
    train(dataclasses.replace(mirrored, stop_after_steps=2), store)
    pieces = train(dataclasses.replace(mirrored, stop_after_steps=4), store)
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)
    plain = train(dataclasses.replace(config, run_name="plain", stop_after_steps=4), store)
    assert not all(torch.equal(whole[name], plain[name]) for name in whole)
    with pytest.raises(CheckpointError, match=r"data\.mirror is True there and False now.*run_name=NAME"):
        train(dataclasses.replace(config, stop_after_steps=6), store)


def test_a_checkpoint_older_than_the_key_was_not_mirrored(config, mirrored, store):
    train(dataclasses.replace(config, stop_after_steps=1), store)
    path = newest_whole(config.run_dir)[0] / "meta.json"
    meta = json.loads(path.read_text())
    del meta["config"]["data"]["mirror"]
    path.write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match=r"data\.mirror is False there and True now"):
        train(dataclasses.replace(mirrored, stop_after_steps=2), store)
    train(dataclasses.replace(config, stop_after_steps=2), store)


def test_evaluations_are_not_mirrored(mirrored, config, store):
    """The losses of one model, before any step, are the same."""
    found = []
    for some in (config, mirrored):
        trainer = Trainer(some, stores=Stores(store, store, META))
        with torch.no_grad():
            for place, parameter in enumerate(trainer.model.parameters()):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(place))
        trainer.evaluate()
        found.append(trainer.state.evaluation)
    assert found[0] == found[1]


def test_a_check_before_training_sees_what_training_sees(mirrored, config, store):
    gradients = [
        Trainer(some, stores=Stores(store, store, META)).probe._pass(0, 4)[1]["to_logits.weight"]
        for some in (config, mirrored)
    ]
    assert not torch.equal(*gradients)


@pytest.mark.parametrize(
    ("changes", "meta", "said"),
    [
        ({}, {}, r"data\.mirror: expected images of the tokenizer fsq.*no meta\.json.*data\.mirror=false"),
        ({}, {"options": {"tokenizer": "cosmos"}}, r"data\.mirror: .*found those of cosmos\. Set data\.mirror=false"),
        ({"vocab_sizes": [512, 8192, 64000, 8192]}, META, r"data\.mirror: vocab_sizes of tok_rgb is 512.* 64000 codes"),
        ({"vocab_sizes": [64000, 512, 64000, 8192]}, META, r"data\.mirror: vocab_sizes of coords is 512.* 8192 bins"),
        ({"max_seq_lens": [256, 36, 259, 39]}, META, r"data\.mirror: expected 13 joints in coords, got 12"),
        (
            {"modalities": ["tok_rgb", "coords", "captions", "coords_next"]},
            META,
            r"data\.mirror: captions may say left and right.*train without captions",
        ),
        (
            {"modalities": ["tok_rgb", "coords", "depth", "coords_next"]},
            META,
            r"data\.mirror: nothing says how the tokens of depth are mirrored",
        ),
    ],
)
def test_what_cannot_be_mirrored_is_said(mirrored, store, changes, meta, said):
    with pytest.raises(ValueError, match=said) as caught:
        Trainer(dataclasses.replace(mirrored, **changes), stores=Stores(store, store, meta))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "token", "said"),
    [
        (5, IMAGE_CODES, "expected tok_rgb to be in 64000 codes, got 64000"),
        (256, BINS, "expected coords to be in 8192 bins, got 8192"),
        (589, 2, "visibility in coords_next is not 0 or 1"),
    ],
)
def test_tokens_of_other_rules_are_not_mirrored(mirrored, store, place, token, said):
    tokens = store.tokens.copy()
    tokens[3, place] = token
    with pytest.raises(ValueError, match=f"data.mirror: {said}"):
        Trainer(mirrored, stores=Stores(dataclasses.replace(store, tokens=tokens), store, META))
