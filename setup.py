"""Builds the torch-free extension `m4kernels._C` with ninja; all project metadata is in pyproject.toml.

Every `csrc/**/*_cpu.cpp` is compiled once per SIMD level and the level is chosen at run time, so one build serves every
CPU of its architecture. `csrc/**/*_cuda.cu` is compiled when nvcc is found. Environment variables:

    M4KERNELS_CUDA=0|1|auto      CUDA sources: never, always (an error without nvcc), when nvcc is found (default)
    M4KERNELS_CUDA_ARCHS=80;90   GPU architectures (default: those of 80;90;100;120 that nvcc knows)
    M4KERNELS_SANITIZE=address,undefined   instrument the host code (see `make sanitize`)
    CXX, NVCC, CUDA_HOME         the compilers
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "m4kernels" / "_version.py").read_text())[1]
DEFAULT_ARCHS = (80, 90, 100, 120)
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
# Levels a *_cpu.cpp file is compiled for. "portable" comes first: where the compiler emits an inline function of the
# standard library in several objects the linker keeps the first, and that one must run on every CPU.
X86_LEVELS = {
    "portable": [],
    "avx2": AVX2,
    "avx512": [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"],
}
# No contraction into FMA, as on the CPU; division and square root are exact by nvcc's default.
NVCC_FLAGS = ["-std=c++20", "-O3", "--fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", f"-I{ROOT / 'csrc'}"]


def say(message: str) -> None:
    print(f"[m4kernels build] {message}", file=sys.stderr, flush=True)


def fail(message: str) -> None:
    raise SystemExit(f"[m4kernels build] error: {message}")


def simd_levels() -> dict[str, list[str]]:
    return X86_LEVELS if platform.machine().lower() in ("x86_64", "amd64") else {"portable": []}


def find_nvcc() -> str | None:
    """nvcc from $NVCC, $CUDA_HOME/bin, the PATH, then the usual place."""
    if os.environ.get("NVCC"):
        return os.environ["NVCC"]
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def cuda_archs(nvcc: str) -> list[int]:
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
    if listed.returncode:
        fail(f"`{nvcc} --list-gpu-arch` failed:\n{listed.stderr}\nSet M4KERNELS_CUDA=0 to build without CUDA.")
    known = sorted(int(arch) for arch in re.findall(r"compute_(\d+)", listed.stdout))
    wanted = os.environ.get("M4KERNELS_CUDA_ARCHS")
    if not wanted:
        return [arch for arch in DEFAULT_ARCHS if arch in known]
    if not re.fullmatch(r"\d+([;, ]+\d+)*", wanted):
        fail(f"M4KERNELS_CUDA_ARCHS={wanted!r}: expected architecture numbers such as '80;90'")
    archs = [int(arch) for arch in re.findall(r"\d+", wanted)]
    unknown = sorted(set(archs) - set(known))
    if unknown:
        fail(f"M4KERNELS_CUDA_ARCHS={wanted!r}: this nvcc does not know {unknown}; it knows {known}")
    return archs


def cuda_plan(sources: list[Path]) -> tuple[str, list[int]] | None:
    """(nvcc, architectures) when the CUDA sources are to be built, else None; says why."""
    choice = os.environ.get("M4KERNELS_CUDA", "auto")
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
    if not sources:
        say("CUDA: nothing to build (no *_cuda.cu file under csrc/)")
        return None
    archs = cuda_archs(nvcc)
    say(f"CUDA: building with {nvcc} for {', '.join(f'sm_{a}' for a in archs)} (M4KERNELS_CUDA={choice})")
    return nvcc, archs


def cuda_version(nvcc: str) -> str:
    """Of the toolkit, such as "13.0"."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    if found is None:
        fail(f"`{nvcc} --version` names no release:\n{said}\nSet M4KERNELS_CUDA=0 to build without CUDA.")
    return found[1]


def ninja_command() -> str:
    found = shutil.which("ninja")
    if found is None:
        import ninja

        found = str(Path(ninja.BIN_DIR) / "ninja")
    return found


