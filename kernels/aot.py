"""Compilation for GPUs that are not here: what the compilers make of each kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from ..plan import MAX_SCALES
from .adjoint import gather_kernel
from .backward import gradients_kernel
from .config import MOST_BACKWARD, MOST_FORWARD, Target, backward_config, dot_precision, forward_config, options, vector
from .forward import statistics_kernel

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")
KERNELS = ("forward", "backward", "gather")

# What a kernel is compiled for about plan and target, by a name for it; the gather kernel is the same for all.
_FLAGS = ("SIGMOID", "GENERAL", "DENSE", "WEIGHTED", "EXTRA", "BOUNDED")
MODES: dict[str, tuple[str, ...]] = {
    "plain": (),  # class numbers that all count alike
    "weights": ("GENERAL", "WEIGHTED"),
    "soft": ("GENERAL", "DENSE"),
    "sigmoid": ("SIGMOID", "GENERAL", "DENSE"),
    "extra": ("EXTRA", "BOUNDED"),  # plain targets, all operators
    "soft, all": ("GENERAL", "DENSE", "WEIGHTED", "EXTRA", "BOUNDED"),
    "sigmoid, all": _FLAGS,
}


@dataclass(frozen=True)
class Variant:
    """One kernel as a user's call would have it compiled.

    Attributes:
        kernel: one of KERNELS.
        arch: "sm_90", "gfx942", ...
        classes: C.
        dims: 2 or 3 spatial axes.
        dtype: Triton's name of the logits' type, "fp32", "fp16", "bf16" or "fp64".
        mode: one of MODES; dense targets are uint8 under sigmoids, otherwise float32.
    """

    kernel: str
    arch: str
    classes: int
    dims: int
    dtype: str = "fp32"
    mode: str = "plain"


def gpu_target(arch: str) -> GPUTarget:
    """Triton's description of an architecture.

    Raises:
        ValueError: a name that is neither sm_N nor gfxN.
    """
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    raise ValueError(f"arch: got {arch!r}, expected a name such as 'sm_90' or 'gfx942'")


def compile_variant(variant: Variant) -> CompiledKernel:
    """Compile one variant; needs no GPU. Triton keeps the result in its cache on disk.

    Raises:
        ValueError: an unknown kernel, architecture or mode.
    """
    target = gpu_target(variant.arch)
    arch = target.arch
    on = Target(target.backend, arch, 1, target.warp_size)
    source, warps = _source(variant, on)
    return triton.compile(source, target=target, options=options(on, warps))


def _source(variant: Variant, on: Target) -> tuple[ASTSource, int]:
    if variant.mode not in MODES:
        raise ValueError(f"mode: got {variant.mode!r}, expected one of {tuple(MODES)}")
    flags = {name: name in MODES[variant.mode] for name in _FLAGS}
    target = ("*u8" if flags["SIGMOID"] else "*fp32") if flags["DENSE"] else "*i64"
    full = (64, 64, 64) if variant.dims == 3 else (1, 64, 64)
    few = vector(variant.classes, MOST_FORWARD if variant.kernel == "forward" else MOST_BACKWARD)
    accumulator = tl.float64 if variant.dtype == "fp64" else tl.float32
    config = (forward_config if variant.kernel == "forward" else backward_config)(on, full, variant.classes)
    tile = dict(zip(("TZ", "TY", "TX"), config.tile, strict=True))
    common = {"ACC": accumulator, "WIDE": False, **tile}
    mixing = {
        "CT": few,
        "MANY": variant.classes > few,
        "DIMS": variant.dims,
        "BLOCK": config.block,
        "SQUARED": True,
        "DOT": dot_precision(on),
        "SPAN": min(config.span, config.size),
        **flags,
        **common,
    }
    if variant.kernel == "forward":
        constants = {**mixing, "ROWS": config.warps, "PX": config.pixels}
        return ASTSource(*_typed(statistics_kernel, variant.dtype, accumulator, target, constants)), config.warps
    if variant.kernel == "backward":
        constants = {**mixing, "LEARNED": True}
        return ASTSource(*_typed(gradients_kernel, variant.dtype, accumulator, target, constants)), config.warps
    if variant.kernel == "gather":
        return ASTSource(*_typed(gather_kernel, variant.dtype, accumulator, target, {**common, "BLOCK": 256})), 4
    raise ValueError(f"kernel: got {variant.kernel!r}, expected one of {KERNELS}")


_INTEGER_TABLES = {"p_geometry": "*i64", "p_groups": "*i32", "p_table": "*i32", "p_counts": "*i32"}


def _typed(
    kernel: triton.JITFunction, logits: str, accumulator: tl.dtype, target: str, constants: dict[str, object]
) -> tuple[triton.JITFunction, dict[str, object], dict[str, object], dict[tuple[int, ...], list[list[object]]]]:
    """A kernel with the types of its arguments, its constants, and the alignment that torch's memory has."""
    signature: dict[str, object] = {}
    aligned: dict[tuple[int, ...], list[list[object]]] = {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("logits", "grads"):
            signature[name] = (f"*{logits}",) * MAX_SCALES
            aligned |= {(position, i): [["tt.divisibility", 16]] for i in range(MAX_SCALES)}
        elif name.startswith("p_"):
            signature[name] = target if name == "p_target" else _INTEGER_TABLES.get(name, f"*{accumulator}")
            aligned[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    return kernel, signature, constants, aligned


def variants(
    kernels: tuple[str, ...] = KERNELS,
    archs: tuple[str, ...] = ARCHITECTURES,
    classes: tuple[int, ...] = (1, 2, 4, 9, 14, 16, 40),
    dims: tuple[int, ...] = (2, 3),
) -> Iterator[Variant]:
    """Every combination; the gather kernel is the same for any C, so it comes once for each number of axes."""
    for arch in archs:
        for axes in dims:
            for kernel in kernels:
                for count in classes if kernel != "gather" else (9,):
                    yield Variant(kernel, arch, count, axes)
