"""csrc/cuda/few.cu compiled for a GPU that need not be here, with the flags of the package's own build."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from .compiled import tool

ROOT = Path(__file__).resolve().parents[2]
_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_KERNEL = re.compile(r"(statistics|gradients)_fewIf(?:Li(\d+)E)?Li(\d+)E")


@dataclass(frozen=True)
class Usage:
    """What ptxas says about one kernel: registers of a thread, and bytes of its own memory."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


@dataclass(frozen=True)
class Binary:
    """few.cu compiled for one number of classes and one architecture.

    Attributes:
        arch, classes: what for.
        nvcc: version of the compiler.
        cubin: the machine code.
        usage: by kernel name, see `kernel_name`.
        listing: of nvdisasm, with source lines.
    """

    arch: str
    classes: int
    nvcc: str
    cubin: bytes
    usage: dict[str, Usage]
    listing: str


def kernel_name(mangled: str) -> str:
    """Name of a kernel: "forward", or "backward 4" where it serves up to four scales; "" for any other."""
    found = _KERNEL.search(mangled)
    if not found:
        return ""
    return "forward" if found[1] == "statistics" else f"backward {found[2]}"


def _build() -> ModuleType:
    """The package's build script, which lies beside the package and not in it."""
    sys.path.insert(0, str(ROOT))
    try:
        return importlib.import_module("build_cuda")
    finally:
        sys.path.remove(str(ROOT))


@cache
def nvcc() -> tuple[str, str]:
    """Path and full version of the nvcc that a build would take first; both "" where there is none."""
    for path in _build().installed():
        said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
        found = re.search(r"\bV(\d+(?:\.\d+)+)", said)
        if found:
            return path, found[1]
    return "", ""


def usages(said: str) -> dict[str, Usage]:
    """Read what `ptxas -v` says, by kernel name.

    Raises:
        ValueError: it speaks of no kernel of few.cu.
    """
    found = {}
    for part in said.split("ptxas info    : Compiling")[1:]:
        entry, frame, used = (pattern.search("Compiling" + part) for pattern in (_ENTRY, _FRAME, _USED))
        if entry and frame and used and kernel_name(entry[1]):
            found[kernel_name(entry[1])] = Usage(int(used[1]), *(int(n) for n in frame.groups()))
    if not found:
        raise ValueError(f"said: got {said[:200]!r}, expected what ptxas -v says about few.cu; look at nvcc's output")
    return found


def compile_few(arch: str, classes: int) -> Binary:
    """Compile few.cu as the package's build does, and disassemble it.

    Args:
        arch: such as "sm_80".
        classes: number of classes, 1 to 16.

    Raises:
        FileNotFoundError: there is no nvcc.
        RuntimeError: it does not compile.
    """
    path, version = nvcc()
    if not path:
        raise FileNotFoundError("nvcc: got none, expected one on PATH or in CUDA_HOME; install the CUDA toolkit")
    build = _build()
    number = arch.removeprefix("sm_")
    cuda = build.Cuda(path, version, (f"{number[:-1]}.{number[-1]}",), (), "")
    flags = build.nvcc_flags(cuda, (), True, str(classes))
    with tempfile.TemporaryDirectory(prefix="gpu-report-") as folder:
        target = Path(folder) / "few.cubin"
        # Line information adds no instruction; it says which function an instruction comes from.
        command = [path, *flags, "-lineinfo", "-Xptxas", "-v", "-cubin", "-o", str(target), build.FEW_SOURCE]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("NVCC_")}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(
                f"few.cu, C={classes}, {arch}: got this from nvcc, expected a cubin: {done.stderr[-999:]}"
            )
        listing = tool("nvdisasm", "-c", "-gi", str(target))
        return Binary(arch, classes, version, target.read_bytes(), usages(done.stdout + done.stderr), listing)
