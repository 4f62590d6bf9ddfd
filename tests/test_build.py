"""The build script's decisions, without compiling: what it builds, in which words, and what it refuses with which."""

import ast
import errno
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.matrix import requirements_of

REPOSITORY = Path(__file__).resolve().parents[1]
AWKWARD = ["my projects", "it's (a&b); #1 100%", 'say "$HOME" `id` \\n $', "a|b<c>d*e?[f]{g}~!^", "Übung, 日本:=@"]
# Notes the words that it is called with, one a line, and makes what it was asked for.
FAKE_COMPILER = """#!/bin/sh
printf '%s\\n' "$@" "" >> "$M4_TEST_LOG"
case $1 in
--list-gpu-arch) printf 'compute_80\\ncompute_90\\ncompute_100\\n' ;;
--version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
esac
while [ $# -gt 0 ]; do
    case $1 in -o) : > "$2" ;; -MF) echo "x.o: csrc/bindings.cpp" > "$2" ;; esac
    shift
done
"""


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the build is inherited."""
    for name in ("CXX", "NVCC", "CUDA_HOME", "CUDA_PATH", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("M4KERNELS_CUDA", "M4KERNELS_CUDA_ARCHS", "M4KERNELS_SANITIZE", "M4KERNELS_EMULATE_AVX512"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(REPOSITORY)


def program(path: Path, text: str = FAKE_COMPILER) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def fake_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An nvcc that knows three architectures, in a folder with a space in its name."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda 13"))
    monkeypatch.setenv("M4_TEST_LOG", str(tmp_path / "log"))
    return program(tmp_path / "cuda 13" / "bin" / "nvcc")


def test_cuda_is_built_when_nvcc_is_found(build: ModuleType, fake_nvcc: Path) -> None:
    assert build.cuda_plan(["a_cuda.cu"]) == (str(fake_nvcc), [80, 90, 100])


def test_cuda_architectures_from_the_environment(
    build: ModuleType, fake_nvcc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("M4KERNELS_CUDA_ARCHS", "90")
    assert build.cuda_plan(["a_cuda.cu"]) == (str(fake_nvcc), [90])
    monkeypatch.setenv("M4KERNELS_CUDA_ARCHS", "70;90")
    with pytest.raises(SystemExit, match=r"does not know \[70\]; it knows \[80, 90, 100\]"):
        build.cuda_plan(["a_cuda.cu"])
    monkeypatch.setenv("M4KERNELS_CUDA_ARCHS", "hopper")
    with pytest.raises(SystemExit, match="expected architecture numbers"):
        build.cuda_plan(["a_cuda.cu"])


def test_cuda_can_be_switched_off(build: ModuleType, fake_nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M4KERNELS_CUDA", "0")
    assert build.cuda_plan(["a_cuda.cu"]) is None


def test_cuda_demanded_without_nvcc_is_an_error(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda *_, **__: None)
    assert build.cuda_plan(["a_cuda.cu"]) is None  # auto: says so and goes on
    monkeypatch.setenv("M4KERNELS_CUDA", "1")
    with pytest.raises(SystemExit, match="nvcc was not found: install the CUDA toolkit, or set NVCC or CUDA_HOME"):
        build.cuda_plan(["a_cuda.cu"])
    monkeypatch.setenv("M4KERNELS_CUDA", "yes")
    with pytest.raises(SystemExit, match="M4KERNELS_CUDA='yes': expected 0, 1 or auto"):
        build.cuda_plan(["a_cuda.cu"])


@pytest.mark.parametrize("name", ["cuda $HOME", 'cuda "13"', "cuda `id`"])
def test_folders_that_nvcc_itself_cannot_take_are_refused(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("NVCC", str(program(tmp_path / name / "nvcc")))
    with pytest.raises(SystemExit, match=r"nvcc cannot work in a folder.*NVCC.*M4KERNELS_CUDA=0"):
        build.cuda_plan(["a_cuda.cu"])


def test_nvcc_that_is_not_there_is_an_error(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVCC", "/nowhere/nvcc")
    with pytest.raises(SystemExit, match="NVCC='/nowhere/nvcc': there is no such program"):
        build.find_nvcc()


def test_settings_that_are_set_but_empty_count_as_not_set(
    build: ModuleType, fake_nvcc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = build.flags_of(None)
    for name in ("CXX", "NVCC", "CUDA_PATH", "M4KERNELS_CUDA", "M4KERNELS_CUDA_ARCHS", "M4KERNELS_SANITIZE"):
        monkeypatch.setenv(name, " ")
    monkeypatch.setenv("M4KERNELS_EMULATE_AVX512", "")
    assert build.flags_of(None) == without
    assert build.cuda_plan(["a_cuda.cu"]) == (str(fake_nvcc), [80, 90, 100])
    if shutil.which("c++"):
        assert build.host_compiler() == ["c++"]


def test_the_compiler_may_be_a_program_or_a_command(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = program(tmp_path / "my tools" / "g++")
    launcher = program(tmp_path / "plain" / "ccache")
    monkeypatch.setenv("PATH", f"{launcher.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    for given, words in {
        str(compiler): [str(compiler)],  # a program, whose name holds a space
        "my tools/g++": [str(compiler)],  # from where the build was started
        f"ccache '{compiler}' -m64": ["ccache", str(compiler), "-m64"],
        'ccache "my tools/g++"': ["ccache", str(compiler)],
    }.items():
        monkeypatch.setenv("CXX", given)
        assert build.host_compiler() == words, given


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nosuch++", "CXX='nosuch\\+\\+': there is no program 'nosuch\\+\\+': unset CXX, or install g\\+\\+ 11"),
        ("/no where/g++ -m64", "there is no program '/no'"),
        ("''", "there is no program ''"),
        ("g++ '-m64", "cannot be split into words"),
    ],
)
def test_a_compiler_that_is_not_there(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, given: str, said: str
) -> None:
    monkeypatch.setenv("CXX", given)
    with pytest.raises(SystemExit, match=said) as refused:
        build.host_compiler()
    assert "\n" not in str(refused.value)


def test_no_compiler_at_all(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler was found \(c\+\+, g\+\+, clang\+\+\): install g\+\+ 11"):
        build.host_compiler()


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("g++: error: unrecognized command-line option '-std=c++20'", r"no C\+\+20 compiler \(g\+\+: error: unrec.*11"),
        ("probe.cpp:3:1: error: static assertion failed: C++20 is unfinished", r"no C\+\+20 compiler \(probe.*11"),
        ("clang: error: no such file: 'omp.h'", r"no C\+\+20 compiler.*OpenMP"),
        ("", r"no C\+\+20 compiler \(status 1\)"),
        ("cc1plus: error writing to /tmp/x.s: No space left on device", "the disk is full.*TMPDIR"),
        ("g++: fatal error: Killed signal terminated program cc1plus", "ran out of memory.*MAX_JOBS=1"),
    ],
)
def test_a_compiler_that_fails_is_told_from_a_machine_that_fails(
    build: ModuleType, tmp_path: Path, message: str, said: str
) -> None:
    compiler = program(tmp_path / "old compiler", f'#!/bin/sh\necho "{message}" >&2\nexit 1\n')
    with pytest.raises(SystemExit, match=said) as refused:
        build.check_compiler([str(compiler)], build.CXX_FLAGS, tmp_path)
    assert "\n" not in str(refused.value)


def test_this_compiler_passes(build: ModuleType, tmp_path: Path) -> None:
    build.check_compiler(build.host_compiler(), build.flags_of(None)[0], tmp_path)
    if shutil.which("gcc"):
        with pytest.raises(SystemExit, match=r"gcc is no C\+\+20 compiler"):
            build.check_compiler(["gcc"], build.flags_of(None)[0], tmp_path)


def test_words_reach_a_program_through_ninja_and_the_shell(build: ModuleType, tmp_path: Path) -> None:
    words = [*AWKWARD, "", " ", "$out", "$$", "a:b", "80;90"]
    program(tmp_path / "note", '#!/bin/sh\nprintf "%s\\n" "$@" > words\n')
    (tmp_path / "build.ninja").write_text(
        f"rule note\n  command = ./note {build.shell(words[:3])} $extra\nbuild words: note\n"
        f"  extra = {build.shell(words[3:])}\n"
    )
    subprocess.run([build.ninja_command(), "-C", str(tmp_path)], check=True, capture_output=True)
    assert (tmp_path / "words").read_text() == "".join(f"{word}\n" for word in words)
    with pytest.raises(SystemExit, match="line break"):
        build.shell(["a\nb"])


def copy_of_the_checkout(folder: Path) -> Path:
    for name in ("setup.py", "pyproject.toml", "README.md", "m4kernels/_version.py", "m4kernels/_sources.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, folder / name)
    shutil.copytree(REPOSITORY / "csrc", folder / "csrc")
    return folder


@pytest.mark.parametrize("name", AWKWARD)
def test_folders_may_have_any_name(tmp_path: Path, name: str) -> None:
    """The checkout, the compiler, the folder for temporary files: as the user calls them."""
    root = copy_of_the_checkout(tmp_path / name)
    log = tmp_path / "log"
    compiler, nvcc = program(root / "g++"), program(tmp_path / "cuda (13) it's" / "nvcc")
    settings = {"CXX": str(compiler), "NVCC": str(nvcc), "M4KERNELS_CUDA": "1", "M4_TEST_LOG": str(log)}
    temporary = tmp_path / re.sub("[${}]", "", name) / "t m p"  # setuptools takes the three for variables
    temporary.mkdir(parents=True)
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(root / "lib"), "--build-temp", "t m p"]
    done = subprocess.run(
        command, cwd=root, env=os.environ | settings | {"TMPDIR": str(temporary)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(list(root.glob("lib/m4kernels/_C*.so"))) == 1
    calls = [call.splitlines() for call in log.read_text().split("\n\n")]
    compiled = [call[call.index("-c") + 1] for call in calls if "-c" in call]
    assert {name for name in compiled if name.endswith((".cpp", ".cu"))} == set(compiled)
    assert len(compiled) > 20
    assert any("-DM4K_CUDA_ARCHS=80;90;100" in call for call in calls)
    assert all("./host-compiler" in call for call in calls if any(word.endswith("_cuda.cu") for word in call))
    script = root / "t m p" / "ninja" / "host-compiler"
    log.unlink()
    subprocess.run([script, "a b"], check=True, env=os.environ | settings)
    assert log.read_text() == "a b\n\n"


def test_the_sources_are_mirrored_by_content(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tree with old times unpacked over another is compiled anew, a file with only a new time is not."""
    root, folder = copy_of_the_checkout(tmp_path / "a"), tmp_path / "b"
    monkeypatch.setattr(build, "ROOT", root)
    names = build.mirror(folder)
    assert [(folder / name).read_bytes() for name in names] == [(root / name).read_bytes() for name in names]
    long_ago, copy = 10**9, folder / "csrc/bindings.cpp"
    os.utime(copy, (long_ago, long_ago))
    (root / "csrc/bindings.cpp").touch()
    (root / "csrc/new.h").write_text("// new\n")
    build.mirror(folder)
    assert copy.stat().st_mtime == long_ago
    (root / "csrc/bindings.cpp").write_text("// other\n")
    os.utime(root / "csrc/bindings.cpp", (long_ago - 9, long_ago - 9))
    (root / "csrc/new.h").unlink()
    build.mirror(folder)
    assert copy.read_text() == "// other\n"
    assert copy.stat().st_mtime > long_ago
    assert not (folder / "csrc/new.h").exists()


