"""What a data set's meta.json says, and the tokenizer that it names."""

import json
from types import SimpleNamespace

import pytest

from m4.data import tokenizers
from m4.data.layout import FORMAT, read_meta, require_meta
from m4.data.tokenizers import tokenizer_of
from m4.errors import DataError

WHOLE = {"format": FORMAT, "options": {"tokenizer": "fsq"}, "modalities": {}}


def write(root, meta):
    (root / "meta.json").write_text(json.dumps(meta))
    return root


def test_meta(tmp_path):
    assert read_meta(tmp_path) == {}
    write(tmp_path, WHOLE)
    assert require_meta(tmp_path) == read_meta(tmp_path) == WHOLE


@pytest.mark.parametrize(
    ("meta", "actual"),
    [
        (None, "no such file, or none of this format"),
        ({"options": {}, "modalities": {}}, "no such file, or none of this format"),  # of another program
        ({"format": FORMAT}, "no options and no modalities"),
        ({"format": FORMAT, "modalities": {}}, "no options"),
    ],
)
def test_meta_that_must_exist(tmp_path, meta, actual):
    if meta is not None:
        write(tmp_path, meta)
    with pytest.raises(DataError, match=rf"meta\.json: expected .*, found {actual}\. Prepare the data again"):
        require_meta(tmp_path)


def test_tokenizer_of_data(monkeypatch):
    asked = []

    def make(*arguments, fsq_id):
        asked.append((*arguments, fsq_id))
        return SimpleNamespace(id="stand-in")

    monkeypatch.setattr(tokenizers, "make_tokenizer", make)
    cosmos = {"options": {"tokenizer": "cosmos", "cosmos_dtype": "bf16"}}
    tokenizer_of({})
    tokenizer_of(cosmos, cosmos_dir="weights")  # decoded in the precision it was encoded in
    tokenizer_of(cosmos, "fsq")
    tokenizer_of({"options": {"tokenizer": "fsq"}, "tokenizer": {"id": "stand-in"}})
    assert asked == [
        ("fsq", None, None, None),
        ("cosmos", "weights", "bf16", None),
        ("fsq", None, "bf16", None),
        ("fsq", None, None, "stand-in"),  # the numbering that the data was prepared with
    ]
