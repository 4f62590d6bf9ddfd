import functools
import importlib
import logging
import pkgutil
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import m4kernels
import m4kernels.ops
from m4kernels import Segments, _ext, dispatch, quantize_coords
from m4kernels.backend import check_backend, runs_always
from m4kernels.dispatch import BACKENDS, KINDS, Dispatcher, unavailable, usual_device
from m4kernels.ops.cross_modal_attention.arguments import AttentionArguments, AttentionBackend
from m4kernels.ops.quantize_coords.arguments import QuantizeArguments, QuantizeBackend
from tests.ops.targets import HAS_TRITON

CALL = QuantizeArguments(torch.zeros(2, 13, 2), torch.ones(2, 13, dtype=torch.bool), None, None, 256.0, 8192)


def test_the_fastest_that_can_run_is_chosen() -> None:
    assert (
        Dispatcher("quantize_coords", ("cpp", "reference"), QuantizeBackend).select("", CALL).__name__.endswith(".cpp")
    )


def test_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatcher = Dispatcher("quantize_coords", ("cpp", "reference"), QuantizeBackend)
    monkeypatch.setenv("M4KERNELS_BACKEND", "reference")
    assert dispatcher.select("", CALL).__name__.endswith(".reference")
    assert dispatcher.select("cpp", CALL).__name__.endswith(".cpp")  # the argument wins
    monkeypatch.setenv("M4KERNELS_BACKEND", "refrence")
    with pytest.raises(ValueError, match="M4KERNELS_BACKEND='refrence' is unknown; expected one of cpp, reference"):
        dispatcher.select("", CALL)


def test_the_variable_is_for_ops_that_have_such_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatcher = Dispatcher("quantize_coords", ("cpp", "reference"), QuantizeBackend)
    monkeypatch.setenv("M4KERNELS_BACKEND", "triton")
    assert dispatcher.select("", CALL).__name__.endswith(".cpp")
    with pytest.raises(ValueError, match="'triton' cannot run: quantize_coords has no such backend"):
        dispatcher.select("triton", CALL)


def test_named_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ext, "load", lambda: None)
    dispatcher = Dispatcher("quantize_coords", ("cpp", "reference"), QuantizeBackend)
    with pytest.raises(
        ValueError, match=r"'cpp' cannot run: the extension m4kernels._C is not built.*Usable here: ref"
    ):
        dispatcher.select("cpp", CALL)


def test_automatic_choice_says_once_why_it_skipped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_ext, "load", lambda: None)
    dispatcher = Dispatcher("quantize_coords", ("cpp", "reference"), QuantizeBackend)
    with caplog.at_level(logging.WARNING, logger="m4kernels"):
        for _ in range(3):
            assert dispatcher.select("", CALL).__name__.endswith(".reference")
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
    dispatcher = Dispatcher("quantize_coords", ("triton", "cpp", "reference"), QuantizeBackend)
    assert dispatcher.select("", CALL).__name__.endswith(".cpp")


def test_what_runs_some_arguments_is_not_remembered_for_all() -> None:
    dispatcher = Dispatcher("cross_modal_attention", ("cpp", "reference"), AttentionBackend)
    segments = Segments.from_counts(torch.tensor([[1]]))
    for dtype, expected in ((torch.float64, ".reference"), (torch.float32, ".cpp"), (torch.float64, ".reference")):
        q = torch.zeros(1, 1, 8, dtype=dtype)
        call = AttentionArguments(q, q, q, segments, segments, None, 1.0)
        assert dispatcher.select("", call).__name__.endswith(expected)


def test_a_backend_that_runs_everything_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatcher = Dispatcher("quantize_coords", ("cpp", "reference"), QuantizeBackend)
    first = dispatcher.select("", CALL)
    monkeypatch.setattr(dispatcher, "_choose", None)
    assert dispatcher.select("", CALL) is first


def test_auto_is_a_name_whatever_the_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatcher = Dispatcher("quantize_coords", ("cpp", "reference"), QuantizeBackend)
    monkeypatch.setenv("M4KERNELS_BACKEND", "reference")
    assert dispatcher.select("auto", CALL).__name__.endswith(".cpp")
    assert dispatcher.select("", CALL).__name__.endswith(".reference")
    monkeypatch.setenv("M4KERNELS_BACKEND", "no such")
    assert torch.equal(quantize_coords(*CALL[:2], backend="auto"), quantize_coords(*CALL[:2], backend="cpp"))
    monkeypatch.setenv("M4KERNELS_BACKEND", "auto")
    assert dispatcher.select("", CALL).__name__.endswith(".cpp")


def test_the_table_of_kinds() -> None:
    assert BACKENDS == ("cuda", "triton", "cpp", "reference")
    for name, kind in KINDS.items():
        assert set(kind.chosen_on) <= set(kind.devices or ("cuda", "cpu"))
        assert (
            unavailable(name, "meta") is None
            if name == "reference"
            else "got meta tensors" in unavailable(name, "meta")
        )
    assert [usual_device(name) for name in ("cpp", "reference")] == ["cpu", "cpu"]
    assert usual_device("cuda") == "cuda"
    assert usual_device("triton") == ("cuda" if torch.cuda.is_available() else "cpu")


