"""Builds the C++ extension lomix_fast._C: whether, from which sources, with which flags, in which order.

setup.py calls `decide` and `build`; `python build_cpp.py` builds the objects and the module under build/, installs
nothing and needs no setuptools, which is how `make lint` looks for compiler warnings and how benchmarks/gpu_day begins.
The CUDA part is described in build_cuda.py. Environment variables, and those named there:

    LOMIX_FAST_BUILD   auto (default), cpu, cuda or none, see `requested_build`
    LOMIX_FAST_WERROR  1 turns warnings of our own sources into errors
    CXX                the C++ compiler; default g++, c++ or clang++, whichever is found first
    MAX_JOBS           how many files are compiled at once; default one per CPU
    DEBUG              1 compiles with -O0 -g, kernels for GPUs with -O1 -g
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import build_cuda
from build_tools import BuildError, CannotBuild, complaint, debug, werror

ROOT = Path(__file__).resolve().parent
BUILDS = ("auto", "cpu", "cuda", "none")
OLDEST_TORCH = (2, 8)

# How ATen names a capability -> what switches it on. The same sets as torch/_inductor/cpu_vec_isa.py, whose AVX-512 set
# is spelt out here with what every such CPU has as well.
CAPABILITIES = {
    "DEFAULT": [],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mavx2", "-mfma", "-mf16c"],
}

_PROBE = """
#include <omp.h>
#include <concepts>
template <std::integral T> T twice(T x) { return 2 * x; }
int probe() { return twice(omp_get_max_threads()); }
"""


@dataclass(frozen=True)
class Toolchain:
    """Everything found on this machine that a build of the extension needs."""

    cxx: tuple[str, ...]
    cxx_version: str
    ninja: str
    torch_version: str
    torch_include: tuple[str, ...]
    torch_lib: str
    cxx11_abi: bool
    capabilities: tuple[str, ...]
    cuda: build_cuda.Cuda | None = None
    cuda_skipped: str = ""  # why there is no CUDA part

    @property
    def is_clang(self) -> bool:
        """Whether the compiler is clang, which knows other warnings and brings its own OpenMP."""
        return "clang" in self.cxx_version

    def describe(self) -> dict[str, str]:
        """Return what lomix_fast/_build_info.py reads when the extension fails to load."""
        record = {
            "torch": self.torch_version,
            "compiler": self.cxx_version,
            "capabilities": " ".join(self.capabilities),
        }
        if self.cuda is None:
            return {**record, "cuda_skipped": self.cuda_skipped}
        return {**record, "cuda": self.cuda.version, "cuda_archs": " ".join(self.cuda.architectures)}


def requested_build() -> str:
    """Return what LOMIX_FAST_BUILD asks for. No visible GPU and nothing else changes the answer.

    auto: build the CPU part where a C++20 compiler and torch are there, and the CUDA part where torch is a CUDA build
    and there is an nvcc for it; go on without either and say so. cpu: build the CPU part or fail. cuda: build both or
    fail. none: pure Python.

    Raises:
        BuildError: the value is none of these.
    """
    value = os.environ.get("LOMIX_FAST_BUILD", "auto")
    if value not in BUILDS:
        raise BuildError(f"LOMIX_FAST_BUILD: got {value!r}, expected one of {', '.join(BUILDS)}")
    return value


def decide() -> tuple[Toolchain | None, str]:
    """Return (toolchain, "") when the extension is to be built, otherwise (None, why it is not).

    Raises:
        BuildError: LOMIX_FAST_BUILD asks for what this machine or this version cannot do.
    """
    asked = requested_build()
    if asked == "none":
        return None, "LOMIX_FAST_BUILD=none was set when it was installed"
    try:
        toolchain = find_toolchain()
    except CannotBuild as error:
        if asked != "auto":
            raise BuildError(
                f"LOMIX_FAST_BUILD={asked}: {error}. LOMIX_FAST_BUILD=none installs without the C++ extension"
            ) from error
        _say_loudly(f"lomix_fast is installed WITHOUT its C++ extension: {error}")
        return None, str(error)
    return _with_cuda(toolchain, asked), ""


def _with_cuda(toolchain: Toolchain, asked: str) -> Toolchain:
    """Add what the CUDA part needs, or the reason why that is not built."""
    if asked == "cpu":
        return replace(toolchain, cuda_skipped="LOMIX_FAST_BUILD=cpu was set when it was installed")
    try:
        return replace(toolchain, cuda=build_cuda.find(toolchain.cxx))
    except CannotBuild as error:
        if asked == "cuda":
            raise BuildError(
                f"LOMIX_FAST_BUILD=cuda: {error}. LOMIX_FAST_BUILD=cpu builds the extension for CPU tensors alone"
            ) from error
        print(f"lomix_fast is built without its CUDA kernels: {error}", file=sys.stderr, flush=True)
        return replace(toolchain, cuda_skipped=str(error))


def _say_loudly(message: str) -> None:
    line = "*" * 100
    rest = "The backends in plain PyTorch work. LOMIX_FAST_BUILD=cpu turns this warning into an error."
    print(f"{line}\n{message}.\n{rest}\n{line}", file=sys.stderr, flush=True)


# ---- what this machine has ----


def find_toolchain() -> Toolchain:
    """Look for everything a build needs and try the compiler on a small C++20 file.

    Raises:
        CannotBuild: something is missing; the message names it and the remedy.
    """
    if not sys.platform.startswith("linux"):
        raise CannotBuild(f"the C++ extension is built on Linux only, this is {sys.platform}")
    torch_facts = _find_torch()
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        raise CannotBuild(f"{header} does not exist; install Python's headers (Debian, Ubuntu: python3-dev)")
    cxx, version = _find_compiler()
    ninja = _find_ninja()
    return Toolchain(cxx, version, ninja, **torch_facts, capabilities=_usable_capabilities(cxx))


def _find_torch() -> dict[str, Any]:
    try:
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths
    except Exception as error:  # a broken torch raises anything from ImportError to OSError
        raise CannotBuild(
            f"the Python that builds it cannot import torch ({type(error).__name__}: {error}); install torch, ninja "
            "and setuptools >= 77 first, then build beside them: pip install --no-build-isolation . (an isolated "
            "build hides an installed torch)"
        ) from error
    release = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if release < OLDEST_TORCH:
        raise CannotBuild(f"torch {torch.__version__} is too old, expected {'.'.join(map(str, OLDEST_TORCH))} or newer")
    return {
        "torch_version": str(torch.__version__),
        "torch_include": tuple(include_paths()),
        "torch_lib": library_paths()[0],
        "cxx11_abi": torch.compiled_with_cxx11_abi(),
    }


def _find_compiler() -> tuple[tuple[str, ...], str]:
    given = os.environ.get("CXX")
    if given:
        cxx = tuple(shlex.split(given))
    else:
        cxx = tuple(name for name in ("g++", "c++", "clang++") if shutil.which(name))[:1]
    remedy = "install one (Debian, Ubuntu: g++) or name it in the environment variable CXX"
    if not cxx:
        raise CannotBuild(f"no C++ compiler (g++, c++, clang++) was found; {remedy}")
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "probe.cpp")
        source.write_text(_PROBE)
        flags = ["-std=c++20", "-fPIC", "-fopenmp", "-shared", str(source), "-o", str(Path(scratch, "probe.so"))]
        trouble = complaint([*cxx, *flags])
    if trouble is not None:
        raise CannotBuild(f"the C++ compiler {shlex.join(cxx)!r} cannot build C++20 with OpenMP ({trouble}); {remedy}")
    version = subprocess.run([*cxx, "--version"], capture_output=True, text=True, check=False).stdout
    return cxx, version.partition("\n")[0]


def _find_ninja() -> str:
    try:
        from ninja import BIN_DIR as beside  # the package, whose directory need not be on PATH
    except ImportError:
        beside = ""
    found = shutil.which("ninja", path=beside) or shutil.which("ninja")
    if not found:
        raise CannotBuild("ninja was not found; pip install ninja")
    return found


def _usable_capabilities(cxx: tuple[str, ...]) -> tuple[str, ...]:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ("DEFAULT",)
    syntax_only = [*cxx, "-x", "c++", "-fsyntax-only", os.devnull]
    return tuple(name for name, flags in CAPABILITIES.items() if complaint([*syntax_only, *flags]) is None)


# ---- flags ----


def compile_flags(toolchain: Toolchain, capability: str | None) -> list[str]:
    """Return all flags of one translation unit.

    Args:
        toolchain: what was found on this machine.
        capability: a key of CAPABILITIES for a kernel, None for the glue, which is baseline code.
    """
    flags = ["-std=c++20", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]
    flags += ["-O0", "-g"] if debug() else ["-O3", "-DNDEBUG"]
    # Nobody here reads errno or floating-point exceptions; results keep IEEE meaning, so no -ffast-math.
    # A product that the source rounds is not fused with the addition after it: what is written twice must agree twice.
    flags += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
    if werror():
        flags.append("-Werror")
    if capability is not None:
        flags += [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}", *CAPABILITIES[capability]]
        if not toolchain.is_clang:
            # With it, gcc 12 keeps larger arrays of vectors in memory that fit registers (see docs/performance.md).
            flags.append("-fno-early-inlining")
        if capability == "AVX512" and not toolchain.is_clang:
            # gcc 12 says these of its own <avx512fintrin.h>; the other capabilities still check the same code for them.
            flags += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    else:
        flags += [f"-DLOMIX_HAVE_{name}" for name in toolchain.capabilities[1:]]
    flags += ["-DTORCH_EXTENSION_NAME=_C", f"-D_GLIBCXX_USE_CXX11_ABI={int(toolchain.cxx11_abi)}", "-Icsrc"]
    for directory in (*toolchain.torch_include, sysconfig.get_path("include")):
        flags += ["-isystem", directory]  # system headers: their warnings are not ours
    return flags


def link_flags(toolchain: Toolchain) -> list[str]:
    """Return the flags that link the module. No rpath: lomix_fast imports torch first, which loads its libraries."""
    flags = [f"-L{toolchain.torch_lib}", "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
    if toolchain.cuda is not None:
        flags += ["-lc10_cuda", "-ltorch_cuda", toolchain.cuda.cudart]
    # The OpenMP runtime that torch brought along, if any: with a second one in the process, torch.set_num_threads would
    # not reach our loops. clang's code needs clang's own.
    own = sorted(Path(toolchain.torch_lib).glob("libgomp*.so*"))
    return [*flags, str(own[0]) if own and not toolchain.is_clang else "-fopenmp"]


# ---- sources, in link order, and ninja ----


def units(toolchain: Toolchain) -> list[tuple[str, str | None]]:
    """Return (source file, what it is compiled for or None) in link order.

    A kernel for the CPU is compiled for each capability, build_cuda.FEW_SOURCE for each number of classes.

    Of a weak symbol, such as a function template of the standard library, the linker keeps the first copy it meets.
    That must be one compiled for every CPU: glue first, then the kernels from the baseline up.
    """
    kernels = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/cpu/kernel_*.cpp"))
    all_sources = [
        path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp"))
    ]
    glue = sorted(set(all_sources) - set(kernels))
    if not kernels or not glue:
        raise BuildError(f"no C++ sources under {ROOT / 'csrc'}; the source tree is incomplete")
    cuda_glue, cuda_kernels = build_cuda.sources(ROOT) if toolchain.cuda else ([], [])
    baseline: list[tuple[str, str | None]] = [(source, None) for source in (*glue, *cuda_glue)]
    return [*baseline, *cuda_kernels, *((s, name) for name in toolchain.capabilities for s in kernels)]


def build_directory(toolchain: Toolchain) -> Path:
    """Return where objects live: one directory for each setting that would otherwise rebuild everything in turn."""
    setting = "debug" if debug() else "release"
    strict = "-werror" if werror() else ""
    return Path("build", f"cpp-{sys.implementation.cache_tag}-torch{toolchain.torch_version}-{setting}{strict}")


def write_ninja(toolchain: Toolchain) -> tuple[Path, Path]:
    """Write build.ninja, with paths relative to the project's root, and return (that file, the module it makes)."""
    directory = build_directory(toolchain)
    module = directory / "_C.so"
    lines = [
        "ninja_required_version = 1.5",
        f"builddir = {directory}",  # where ninja keeps its log of what is up to date
        f"cxx = {_ninja_command(toolchain.cxx)}",
        "rule compile",
        "  command = $cxx -MD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in $for",
        *_nvcc_rule(toolchain),
        "rule link",
        "  command = $cxx -shared $in $flags -o $out",
        "  description = link $out",
    ]
    objects = []
    edges: list[tuple[int, list[str]]] = []
    for source, variant in units(toolchain):
        is_cuda = source.endswith(".cu")
        suffix = f".{variant}.o" if variant else ".cu.o" if is_cuda else ".o"
        objects.append((directory / source).with_suffix(suffix))
        edge = [
            f"build {_ninja_path(objects[-1])}: {'nvcc' if is_cuda else 'compile'} {_ninja_path(source)}",
            f"  flags = {_ninja_command(_unit_flags(toolchain, source, variant))}",
            f"  for = {f'for {variant}' if variant else ''}{' classes' if variant and is_cuda else ''}",
        ]
        edges.append((int(variant) if variant and is_cuda else 0, edge))
    # ninja begins with what comes first, and with many cores all wait for the slowest: those of the most classes first.
    for _, edge in sorted(edges, key=lambda one: -one[0]):
        lines += edge
    lines.append(f"build {_ninja_path(module)}: link {' '.join(map(_ninja_path, objects))}")
    lines.append(f"  flags = {_ninja_command(link_flags(toolchain))}")
    lines.append(f"default {_ninja_path(module)}")
    path = directory / "build.ninja"
    (ROOT / directory).mkdir(parents=True, exist_ok=True)
    (ROOT / path).write_text("\n".join(lines) + "\n")
    return path, module