def test_the_digest_of_the_sources_is_in_one_command_alone(build: ModuleType, tmp_path: Path) -> None:
    """One changed file must not compile all of them anew."""
    build.write_ninja(tmp_path, build.host_compiler(), None)
    text = (tmp_path / "build.ninja").read_text()
    assert text.count(build.sources.digest(REPOSITORY)) == 1
    assert re.search(r"cxx csrc/bindings\.cpp\n  extra = .*-DM4K_SOURCES=[0-9a-f]{32} ", text)


def test_compiler_failure_is_one_clear_error(tmp_path: Path) -> None:
    environment = os.environ | {"CXX": "/bin/false", "M4KERNELS_CUDA": "0"}
    command = [sys.executable, "setup.py", "build_ext", "--build-temp", str(tmp_path / "t")]
    command += ["--build-lib", str(tmp_path)]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1].startswith("[m4kernels build] error: /bin/false is no C++20 compiler")


@pytest.mark.parametrize(
    ("code", "said"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "cannot be written"), (errno.EIO, "mend that")]
)
def test_a_disk_that_fails_is_one_clear_error(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, code: int, said: str
) -> None:
    from setuptools import Distribution

    def failing(_: object) -> None:
        raise OSError(code, os.strerror(code), "m4kernels/_C.so")

    monkeypatch.setattr(build.build_ext, "run", failing)
    command = build.NinjaBuild(Distribution())
    command.build_temp = "build"
    with pytest.raises(SystemExit, match=rf"m4kernels/_C\.so.*{said}"):
        command.run()


