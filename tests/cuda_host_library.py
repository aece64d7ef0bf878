"""csrc/cuda compiled with g++ for execution on the host, as a library of ops on CPU tensors.

Objects are kept under build/cuda-host; ninja makes anew what has changed.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).resolve().parents[1]
HOST = Path("tests", "cuda_host")
MOST_FEW = 16  # numbers of classes that few.cu and few_general.cu are built for
FEW = ("few", "few_general")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def _ninja() -> str | None:
    """The ninja that pip installed, which need not be on PATH, or another."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = ""
    return shutil.which("ninja", path=BIN_DIR) or shutil.which("ninja")


def missing() -> str | None:
    """Why the library cannot be built here, or None."""
    if shutil.which("g++") is None:
        return "there is no g++, whose sanitizers this needs"
    return None if _ninja() else "there is no ninja; pip install ninja"


def sanitizer_environment(seed: int = 1) -> dict[str, str]:
    """Variables under which Python can load the library: the sanitizers have to be there first.

    Leaks are not looked for: Python and torch free nothing at their end. Seed: of the order in which threads run.
    """
    found = [
        subprocess.check_output(["g++", f"-print-file-name={n}.so"], text=True).strip() for n in ("libasan", "libubsan")
    ]
    return {
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "CUDA_HOST_SEED": str(seed),
    }


def build(changed: Path | None = None, classes: Iterable[int] = range(1, MOST_FEW + 1)) -> Path:
    """Build the library, with all sanitizers.

    Args:
        changed: a copy of csrc whose few.cu and few_general.cu take the place of the real ones; everything else is
            that of the whole library, which has to be there.
        classes: numbers of classes that these are built for; calling it with another one ends the process.

    Raises:
        RuntimeError: it does not compile; the message is what the compiler said.
    """
    whole = Path("build", "cuda-host", "whole")
    directory = whole if changed is None else changed.parent
    kernels = Path("csrc") if changed is None else changed
    paths = [str(HOST / "include"), str(HOST), str(kernels)]
    flags = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fno-strict-aliasing", *SANITIZE, "-Wall", "-Wextra", "-Werror"]
    flags += ["-Wno-unknown-pragmas", *(f"-I{path}" for path in paths)]
    for path in include_paths():
        flags += ["-isystem", path]
    flags.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    units = [(f"{stem}.{c}.o", kernels / f"cuda/{stem}.cu", f"-DLOMIX_CLASSES={c}") for c in classes for stem in FEW]
    rest = [Path("csrc", name) for name in ("cuda/common.cu", "cuda/many.cu", "cuda/map_stats.cpp", "cuda/prepare.cpp")]
    rest += [Path("csrc/inputs.cpp"), *(HOST / f"{stem}.cpp" for stem in ("device", "ops", "machine", "launch"))]
    if changed is None:
        units += [(f"{path.name}.o", path, "") for path in rest]
    objects = [str(directory / unit[0]) for unit in units]
    if changed is not None:
        objects += [str(whole / f"{path.name}.o") for path in rest]
    library = directory / "library.so"
    lines = [
        f"builddir = {directory}",
        "rule compile",
        f"  command = g++ -MD -MF $out.d {shlex.join(flags)} $define -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        # Lazily: only the numbers of classes that are called have to be there.
        f"  command = g++ -shared -Wl,-z,lazy {shlex.join(SANITIZE)} $in -L{library_paths()[0]} -lc10 -ltorch_cpu "
        "-ltorch -o $out",
    ]
    for target, source, define in units:
        lines += [f"build {directory / target}: compile {source}", f"  define = {define}"]
    lines += [f"build {library}: link {' '.join(objects)}"]
    (ROOT / directory).mkdir(parents=True, exist_ok=True)
    script = ROOT / directory / "build.ninja"
    script.write_text("\n".join(lines) + "\n")
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    ninja = _ninja()
    if ninja is None:
        raise RuntimeError("ninja was not found; pip install ninja")
    command = [ninja, "-C", str(ROOT), "-f", str(script), "-j", jobs]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{library} could not be built\n{done.stdout[-4000:]}{done.stderr[-1000:]}")
    return ROOT / library
