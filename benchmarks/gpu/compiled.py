"""One variant of a kernel compiled for a GPU that need not be here, and what the compilers made of it."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import amdgcn, sass
from .occupancy import occupancy, programs_per_core

CLASSES = tuple(dict.fromkeys((*sass.CLASSES, *amdgcn.CLASSES)))


@dataclass(frozen=True)
class Compiled:
    """What the compilers made of one variant.

    Attributes:
        kernel, arch, classes, dims: the variant.
        warps: of a program.
        registers: of a thread (AMD: vector registers, with those for accumulation).
        scalar_registers: AMD, of a warp; 0 for NVIDIA.
        stack_bytes: of a thread's own memory (AMD: private segment), local memory included.
        spills: instructions that load or store spilled registers in memory; for AMD at least the registers spilled.
        scalar_spills: AMD, scalar registers kept in lanes of vector registers, not in memory.
        shared_bytes: of a program.
        programs: that fit on a core at once, in theory.
        occupancy: the share of a core's warps that these are.
        seconds: one compilation that found nothing in a cache.
        cpu_seconds: what it computed in that time; the same unless the machine had other things to do.
        static: instructions by class, CLASSES.
        error: why it could not be compiled or read, otherwise "".
    """

    kernel: str
    arch: str
    classes: int
    dims: int
    warps: int = 0
    registers: int = 0
    scalar_registers: int = 0
    stack_bytes: int = 0
    spills: int = 0
    scalar_spills: int = 0
    shared_bytes: int = 0
    programs: int = 0
    occupancy: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    static: Mapping[str, int] | None = None
    error: str = ""

    @property
    def spilled(self) -> bool:
        """Whether anything that belongs in registers lies in memory."""
        return self.spills > 0 or self.stack_bytes > 0

    @property
    def instructions(self) -> int:
        """Static instructions of all classes."""
        return sum((self.static or {}).values())


@contextmanager
def _fresh_cache() -> Iterator[None]:
    """An empty folder as Triton's cache, so that a compilation is one."""
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory(prefix="gpu-report-") as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["TRITON_CACHE_DIR"]
            else:
                os.environ["TRITON_CACHE_DIR"] = before


def compile_one(kernel: str, arch: str, classes: int, dims: int, mode: str = "plain") -> Compiled:
    """Compile and read one variant; a failure is reported in the result, so that the others go on.

    Args:
        kernel, arch, classes, dims, mode: see `lomix_fast.kernels.aot.Variant`. The result does not hold the mode.
    """
    from lomix_fast.kernels.aot import Variant, compile_variant  # imports triton, which must not be interpreting

    named = {"kernel": kernel, "arch": arch, "classes": classes, "dims": dims}
    try:
        with _fresh_cache():
            start, worked = time.perf_counter(), _worked()
            made = compile_variant(Variant(kernel, arch, classes, dims, mode=mode))
            spent = {"seconds": time.perf_counter() - start, "cpu_seconds": _worked() - worked}
            require_any_scales(made.src)
            read = _nvidia if "cubin" in made.asm else _amd
            return read(made, {**named, **spent, "warps": made.metadata.num_warps})
    except Exception as error:
        return Compiled(**named, error=f"{type(error).__name__}: {error}".splitlines()[0])


def _worked() -> float:
    """Seconds that processors have worked for this process and for those that it waited for, such as assemblers."""
    return sum(os.times()[:4])


def require_any_scales(source: object) -> None:
    """Make sure that a compiled source does not depend on L, so that its binary serves any number of scales.

    Args:
        source: the `ASTSource` that was compiled. L must be no constant of it and, where the kernel takes it, neither
            specialised on its value nor typed by it at a launch.

    Raises:
        AssertionError: it does depend on L.
    """
    kernel = source.fn  # type: ignore[attr-defined]
    names = kernel.arg_names
    constant = {names[path[0]] for path in source.constants}  # type: ignore[attr-defined]
    assert "L" not in constant, f"{kernel.__name__}: L is a constant, so each number of scales has its own binary"
    for parameter in kernel.params:
        if parameter.name == "L":
            assert parameter.do_not_specialize and not parameter.is_constexpr, (
                f"{kernel.__name__}: L is specialised on at a launch, expected it in do_not_specialize"
            )


def _nvidia(made: object, known: dict[str, object]) -> Compiled:
    cubin: bytes = made.asm["cubin"]  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory(prefix="gpu-report-") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        used = sass.usage(tool("cuobjdump", "-res-usage", str(path)))
        static = sass.instructions(tool("nvdisasm", "-c", str(path)))
    shared, warps, arch = made.metadata.shared, int(str(known["warps"])), str(known["arch"])  # type: ignore[attr-defined]
    fit = programs_per_core(arch, used["REG"], warps, shared)
    return Compiled(
        **known,  # type: ignore[arg-type]
        registers=used["REG"],
        stack_bytes=used["STACK"] + used["LOCAL"],
        spills=static["spill_load"] + static["spill_store"],
        shared_bytes=shared,
        programs=fit,
        occupancy=occupancy(arch, fit, warps),
        static=dict(static),
    )


def _amd(made: object, known: dict[str, object]) -> Compiled:
    assembly: str = made.asm["amdgcn"]  # type: ignore[attr-defined]
    used, static = amdgcn.usage(assembly), amdgcn.instructions(assembly)
    warps, arch = int(str(known["warps"])), str(known["arch"])
    # Shared memory is asked for at the launch; the assembly knows only what is fixed.
    shared = max(used["group_segment_fixed_size"], made.metadata.shared)  # type: ignore[attr-defined]
    fit = programs_per_core(arch, used["vgpr_count"], warps, shared)
    return Compiled(
        **known,  # type: ignore[arg-type]
        registers=used["vgpr_count"],  # on gfx90a and later it includes agpr_count
        scalar_registers=used["sgpr_count"],
        stack_bytes=used["private_segment_fixed_size"],
        spills=max(used["vgpr_spill_count"], static["spill_load"] + static["spill_store"]),
        scalar_spills=used["sgpr_spill_count"],
        shared_bytes=shared,
        programs=fit,
        occupancy=occupancy(arch, fit, warps),
        static=dict(static),
    )


def tool(name: str, *arguments: str) -> str:
    """Output of one of the tools that the triton wheel ships."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"{name}: not in this triton, expected it among backends/nvidia/bin; reinstall triton")
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True, timeout=120).stdout
