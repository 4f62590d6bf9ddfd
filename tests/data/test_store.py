"""The packed store: what it accepts, what it refuses, and when it builds itself anew."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from m4.data import store as store_module
from m4.data.store import open_store
from m4.errors import DataError

MODALITIES, VOCABS, LENGTHS = ["rgb", "coords"], [64_000, 8192], [256, 39]


def tokens(seed=0, samples=7):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 64_000, (samples, 16, 16)), rng.integers(0, 8192, (samples, 3, 13))


def write(root, rgb, coords, split="train", rgb_dtype=np.int32):
    for modality, arrays, dtype in (("rgb", rgb, rgb_dtype), ("coords", coords, np.uint16)):
        for number, array in enumerate(arrays):
            folder = root / split / modality / f"{number:06d}"
            folder.mkdir(parents=True, exist_ok=True)
            np.save(folder / f"{modality}.npy", array.astype(dtype))
    return root


def open_it(root, split="train", **changes):
    arguments = dict(modalities=MODALITIES, vocab_sizes=VOCABS, max_seq_lens=LENGTHS)
    return open_store(root, split, **{**arguments, **changes})


def expected(rgb, coords):
    return np.concatenate([rgb.reshape(len(rgb), -1), coords.reshape(len(coords), -1)], 1)


def test_rows_and_batches(tmp_path):
    rgb, coords = tokens()
    store = open_it(write(tmp_path, rgb, coords))
    assert len(store) == 7
    assert store.tokens.dtype == np.uint16
    assert isinstance(store.tokens, np.memmap)
    assert store.pids == tuple(f"{number:06d}" for number in range(7))
    np.testing.assert_array_equal(store.tokens, expected(rgb, coords))
    for rows in ([3, 0, 3], np.array([3, 0, 3]), torch.tensor([3, 0, 3])):
        batch = store.batch(rows)
        assert batch.dtype == torch.int64
        np.testing.assert_array_equal(batch, expected(rgb, coords)[[3, 0, 3]])


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint32, np.int64, np.uint64, ">i4"])
def test_any_integer_type(tmp_path, dtype):
    rgb, coords = tokens()
    store = open_it(write(tmp_path, rgb, coords, rgb_dtype=dtype))
    np.testing.assert_array_equal(store.tokens, expected(rgb, coords))


def test_any_shape_and_file_name(tmp_path, caplog):
    rgb, coords = tokens()
    write(tmp_path, rgb, coords)
    base = tmp_path / "train/rgb"
    np.save(base / "000000/rgb.npy", rgb[0].ravel())
    np.save(base / "000001/rgb.npy", np.stack([rgb[1], rgb[2], rgb[3]]))
    np.save(base / "000002/rgb.npy", np.stack([rgb[2].ravel()] * 2))
    np.save(base / "000003/rgb.npy", np.asfortranarray(rgb[3]))
    (base / "000004/rgb.npy").rename(base / "000004/something else.npy")
    (base / "000005/.DS_Store").write_bytes(b"x")
    with caplog.at_level("INFO"):
        store = open_it(tmp_path)
    np.testing.assert_array_equal(store.tokens, expected(rgb, coords))
    assert "rgb: files with an augmentation axis; the first entry of each is used" in caplog.text


def test_second_opening_reads_the_cache(tmp_path, monkeypatch):
    root = write(tmp_path, *tokens())
    first = open_it(root)

    def refuse(*_):
        raise AssertionError("built again")

    monkeypatch.setattr(store_module, "_build", refuse)
    second = open_it(root)
    assert second.fingerprint == first.fingerprint
    np.testing.assert_array_equal(second.tokens, first.tokens)


def test_fingerprint_is_of_the_content(tmp_path):
    rgb, coords = tokens()
    fingerprints = {
        open_it(write(tmp_path / "a", rgb, coords)).fingerprint,
        open_it(write(tmp_path / "elsewhere/b", rgb, coords, rgb_dtype=np.int64)).fingerprint,
        open_it(write(tmp_path / "c", rgb, coords), cache_dir=tmp_path / "cache").fingerprint,
    }
    assert len(fingerprints) == 1
    rgb[6, 15, 15] ^= 1
    assert open_it(write(tmp_path / "d", rgb, coords)).fingerprint not in fingerprints


def test_changed_data_is_packed_anew(tmp_path):
    rgb, coords = tokens()
    root = write(tmp_path, rgb, coords)
    before = open_it(root)
    rgb[2] = 5
    np.save(root / "train/rgb/000002/rgb.npy", rgb[2].astype(np.int32))
    after = open_it(root)
    np.testing.assert_array_equal(after.tokens[2, :256], 5)
    assert after.fingerprint != before.fingerprint
    np.testing.assert_array_equal(before.tokens[2, 256:], coords[2].ravel())  # an open store keeps its data
    assert len(list((root / ".cache").glob("*.u16"))) == 1
    more = tokens(1, samples=9)
    assert len(open_it(write(root, *more))) == 9


@pytest.mark.parametrize("harm", ["truncate", "no data", "no json", "wrong json", "no maxima", "other maxima"])
def test_damaged_cache_is_packed_anew(tmp_path, harm):
    rgb, coords = tokens()
    root = write(tmp_path, rgb, coords)
    open_it(root)
    data, index = next((root / ".cache").glob("*.u16")), next((root / ".cache").glob("*.json"))
    if harm == "truncate":
        data.write_bytes(data.read_bytes()[:-100])
    elif harm == "no data":
        data.unlink()
    elif harm.endswith("maxima"):
        maxima = [] if harm == "no maxima" else [[1, 0], [1, 99]]
        index.write_text(json.dumps(json.loads(index.read_text()) | {"largest": maxima}))
    else:
        index.write_text("{" if harm == "no json" else "{}")
    np.testing.assert_array_equal(open_it(root).tokens, expected(rgb, coords))


def test_modalities_in_any_order_or_number(tmp_path):
    rgb, coords = tokens()
    root = write(tmp_path, rgb, coords)
    swapped = open_it(root, modalities=["coords", "rgb"], vocab_sizes=[8192, 64_000], max_seq_lens=[39, 256])
    np.testing.assert_array_equal(swapped.tokens[:, :39], coords.reshape(7, -1))
    only = open_it(root, modalities=["coords"], vocab_sizes=[8192], max_seq_lens=[39])
    np.testing.assert_array_equal(only.tokens, coords.reshape(7, -1))
    assert only.fingerprint != swapped.fingerprint


def test_missing_things(tmp_path):
    with pytest.raises(DataError, match="nowhere: expected a data root, found no such folder"):
        open_it(tmp_path / "nowhere")
    with pytest.raises(DataError, match="expected the folders train, eval, test, found none"):
        open_it(tmp_path)
    root = write(tmp_path, *tokens())
    with pytest.raises(DataError, match="eval: expected a folder of this split, found only train"):
        open_it(root, "eval")
    with pytest.raises(DataError, match="depth: expected a folder of this modality, found only coords, rgb"):
        open_it(root, modalities=["rgb", "depth"])
    (root / "eval/rgb").mkdir(parents=True)
    (root / "eval/coords").mkdir()
    with pytest.raises(DataError, match="eval: expected samples, found none"):
        open_it(root, "eval")


def test_modality_without_a_pid(tmp_path):
    root = write(tmp_path, *tokens())
    for pid in ("000004", "000005"):
        (root / f"train/coords/{pid}/coords.npy").unlink()
        (root / f"train/coords/{pid}").rmdir()
    message = r"train/coords/000004: expected the same samples as in rgb, found no sample 000004 \(2 of 7"
    with pytest.raises(DataError, match=message):
        open_it(root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((16, 15), int), r"expected 256 tokens, .* found shape \(16, 15\)"),
        (np.zeros((0, 16, 16), int), r"expected 256 tokens, .* found shape \(0, 16, 16\)"),
        (np.zeros((16, 16)), "expected integers, found dtype float64"),
        (np.full((16, 16), 64_000), r"expected tokens below 64000 \(vocab_sizes of rgb\), found 64000"),
        (np.full((16, 16), 70_000), r"expected tokens in \[0, 65536\), found 70000"),
        (np.full((16, 16), -3), r"expected tokens in \[0, 65536\), found -3"),
        (b"", r"expected a \.npy file of integers"),
        (b"\x93NUMPY\x01\x00 no", r"expected a \.npy file of integers"),
        ("cut", "expected 256 values of int64"),
        (np.array([{}]), "expected integers, found dtype object"),
    ],
)
def test_bad_file_is_named(tmp_path, content, message):
    root = write(tmp_path, *tokens())
    path = root / "train/rgb/000003/rgb.npy"
    if isinstance(content, np.ndarray):
        np.save(path, content)
    elif content == "cut":
        np.save(path, np.zeros((16, 16), np.int64))
        path.write_bytes(path.read_bytes()[:-8])
    else:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"train/rgb/000003/rgb\.npy: {message}"):
        open_it(root)


def test_token_above_a_lowered_vocabulary_is_found_in_the_cache_too(tmp_path):
    rgb, coords = tokens()
    coords[5, 1, 1] = 8191
    coords[coords == 8191] = 8191
    root = write(tmp_path, rgb, np.minimum(coords, 8000) + 191 * (coords == 8191))
    open_it(root)
    with pytest.raises(DataError, match=r"000005/coords\.npy: expected tokens below 8191 .* found 8191"):
        open_it(root, vocab_sizes=[64_000, 8191])


def test_folder_with_no_file_or_several(tmp_path):
    root = write(tmp_path, *tokens())
    np.save(root / "train/rgb/000001/again.npy", np.zeros((16, 16), int))
    with pytest.raises(DataError, match=r"000001: expected a folder with one file, found again\.npy, rgb\.npy"):
        open_it(root)
    (root / "train/rgb/000001/again.npy").unlink()
    (root / "train/rgb/000001/rgb.npy").unlink()
    with pytest.raises(DataError, match="000001: expected a folder with one file, found none"):
        open_it(root)


def test_bad_arguments(tmp_path):
    root = write(tmp_path, *tokens())
    with pytest.raises(DataError, match="three lists of one length, at least 1, found lengths 2, 1, 2"):
        open_it(root, vocab_sizes=[64_000])
    with pytest.raises(DataError, match=r"vocab_sizes \(rgb\): expected 1 to 65536"):
        open_it(root, vocab_sizes=[70_000, 8192])


def test_unwritable_root(tmp_path):
    rgb, coords = tokens()
    root = write(tmp_path, rgb, coords)
    (root / ".cache").write_text("in the way")  # file permissions do not stop the superuser
    with pytest.raises(DataError, match=r"\.cache: expected a folder that can be written to.*data\.cache_dir"):
        open_it(root)
    store = open_it(root, cache_dir=tmp_path / "mine")
    np.testing.assert_array_equal(store.tokens, expected(rgb, coords))


def test_two_roots_share_a_cache_folder(tmp_path):
    a = open_it(write(tmp_path / "a", *tokens(0)), cache_dir=tmp_path / "cache")
    b = open_it(write(tmp_path / "b", *tokens(1)), cache_dir=tmp_path / "cache")
    again = open_it(tmp_path / "a", cache_dir=tmp_path / "cache")
    assert a.fingerprint == again.fingerprint != b.fingerprint


def test_a_build_that_is_killed_leaves_no_cache(tmp_path, monkeypatch):
    rgb, coords = tokens()
    root = write(tmp_path, rgb, coords)

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(KeyboardInterrupt):
        open_it(root)
    monkeypatch.undo()
    assert not [path for path in (root / ".cache").iterdir() if path.suffix != ".lock"]
    np.testing.assert_array_equal(open_it(root).tokens, expected(rgb, coords))


def test_real_layout(prepared):
    modalities = ["tok_rgb", "coords", "tok_rgb_next", "coords_next"]
    store = open_store(prepared, "train", modalities, [64_000, 8192] * 2, [256, 39] * 2)
    assert store.tokens.shape[1] == 590
    with pytest.raises(DataError, match=r"captions\.json: expected a \.npy file"):
        open_store(prepared, "train", ["captions"], [100], [39])


def test_packing_is_fast(tmp_path):
    """1,000 samples, two modalities: well under a second here; 12,000 x 4 take a few."""
    rgb, coords = tokens(samples=1000)
    root = write(tmp_path, rgb, coords)
    start = time.process_time()
    open_it(root)
    assert time.process_time() - start < 2


def test_imports_nothing_of_the_preparation():
    code = (
        "import sys, m4.data.store; "
        "rooms = ('PIL', 'scipy', 'skimage', 'm4.data.preparation', 'm4.data.synthetic'); "
        "bad = {name for name in sys.modules if name.startswith(rooms)}; "
        "sys.exit(', '.join(bad) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
