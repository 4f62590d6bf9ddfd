"""Builds the torch-free extension `m4kernels._C` with ninja; all project metadata is in pyproject.toml.

Every `csrc/**/*_cpu.cpp` is compiled once per SIMD level and the level is chosen at run time, so one build serves every
CPU of its architecture. `csrc/**/*_cuda.cu` is compiled when nvcc is found. Environment variables (one that is set but
empty counts as not set):

    CXX                          the C++ compiler: a program, or a command such as "ccache g++"
    NVCC, CUDA_HOME              nvcc itself, or the folder whose bin/ has it
    M4KERNELS_CUDA=0|1|auto      CUDA sources: never, always (an error without nvcc), when nvcc is found (default)
    M4KERNELS_CUDA_ARCHS=80;90   GPU architectures (default: those of 80;90;100;120 that nvcc knows)
    M4KERNELS_SANITIZE=address,undefined   instrument the host code (see `make sanitize`)
    M4KERNELS_EMULATE_AVX512=1   AVX-512 in software, to test its levels on a processor without it (needs SIMDe)
    MAX_JOBS=2                   how many compilers run at once (default: ninja's, the number of cores and two)
"""

import importlib
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "m4kernels" / "_version.py").read_text())[1]
# Which files are sources, and their digest: the package compares it when it loads what was built here.
sources = SimpleNamespace(**runpy.run_path(str(ROOT / "m4kernels" / "_sources.py")))
COMPILERS = ("c++", "g++", "clang++")
NEEDED = "g++ 11 or clang++ 14 with OpenMP, or newer (Debian, Ubuntu: apt install g++; CXX names another compiler)"
DEFAULT_ARCHS = (80, 90, 100, 120)
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
# Levels a *_cpu.cpp file is compiled for. "portable" comes first: where the compiler emits an inline function of the
# standard library in several objects the linker keeps the first, and that one must run on every CPU.
X86_LEVELS = {
    "portable": [],
    "avx2": AVX2,
    "avx512": (AVX512 := [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]),
    "avx512bf16": [*AVX512, "-mavx512bf16", "-DM4K_SIMD_AVX512"],
}
# AVX-512 in software: registers of AVX2, and the intrinsics of csrc/common/emulated_avx512.h.
EMULATED_LEVELS = {**X86_LEVELS, "avx512": AVX2, "avx512bf16": [*AVX2, "-DM4K_SIMD_AVX512"]}
# Only files of this name are compiled for it.
ONLY = {"avx512bf16": "_bf16_cpu.cpp"}
# Contraction into FMA would make backends differ in the last bit; kernels that want FMA ask for it by name.
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
CXX_FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
# No contraction into FMA, as on the CPU; division and square root are exact by nvcc's default.
NVCC_FLAGS = ["-std=c++20", "-O3", "--fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
# What the sources ask of a compiler, in small; an old one says so here and not in the middle of a kernel.
PROBE = """\
#include <bit>
#include <cstdint>
static_assert(__cplusplus >= 202002L, "this compiler's C++20 is unfinished");
template <typename T>
concept Number = requires(T a) { a + a; };
uint32_t probe(const Number auto* values, int n) {
    float sum = 0;
#pragma omp parallel for reduction(+ : sum)
    for (int i = 0; i < n; ++i) sum += values[i];
    return std::bit_cast<uint32_t>(sum);
}
int main(int n, char**) {
    if (n > 9) throw n;  // gcc, which is no g++, leaves the library of C++ out
    const float values[] = {1, 2};
    return probe(values, 2) == 0;
}
"""
# What compilers, linkers and ninja say (in English, by LC_ALL=C) when not the sources are to blame, and what to do.
REMEDIES = {
    "No space left on device|Disk quota exceeded": "the disk is full: free some space (files are written under "
    "{folder}; TMPDIR moves them) and install again",
    "Killed|[Oo]ut of memory|memory exhausted|Cannot allocate memory": "the compiler ran out of memory: let fewer "
    "run at once, `MAX_JOBS=1 pip install -e .`",
    "Permission denied|Read-only file system": "a file cannot be written or run (see above): {folder} must allow both; "
    "TMPDIR names another folder",
    "simde/x86/avx512.h": "M4KERNELS_EMULATE_AVX512 needs SIMDe's headers (Debian, Ubuntu: apt install libsimde-dev)",
    "unsupported GNU version|unsupported clang version": "nvcc does not take this host compiler: name an older one, "
    "such as CXX=g++-13, or build without CUDA, M4KERNELS_CUDA=0",
}


def say(message: str) -> None:
    print(f"[m4kernels build] {message}", file=sys.stderr, flush=True)


def fail(message: str) -> NoReturn:
    raise SystemExit(f"[m4kernels build] error: {message}")


def setting(name: str, default: str = "") -> str:
    """An environment variable; set but empty counts as not set."""
    return os.environ.get(name, "").strip() or default


def ask(*command: str, folder: Path | None = None) -> "subprocess.CompletedProcess[str]":
    """Run a program, in English, and read what it says."""
    pipe = {"capture_output": True, "text": True, "errors": "backslashreplace"}
    try:
        return subprocess.run(command, cwd=folder, env=os.environ | {"LC_ALL": "C"}, **pipe)
    except OSError as error:
        fail(f"{shlex.join(command)}: {error.strerror}")


def emulates_avx512() -> bool:
    """Whether the levels of AVX-512 are to run in software."""
    choice = setting("M4KERNELS_EMULATE_AVX512", "0")
    if choice not in ("0", "1"):
        fail(f"M4KERNELS_EMULATE_AVX512={choice!r}: expected 0 or 1")
    return choice == "1"


def simd_levels() -> dict[str, list[str]]:
    if platform.machine().lower() in ("x86_64", "amd64"):
        return EMULATED_LEVELS if emulates_avx512() else X86_LEVELS
    if emulates_avx512():
        fail("M4KERNELS_EMULATE_AVX512=1: only on x86-64; other processors have the level portable alone")
    return {"portable": []}


def host_compiler() -> list[str]:
    """The words of the command that compiles C++: $CXX, else the system's compiler."""
    given = setting("CXX")
    if not given:
        found = next((name for name in COMPILERS if shutil.which(name)), None)
        return [found] if found else fail(f"no C++ compiler was found ({', '.join(COMPILERS)}): install {NEEDED}")
    try:
        words = [given] if shutil.which(given) else shlex.split(given)  # a program's name may hold spaces
    except ValueError as error:
        fail(f"CXX={given!r} cannot be split into words ({error}): quote it as for a shell, or unset it")
    if shutil.which(words[0]) is None:
        fail(f"CXX={given!r}: there is no program {words[0]!r}: unset CXX, or install {NEEDED}")
    # It runs in the build folder, where a path relative to this one would lead elsewhere.
    return [os.path.abspath(word) if os.sep in word and os.path.exists(word) else word for word in words]


def check_compiler(cxx: Sequence[str], flags: Sequence[str], folder: Path) -> None:
    """Compile a small program as the sources will be; fails in a line that says what to install."""
    (folder / "probe.cpp").write_text(PROBE)
    widest = list(simd_levels().values())[-1]
    done = ask(*cxx, *flags, *widest, "probe.cpp", "-o", "probe", folder=folder)
    if done.returncode:
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        said = next((line for line in lines if "error" in line), lines[0] if lines else f"status {done.returncode}")
        fail(remedy("\n".join(lines), folder) or f"{shlex.join(cxx)} is no C++20 compiler ({said}): install {NEEDED}")


def find_nvcc() -> str | None:
    """nvcc from $NVCC, $CUDA_HOME/bin, the PATH, then the usual place."""
    if given := setting("NVCC"):
        found = shutil.which(given)
        return os.path.abspath(found) if found else fail(f"NVCC={given!r}: there is no such program; unset it?")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        home = setting(name)
        if home and (Path(home) / "bin" / "nvcc").exists():
            return os.path.abspath(Path(home) / "bin" / "nvcc")
        if home:
            say(f"CUDA: {name}={home!r} has no bin/nvcc; looking further")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def cuda_archs(nvcc: str) -> list[int]:
    listed = ask(nvcc, "--list-gpu-arch")
    if listed.returncode:
        fail(f"`{nvcc} --list-gpu-arch` failed:\n{listed.stderr}\nSet M4KERNELS_CUDA=0 to build without CUDA.")
    known = sorted(int(arch) for arch in re.findall(r"compute_(\d+)", listed.stdout))
    wanted = setting("M4KERNELS_CUDA_ARCHS")
    if not wanted:
        return [arch for arch in DEFAULT_ARCHS if arch in known]
    if not re.fullmatch(r"\d+([;, ]+\d+)*", wanted):
        fail(f"M4KERNELS_CUDA_ARCHS={wanted!r}: expected architecture numbers such as '80;90'")
    archs = [int(arch) for arch in re.findall(r"\d+", wanted)]
    unknown = sorted(set(archs) - set(known))
    if unknown:
        fail(f"M4KERNELS_CUDA_ARCHS={wanted!r}: this nvcc does not know {unknown}; it knows {known}")
    return archs


def cuda_plan(cuda_sources: Sequence[object]) -> tuple[str, list[int]] | None:
    """(nvcc, architectures) when the CUDA sources are to be built, else None; says why."""
    choice = setting("M4KERNELS_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        fail(f"M4KERNELS_CUDA={choice!r}: expected 0, 1 or auto")
    if choice == "0":
        say("CUDA: not built (M4KERNELS_CUDA=0)")
        return None
    nvcc = find_nvcc()
    if nvcc is None:
        if choice == "1":
            fail("M4KERNELS_CUDA=1, but nvcc was not found: install the CUDA toolkit, or set NVCC or CUDA_HOME")
        say("CUDA: not built (no nvcc on $NVCC, $CUDA_HOME or $PATH)")
        return None
    if not cuda_sources:
        say("CUDA: nothing to build (no *_cuda.cu file under csrc/)")
        return None
    if re.search(r'["$`]', nvcc):
        fail(
            f'{nvcc}: nvcc cannot work in a folder whose name holds a ", a $ or a `: reach it through a link with a '
            "plain name (NVCC names it), or set M4KERNELS_CUDA=0 to build without CUDA"
        )
    archs = cuda_archs(nvcc)
    say(f"CUDA: building with {nvcc} for {', '.join(f'sm_{a}' for a in archs)} (M4KERNELS_CUDA={choice})")
    return nvcc, archs


def cuda_version(nvcc: str) -> str:
    """Of the toolkit, such as "13.0"."""
    said = ask(nvcc, "--version").stdout
    if found := re.search(r"release (\d+\.\d+)", said):
        return found[1]
    fail(f"`{nvcc} --version` names no release:\n{said}\nSet M4KERNELS_CUDA=0 to build without CUDA.")


def ninja_command() -> str:
    return shutil.which("ninja") or str(Path(importlib.import_module("ninja").BIN_DIR) / "ninja")


def include_folders() -> list[str]:
    """Of pybind11 and Python."""
    import pybind11

    python = sysconfig.get_path("include")
    if not (Path(python) / "Python.h").is_file():
        fail(f"{python} has no Python.h: install Python's headers (Debian, Ubuntu: apt install python3-dev)")
    return [pybind11.get_include(), python]


def remedy(output: str, folder: Path) -> str | None:
    """What to do where a failed build says that something besides the sources is at fault."""
    return next((text.format(folder=folder) for said, text in REMEDIES.items() if re.search(said, output)), None)


def mirror(folder: Path) -> list[str]:
    """Copy the sources into `folder` and return their relative paths.

    So no command names a folder of the user's, whatever its name holds (nvcc takes no $ in a path), and what is
    compiled anew depends on the content of a file, not on the time that git or an archive gave it.
    """
    for name in (names := sources.files(ROOT)):
        content = (ROOT / name).read_bytes()
        copy = folder / name
        if not (copy.is_file() and copy.read_bytes() == content):
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(content)
    if (folder / "csrc").is_dir():
        for name in set(sources.files(folder)) - set(names):
            (folder / name).unlink()
    return names


def shell(words: Sequence[str]) -> str:
    """Words of a command as ninja wants them, which hands the command to a shell."""
    joined = shlex.join(words)
    if "\n" in joined:
        fail(f"the name of a folder holds a line break, which ninja cannot take: {joined!r}")
    return joined.replace("$", "$$")


def ccbin(cxx: Sequence[str], folder: Path) -> str:
    """The host compiler as nvcc takes it: one program of a plain name; a small script where $CXX is more than that."""
    if len(cxx) == 1 and re.fullmatch(r"[\w./+-]+", cxx[0]):
        return cxx[0]
    script = folder / "host-compiler"
    script.write_bytes(os.fsencode(f'#!/bin/sh\nexec {shlex.join(cxx)} "$@"\n'))
    script.chmod(0o755)
    return "./host-compiler"


def flags_of(cuda: tuple[str, list[int]] | None) -> tuple[list[str], list[str], list[str]]:
    """Flags of every C++ source, of bindings.cpp besides, and of linking."""
    common = [*CXX_FLAGS, f"-DM4K_X86={int(len(simd_levels()) > 1)}", f"-DM4K_CUDA={int(cuda is not None)}"]
    if emulates_avx512():
        say("SIMD levels avx512 and avx512bf16: in software, for tests (M4KERNELS_EMULATE_AVX512=1)")
        common.append("-DM4K_EMULATE_AVX512")
    # What changes often goes to one file alone, so that the others are not compiled anew.
    bindings = [
        f"-DM4K_VERSION={VERSION}",
        f"-DM4K_SOURCES={sources.digest(ROOT)}",
        f"-DM4K_CUDA_VERSION={cuda_version(cuda[0]) if cuda else ''}",
        f"-DM4K_CUDA_ARCHS={';'.join(map(str, cuda[1])) if cuda else ''}",
    ]
    link = ["-shared"]
    if sys.platform == "darwin":
        say("OpenMP: not used on macOS; the kernels run on one thread")
        link += ["-undefined", "dynamic_lookup"]
    else:
        common.append("-fopenmp")
        link.append("-fopenmp")
    if wanted := setting("M4KERNELS_SANITIZE"):
        if not re.fullmatch(r"[a-z-]+(,[a-z-]+)*", wanted):
            fail(f"M4KERNELS_SANITIZE={wanted!r}: expected names of sanitizers, such as address,undefined")
        say(f"sanitizers: {wanted}")
        sanitize = [*(f"-fsanitize={name}" for name in wanted.split(",")), "-fno-omit-frame-pointer", "-g1", "-O1"]
        common += [*sanitize, "-fno-sanitize-recover=undefined"]
        link += sanitize
    return common, bindings, link


def write_ninja(folder: Path, cxx: Sequence[str], cuda: tuple[str, list[int]] | None) -> None:
    """Mirror the sources and write a build.ninja with one edge per (source, SIMD level), which makes `_C.so`."""
    common, bindings, link = flags_of(cuda)
    check_compiler(cxx, common, folder)
    names = mirror(folder)
    objects: list[str] = []
    edges: list[str] = []

    def edge(rule: str, name: str, suffix: str, flags: Sequence[str]) -> None:
        objects.append(f"{Path(name).relative_to('csrc').with_suffix('')}{suffix}.o".replace(os.sep, "_"))
        edges.append(f"build {objects[-1]}: {rule} {name}\n  extra = {shell(flags)}\n")

    cpu = [name for name in names if name.endswith("_cpu.cpp")]
    for level, flags in simd_levels().items():
        for name in (name for name in cpu if name.endswith(ONLY.get(level, ""))):
            edge("cxx", name, f".{level}", [f"-DM4K_SIMD_{level.upper()}", *flags])
    for name in names:
        if name.endswith(".cpp") and name not in cpu:
            edge("cxx", name, "", bindings if name == "csrc/bindings.cpp" else [])
    linker, nvcc = "$cxx", ""
    if cuda:
        # nvcc's files in between go to the build folder as well: it takes no $ in the name of TMPDIR either.
        nvcc = f"TMPDIR=. {shell([cuda[0], '-ccbin', ccbin(cxx, folder)])}"
        gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in cuda[1]]
        gencode.append(f"-gencode=arch=compute_{cuda[1][-1]},code=compute_{cuda[1][-1]}")
        for name in names:
            if name.endswith("_cuda.cu"):
                edge("nvcc", name, ".cuda", gencode)  # about 5 s each, for four architectures
        # nvcc knows where its libraries are, which the path of a wrapper script does not tell.
        linker = "$nvcc"
        link = ["-shared", "--no-device-link", "-cudart", "static", *(f"-Xcompiler={flag}" for flag in link)]
    common += [f"-I{path}" for path in ("csrc", *include_folders())]
    text = (
        f"cxx = {shell(cxx)}\n"
        f"nvcc = {nvcc}\n"
        "rule cxx\n"
        f"  command = $cxx -MMD -MF $out.d {shell(common)} $extra -c $in -o $out\n"
        "  depfile = $out.d\n  deps = gcc\n  description = C++ $out\n"
        "rule nvcc\n"
        f"  command = $nvcc -MMD -MF $out.d {shell(NVCC_FLAGS)} -Icsrc $extra -c $in -o $out\n"
        "  depfile = $out.d\n  deps = gcc\n  description = CUDA $out\n"
        "rule link\n"
        f"  command = {linker} $in {shell(link)} -o $out\n"
        "  description = link $out\n" + "".join(edges) + f"build _C.so: link {' '.join(objects)}\n"
    )
    (folder / "build.ninja").write_bytes(os.fsencode(text))


def run_ninja(folder: Path, jobs: Sequence[str]) -> tuple[int, str]:
    """Its exit status and what it said, which is passed on as it comes."""
    command, environment, lines = [ninja_command(), *jobs], os.environ | {"LC_ALL": "C"}, []
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with subprocess.Popen(command, cwd=folder, env=environment, **pipe) as process:
        for line in process.stdout or ():
            print(line, end="", file=sys.stderr, flush=True)
            lines.append(line)
    return process.returncode, "".join(lines)


class NinjaBuild(build_ext):
    """Compiles with ninja in the folder of temporary files, then puts the extension where setuptools wants it."""

    def run(self) -> None:
        self.cxx = host_compiler()
        # Setuptools prepares a compiler of its own, which is not used, and stumbles over a quote in one of these.
        read = re.compile("CC|CXX|CPP|AR|LD(CXX)?SHARED|(C|CXX|CPP|LD|AR)FLAGS")
        inherited = {name: os.environ.pop(name) for name in list(os.environ) if read.fullmatch(name)}
        try:
            super().run()
        except (OSError, BaseError) as error:  # also of copying the extension to its place
            folder = Path(self.build_temp).resolve()
            fail(f"{error}: {remedy(str(error), folder) or 'mend that, then install again'}")
        finally:
            os.environ.update(inherited)

    def build_extension(self, ext: Extension) -> None:
        folder = (Path(self.build_temp) / "ninja").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        jobs = setting("MAX_JOBS", str(self.parallel or ""))
        if jobs and not re.fullmatch(r"[1-9]\d*", jobs):
            fail(f"MAX_JOBS={jobs!r}: expected how many compilers may run at once, such as 2")
        cuda = cuda_plan([name for name in sources.files(ROOT) if name.endswith("_cuda.cu")])
        say(f"CPU: compiling with {shlex.join(self.cxx)}; SIMD levels {', '.join(simd_levels())} (chosen at run time)")
        try:
            write_ninja(folder, self.cxx, cuda)
            status, output = run_ninja(folder, ["-j", jobs] if jobs else [])
        except ModuleNotFoundError as error:
            fail(f"{error.name} is not installed: `pip install pybind11 ninja`, or leave --no-build-isolation out")
        if status:
            cause = remedy(output, folder) or f"{shlex.join(self.cxx)} did not take the sources; please report it"
            fail(f"compilation failed (see above): {cause}")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a process that has it loaded keeps the old file
        shutil.copy(folder / "_C.so", target)


def check_places(root: Path, environment: str, temporary: str) -> None:
    """Setuptools writes into the checkout, whatever is asked of it, and takes some names of folders for variables."""
    for folder in (root, root / "m4kernels"):
        if not os.access(folder, os.W_OK):
            fail(f"{folder} cannot be written: install from a copy of the repository that is yours (cp -r, git clone)")
    for place, advice in {temporary: "set TMPDIR to another", environment: "make the environment elsewhere"}.items():
        if re.search(r"[{}]|\$[A-Za-z_]", place):
            fail(f"setuptools cannot work with {place}, because of the $ or the brace in its name: {advice}")


if __name__ == "__main__":
    check_places(ROOT, sys.prefix, tempfile.gettempdir())
# Listing the files lets the sdist carry them; NinjaBuild decides how each is compiled.
listed = sources.files(ROOT)
cpp = [name for name in listed if name.endswith(".cpp")]
setup(
    ext_modules=[Extension("m4kernels._C", cpp, depends=[name for name in listed if name not in cpp])],
    cmdclass={"build_ext": NinjaBuild},
)
