"""`make gpu`: the runner of its stages, their list and order, its folder, and its stages rehearsed on the CPU."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import runner, stages
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.folder import LOG, RECORDS, SUMMARY, TAR, records_of
from benchmarks.gpu.runner import Outcome, Stage, run_stages
from benchmarks.gpu.session import body_of, collect, name_of
from benchmarks.gpu.stages import stages_of
from benchmarks.results import Session, commit, machine
from tests.runs import REPOSITORY

PLAIN_NAME = r"[A-Za-z0-9._-]+"  # of a file that a machine gives back


def python(code: str, seconds: float = 30.0, name: str = "stage", **environment: str) -> Stage:
    return Stage(name, (sys.executable, "-c", code), seconds, environment=environment)


def run(tmp_path: Path, *given: Stage) -> tuple[int, list[Outcome]]:
    seen: list[Outcome] = []
    status = run_stages(given, tmp_path / LOG, lambda outcomes: seen.append(outcomes[-1]))
    return status, seen


def names(outcomes: list[Outcome]) -> list[tuple[str, str]]:
    return [(outcome.name, outcome.status) for outcome in outcomes]


def test_a_failing_stage_stops_nothing_and_is_told(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    status, seen = run(
        tmp_path,
        python("print('fine')", name="first"),
        python("print('last words'); raise SystemExit(3)", name="second"),
        Stage("third", ("/nowhere/program",), 5),
        python("import os; assert os.environ['GIVEN'] == 'x'", name="fourth", GIVEN="x"),
    )
    assert status == 1
    assert [(s.name, s.status, s.returncode) for s in seen] == [
        ("first", "passed", 0),
        ("second", "failed", 3),
        ("third", "failed", 127),
        ("fourth", "passed", 0),
    ]
    said = capfd.readouterr().out
    assert "2 of 4 stages passed" in said
    assert "--- second failed (status 3)" in said
    assert said.count("\nlast words\n") == 2  # as it came, and in the summary
    log = (tmp_path / LOG).read_text()
    assert log.index("=== first") < log.index("\nfine\n") < log.index("=== second") < log.index("\nlast words\n")


def test_all_passed_is_status_0_though_nothing_could_be_kept(tmp_path: Path) -> None:
    def full_disk(_: list[Outcome]) -> None:
        raise OSError("no space left")

    assert run_stages([python("pass"), python("pass")], tmp_path / LOG, full_disk) == 0


def test_what_stands_in_for_a_failed_stage(tmp_path: Path) -> None:
    instead = python("print('the rest')", name="instead")
    failing, fine = python("raise SystemExit(2)", name="build"), python("pass", name="fine")
    status, seen = run(
        tmp_path,
        dataclasses.replace(failing, otherwise=instead),
        dataclasses.replace(fine, otherwise=instead),
        python("pass", name="last"),
    )
    assert status == 1  # though something stood in
    assert names(seen) == [("build", "failed"), ("instead", "passed"), ("fine", "passed"), ("last", "passed")]


def test_a_machine_without_nvcc_builds_the_kernels_of_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the build stage asks of setup.py, there: an error first, then everything but CUDA."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    setup = f"""
import runpy
from types import SimpleNamespace
import setuptools
setuptools.setup = lambda **_: None  # only its functions are wanted
build = SimpleNamespace(**runpy.run_path({str(REPOSITORY / "setup.py")!r}, run_name="setup"))
build.cuda_plan.__globals__["find_nvcc"] = lambda: None
assert build.cuda_plan(["a_cuda.cu"]) is None
"""
    stage = next(stage for stage in stages_of(True, tmp_path) if stage.name == "build")
    assert stage.otherwise is not None
    command = (sys.executable, "-c", setup)
    otherwise = dataclasses.replace(stage.otherwise, command=command)
    _, seen = run(tmp_path, dataclasses.replace(stage, command=command, otherwise=otherwise))
    assert names(seen) == [("build", "failed"), ("build without CUDA", "passed")]
    assert "nvcc was not found" in seen[0].tail[-1]
    assert "CUDA: not built (M4KERNELS_CUDA=0)" in seen[1].tail[-1]


POLITE = (
    "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('saved what there was', flush=True)\n"
)


def test_a_stage_out_of_time_is_interrupted_first_and_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "GRACE", 1.0)
    monkeypatch.setattr(runner, "LEAST", 1.0)
    stubborn = (
        "import pathlib, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    start = time.monotonic()
    status, seen = run(
        tmp_path,
        python(POLITE, seconds=4.0, name="polite"),
        python(stubborn, seconds=4.0, name="stubborn"),
        dataclasses.replace(python(POLITE, seconds=4.0, name="optional"), optional=True),
        python("print('still here')", name="next"),
    )
    assert time.monotonic() - start < 40
    assert status == 1
    assert [s.status for s in seen] == ["out of time", "out of time", "cut short", "passed"]
    assert seen[0].tail[-1] == "saved what there was"
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


def test_a_stage_may_take_what_others_left_and_never_what_is_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, allowed = [0.0], []
    takes = {"quick": 10.0, "long": 90.0, "late": 70.0, "last": 1.0}

    def pretended(stage: Stage, _log: Path) -> Outcome:
        allowed.append((stage.name, stage.seconds))
        clock[0] += takes[stage.name]
        return Outcome(stage.name, "", "passed", 0, takes[stage.name], [])

    monkeypatch.setattr(runner, "run_stage", pretended)
    monkeypatch.setattr(runner.time, "monotonic", lambda: clock[0])
    given = [Stage("quick", (), 50), Stage("long", (), 40, 100), Stage("late", (), 60), Stage("last", (), 20)]
    run_stages(given, tmp_path / LOG, lambda _: None)
    # 40 s were left by the first; the third took 10 too many and the last has that less.
    assert allowed == [("quick", 50), ("long", 80), ("late", 50), ("last", runner.LEAST)]


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_stages_are_there_and_fit_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_gpu: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    listed = stages_of(on_gpu, tmp_path, "python")
    names = [stage.name for stage in listed]
    assert len(set(names)) == len(names)
    order = ["speed", "build", "report", "every op", "step", "compiled step", "kernel table", "products", "peers"]
    order += ["sweeps", "tests", "training", "memcheck", "counters", "racecheck", "speed-ups"]
    assert [name for name in names if name != "step tests"] == order
    assert set(stages.FUNCTIONS) <= set(names)
    if on_gpu:
        assert sum(stage.seconds for stage in listed) <= stages.SECONDS
        assert all(stage.seconds > 2 * runner.GRACE for stage in listed)
        assert listed[1].environment["M4KERNELS_CUDA_ARCHS"] == "90"
    for stage in listed:
        for argument in stage.command:
            if argument.endswith(".py"):
                assert (REPOSITORY / argument).is_file(), argument


def test_tests_run_on_many_processes_only_where_that_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    absent: set[str] = set()
    monkeypatch.setattr(stages.importlib.util, "find_spec", lambda name: None if name in absent else object())
    command = stages.test_command("python", tmp_path, "tests")
    assert command[command.index("-n") + 1] == str(stages.WORKERS)
    assert f"timeout={stages.TEST_SECONDS}" in command
    absent |= {"xdist", "pytest_timeout"}
    command = stages.test_command("python", tmp_path, "tests")
    assert "-n" not in command
    assert not any("timeout" in argument for argument in command)


def quick(*_: Any) -> list[Stage]:
    """A session that takes a moment."""
    code = (
        "import sys; from pathlib import Path; from benchmarks.gpu.folder import Folder\n"
        "from benchmarks.results import Record; from benchmarks.measure import Work\n"
        "folder = Folder(Path({out!r}), 'step')\n"
        "folder.time(Record('training_step', 'M4, 96 samples', 'captured', 0.02, 5, '1 TFLOP/s', 'w', 0.5, 3))\n"
        "folder.say('a table')"
    )
    return [python(code.format(out=str(_[1])), name="step")]


def session(monkeypatch: pytest.MonkeyPatch, out: Path) -> int:
    monkeypatch.setattr("benchmarks.gpu.__main__.stages_of", quick)
    monkeypatch.setattr(sys, "argv", ["gpu", "--dry-run", "--out", str(out)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # which --dry-run sets
    before = signal.getsignal(signal.SIGTERM)
    try:
        return main()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_a_session_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few files with plain names; the tar holds the others; another session's are gone, and nobody else's."""
    monkeypatch.setenv("M4KERNELS_COMMIT", "0123456789abcdef")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("not the session's")
    for name in (RECORDS, LOG, SUMMARY, TAR, "20250101-000000-000001-abcdef0.json"):
        (out / name).write_text("another session's\n")
    assert session(monkeypatch, out) == 0
    files = sorted(path.name for path in out.iterdir())
    assert len(files) == 7
    assert all(re.fullmatch(PLAIN_NAME, name) for name in files)
    (named,) = (name for name in files if name.endswith("-0123456.json"))
    with tarfile.open(out / TAR) as tar:
        assert sorted(tar.getnames()) == [name for name in files if name != TAR]
    body = json.loads((out / named).read_text())
    assert body["environment"]["commit"] == "0123456789abcdef"
    assert [record["provider"] for record in body["records"]] == ["captured"]
    assert [stage["status"] for stage in body["gpu"]["stage"]] == ["passed"]
    assert "1 of 1 stages passed" in (out / SUMMARY).read_text()


