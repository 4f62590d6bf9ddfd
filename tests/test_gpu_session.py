"""`make gpu`: the runner of its stages, its list of stages, and its training step rehearsed on the CPU."""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_linear_cross_entropy, device, gpu, gpu_step, guard
from benchmarks.gpu import Stage, run_session, stages_of
from benchmarks.peers import installed, sdpa
from benchmarks.results import Session, commit, machine
from m4.config import ModelSection
from m4.model import ModelConfig, m4
from m4kernels import MaskedBatch, PackedTokens, Segments, cross_modal_attention, linear_cross_entropy
from tests.training.step_setup import PlainRecorder

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def python(code: str, seconds: float = 30.0, name: str = "stage", **environment: str) -> Stage:
    return Stage(name, (sys.executable, "-c", code), seconds, environment)


def session(tmp_path: Path, *stages: Stage) -> tuple[int, dict]:
    status = run_session(stages, tmp_path, {"gpu": None})
    (path,) = tmp_path.glob("stages-*.json")
    return status, json.loads(path.read_text())


def test_a_failing_stage_stops_nothing_and_is_told(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    status, body = session(
        tmp_path,
        python("print('fine')", name="first"),
        python("print('last words'); raise SystemExit(3)", name="second"),
        Stage("third", ("/nowhere/program",), 5),
        python("import os; assert os.environ['GIVEN'] == 'x'", name="fourth", GIVEN="x"),
    )
    assert status == 1
    assert [(s["name"], s["status"], s["returncode"]) for s in body["stages"]] == [
        ("first", "passed", 0),
        ("second", "failed", 3),
        ("third", "failed", 127),
        ("fourth", "passed", 0),
    ]
    said = capfd.readouterr().out
    assert "2 of 4 stages passed" in said
    assert "--- second failed (status 3)" in said
    assert said.count("\nlast words\n") == 2  # as it came, and in the summary
    assert (tmp_path / "logs" / "first.log").read_text() == "fine\n"


def test_all_passed_is_status_0(tmp_path: Path) -> None:
    assert session(tmp_path, python("pass"))[0] == 0


def test_what_stands_in_for_a_failed_stage(tmp_path: Path) -> None:
    instead = python("print('the rest')", name="instead")
    failing, fine = python("raise SystemExit(2)", name="build"), python("pass", name="fine")
    status, body = session(
        tmp_path,
        dataclasses.replace(failing, otherwise=instead),
        dataclasses.replace(fine, otherwise=instead),
        python("pass", name="last"),
    )
    assert status == 1  # though something stood in
    assert [(s["name"], s["status"]) for s in body["stages"]] == [
        ("build", "failed"),
        ("instead", "passed"),
        ("fine", "passed"),
        ("last", "passed"),
    ]


def test_a_machine_without_nvcc_builds_the_kernels_of_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the build stage asks of setup.py, there: an error first, then everything but CUDA."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    setup = f"""
import runpy
from types import SimpleNamespace
import setuptools
setuptools.setup = lambda **_: None  # only its functions are wanted
build = SimpleNamespace(**runpy.run_path({str(ROOT / "setup.py")!r}, run_name="setup"))
build.cuda_plan.__globals__["find_nvcc"] = lambda: None
assert build.cuda_plan(["a_cuda.cu"]) is None
"""
    stage = stages_of(True, tmp_path)[0]
    assert stage.otherwise is not None
    command = (sys.executable, "-c", setup)
    otherwise = dataclasses.replace(stage.otherwise, command=command)
    _, body = session(tmp_path, dataclasses.replace(stage, command=command, otherwise=otherwise))
    assert [(s["name"], s["status"]) for s in body["stages"]] == [("build", "failed"), ("build without CUDA", "passed")]
    assert "nvcc was not found" in body["stages"][0]["tail"][-1]
    assert "CUDA: not built (M4KERNELS_CUDA=0)" in body["stages"][1]["tail"][-1]


def test_a_stage_out_of_time_is_interrupted_first_and_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "GRACE", 1.0)
    polite = (
        "import time\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('saved what there was', flush=True)\n"
    )
    stubborn = (
        "import pathlib, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    start = time.monotonic()
    status, body = session(
        tmp_path,
        python(polite, seconds=4.0, name="polite"),
        python(stubborn, seconds=4.0, name="stubborn"),
        python("print('still here')", name="next"),
    )
    assert time.monotonic() - start < 30
    assert status == 1
    assert [s["status"] for s in body["stages"]] == ["out of time", "out of time", "passed"]
    assert body["stages"][0]["tail"][-1] == "saved what there was"
    child = int((tmp_path / "child").read_text())
    for _ in range(100):  # it may take a moment to be reaped
        if not _alive(child):
            break
        time.sleep(0.05)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_stages_are_there_and_fit_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_gpu: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    stages = stages_of(on_gpu, tmp_path, "python")
    names = [stage.name for stage in stages]
    assert len(set(names)) == len(names)
    assert {"build", "cuda tests", "training step", "repeats and masks"} <= set(names)
    assert {"op benchmarks", "step benchmarks", "plots"} <= set(names)
    if on_gpu:
        assert sum(stage.seconds for stage in stages) <= 600
        assert stages[0].environment["M4KERNELS_CUDA_ARCHS"] == "90"
    for stage in stages:
        for argument in stage.command:
            argument = argument.removeprefix("--ignore=")
            if argument.endswith(".py"):
                assert (ROOT / argument).is_file(), argument


@pytest.mark.parametrize(
    ("kernels", "recorder"),
    [("auto", None), ("auto", PlainRecorder()), ("reference", None), ("reference-matmul", None)],
)
def test_step_of_the_benchmark(kernels: str, recorder: PlainRecorder | None) -> None:
    inputs = gpu_step.recipe(2, 2, ModelSection(dim=16, enc_depth=1, dec_depth=1, head_dim=8))
    lengths = {"max_seq_lens": [16, 6, 16, 6], "input_tokens_range": [6, 12], "target_tokens_range": [4, 12]}
    small = dataclasses.replace(inputs.config, **lengths, vocab_sizes=[64] * 4)
    store = dataclasses.replace(inputs.store, tokens=inputs.store.tokens[:32, :44] % 64)
    inputs = inputs._replace(config=small, store=store)
    run = gpu_step.stepper(inputs, kernels, recorder=recorder, device=CPU)
    for _ in range(3):
        run()
    assert gpu_step.work(inputs).amount > 0


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


def test_a_machine_without_git_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("M4KERNELS_COMMIT", raising=False)
    monkeypatch.setenv("PATH", "")
    here = machine()
    assert here["commit"] == "unknown"
    assert here["uncommitted_changes"] is None  # not known
    monkeypatch.setenv("M4KERNELS_COMMIT", "0123456789abcdef")  # as `make gpu` is told
    assert commit() == "0123456789abcdef"
    monkeypatch.setattr("benchmarks.results.environment", machine)  # what it measures besides takes seconds
    path = Session().save(tmp_path)
    assert path.name.endswith("-0123456.json")
    assert json.loads(path.read_text())["environment"]["commit"] == "0123456789abcdef"
    monkeypatch.setattr(gpu, "stages_of", lambda *_: [python("print('measured')")])
    monkeypatch.setattr(sys, "argv", ["gpu", "--dry-run", "--out", str(tmp_path / "session")])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # which --dry-run sets
    assert gpu.main() == 0
    (stages,) = (tmp_path / "session").glob("*/stages-*.json")
    assert json.loads(stages.read_text())["commit"] == "0123456789abcdef"


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
