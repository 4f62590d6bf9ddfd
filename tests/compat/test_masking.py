"""`m4.compat.SimpleMultimodalMasking` and the data loader around it."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from m4.compat import FourM, SimpleMultimodalMasking, create_multimodal_masked_dataloader
from m4kernels import mask_tokens
from tests.compat.both_forms import LENGTHS, NAMES, SIZES, batch, masking, sample
from tests.runs import MODALITIES

pytestmark = pytest.mark.usefixtures("one_thread")

FIELDS = ["tokens", "positions", "modalities", "pad_mask"]
WIDTHS = {"enc": 24, "dec": 20}
LOADER = {
    "modalities": list(MODALITIES),
    "vocab_sizes": [64] * 4,
    "max_seq_lens": list(MODALITIES.values()),
    "input_alphas": [1.0] * 4,
    "target_alphas": [1.0] * 4,
    "input_tokens_range": [6, 12],
    "target_tokens_range": [4, 12],
    "split": "train",
    "batch_size": 4,
}


def one(seed: int = 0) -> dict[str, Tensor]:
    return sample(torch.Generator().manual_seed(seed))


def test_layout_of_a_sample() -> None:
    tokens = one()
    torch.manual_seed(0)
    for _ in range(20):
        masked = masking()(tokens | {"captions": "not a modality"})
        assert set(masked) == {f"{side}_{field}" for side in ("enc", "dec") for field in FIELDS}
        seen = set()
        for side, width in WIDTHS.items():
            ids, positions, modalities, valid = (masked[f"{side}_{field}"] for field in FIELDS)
            assert [x.dtype for x in (ids, positions, modalities, valid)] == [torch.int64] * 3 + [torch.bool]
            assert ids.shape == positions.shape == modalities.shape == valid.shape == (width,)
            count = int(valid.sum())
            assert bool(valid[:count].all())
            assert count > 0
            assert set(ids[count:].tolist()) <= {0 if side == "enc" else -100}
            assert not positions[count:].any()
            assert not modalities[count:].any()
            places = list(zip(modalities[:count].tolist(), positions[:count].tolist(), strict=True))
            assert places == sorted(places)
            assert not seen & set(places)
            seen |= set(places)
            assert ids[:count].tolist() == [int(tokens[NAMES[m]][p]) for m, p in places]


def test_the_mask_is_that_of_mask_tokens() -> None:
    transform = masking(seed=7)
    samples = [one(seed) for seed in range(3)]
    rows = torch.stack([torch.cat([s[name] for name in NAMES]) for s in samples])
    ids = torch.tensor([5, 2**40, 0])
    expected = mask_tokens(rows, transform.spec, seed=7, sample_ids=ids, epoch=2).padded()
    collated = transform.collate(samples, sample_ids=ids, epoch=2)
    assert set(collated) == set(expected)
    for name, values in expected.items():
        assert torch.equal(collated[name], values), name
    for number, s in enumerate(samples):
        single = transform(s, sample_id=int(ids[number]), epoch=2)
        assert all(torch.equal(single[name], values[number]) for name, values in expected.items())


def test_masks_follow_torchs_seed() -> None:
    def drawn(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [masking()(one())["enc_positions"] for _ in range(3)]

    first = drawn(0)
    assert all(map(torch.equal, first, drawn(0)))
    assert not any(map(torch.equal, first, drawn(1)))
    assert not torch.equal(first[0], first[1])


def test_samples_of_fewer_tokens() -> None:
    tokens = one()
    tokens["coords"], tokens["tok_rgb_next"] = tokens["coords"][:3], tokens["tok_rgb_next"][:1]
    masked = masking().collate([tokens, one(1)] * 50, sample_ids=range(100))
    for side in WIDTHS:
        valid, modalities, positions = (masked[f"{side}_{f}"][::2] for f in ("pad_mask", "modalities", "positions"))
        for kind, most in ((1, 3), (2, 1)):
            chosen = valid & (modalities == kind)
            assert chosen.any()
            assert int(positions[chosen].max()) < most


def test_width_is_that_of_the_range() -> None:
    """Though a sample has 50 tokens only; and a range may be one number."""
    masked = masking(input_tokens_range=70, target_tokens_range=[1, 64])(one())
    assert (masked["enc_tokens"].shape, masked["dec_tokens"].shape) == ((70,), (64,))
    fixed = masking(input_tokens_range=9)
    assert fixed.input_tokens_range == (9, 9)


def test_what_was_given_is_kept_on_request() -> None:
    transform = masking(include_unmasked_data_dict=True)
    tokens = one()
    assert transform(tokens)["unmasked_data_dict"] is tokens
    kept = transform.collate([tokens, one(1)])["unmasked_data_dict"]
    assert torch.equal(kept["coords"], torch.stack([tokens["coords"], one(1)["coords"]]))


class Samples(torch.utils.data.Dataset):
    """All the same tokens, with a transform as nano4M's data sets have it."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        return one() if self.transform is None else self.transform(one())


