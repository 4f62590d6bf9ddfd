"""Data that others made: what is accepted with what was assumed, and what is refused as made by other rules."""

import json

import numpy as np
import pytest
import torch

from m4.data.inspection.dataset_statistics import statistics
from m4.data.store import open_store
from m4.errors import DataError
from m4kernels import dequantize_coords

SAMPLES = 24


def joints(seed=0):
    """int (N, 3, 13): x, y in 8,192 bins, visibility."""
    rng = np.random.default_rng(seed)
    xy = rng.integers(0, 8192, (SAMPLES, 2, 13))
    return np.concatenate([xy, rng.integers(0, 2, (SAMPLES, 1, 13))], axis=1)


def write(root, coords, name="whatever they called it.npy", split="train"):
    rgb = np.random.default_rng(1).integers(0, 64_000, (len(coords), 16, 16))
    for modality, arrays in (("tok_rgb", rgb), ("coords", coords)):
        for number, array in enumerate(arrays):
            folder = root / split / modality / f"{number:06d}"
            folder.mkdir(parents=True, exist_ok=True)
            np.save(folder / name, array)
    return root


def opened(root, vocabulary=65_536):
    return open_store(root, "train", ["coords"], [vocabulary], [39]).tokens.reshape(-1, 3, 13)


def test_a_nano4m_root_is_accepted_and_the_assumptions_are_said(tmp_path, caplog):
    with caplog.at_level("INFO"):
        tokens = opened(write(tmp_path, joints()))
        opened(tmp_path)  # from the cache
    np.testing.assert_array_equal(tokens, joints())
    said = "coords: no meta.json of python -m m4.data, so nothing says how joints were scaled"
    assert caplog.text.count(said) == 2
    text = statistics(tmp_path)
    assert "note: no meta.json" in text
    assert "no pairs.csv, so nothing is known of which samples share a video" in text


def test_prepared_data_needs_no_assumptions(prepared, tmp_path, caplog):
    with caplog.at_level("INFO"):
        open_store(prepared, "train", ["tok_rgb", "coords"], [65_536] * 2, [256, 39], cache_dir=tmp_path)
    assert "assum" not in caplog.text
    assert "taken" not in caplog.text
    assert "no meta.json" not in caplog.text


@pytest.mark.parametrize("form", ["rows", "flat", "augmented", "augmented and flat", "fortran", "float32"])
def test_float_joints_are_fractions_of_the_canvas(tmp_path, caplog, form):
    whole = joints()
    fractions = whole / np.array([8191, 8191, 1])[:, None]
    forms = {
        "rows": fractions,
        "flat": fractions.reshape(SAMPLES, 39),
        "augmented": np.stack([fractions, fractions * 0], 1),
        "augmented and flat": np.stack([fractions, fractions * 0], 1).reshape(SAMPLES, 2, 39),
        "fortran": [np.asfortranarray(row) for row in fractions],
        "float32": fractions.astype(np.float32),
    }
    with caplog.at_level("INFO"):
        tokens = opened(write(tmp_path, forms[form]))
    np.testing.assert_array_equal(tokens, whole)
    assert (
        f"coords: files floats; taken as fractions of the canvas, in 8,192 bins ({SAMPLES} of {SAMPLES})" in caplog.text
    )
    assert ("flat; taken as rows x, y, visibility" in caplog.text) == (form == "flat")
    assert ("augmentation axis; the first entry of each is used" in caplog.text) == form.startswith("augmented")


def test_float_joints_outside_the_frame_become_invisible(tmp_path):
    fractions = joints() / np.array([8191, 8191, 1])[:, None]
    fractions[:, 2] = 1
    fractions[3, 0, :3] = (1.25, np.nan, -0.2)
    tokens = opened(write(tmp_path, fractions))
    assert tokens[3, 2].tolist() == [0, 0, 0] + [1] * 10
    assert tokens[3, 0, :3].tolist() == [8191, 0, 0]
    _, visible = dequantize_coords(torch.from_numpy(tokens.astype(np.int64).reshape(-1, 39)))
    assert visible[3].tolist() == [False] * 3 + [True] * 10


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.transpose(0, 2, 1), r"expected rows x, y, visibility \(3, 13\), found \(13, 3\), joint by joint"),
        (lambda t: t[:, :2], r"\(2, 13\), without visibility"),
        (lambda t: t[:, :2].transpose(0, 2, 1), r"\(13, 2\), without visibility"),
        (lambda t: t.transpose(0, 2, 1).reshape(-1, 39), "every third value 0 or 1: x, y, visibility joint by joint"),
        (
            lambda t: np.where(t == t[5].max(), 8192, t),
            r"expected joints in bins 0 … 8191, found 8192, as the M3 rules",
        ),
        (
            lambda t: t // np.array([32, 32, 1])[:, None],
            "none of .* visible joints beyond 2[45].: pixels, or fewer bins",
        ),
        (lambda t: t / np.array([32, 32, 1.0])[:, None], r"float joints in \[0, 1\].*, perhaps pixels"),
        (lambda t: t / np.array([8191, 8191, 2.0])[:, None], r"expected visibility 0 or 1, found 0 … 0\.5"),
    ],
)
def test_other_rules_are_refused_with_the_reason(tmp_path, change, reason):
    root = write(tmp_path, change(joints()))
    message = rf"train/coords/0000\d\d/whatever.*{reason}.*Prepare the data again from the videos"
    with pytest.raises(DataError, match=message):
        opened(root)
    with pytest.raises(DataError, match=reason):
        statistics(root)


def test_visibility_that_is_none_is_said(tmp_path, caplog):
    coords = joints()
    coords[:, 2] *= 7
    with caplog.at_level("INFO"):
        np.testing.assert_array_equal(opened(write(tmp_path, coords)), coords)
    assert "visibility is not 0 or 1 everywhere" in caplog.text


def test_few_bins_are_right_where_the_vocabulary_says_so(tmp_path):
    coords = joints() // np.array([32, 32, 1])[:, None]
    np.testing.assert_array_equal(opened(write(tmp_path, coords), vocabulary=256), coords)


def test_meta_of_another_version_or_damaged_is_refused(tmp_path):
    root = write(tmp_path, joints())
    (root / "meta.json").write_text(json.dumps({"format": "m4-tokens-v9"}))
    with pytest.raises(DataError, match=r"meta\.json: expected format m4-tokens-v1, found m4-tokens-v9"):
        opened(root)
    (root / "meta.json").write_text('{"form')
    with pytest.raises(DataError, match=r"meta\.json: expected JSON"):
        opened(root)
    (root / "meta.json").write_text('{"made by": "somebody"}')
    assert len(opened(root)) == SAMPLES


def test_a_root_in_the_middle_of_a_split_is_refused(tmp_path):
    root = write(tmp_path, joints())
    (root / ".unfinished").write_text("split\n")
    with pytest.raises(DataError, match=r"expected a finished data set.*python -m m4.data prepare or split"):
        opened(root)
