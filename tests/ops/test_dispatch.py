import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import m4kernels
from m4kernels import _ext
from m4kernels.dispatch import Dispatcher

CALL = (torch.zeros(2, 13, 2), torch.ones(2, 13, dtype=torch.bool), None, None, 256.0, 8192)


def test_the_fastest_that_can_run_is_chosen() -> None:
    assert Dispatcher("quantize_coords", ("cpp", "reference")).select("", *CALL).__name__.endswith(".cpp")


def test_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatcher = Dispatcher("quantize_coords", ("cpp", "reference"))
    monkeypatch.setenv("M4KERNELS_BACKEND", "reference")
    assert dispatcher.select("", *CALL).__name__.endswith(".reference")
    assert dispatcher.select("cpp", *CALL).__name__.endswith(".cpp")  # the argument wins
    monkeypatch.setenv("M4KERNELS_BACKEND", "refrence")
    with pytest.raises(ValueError, match="M4KERNELS_BACKEND='refrence' is unknown; expected one of cpp, reference"):
        dispatcher.select("", *CALL)


def test_named_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ext, "load", lambda: None)
    dispatcher = Dispatcher("quantize_coords", ("cpp", "reference"))
    with pytest.raises(
        ValueError, match=r"'cpp' cannot run: the extension m4kernels._C is not built.*Usable here: ref"
    ):
        dispatcher.select("cpp", *CALL)


def test_automatic_choice_says_once_why_it_skipped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_ext, "load", lambda: None)
    dispatcher = Dispatcher("quantize_coords", ("cpp", "reference"))
    with caplog.at_level(logging.WARNING, logger="m4kernels"):
        for _ in range(3):
            assert dispatcher.select("", *CALL).__name__.endswith(".reference")
    assert [r.message for r in caplog.records].count(caplog.records[0].message) == 1
    assert "skipping the faster backend 'cpp'" in caplog.text


def test_broken_extension_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("undefined symbol: _Z3foo")

    _ext.load.cache_clear()
    monkeypatch.setattr(_ext.importlib, "import_module", broken)
    with pytest.raises(ImportError, match="undefined symbol"):
        _ext.load()


def test_stale_extension_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    _ext.load.cache_clear()
    monkeypatch.setattr(_ext.importlib, "import_module", lambda name: SimpleNamespace(version="0.0.1"))
    with pytest.raises(ImportError, match=r"built from version 0\.0\.1.*run `pip install -e \.` again"):
        _ext.load()
    _ext.load.cache_clear()


def test_report_and_lazy_import() -> None:
    report = subprocess.run([sys.executable, "-m", "m4kernels"], capture_output=True, text=True, check=True).stdout
    assert f"m4kernels {m4kernels.__version__}" in report
    assert "cpp        yes" in report
    assert "SIMD level" in report
    code = "import sys, m4kernels; print('triton' in sys.modules, 'm4kernels._C' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "False"]  # importing compiles nothing and loads no backend


def test_the_interpreter_is_never_chosen_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    dispatcher = Dispatcher("quantize_coords", ("triton", "cpp", "reference"))
    assert dispatcher.select("", *CALL).__name__.endswith(".cpp")


def test_what_runs_some_arguments_is_not_remembered_for_all() -> None:
    dispatcher = Dispatcher("cross_modal_attention", ("cpp", "reference"))
    for dtype, expected in ((torch.float64, ".reference"), (torch.float32, ".cpp"), (torch.float64, ".reference")):
        assert dispatcher.select("", torch.zeros(1, 1, 8, dtype=dtype)).__name__.endswith(expected)


def test_a_backend_that_runs_everything_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatcher = Dispatcher("quantize_coords", ("cpp", "reference"))
    first = dispatcher.select("", *CALL)
    monkeypatch.setattr(dispatcher, "_choose", None)
    assert dispatcher.select("", *CALL) is first
