"""The figures of the CUDA kernels, and the two files that they are kept in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .cuda_build import nvcc
from .cuda_compiled import ARCHITECTURES, CLASSES, CudaCompiled, compile_cuda, read_cuda_csv, write_cuda_csv
from .cuda_counts import TileCount, count_all, load_counted, save_counted


@dataclass(frozen=True)
class CudaReport:
    """Figures of the CUDA kernels.

    Attributes:
        compiled: every variant.
        nvcc: version of the compiler.
        counted: every tile that the model needs; none where the model is left out.
        counted_nvcc: version of the compiler whose machine code was counted.
    """

    compiled: Sequence[CudaCompiled]
    nvcc: str
    counted: Sequence[TileCount]
    counted_nvcc: str


def make_cuda_report(csv: Path, counted: Path | None, workers: int) -> CudaReport:
    """Compile and count everything, and write the files; minutes.

    Args:
        csv: file of what nvcc makes.
        counted: file of counts; None counts nothing.
        workers: processes at a time.
    """
    compiled, version = compile_cuda([(arch, n) for arch in ARCHITECTURES for n in CLASSES], workers)
    compiled.sort(key=lambda c: (c.kernel != "forward", c.arch, c.scales, c.classes))
    write_cuda_csv(csv, compiled, version)
    print(csv)
    tiles: list[TileCount] = []
    if counted is not None:
        tiles = count_all(workers)
        save_counted(counted, tiles, nvcc()[1])
        print(counted)
    return CudaReport(compiled, version, tiles, version)


def read_cuda_report(csv: Path, counted: Path | None) -> CudaReport:
    """The figures of the saved files; counts as far as their file is there.

    Args:
        csv: see `make_cuda_report`.
        counted: likewise.
    """
    compiled, version = read_cuda_csv(csv)
    tiles, counted_version = load_counted(counted) if counted is not None and counted.exists() else ([], version)
    return CudaReport(compiled, version, tiles, counted_version)
