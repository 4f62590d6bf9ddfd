"""How benchmarks behave on a GPU: what they call, how their inputs move, their peers and their floors."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_linear_cross_entropy, device, guard
from benchmarks.gpu import step
from benchmarks.peers import installed, sdpa
from m4.model import ModelConfig, m4
from m4kernels import MaskedBatch, PackedTokens, Segments, cross_modal_attention, linear_cross_entropy

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("kernels", "captured"), [("auto", False), ("auto", True), ("reference", False), ("reference-matmul", False)]
)
def test_step_of_the_benchmark(kernels: str, captured: bool) -> None:
    inputs = step.tiny(2, 2)
    recorder = step.Unrecorded() if captured else None
    run = step.trainer_of(inputs, kernels, recorder=recorder, device=CPU).train_step
    for _ in range(3):
        run()
    assert step.work(inputs).amount > 0


def test_the_benchmark_calls_the_loss_as_the_trainer_does(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def watched(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, **others: Any) -> Any:
        calls.append((x.dtype, weight.dtype, torch.is_autocast_enabled("cpu"), sorted(others)))
        return linear_cross_entropy(x, weight, targets, **others)

    for module in (m4, bench_linear_cross_entropy):
        monkeypatch.setattr(module, "linear_cross_entropy", watched)
    inputs = bench_linear_cross_entropy.tokens(40, 16, 64, limits=(64, 32))
    moved = device.moved(inputs, CPU, torch.bfloat16)
    bench_linear_cross_entropy.as_trained(moved)()
    assert moved.x.grad is None
    config = ModelConfig(
        modalities=("a", "b"), vocab_sizes=(64, 32), max_seq_lens=(8, 8), dim=16, enc_depth=1, dec_depth=1, head_dim=8
    )
    tokens = PackedTokens(
        torch.tensor([1, 2, 3]),
        torch.tensor([0, 1, 0]),
        torch.tensor([0, 0, 1]),
        Segments.from_counts(torch.tensor([[2, 1]])),
    )
    with torch.autocast("cpu", torch.bfloat16):
        m4.M4(config)(MaskedBatch(tokens, tokens))
    assert calls[0] == calls[1]
    assert calls[0][:3] == (torch.float32, torch.float32, True)


def test_inputs_move_as_a_whole() -> None:
    segments = Segments.from_counts(torch.tensor([[1, 2]]))
    leaf = torch.randn(3, requires_grad=True)
    from benchmarks.bench_cross_modal_attention import Layer

    moved = device.moved(Layer(leaf, leaf, leaf, segments, segments, None, True), torch.device("meta"), torch.bfloat16)
    assert moved.q is moved.k  # what was one tensor stays one
    assert moved.q_segments is moved.k_segments
    assert moved.q.is_leaf
    assert moved.q.requires_grad
    assert (moved.q.dtype, moved.q.device.type) == (torch.bfloat16, "meta")
    assert moved.q_segments.counts.dtype == torch.int32
    assert moved.backward is True
    (listed,) = device.moved([leaf], torch.device("meta"))
    assert listed.device.type == "meta"
    assert device.moved(leaf, CPU) is leaf


def test_absent_peers_are_skipped_and_broken_ones_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_peer").mkdir()
    (tmp_path / "broken_peer" / "__init__.py").write_text("import nothing_of_the_kind\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(device.Unavailable, match="absent-peer is not installed"):
        installed._module("absent_peer.inner", "absent-peer")
    with pytest.raises(ModuleNotFoundError, match="nothing_of_the_kind"):
        installed._module("broken_peer", "broken-peer")
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    with pytest.raises(device.Unavailable, match=r"2\.13"):
        installed.torch_linear_cross_entropy(*[torch.zeros(1, 1)] * 3)


def test_varlen_attention_gets_the_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call, with the kernel stood in for; arguments by position, whose names differ between versions."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    q_segments = Segments.from_counts(torch.tensor([[1, 2], [3, 0]]))
    k_segments = Segments.from_counts(torch.tensor([[2, 2], [1, 4]]))
    q, k, v = (torch.randn(n, 2, 8) for n in (6, 9, 9))

    def stand_in(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int) -> torch.Tensor:
        assert (max_q, max_k) == (3, 5)
        ends = cu_q.tolist(), cu_k.tolist()
        return sdpa.by_sample(q, k, v, *ends, [None] * 2)

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    out = installed.varlen_attention(q, k, v, q_segments, k_segments)
    torch.testing.assert_close(out, cross_modal_attention(q, k, v, q_segments, k_segments))


def test_a_gpu_without_floors_reports_and_one_with_floors_guards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "speedup", lambda *_, **__: 2.0)
    path = tmp_path / "floors-some-gpu.yaml"
    arguments = {"kernel": lambda: None, "baseline": lambda: None, "path": path}
    assert guard.check("op/case/a over b", **arguments, on_gpu=True) == 2.0
    guard.save({"op/case/a over b": 3.0}, path)
    with pytest.raises(guard.GuardError, match="floor 3"):
        guard.check("op/case/a over b", **arguments, on_gpu=True)
    with pytest.raises(guard.GuardError, match="no floor"):
        guard.check("op/case/c over d", **arguments, on_gpu=True)
