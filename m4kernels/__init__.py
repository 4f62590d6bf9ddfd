"""Fast kernels for masked multimodal models: each op is one function with a plain PyTorch reference."""

from m4kernels._version import __version__
from m4kernels.ops.adamw_step.api import adamw_step
from m4kernels.ops.cross_modal_attention.api import cross_modal_attention
from m4kernels.ops.cross_modal_attention.packed import (
    cross_modal_attention_kvpacked,
    cross_modal_attention_qkvpacked,
)
from m4kernels.ops.embedding.api import embedding
from m4kernels.ops.layer_norm.api import add_layer_norm, layer_norm
from m4kernels.ops.linear.api import linear
from m4kernels.ops.linear_cross_entropy.api import LinearCrossEntropyOutput, linear_cross_entropy
from m4kernels.ops.mask_tokens.api import mask_tokens
from m4kernels.ops.mask_tokens.spec import MaskingSpec
from m4kernels.ops.quantize_coords.api import dequantize_coords, quantize_coords
from m4kernels.segments import MaskedBatch, PackedTokens, Segments

__all__ = [
    "LinearCrossEntropyOutput",
    "MaskedBatch",
    "MaskingSpec",
    "PackedTokens",
    "Segments",
    "__version__",
    "adamw_step",
    "add_layer_norm",
    "cross_modal_attention",
    "cross_modal_attention_kvpacked",
    "cross_modal_attention_qkvpacked",
    "dequantize_coords",
    "embedding",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "mask_tokens",
    "quantize_coords",
]
