"""Image tokenizers: 256x256 pictures to 16x16 grids of ids and back, all behind one protocol."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from m4.data.tokenizers.base import ImageTokenizer
from m4.errors import data_error
from m4.modalities import IMAGE_LEVELS

TOKENIZERS = ("fsq", "cosmos")


def make_tokenizer(
    name: str,
    cosmos_dir: str | os.PathLike | None = None,
    cosmos_dtype: str | None = None,
    fsq_id: str | None = None,
) -> ImageTokenizer:
    """The tokenizer ``name``. Raises DataError for another name, or absent weights.

    cosmos_dir: the folder of Cosmos' weights, None for the Hugging Face cache; cosmos_dtype: "bf16", "fp32" or None;
    fsq_id: how the codes of fsq are numbered, None for the newest way.
    """
    if name == "fsq":
        from m4.data.tokenizers import fsq

        return fsq.FSQTokenizer(fsq_id or fsq.NEWEST)
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
    tokenizer = make_tokenizer(
        name or options.get("tokenizer", "fsq"), cosmos_dir, options.get("cosmos_dtype"), fsq_id=_fsq_id(meta)
    )
    recorded = meta.get("tokenizer", {}).get("id")
    if name is None and recorded not in (None, tokenizer.id):
        raise data_error(
            "meta.json",
            expected=f"images of the tokenizer {tokenizer.id}, which is at hand",
            actual=f"those of {recorded}",
            remedy="Use the version of this package that prepared the data, or prepare the data and train again.",
        )
    return tokenizer


def _fsq_id(meta: Mapping[str, Any]) -> str | None:
    """How the codes of data with this meta.json are numbered, if they are those of fsq."""
    named = meta.get("tokenizer", {}).get("id")
    return named if meta.get("options", {}).get("tokenizer") == "fsq" else None


def code_levels(meta: Mapping[str, Any]) -> tuple[int, ...]:
    """How many levels each digit of the image codes of data with this meta.json has, fastest digit first; those of
    Cosmos where it does not say."""
    if meta.get("options", {}).get("tokenizer") == "fsq":
        from m4.data.tokenizers import fsq

        return fsq.numbering_of(_fsq_id(meta) or fsq.NEWEST).digits()
    return IMAGE_LEVELS


def mirrored_codes(meta: Mapping[str, Any]) -> np.ndarray:
    """int64 (C,): what each code of the tokenizer of data with this meta.json becomes where a picture is mirrored left
    to right, which also reverses the columns of its grid.

    Raises DataError, which names data.mirror, where that is not known without the pictures.
    """
    name = meta.get("options", {}).get("tokenizer")
    if name == "fsq":
        from m4.data.tokenizers import fsq

        return fsq.mirrored_codes(_fsq_id(meta) or fsq.NEWEST)
    raise data_error(
        "data.mirror",
        expected="images of the tokenizer fsq, whose codes have a known mirror image",
        actual=f"those of {name}" if name else "no meta.json that names the image tokenizer",
        remedy="Set data.mirror=false, or prepare the data with python -m m4.data prepare --tokenizer fsq.",
    )


def code_values(meta: Mapping[str, Any]) -> np.ndarray | None:
    """float32 (V, C): a point for each image code of data with this meta.json, of which the squared distance is that of
    the decoded blocks; None where the tokenizer has none (Cosmos decodes by a network)."""
    if meta.get("options", {}).get("tokenizer") == "fsq":
        from m4.data.tokenizers import fsq

        return fsq.code_values(_fsq_id(meta) or fsq.NEWEST)
    return None


__all__ = [
    "TOKENIZERS",
    "ImageTokenizer",
    "code_levels",
    "code_values",
    "make_tokenizer",
    "mirrored_codes",
    "tokenizer_of",
]
