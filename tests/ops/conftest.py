"""Fixtures for the tests of the ops."""

import os
from collections.abc import Iterator

import pytest
import torch

# On a GPU, deterministic algorithms (below) want cuBLAS to have a workspace of its own.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill freshly allocated memory with NaN (or the largest integer), so that an output left unwritten shows."""
    # On a GPU only with warnings: the references use operators that PyTorch refuses otherwise.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["auto", "avx512bf16", "avx512", "avx2", "portable"])
def simd_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the compiled CPU kernels at each SIMD level that this CPU has."""
    from m4kernels import _ext

    extension = _ext.require()
    try:
        extension.set_simd_level(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    extension.set_simd_level("auto")