def _nvcc_rule(toolchain: Toolchain) -> list[str]:
    if toolchain.cuda is None:
        return []
    return [
        f"nvcc = {_ninja_command((toolchain.cuda.nvcc,))}",
        "rule nvcc",
        "  command = $nvcc -MD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = nvcc $in $for",
    ]


def _unit_flags(toolchain: Toolchain, source: str, variant: str | None) -> list[str]:
    if toolchain.cuda is not None and source.endswith(".cu"):
        return build_cuda.nvcc_flags(toolchain.cuda, toolchain.cxx, toolchain.cxx11_abi, variant)
    flags = compile_flags(toolchain, variant)
    if toolchain.cuda is not None and not source.startswith("csrc/cpu/"):
        flags += build_cuda.glue_flags(toolchain.cuda)
    return flags


def _ninja_path(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _ninja_command(words: tuple[str, ...] | list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def build(toolchain: Toolchain) -> Path:
    """Compile what changed and link; return the finished module, beside which lies its _build_info.json.

    Raises:
        BuildError: the compiler or linker failed (its output is above), or MAX_JOBS is not a positive number.
    """
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    if not jobs.isdecimal() or int(jobs) < 1:
        raise BuildError(f"MAX_JOBS: got {jobs!r}, expected a positive whole number")
    script, module = write_ninja(toolchain)
    sys.stdout.flush()
    done = subprocess.run([toolchain.ninja, "-C", str(ROOT), "-f", str(script), "-j", jobs], check=False)
    if done.returncode != 0:
        raise BuildError("building lomix_fast._C failed; the compiler's messages are above")
    (ROOT / module).with_name("_build_info.json").write_text(json.dumps(toolchain.describe(), indent=2) + "\n")
    return ROOT / module


if __name__ == "__main__":
    try:
        found, skipped = decide()
        print(skipped if found is None else build(found))
    except BuildError as failure:
        raise SystemExit(str(failure)) from None
