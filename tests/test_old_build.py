"""An extension that was built from other sources than those beside it is told, and never used."""

import os
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import m4kernels
from m4kernels import __main__ as report
from m4kernels import _ext, _sources
from m4kernels.ops.quantize_coords.arguments import QuantizeArguments, QuantizeBackend

REPOSITORY = Path(__file__).resolve().parents[1]
ADVICE = r"run `pip install -e \.` again"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the sources that the loaded extension was built from, in the place of those beside the package."""
    shutil.copytree(REPOSITORY / "csrc", tmp_path / "csrc")
    shutil.copy(REPOSITORY / "setup.py", tmp_path)
    monkeypatch.setattr(_sources, "checkout", lambda: tmp_path)
    _ext.load.cache_clear()
    yield tmp_path
    _ext.load.cache_clear()


def edit(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"// one more line\n")


def test_the_build_of_these_sources_loads(checkout: Path) -> None:
    assert _ext.require().sources == _sources.digest(checkout)


@pytest.mark.parametrize("name", ["csrc/bindings.cpp", "csrc/common/bind.h", "setup.py"])
def test_other_sources_are_refused(checkout: Path, name: str) -> None:
    edit(checkout / name)
    with pytest.raises(ImportError, match=f"m4kernels._C is an old build, not built from what .*{ADVICE}"):
        _ext.load()


def test_builds_of_before_the_digest_are_refused(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = SimpleNamespace(version=m4kernels.__version__)
    monkeypatch.setattr(_ext.importlib, "import_module", lambda _: old)
    with pytest.raises(ImportError, match=f"old build, not built from.*{ADVICE}"):
        _ext.load()


def test_an_op_says_so_and_does_not_fall_back(checkout: Path) -> None:
    edit(checkout / "csrc/bindings.cpp")
    dispatcher = m4kernels.dispatch.Dispatcher("quantize_coords", ("cpp", "reference"), QuantizeBackend)
    visible = torch.ones(2, 13, dtype=torch.bool)
    call = QuantizeArguments(torch.zeros(2, 13, 2), visible, None, None, 256.0, 8192)
    with pytest.raises(ImportError, match=ADVICE):
        dispatcher.select("", call)


def test_an_installed_wheel_has_nothing_to_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _sources.checkout() == REPOSITORY
    package = tmp_path / "site-packages" / "m4kernels"
    package.mkdir(parents=True)
    shutil.copy(REPOSITORY / "m4kernels" / "_sources.py", package)
    assert runpy.run_path(str(package / "_sources.py"))["checkout"]() is None
    built = SimpleNamespace(version=m4kernels.__version__, sources="of another tree")
    monkeypatch.setattr(_sources, "checkout", lambda: None)
    monkeypatch.setattr(_ext.importlib, "import_module", lambda _: built)
    _ext.load.cache_clear()
    assert _ext.load() is built
    _ext.load.cache_clear()


def test_sources_that_cannot_be_read_are_named(checkout: Path) -> None:
    (checkout / "csrc/gone.h").symlink_to(checkout / "nowhere.h")
    with pytest.raises(ImportError, match=r"csrc/gone\.h cannot be read"):
        _ext.load()


def test_the_report_comes_whatever_is_broken(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert report.report() == 0
    whole = capsys.readouterr().out
    edit(checkout / "csrc/bindings.cpp")
    _ext.load.cache_clear()

    def failing() -> bool:
        raise RuntimeError("driver gone")

    monkeypatch.setattr(torch.cuda, "is_available", failing)
    assert report.report() == 1
    said = capsys.readouterr().out
    assert said.count("run `pip install -e .` again") == 1  # in one line
    assert "extension: BROKEN: ImportError: m4kernels._C is an old build" in said
    assert "GPU: BROKEN: RuntimeError: driver gone" in said
    assert "  cpp        no: the extension is broken (see above)" in said
    assert said.count("\n  ") == whole.count("\n  ")  # every op with every backend


def test_a_truncated_extension_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: str) -> None:
        raise ImportError("_C.so: file too short")

    monkeypatch.setattr(_ext.importlib, "import_module", broken)
    _ext.load.cache_clear()
    with pytest.raises(ImportError, match=f"does not load .*file too short.*{ADVICE}"):
        _ext.load()
    _ext.load.cache_clear()


def test_a_build_for_another_python_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ext, "__file__", str(tmp_path / "_ext.py"))
    assert _ext.absent() == "the extension m4kernels._C is not built: run `pip install -e .` in the repository"
    (tmp_path / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    assert "not built for this Python, which wants _C" in _ext.absent()
    assert "there is _C.cpython-39-x86_64-linux-gnu.so: run" in _ext.absent()


class TestDigest:
    def test_of_content_alone(self, checkout: Path) -> None:
        before = _sources.digest(checkout)
        for name in (*_sources.files(checkout), "setup.py"):
            content = (checkout / name).read_bytes()
            (checkout / name).write_bytes(content.replace(b"\n", b"\r\n"))  # as git may check it out
            os.utime(checkout / name, (1, 1))
        (checkout / "csrc/.#bindings.cpp").symlink_to("user@host.1")  # Emacs's lock
        (checkout / "csrc/.bindings.cpp.swp").touch()
        (checkout / "csrc/README.md").touch()
        assert _sources.digest(checkout) == before

    def test_of_names_and_bounds(self, checkout: Path) -> None:
        seen = {_sources.digest(checkout)}
        (checkout / "csrc/a.h").write_text("12")
        (checkout / "csrc/b.h").write_text("3")
        seen.add(_sources.digest(checkout))
        (checkout / "csrc/a.h").write_text("1")
        (checkout / "csrc/b.h").write_text("23")
        seen.add(_sources.digest(checkout))
        (checkout / "csrc/b.h").rename(checkout / "csrc/c.h")
        seen.add(_sources.digest(checkout))
        assert len(seen) == 4

    def test_every_source_counts(self) -> None:
        on_disk = {path for path in REPOSITORY.glob("csrc/**/*") if path.is_file() and not path.name.startswith(".")}
        assert {REPOSITORY / name for name in _sources.files(REPOSITORY)} == on_disk

    def test_needs_no_package(self) -> None:
        """setup.py runs it where torch is not installed."""
        text = (REPOSITORY / "m4kernels" / "_sources.py").read_text()
        imports = [line.split()[1] for line in text.splitlines() if line.startswith(("import ", "from "))]
        assert {name.split(".")[0] for name in imports} <= set(sys.stdlib_module_names)
