"""The benchmark guards fail when a kernel becomes slower; sessions are saved and drawn."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from benchmarks import bench_linear, bench_training_step, device, guard, measure, plot
from benchmarks.device import ON_GPU
from benchmarks.results import Record, Session
from m4kernels import quantize_coords

XY, VISIBLE = torch.rand(2000, 13, 2) * 256, torch.ones(2000, 13, dtype=torch.bool)
# Threads that wait for each other on a busy machine would decide a ratio.
pytestmark = pytest.mark.usefixtures("one_thread")
NAME = "quantize_coords/2000 samples/cpp over reference"


def quantize(backend: str, times: int = 1) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            quantize_coords(XY, VISIBLE, backend=backend)

    return run


def check(kernel: Callable[[], None], path: Path, update: bool = False) -> float:
    return guard.check(NAME, kernel, quantize("reference"), path=path, update=update, seconds=0.1)


def test_guard_fails_when_the_kernel_is_made_slower(tmp_path: Path) -> None:
    floors, floor = tmp_path / "floors.yaml", 1.5  # far from either side, so that a busy machine decides nothing
    guard.save({NAME: floor}, floors)
    assert check(quantize("cpp"), floors) >= floor
    with pytest.raises(guard.GuardError) as error:
        check(quantize("cpp", times=60), floors)
    message = str(error.value)
    assert NAME in message
    assert "floor 1.5x" in message
    assert "measured" in message
    assert "--update-floors" in message
    assert guard.load(floors) == {NAME: floor}  # a failure changes nothing


def test_floors_are_updated_on_purpose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    floors = tmp_path / "floors.yaml"
    guard.save({"other": 2.0, NAME: 9.0}, floors)
    monkeypatch.setattr(guard, "speedup", lambda *_, **__: 8.0)
    assert check(quantize("cpp"), floors, update=True) == 8.0
    assert guard.load(floors) == {"other": 2.0, NAME: 8.0 * guard.MARGIN}


def test_guard_wants_a_committed_floor(tmp_path: Path) -> None:
    with pytest.raises(guard.GuardError, match=r"no floor in floors\.yaml \(measured .*x\)\. Set it"):
        check(quantize("cpp"), tmp_path / "floors.yaml")


def test_a_single_disturbance_does_not_fail_the_guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    floors = tmp_path / "floors.yaml"
    guard.save({NAME: 5.0}, floors)
    measured = iter([1.0, 9.0])
    monkeypatch.setattr(guard, "speedup", lambda *_, **__: next(measured))
    assert check(quantize("cpp"), floors) == 9.0


def test_runs_are_measured_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(run: Callable[[], object]) -> float:
        run()
        return 0.1

    monkeypatch.setattr(measure, "timed", timed)
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    medians = measure.alternate(runs, seconds=0, rounds=(4, 4))
    assert calls == ["a", "a", "b", "b", *["a", "b"] * 4]  # each is warmed up; then four rounds
    assert set(medians) == {"a", "b"}
    calls.clear()
    monkeypatch.setattr(measure, "timed", lambda run: run() or measure.SECONDS_A_TURN / 3)
    measure.alternate(runs, seconds=0, rounds=(2, 2))
    assert calls == ["a", "a", "b", "b", *[*"a" * 4, *"b" * 4] * 2]  # three in a turn, one more untimed before them
    monkeypatch.setattr(measure, "timed", lambda run: 1e-6)
    assert measure.warm_up(runs["a"]) == (1e-6, 200)  # repeated until the clock's noise does not show
    monkeypatch.setattr(measure, "timed", lambda run: 3.0)
    assert measure.warm_up(runs["a"]) == (3.0, 1)


@pytest.mark.skipif(ON_GPU, reason="a GPU multiplies in bfloat16")
def test_bf16_is_not_timed_where_the_processor_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With AVX2 alone PyTorch's products of bfloat16 run at 1 GFLOP/s: every timed row took minutes and was killed."""
    rates, products = measure.product_rates.__wrapped__, []
    monkeypatch.setattr(torch, "mm", lambda a, b: products.append(a.dtype))
    monkeypatch.setattr(measure.onednn, "product", lambda a, b: None)
    for why, dtypes in (("no instructions", {torch.float32}), (None, {torch.float32, torch.bfloat16})):
        for module in (measure, device):
            monkeypatch.setattr(module, "slow_bf16", lambda why=why: why)
        products.clear()
        assert {name.split()[-1] for name in rates()} == {str(dtype).split(".")[-1] for dtype in dtypes}
        assert set(products) == dtypes
        for suite, provider in ((bench_linear.SUITE, "F.linear, bf16"), (bench_training_step.SUITE, "auto, bf16")):
            expected = nullcontext() if why is None else pytest.raises(device.Unavailable, match="no instructions")
            with monkeypatch.context() as patched, expected:
                patched.setattr(bench_training_step, "trainer", lambda: None)
                suite.providers[provider](None)


def test_session_is_saved_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "copy_bandwidth", lambda: 1e10)
    work = measure.Work(1e6, "B", "bytes = 1e6")
    session = Session(
        [
            Record.of("op", "case", name, seconds, 3, work, 2**20)
            for name, seconds in (("cpp", 2e-4), ("reference", 1e-3))
        ],
        {"op/case/cpp over reference": 5.0},
    )
    assert session.records[0].share_of_floor == pytest.approx(0.5)
    assert session.records[0].rate == "5.0 GB/s"
    assert any("5.00x" in line for line in session.table())
    first, second = session.save(tmp_path), session.save(tmp_path)
    assert first.parent == second.parent
    body = json.loads(second.read_text())
    assert len(body["environment"]["commit"]) in (7, 40)
    assert body["environment"]["torch"] == torch.__version__
    assert body["records"][1]["provider"] == "reference"
    assert plot.newest(second.parent) == second
    plot.draw(body, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(SystemExit, match="--save-results"):
        plot.newest(tmp_path / "nowhere")