class NinjaBuild(build_ext):
    """Writes a build.ninja with one edge per (source, SIMD level) and runs it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        build_dir = (Path(self.build_temp) / "ninja").resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)

        levels = simd_levels()
        cpu = sorted(ROOT.glob("csrc/**/*_cpu.cpp"))
        host = sorted(set(ROOT.glob("csrc/**/*.cpp")) - set(cpu))
        cuda_sources = sorted(ROOT.glob("csrc/**/*_cuda.cu"))
        cuda = cuda_plan(cuda_sources)

        includes = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
        # Contraction into FMA would make backends differ in the last bit; kernels that want FMA ask for it by name.
        common = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
        common += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
        common += [
            f"-DM4K_VERSION={VERSION}",
            f"-DM4K_X86={int(len(levels) > 1)}",
            f"-DM4K_CUDA={int(cuda is not None)}",
        ]
        toolkit = [
            f"-DM4K_CUDA_VERSION={cuda_version(cuda[0]) if cuda else ''}",
            f"-DM4K_CUDA_ARCHS='{';'.join(map(str, cuda[1])) if cuda else ''}'",
        ]
        common += [f"-I{path}" for path in includes]
        link = ["-shared"]
        if sys.platform == "darwin":
            say("OpenMP: not used on macOS; the kernels run on one thread")
            link += ["-undefined", "dynamic_lookup"]
        else:
            common.append("-fopenmp")
            link.append("-fopenmp")
        if os.environ.get("M4KERNELS_SANITIZE"):
            sanitize = [f"-fsanitize={os.environ['M4KERNELS_SANITIZE']}", "-fno-omit-frame-pointer", "-g", "-O1"]
            say(f"sanitizers: {sanitize[0]}")
            common += [*sanitize, "-fno-sanitize-recover=undefined"]
            link += sanitize
        say(f"CPU: SIMD levels {', '.join(levels)} (chosen at run time)")

        objects: list[str] = []
        edges: list[str] = []

        def edge(rule: str, source: Path, suffix: str, flags: list[str]) -> None:
            obj = f"{source.relative_to(ROOT / 'csrc').with_suffix('')}{suffix}.o".replace(os.sep, "_")
            objects.append(obj)
            edges.append(f"build {obj}: {rule} {quote(source)}\n  extra = {' '.join(flags)}\n")

        for level, flags in levels.items():
            for source in cpu:
                edge("cxx", source, f".{level}", [f"-DM4K_SIMD_{level.upper()}", *flags])
        for source in host:
            edge("cxx", source, "", toolkit if source.name == "bindings.cpp" else [])
        cxx = os.environ.get("CXX", "c++")  # may be several words, such as "ccache g++"
        nvcc, linker = "nvcc", "$cxx"
        if cuda is not None:
            nvcc, archs = cuda
            gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
            gencode.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
            for source in cuda_sources:
                edge("nvcc", source, ".cuda", gencode)  # about 5 s each, for four architectures
            # nvcc knows where its libraries are, which the path of a wrapper script does not tell.
            linker = "$nvcc -ccbin $ccbin"
            link = ["-shared", "--no-device-link", "-cudart static", f"-Xcompiler={','.join(link)}"]

        (build_dir / "build.ninja").write_text(
            f"cxx = {cxx}\n"
            f"ccbin = {shlex.split(cxx)[-1]}\n"
            f"nvcc = {nvcc}\n"
            "rule cxx\n"
            f"  command = $cxx -MMD -MF $out.d {' '.join(common)} $extra -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc\n  description = C++ $out\n"
            "rule nvcc\n"
            f"  command = $nvcc -ccbin $ccbin -MMD -MF $out.d {' '.join(NVCC_FLAGS)} $extra -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc\n  description = CUDA $out\n"
            "rule link\n"
            f"  command = {linker} $in {' '.join(link)} -o $out\n"
            "  description = link $out\n" + "".join(edges) + f"build {quote(target)}: link {' '.join(objects)}\n"
        )
        command = [ninja_command(), "-C", str(build_dir)]
        if self.parallel:
            command += ["-j", str(self.parallel)]
        if subprocess.run(command).returncode:
            needed = "a C++20 compiler with OpenMP is needed, e.g. g++ 11 or newer"
            needed += ", one that nvcc takes (M4KERNELS_CUDA=0 builds without CUDA)" if cuda else ""
            fail(f"compilation failed (see above); {needed}")


def quote(path: Path) -> str:
    """A path as ninja wants it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def listed(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(f"csrc/**/{pattern}"))


# Listing the files lets the sdist carry them; NinjaBuild decides how each is compiled.
setup(
    ext_modules=[Extension("m4kernels._C", listed("*.cpp"), depends=listed("*.h", "*.cu", "*.cuh"))],
    cmdclass={"build_ext": NinjaBuild},
)