def test_a_machine_without_git_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("M4KERNELS_COMMIT", raising=False)
    monkeypatch.setenv("PATH", "")
    here = machine()
    assert here["commit"] == "unknown"
    assert here["uncommitted_changes"] is None  # not known
    assert session(monkeypatch, tmp_path / "session") == 0
    assert name_of(records_of(tmp_path / "session")).endswith("-unknown.json")
    monkeypatch.setenv("M4KERNELS_COMMIT", "0123456789abcdef")  # as `make gpu` is told
    assert commit() == "0123456789abcdef"
    monkeypatch.setattr("benchmarks.results.environment", machine)  # what it measures besides takes seconds
    path = Session().save(tmp_path)
    assert path.name.endswith("-0123456.json")
    assert json.loads(path.read_text())["environment"]["commit"] == "0123456789abcdef"


def test_a_kill_loses_one_stage_at_most(tmp_path: Path) -> None:
    """kill -9 of a session in its second stage, which has written a record and half another: all else is there."""
    second = (
        "import os, time; from pathlib import Path; from benchmarks.gpu.folder import RECORDS, Folder\n"
        f"folder = Folder(Path({str(tmp_path)!r}), 'second'); folder.append('op', op='kept at once')\n"
        f'open({str(tmp_path / RECORDS)!r}, \'a\').write(\'{{"kind": "op", "op": "half\')\n'
        f"Path({str(tmp_path / 'ready')!r}).touch(); time.sleep(60)"
    )
    first = (
        "from pathlib import Path; from benchmarks.gpu.folder import Folder\n"
        f"Folder(Path({str(tmp_path)!r}), 'first').append('op', op='first')"
    )
    listed = [("one", first), ("two", second)]
    program = (
        "import sys; from pathlib import Path\n"
        "from benchmarks.gpu import __main__ as gpu; from benchmarks.gpu.runner import Stage\n"
        f"gpu.stages_of = lambda *_: [Stage(n, (sys.executable, '-c', c), 60) for n, c in {listed!r}]\n"
        f"gpu.session(Path({str(tmp_path)!r}), False)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    try:
        for _ in range(600):
            if (tmp_path / "ready").exists():
                break
            time.sleep(0.1)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with pytest.raises(json.JSONDecodeError):
        json.loads((tmp_path / RECORDS).read_text().split("\n")[-1])
    assert [r["op"] for r in records_of(tmp_path) if r["kind"] == "op"] == ["first", "kept at once"]
    assert [r["op"] for r in records_of(tmp_path / TAR) if r["kind"] == "op"] == ["first"]


def test_a_session_that_is_told_to_stop_ends_its_stage_too(tmp_path: Path) -> None:
    stage = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    program = (
        "import sys; from benchmarks.gpu import __main__ as gpu; from benchmarks.gpu.runner import Stage\n"
        f"gpu.stages_of = lambda *_: [Stage('one', (sys.executable, '-c', {stage!r}), 60)]\n"
        f"sys.argv[1:] = ['--dry-run', '--out', {str(tmp_path / 'out')!r}]\n"
        "sys.exit(gpu.main())"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    for _ in range(600):
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            break
        time.sleep(0.1)
    process.terminate()
    assert process.wait(20) == 128 + signal.SIGTERM
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not _alive(pid):
            break
        time.sleep(0.05)
    assert not _alive(pid)


def test_rehearsals_and_damage_are_no_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert session(monkeypatch, tmp_path / "out") == 0
    with pytest.raises(SystemExit, match="rehearsal"):
        collect(tmp_path / "out", tmp_path)
    records = (tmp_path / "out" / RECORDS).read_text().split("\n")
    (tmp_path / "out" / RECORDS).write_text("\n".join([records[0][:-5], *records[1:]]))
    with pytest.raises(SystemExit, match=r"line 1 .* damaged"):
        records_of(tmp_path / "out")
    with pytest.raises(SystemExit, match=r"expected records\.jsonl or session\.tar"):
        records_of(tmp_path / "nowhere")
    with pytest.raises(SystemExit, match="none of `make gpu`"):
        body_of([])
