"""What the Triton kernels of several ops are made of. Importing it imports triton."""

import os

import triton
import triton.language as tl

# Triton's interpreter cuts bfloat16 off where a GPU rounds to nearest even.
CUTS_OFF = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def rounded(b_value, dtype: tl.constexpr):
    """float32 values in a dtype, rounded to nearest even."""
    if CUTS_OFF and dtype == tl.bfloat16:
        b_bits = b_value.to(tl.uint32, bitcast=True)
        b_bits += 0x7FFF + ((b_bits >> 16) & 1)
        b_value = (b_bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return b_value.to(dtype)
