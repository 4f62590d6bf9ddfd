"""mask_tokens on a GPU: repeats, graph capture, streams of work without a synchronisation, assertions on the device."""

import subprocess
import sys

import pytest
import torch

from m4kernels import MaskedBatch, mask_tokens
from tests.ops.masking import M4, assert_equal, make_inputs

BACKENDS = ("cuda", "triton")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.parametrize("backend", BACKENDS),
]
CAPACITY = (13_312, 9_472)


def test_ten_repeats_give_the_same_bits(backend: str) -> None:
    tokens, ids, lengths = (x.cuda() for x in make_inputs(M4, 96, ragged=True))
    keywords = {"seed": 3, "sample_ids": ids, "lengths": lengths, "backend": backend}
    for capacity in (None, CAPACITY):
        first, *others = (mask_tokens(tokens, M4, **keywords, capacity=capacity) for _ in range(10))
        for other in others:
            assert_equal(other, first)


def test_graph_capture_with_a_capacity(backend: str) -> None:
    """A captured call makes the masks of whatever samples its input buffers hold; it also proves that none waits."""
    tokens, ids, lengths = (x.cuda() for x in make_inputs(M4, 96, ragged=True))

    def call() -> MaskedBatch:
        return mask_tokens(
            tokens, M4, seed=3, epoch=1, sample_ids=ids, lengths=lengths, capacity=CAPACITY, backend=backend
        )

    torch.use_deterministic_algorithms(False)  # poisoned allocations are not for a capture
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # tables and compiled kernels exist before the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for seed in (1, 2, 3):
        new = make_inputs(M4, 96, ragged=True, seed=seed)
        for buffer, values in zip((tokens, ids, lengths), new, strict=True):
            buffer.copy_(values)
        for tensor in captured.tensors():
            tensor.fill_(77)
        graph.replay()
        host_tokens, host_ids, host_lengths = new
        keywords = {"seed": 3, "epoch": 1, "sample_ids": host_ids, "lengths": host_lengths, "capacity": CAPACITY}
        assert_equal(captured.to("cpu"), mask_tokens(host_tokens, M4, **keywords, backend="reference"))


def test_with_a_capacity_nothing_waits_for_the_device(backend: str) -> None:
    tokens, ids, lengths = (x.cuda() for x in make_inputs(M4, 96, ragged=True))
    keywords = {"seed": 3, "sample_ids": ids, "lengths": lengths, "capacity": CAPACITY, "backend": backend}
    mask_tokens(tokens, M4, **keywords)  # tables and compiled kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        mask_tokens(tokens, M4, **keywords)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_without_a_capacity_a_bad_length_raises(backend: str) -> None:
    tokens, ids, lengths = (x.cuda() for x in make_inputs(M4, 96, ragged=True))
    lengths[70, 1] = 40
    with pytest.raises(ValueError, match=r"lengths\[70, 1\] must be 0 to 39 .*got 40"):
        mask_tokens(tokens, M4, seed=3, sample_ids=ids, lengths=lengths, backend=backend)


@pytest.mark.parametrize("fault", ["lengths", "capacity"])
def test_faults_trip_an_assertion_that_names_the_op(backend: str, fault: str) -> None:
    """In a process of its own, because an assertion leaves the device unusable."""
    code = f"""
import torch
from m4kernels import MaskingSpec, mask_tokens
spec = MaskingSpec((5, 17), (1, 1), (1, 1), (9, 9), (3, 3))
tokens = torch.zeros(4, 22, dtype=torch.int64, device="cuda")
lengths = torch.tensor([[5, 17]] * 3 + [[5, 18 if {fault == "lengths"} else 17]], device="cuda")
ids = torch.arange(4, device="cuda")
capacity = (36 if {fault == "lengths"} else 20, 40)
mask_tokens(tokens, spec, seed=0, sample_ids=ids, lengths=lengths, capacity=capacity, backend="{backend}")
print("returned")
torch.cuda.synchronize()
print("unnoticed")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "returned" in done.stdout
    assert "unnoticed" not in done.stdout
    assert done.returncode != 0
    assert "mask_tokens: a length is out of range or the capacity too small" in done.stdout + done.stderr
