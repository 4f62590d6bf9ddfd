"""How commands end: what becomes one line and which status, on any terminal."""

import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

from m4.cli import exit_status, python_command
from m4.data.__main__ import main as data_main
from m4.errors import ConfigError
from m4.run.signals import Interrupted
from tests.runs import REPOSITORY, command, environment


def _raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConfigError("lr:\n expected more"), "lr: expected more"),
        (FileNotFoundError(2, "No such file or directory", "there"), "there: No such file or directory"),
        (OSError("no place"), "no place"),
        (MemoryError(), "out of memory"),
        (MemoryError("Unable to allocate 9 EiB"), "out of memory (Unable to allocate 9 EiB)"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of memory (CUDA out of memory."),
        (BrokenProcessPool("terminated abruptly"), "lower --workers"),
        (
            RuntimeError("Found no NVIDIA driver on your system.\nmore"),
            "device: the GPU cannot be used: Found no",
        ),
        (UnicodeEncodeError("ascii", "\u2588", 0, 1, "ordinal not in range"), "can't encode"),
        (ValueError(), "ValueError"),
    ],
)
def test_what_a_user_can_mend_is_one_line(capsys, error, said):
    assert exit_status(_raising(error)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1


def test_memory_that_the_allocator_of_torch_refuses(capsys):
    def main():
        torch.empty(2**60)

    assert exit_status(main) == 2
    assert "error: out of memory (" in capsys.readouterr().err


@pytest.mark.parametrize(
    "bug", [AssertionError("x"), TypeError("x"), KeyError("x"), IndexError("x"), RuntimeError("x"), ZeroDivisionError()]
)
def test_bugs_are_raised(bug):
    with pytest.raises(type(bug)):
        exit_status(_raising(bug))


def test_interruptions(capsys):
    assert exit_status(_raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted; run the same command again to continue\n"
    assert exit_status(_raising(Interrupted(15))) == 143


@pytest.mark.parametrize(("value", "shown"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_traceback_on_request(capsys, monkeypatch, value, shown):
    monkeypatch.delenv("M4_TRACEBACK", raising=False)
    if value is not None:
        monkeypatch.setenv("M4_TRACEBACK", value)
    for main in (_raising(ConfigError("lr: more")), lambda: data_main(["inspect", "/nowhere"])):
        assert exit_status(main) == 2
        err = capsys.readouterr().err
        assert ("Traceback (most recent call last)" in err) == shown
        assert err.splitlines()[-1].startswith("error: ")


TALKER = """
import logging, sys
from m4.cli import run_command

def main():
    logging.getLogger("m4.x").info("log ≤ …")
    print("▁▂█ → 世 \\udcff " + "x" * int(sys.argv[1]))
    if sys.argv[2:] == ["fail"]:
        raise ValueError("≥ ü")
    return 0

run_command(main)
"""


def _talk(*arguments, **more):
    talker = [sys.executable, "-c", TALKER, *map(str, arguments)]
    return subprocess.run(talker, cwd=REPOSITORY, timeout=60, **more)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "ascii:strict", "cp1252", "utf-8"])
def test_output_in_any_encoding(encoding):
    done = _talk(0, "fail", env={**environment(), "PYTHONIOENCODING": encoding}, capture_output=True)
    assert done.returncode == 2
    out, err = (text.decode(encoding.partition(":")[0]) for text in (done.stdout, done.stderr))
    if encoding == "utf-8":
        assert out == "▁▂█ → 世 \\udcff \n"
        assert err == "log ≤ …\nerror: ≥ ü\n"
    else:
        assert out == ".:@ -> \\u4e16 \\udcff \n"
        assert err.splitlines()[0] in ("log <= ...", "log <= …")
        assert err.splitlines()[1] in ("error: >= \\xfc", "error: >= ü")


@pytest.mark.parametrize("length", [1, 100_000])
def test_a_reader_that_has_gone(length):
    talker = [sys.executable, "-c", TALKER, str(length)]
    with subprocess.Popen(talker, cwd=REPOSITORY, env=environment(), stdout=-1, stderr=-1) as process:
        process.stdout.close()
        said = process.stderr.read().decode()
    assert process.returncode == 1
    assert said == "log ≤ …\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("length", [1, 100_000])
def test_a_full_disk_behind_standard_output(length, unbuffered):
    with open("/dev/full", "w") as full:
        done = _talk(
            length,
            env={**environment(), "PYTHONUNBUFFERED": unbuffered},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2
    assert done.stderr == "log ≤ …\nerror: standard output: No space left on device\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams(closed):
    shell = ["sh", "-c", f'"$0" -c "$1" 3 {closed}', sys.executable, TALKER]
    assert subprocess.run(shell, cwd=REPOSITORY, env=environment(), timeout=60).returncode == 0


def test_statistics_on_a_latin_terminal(picture_data):
    done = subprocess.run(
        command("m4.data", "inspect", picture_data, "--no-sheet"),
        cwd=REPOSITORY,
        env={**environment(), "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "histogram over 0 ... " in done.stdout.decode("latin-1")


def test_the_interpreter_is_named_as_it_can_be_typed(tmp_path, monkeypatch):
    running = tmp_path / "venv" / "bin" / "python"
    running.parent.mkdir(parents=True)
    running.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(running))
    monkeypatch.chdir(tmp_path)
    assert python_command() == "venv/bin/python"
    monkeypatch.chdir("/")
    assert python_command() == str(running)
    monkeypatch.setenv("PATH", str(running.parent))
    assert python_command() == "python"


@pytest.mark.parametrize("module", ["m4.train", "m4.evaluate", "m4.generate", "m4.plots"])
def test_commands_start_without_what_they_may_not_need(module):
    """Packages whose import takes half as long as torch's: a word on a wrong option should not wait for them."""
    # torch of some versions imports some of them itself.
    program = f"import sys, torch; before = set(sys.modules); import {module}; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, env=environment(), stdout=-1, check=True)
    heavy = {"sympy", "scipy.optimize", "torch._dynamo", "torch.distributed.tensor", "triton"}
    assert heavy.isdisjoint(done.stdout.decode().split())
