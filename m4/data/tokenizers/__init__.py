"""Image tokenizers: 256x256 pictures to 16x16 grids of ids and back, all behind one protocol."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from m4.data.tokenizers.base import ImageTokenizer
from m4.errors import data_error

TOKENIZERS = ("fsq", "cosmos")


def make_tokenizer(
    name: str, cosmos_dir: str | os.PathLike | None = None, cosmos_dtype: str | None = None
) -> ImageTokenizer:
    """The tokenizer ``name``. Raises DataError for another name, or absent weights.

    cosmos_dir: the folder of Cosmos' weights, None for the Hugging Face cache; cosmos_dtype: "bf16", "fp32" or None.
    """
    if name == "fsq":
        from m4.data.tokenizers.fsq import FSQTokenizer

        return FSQTokenizer()
    if name == "cosmos":
        from m4.data.tokenizers.cosmos import CosmosTokenizer

        return CosmosTokenizer(cosmos_dir, dtype=cosmos_dtype)
    raise data_error("tokenizer", expected=" or ".join(TOKENIZERS), actual=repr(name), remedy="Choose one of these.")


def tokenizer_of(
    meta: Mapping[str, Any], name: str | None = None, cosmos_dir: str | os.PathLike | None = None
) -> ImageTokenizer:
    """The image tokenizer that the data with this meta.json was prepared with; fsq where it does not say (``{}``).

    name: another tokenizer instead. Raises DataError as `make_tokenizer` does, and where the one that is at hand is
    another version, whose ids mean something else.
    """
    options = meta.get("options", {})
    tokenizer = make_tokenizer(name or options.get("tokenizer", "fsq"), cosmos_dir, options.get("cosmos_dtype"))
    recorded = meta.get("tokenizer", {}).get("id")
    if name is None and recorded not in (None, tokenizer.id):
        raise data_error(
            "meta.json",
            expected=f"images of the tokenizer {tokenizer.id}, which is at hand",
            actual=f"those of {recorded}",
            remedy="Use the version of this package that prepared the data, or prepare the data and train again.",
        )
    return tokenizer


def mirrored_codes(meta: Mapping[str, Any]) -> np.ndarray:
    """int64 (C,): what each code of the tokenizer of data with this meta.json becomes where a picture is mirrored left
    to right, which also reverses the columns of its grid.

    Raises DataError, which names data.mirror, where that is not known without the pictures.
    """
    name = meta.get("options", {}).get("tokenizer")
    if name == "fsq":
        from m4.data.tokenizers import fsq

        return fsq.mirrored_codes()
    raise data_error(
        "data.mirror",
        expected="images of the tokenizer fsq, whose codes have a known mirror image",
        actual=f"those of {name}" if name else "no meta.json that names the image tokenizer",
        remedy="Set data.mirror=false, or prepare the data with python -m m4.data prepare --tokenizer fsq.",
    )


__all__ = ["TOKENIZERS", "ImageTokenizer", "make_tokenizer", "mirrored_codes", "tokenizer_of"]