def test_each_gpu_is_asked_for_itself(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Two kinds of GPU in one machine, the second too old for the kernels; as the driver and the extension tell it."""
    capabilities = [(9, 0), (7, 0)]
    built = SimpleNamespace(has_cuda=True, cuda_version="13.0", cuda_archs="80;90", cuda_driver_version=lambda: 13000)
    monkeypatch.setattr(_ext, "load", lambda: built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])
    monkeypatch.setattr(dispatch, "_gpu_unfit", functools.cache(dispatch._gpu_unfit.__wrapped__))
    current = 0
    assert unavailable("cuda", "cuda") is None
    current = 1
    assert "the GPU is an sm_70" in (unavailable("cuda", "cuda") or "")
    assert unavailable("cuda", "cuda:0") is None
    assert "the GPU is an sm_70" in (unavailable("cuda", torch.device("cuda", 1)) or "")

    dispatcher = Dispatcher("quantize_coords", ("cuda", "reference"), QuantizeBackend)
    for _ in range(2):  # also what was settled, which is of a GPU of its own
        for index, chosen in enumerate((".cuda", ".reference")):
            call: Any = SimpleNamespace(device=torch.device("cuda", index))
            assert dispatcher.select("", call).__name__.endswith(chosen)
            assert dispatcher.select("reference", call).__name__.endswith(".reference")
    assert caplog.text.count("skipping the faster backend 'cuda'") == 1
    with pytest.raises(ValueError, match="'cuda' cannot run: the extension was built for sm_80, sm_90, but the GPU is"):
        dispatcher.select("cuda", call)


def toy(**functions: object) -> ModuleType:
    """A backend as a module, with what `functions` change; None removes one."""
    module = ModuleType("m4kernels.ops.quantize_coords.toy")
    whole = {
        "can_run": runs_always,
        "quantize_coords": lambda call: torch.zeros(2, 39, dtype=torch.int64),
        "dequantize_coords": lambda _call: (None, None),
    }
    vars(module).update({name: f for name, f in (whole | functions).items() if f is not None})
    return module


def test_a_backend_is_held_to_its_protocol() -> None:
    check_backend(toy(), QuantizeBackend)
    for change, fault in (
        ({"dequantize_coords": None}, r"toy is no QuantizeBackend: it lacks dequantize_coords\(call\)$"),
        ({"can_run": None, "quantize_coords": 3}, r"it lacks can_run\(call\); it lacks quantize_coords\(call\)"),
        ({"quantize_coords": lambda xy, visible: None}, r"quantize_coords takes \(xy, visible\), expected \(call\)"),
        ({"dequantize_coords": lambda: None}, r"dequantize_coords takes \(\), expected \(call\)"),
        ({"can_run": lambda call, more: None}, r"can_run takes \(call, more\), expected \(call\)"),
    ):
        with pytest.raises(TypeError, match=fault):
            check_backend(toy(**change), QuantizeBackend)


def test_a_broken_backend_says_so_when_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatcher = Dispatcher("quantize_coords", ("cpp", "reference"), QuantizeBackend)
    broken = toy(dequantize_coords=None)
    monkeypatch.setitem(sys.modules, "m4kernels.ops.quantize_coords.cpp", broken)
    for backend in ("", "cpp", "auto"):  # never a silent fallback
        with pytest.raises(TypeError, match="toy is no QuantizeBackend: it lacks dequantize_coords"):
            dispatcher.select(backend, CALL)
    assert dispatcher.select("reference", CALL).__name__.endswith(".reference")


@pytest.mark.parametrize("op", [module.name for module in pkgutil.iter_modules(m4kernels.ops.__path__)])
def test_every_backend_keeps_its_protocol(op: str) -> None:
    dispatcher = importlib.import_module(f"m4kernels.ops.{op}.api").dispatcher
    for backend in dispatcher.backends:
        if backend != "triton" or HAS_TRITON:
            assert dispatcher.module(backend).__name__.endswith(backend)


def test_bindings_take_names_only() -> None:
    """Two addresses swapped would corrupt memory without a word."""
    extension = _ext.require()
    for name in ("quantize_coords_f32", "mask_tokens_fill", "cross_modal_attention_f32", "lce_pass_f32"):
        with pytest.raises(TypeError, match=rf"{name}\(\) takes these arguments, each by its name: \w+, \w+"):
            getattr(extension, name)(*range(12))


def test_bindings_put_names_in_their_order_and_refuse_what_does_not_fit() -> None:
    segments = Segments.from_counts(torch.tensor([[3, 1], [0, 2]]))
    good = {
        "cu_seqlens": segments.cu_seqlens.data_ptr(),
        "counts": segments.counts.data_ptr(),
        "batch": 2,
        "modalities": 2,
        "total": 6,
        "max_seqlen": 4,
    }
    consistent = _ext.require().segments_consistent
    assert consistent(**good) is True
    assert consistent(**dict(reversed(good.items()))) is True
    assert consistent(**(good | {"".join(["to", "tal"]): 5})) is False  # a name that is not interned
    lacking = {name: value for name, value in good.items() if name != "total"}
    for wrong in ({}, lacking, good | {"more": 1}, lacking | {"totals": 6}):
        with pytest.raises(TypeError, match="takes these arguments, each by its name: cu_seqlens, counts, batch, mod"):
            consistent(**wrong)
    for value in (6.0, None, "6", 2**63, torch.tensor):
        with pytest.raises(TypeError, match=r"segments_consistent\(\): total does not fit its type, got"):
            consistent(**(good | {"total": value}))
    with pytest.raises(TypeError, match=r"cu_seqlens does not fit its type, got -1"):
        consistent(**(good | {"cu_seqlens": -1}))
    with pytest.raises(TypeError, match=r"mask_tokens_select\(\): n does not fit its type, got 2147483648"):
        _ext.require().mask_tokens_select(keys=0, n=2**31, inputs=0, targets=0, roles=0)