def test_a_checkout_that_cannot_be_written_is_refused(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    build.check_places(REPOSITORY, "/usr", "/tmp")
    monkeypatch.setattr(build.os, "access", lambda *_: False)
    with pytest.raises(SystemExit, match="cannot be written: install from a copy of the repository"):
        build.check_places(REPOSITORY, "/usr", "/tmp")


@pytest.mark.filterwarnings("ignore:shell/Perl-style:DeprecationWarning")
@pytest.mark.parametrize(
    ("prefix", "works"), [("/a $y/v", False), ("/a{b/v", False), ("/a}/v", False), ("/a $5 '", True)]
)
def test_environments_that_setuptools_cannot_take(build: ModuleType, prefix: str, works: bool) -> None:
    from distutils.util import subst_vars  # as setuptools has it: these names are its variables

    if works:
        build.check_places(REPOSITORY, prefix, prefix)
        assert subst_vars(prefix, {}) == prefix
    else:
        with pytest.raises(SystemExit, match=r"setuptools cannot work with .*: make the environment elsewhere"):
            build.check_places(REPOSITORY, prefix, "/tmp")
        with pytest.raises(SystemExit, match=r"setuptools cannot work with .*: set TMPDIR to another"):
            build.check_places(REPOSITORY, "/usr", prefix)
        with pytest.raises(ValueError, match=r"."):
            subst_vars(prefix, {})


def test_avx512_in_software_is_compiled_for_avx2(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    native = build.simd_levels()
    assert "-mavx512f" in native["avx512"]
    assert "-DM4K_EMULATE_AVX512" not in build.flags_of(None)[0]
    monkeypatch.setenv("M4KERNELS_EMULATE_AVX512", "1")
    levels = build.simd_levels()
    assert list(levels) == list(native)  # one compiled after the other in the same order
    assert not [flag for flags in levels.values() for flag in flags if "512" in flag and flag.startswith("-m")]
    assert "-DM4K_SIMD_AVX512" in levels["avx512bf16"]
    assert "-DM4K_EMULATE_AVX512" in build.flags_of(None)[0]
    said = "csrc/common/emulated_avx512.h:7:10: fatal error: simde/x86/avx512.h: No such file or directory"
    assert "apt install libsimde-dev" in build.remedy(said, Path("build"))


def test_where_avx512_cannot_run_in_software(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M4KERNELS_EMULATE_AVX512", "yes")
    with pytest.raises(SystemExit, match="M4KERNELS_EMULATE_AVX512='yes': expected 0 or 1"):
        build.simd_levels()
    monkeypatch.setenv("M4KERNELS_EMULATE_AVX512", "1")
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    with pytest.raises(SystemExit, match="M4KERNELS_EMULATE_AVX512=1: only on x86-64"):
        build.simd_levels()


def test_sources_that_need_a_simd_level_say_so_in_their_name() -> None:
    for path in REPOSITORY.glob("csrc/**/*.cpp"):
        uses_level = "M4K_SIMD_NS" in path.read_text()
        assert uses_level == path.name.endswith("_cpu.cpp"), path


def imported(path: Path) -> set[str]:
    """Names of the packages that a file imports when it is itself imported."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_an_editable_install_brings_what_the_benchmarks_import() -> None:
    """It brings the extra `benchmarks`: see test_packaging.py."""
    plain = {re.split(r"[^\w-]", requirement)[0].lower() for requirement in requirements_of(REPOSITORY, "benchmarks")}
    homes = importlib.metadata.packages_distributions()
    needed = set().union(*(imported(path) for path in REPOSITORY.glob("benchmarks/**/*.py")))
    needed -= {"benchmarks", "m4", "m4kernels", *sys.stdlib_module_names}
    brought = {name: {home.lower() for home in homes[name]} for name in needed}
    assert not {name: homes for name, homes in brought.items() if not homes & plain}
    assert "pytest-benchmark" in plain  # whose fixture they take


def test_benchmarks_are_collected_without_the_packages_of_the_tests() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:timeout",
        "-p",
        "no:hypothesispytest",
        "-p",
        "no:cacheprovider",
    ]
    command += ["benchmarks/", "--collect-only", "-q", "-k", "quantize"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "test_guard" in done.stdout
    assert "warning" not in done.stdout.lower()
