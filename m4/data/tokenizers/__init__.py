"""Image tokenizers: 256x256 pictures to 16x16 grids of ids and back, all behind one protocol."""

from __future__ import annotations

import os

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


__all__ = ["TOKENIZERS", "ImageTokenizer", "make_tokenizer"]