@pytest.mark.parametrize("at_once", [False, True])
def test_in_workers_of_a_data_loader(at_once: bool) -> None:
    """Masks differ from sample to sample, worker to worker and epoch to epoch, and the model takes the batches."""
    torch.set_num_threads(2)
    batch(samples=64)  # forked workers must not wait for threads that their parent has
    transform = masking()
    loader = DataLoader(
        Samples(None if at_once else transform),
        batch_size=4,
        num_workers=2,
        collate_fn=transform.collate if at_once else None,
        timeout=200,
    )
    torch.manual_seed(0)
    rows = [batch["enc_positions"] for batch in itertools.chain(loader, loader)]
    assert len({tuple(row) for row in torch.cat(rows).tolist()}) == 24
    model = FourM(
        modalities=NAMES, vocab_sizes=SIZES, max_seq_lens=LENGTHS, dim=16, enc_depth=1, dec_depth=1, head_dim=8
    )
    assert torch.isfinite(model(next(iter(loader)))[0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"overlap_vocab": False}, "overlap_vocab: expected True, got False"),
        ({"overlap_posembs": False}, "overlap_posembs: expected True, got False"),
        ({"overlap_vocab": "yes"}, "overlap_vocab: expected True or False, got 'yes'"),
        ({"include_unmasked_data_dict": 1}, "include_unmasked_data_dict: expected True or False"),
        ({"input_alphas": [1.0]}, "input_alphas has 1 values, but max_seq_lens has 4"),
        ({"target_alphas": [0.0] * 4}, "target_alphas must have a positive value"),
        ({"input_tokens_range": [9, 3]}, "input_tokens_range must be two integers .fewest, most."),
        ({"target_tokens_range": "39"}, "target_tokens_range must be a list of integers, got '39'"),
        ({"vocab_sizes": [61]}, "vocab_sizes has 1 entries, modalities has 4"),
        ({"seed": 0.5}, "seed: expected integers, got 0.5"),
    ],
)
def test_arguments_that_do_not_fit(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        masking(**changes)


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (None, "coords: the sample lacks this modality; it has tok_rgb, tok_rgb_next, coords_next"),
        ([1, 2], "coords: expected an integer tensor .n,. of tokens, got a list"),
        (torch.zeros(3, 3, dtype=torch.int64), r"coords: expected an integer tensor .*got torch.int64 \(3, 3\)"),
        (torch.zeros(9), "coords: expected an integer tensor .*got torch.float32"),
        (torch.zeros(9, dtype=torch.bool), "coords: expected an integer tensor .*got torch.bool"),
        (torch.zeros(10, dtype=torch.int64), "coords: expected at most 9 tokens .max_seq_lens., got 10"),
        (torch.tensor([0, 40]), "coords: expected ids of 0 to 39 .vocab_sizes., got 40"),
        (torch.tensor([-1]), "coords: expected ids of 0 to 39 .vocab_sizes., got -1"),
    ],
)
def test_samples_that_do_not_fit(tokens: Any, said: str) -> None:
    s: dict[str, Any] = one()
    del s["coords"]
    if tokens is not None:
        s["coords"] = tokens
    with pytest.raises(ValueError, match=said):
        masking()(s)


def test_collate_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="collate: expected a list of at least one sample"):
        masking().collate([])
    with pytest.raises(ValueError, match="collate: expected a list of at least one sample"):
        masking().collate(one())
    with pytest.raises(ValueError, match="sample_ids: expected one for each of 2 samples, got 3"):
        masking().collate([one(), one()], sample_ids=[1, 2, 3])


# The data loader ------------------------------------------------------------------------------------------------------


def test_batches_of_a_data_set(token_root) -> None:
    loader = create_multimodal_masked_dataloader(str(token_root), **LOADER)
    torch.manual_seed(0)
    epochs = [list(loader), list(loader)]
    assert [len(batches) for batches in epochs] == [2, 2]  # 11 samples: the last three are left out
    assert not torch.equal(epochs[0][0]["enc_positions"], epochs[1][0]["enc_positions"])
    lists = {name: LOADER[name] for name in ("modalities", "vocab_sizes", "max_seq_lens")}
    loss, metrics = FourM(**lists, dim=16, enc_depth=1, dec_depth=1, head_dim=8)(epochs[0][0])
    assert torch.isfinite(loss)
    assert list(metrics) == LOADER["modalities"]


def test_evaluation_sees_the_same_batches(token_root) -> None:
    arguments: dict[str, Any] = LOADER | {"split": "eval", "shuffle": False, "drop_last": False, "num_workers": 1}
    first, again = (list(create_multimodal_masked_dataloader(str(token_root), **arguments)) for _ in range(2))
    assert [len(b["enc_tokens"]) for b in first] == [4, 3]
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    other = next(iter(create_multimodal_masked_dataloader(str(token_root), **arguments, seed=1)))
    assert not torch.equal(other["enc_positions"], first[0]["enc_positions"])


def test_loader_without_end(token_root) -> None:
    batches = create_multimodal_masked_dataloader(str(token_root), **LOADER, infinite=True)
    assert len(list(itertools.islice(batches, 7))) == 7


def test_ranks_share_the_samples(token_root, monkeypatch) -> None:
    """11 samples, of which every epoch two ranks take five each, others the next time."""
    monkeypatch.setattr(SimpleMultimodalMasking, "of_rows", lambda _, rows, **__: {"rows": rows})
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    epochs: list[list[tuple[int, ...]]] = [[], []]
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda *_, rank=rank: rank)
        loader = create_multimodal_masked_dataloader(
            str(token_root), **(LOADER | {"batch_size": 5}), distributed=True, infinite=True
        )
        for epoch, b in zip(epochs, itertools.islice(loader, 2), strict=True):
            epoch += map(tuple, b["rows"].tolist())
    assert [len(set(epoch)) for epoch in epochs] == [10, 10]
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sample_from_k_augmentations": 4}, "sample_from_k_augmentations: expected 1, .*got 4"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"batch_size": 12}, "batch_size: train of .* has 11 samples, too few for 12 at a time"),
        ({"shuffle": "yes"}, "shuffle: expected True or False, got 'yes'"),
        ({"num_workers": -1}, "num_workers: expected at least 0, got -1"),
        ({"split": "nosuch"}, "nosuch"),
        ({"overlap_vocab": False}, "overlap_vocab: expected True"),
    ],
)
def test_loader_arguments_that_do_not_fit(token_root, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        create_multimodal_masked_dataloader(str(token_root), **(LOADER | changes))
