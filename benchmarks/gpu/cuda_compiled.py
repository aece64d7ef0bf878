"""What ptxas makes of the CUDA kernels for few classes: figures, their file, and the promises about them."""

from __future__ import annotations

import csv
import re
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, fields
from multiprocessing import get_context
from pathlib import Path

from .cuda_build import Binary, compile_few, kernel_name
from .cuda_shapes import shapes, tiles_of
from .occupancy import occupancy, programs_per_core
from .sass import instructions
from .table import Verdict, markdown

ARCHITECTURES = ("sm_80", "sm_89", "sm_90")
CLASSES = tuple(range(1, 17))
SCALES = (4, 5, 6)
# Without spills, and with so many warps: the more there are, the less a warp's waiting for memory costs.
PROMISED_ARCHITECTURES = ("sm_80", "sm_90")
MOST_SHARED = 100 * 1024
_LARGE = (1, 1024, 1024)  # in 2D, whose axis tables are longer than those of 3D
_BATCH = 8
_CORES = 132
_GRANULE = 128  # bytes that shared memory is given in


@dataclass(frozen=True)
class CudaCompiled:
    """One kernel of few.cu as a launch for L scales meets it.

    Attributes:
        kernel: "forward" or "backward".
        arch, classes, scales: the variant; L = 4 stands for L <= 4.
        registers: of a thread.
        stack, spill_stores, spill_loads: bytes of a thread's own memory, as ptxas counts them.
        threads: of a block.
        shared: bytes of a block on a large image.
        blocks: on a multiprocessor, as far as registers, threads and shared memory leave room.
        occupancy: the share of a multiprocessor's warps that these are.
        instructions: in the binary, without padding.
    """

    kernel: str
    arch: str
    classes: int
    scales: int
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    threads: int
    shared: int
    blocks: int
    occupancy: float
    instructions: int

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.kernel} {self.arch} C={self.classes} L={self.scales}"

    @property
    def in_memory(self) -> bool:
        """Whether anything that belongs in registers lies in memory."""
        return self.stack + self.spill_stores + self.spill_loads > 0


_COLUMNS = (*(field.name for field in fields(CudaCompiled)), "nvcc")


def read_binary(binary: Binary) -> list[CudaCompiled]:
    """The figures of every kernel in a binary, the forward kernel once for each of SCALES."""
    sections = re.split(r"^\.text\.(\w+):$", binary.listing, flags=re.MULTILINE)
    texts = dict(zip(map(kernel_name, sections[1::2]), sections[2::2], strict=True))
    counted = {name: sum(instructions(text).values()) for name, text in texts.items()}
    found = []
    for which in ("forward", "backward"):
        for scales in SCALES:
            name = which if which == "forward" else f"{which} {scales}"
            used, shape = binary.usage[name], shapes()[which, binary.classes, scales]
            shared = tiles_of(which, binary.arch, _CORES, binary.classes, scales, _LARGE, _BATCH).shared
            given = -(-shared // _GRANULE) * _GRANULE
            blocks = programs_per_core(binary.arch, used.registers, shape.threads // 32, given)
            found.append(
                CudaCompiled(
                    *(which, binary.arch, binary.classes, scales),
                    *(used.registers, used.stack, used.spill_stores, used.spill_loads, shape.threads, shared, blocks),
                    round(occupancy(binary.arch, blocks, shape.threads // 32), 4),
                    counted[name],
                )
            )
    return found


def compile_classes(arch: str, classes: int) -> tuple[list[CudaCompiled], str]:
    """Compile one binary: its figures, and the version of nvcc."""
    binary = compile_few(arch, classes)
    return read_binary(binary), binary.nvcc


def compile_cuda(which: Iterable[tuple[str, int]], workers: int) -> tuple[list[CudaCompiled], str]:
    """Compile binaries in worker processes, with a line on stderr for each: their figures, and the version of nvcc.

    Args:
        which: architecture and number of classes of each.
        workers: processes at a time.
    """
    start, done, version = time.perf_counter(), {}, ""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(compile_classes, *one): one for one in dict.fromkeys(which)}
        for future in as_completed(waiting):
            done[waiting[future]], version = future.result()
            passed, (arch, classes) = time.perf_counter() - start, waiting[future]
            print(f"[{len(done)}/{len(waiting)}, {passed:.0f} s] CUDA {arch} C={classes}", file=sys.stderr, flush=True)
    return [row for one in waiting.values() for row in done[one]], version


def write_cuda_csv(path: Path, compiled: Iterable[CudaCompiled], version: str) -> None:
    """Write a row for every variant.

    Args:
        path: the file; its folder is made.
        compiled: the rows.
        version: of nvcc.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows([*(getattr(one, name) for name in _COLUMNS[:-1]), version] for one in compiled)


def read_cuda_csv(path: Path) -> tuple[list[CudaCompiled], str]:
    """Read what `write_cuda_csv` wrote: the rows, and the version of nvcc.

    Raises:
        ValueError: it is not such a file.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or tuple(rows[0]) != _COLUMNS:
        got = ", ".join(rows[0]) if rows else "no rows"
        raise ValueError(f"{path}: got {got}, expected the columns {', '.join(_COLUMNS)}; run python -m benchmarks.gpu")
    made = {"int": int, "float": float, "str": str}
    found = [CudaCompiled(**{f.name: made[str(f.type)](row[f.name]) for f in fields(CudaCompiled)}) for row in rows]
    return found, rows[0]["nvcc"]


def judge_cuda(compiled: Sequence[CudaCompiled]) -> list[Verdict]:
    """Every promise about what ptxas makes of the CUDA kernels, judged on these variants."""
    promised = [c for c in compiled if c.arch in PROMISED_ARCHITECTURES and c.scales <= 5]
    small = [c for c in promised if c.classes <= 9 and c.scales <= 4]
    where = " and ".join(PROMISED_ARCHITECTURES)

    def verdict(promise: str, among: Sequence[CudaCompiled], broken: Sequence[CudaCompiled], figure: str) -> Verdict:
        said = f"{len(among) - len(broken)} of {len(among)} variants"
        return Verdict(
            promise, not broken if among else None, said + "".join(f"; {figure.format(c=c)}" for c in broken)
        )

    return [
        verdict(
            f"CUDA: no local memory (stack frame or spill) at C <= 16, L <= 5 on {where}",
            *(promised, [c for c in promised if c.in_memory]),
            "{c.name}: {c.stack} bytes of stack, {c.spill_stores} and {c.spill_loads} of spill stores and loads",
        ),
        verdict(
            f"CUDA: at least 25 % of a multiprocessor's warps at C <= 9, L <= 4 on {where}",
            *(small, [c for c in small if c.occupancy < 0.25]),
            "{c.name}: {c.occupancy:.1%} with {c.registers} registers and {c.shared} shared bytes",
        ),
        verdict(
            f"CUDA: at least 12.5 % of them at C <= 16, L <= 5 on {where}",
            *(promised, [c for c in promised if c.occupancy < 0.125]),
            "{c.name}: {c.occupancy:.1%} with {c.registers} registers and {c.shared} shared bytes",
        ),
        verdict(
            f"CUDA: a block takes less than {MOST_SHARED // 1024} KiB of shared memory at C <= 16, L <= 5 on {where}",
            *(promised, [c for c in promised if c.shared >= MOST_SHARED]),
            "{c.name}: {c.shared} bytes",
        ),
    ]


def cuda_table(compiled: Sequence[CudaCompiled]) -> str:
    """Registers of a thread, blocks on a multiprocessor and occupancy, a row for each kernel and architecture."""
    lines, shown = [], [n for n in (1, 2, 4, 8, 9, 12, 14, 16) if any(c.classes == n for c in compiled)]
    for key in dict.fromkeys((c.kernel, c.arch, c.scales) for c in compiled):
        at = {c.classes: c for c in compiled if (c.kernel, c.arch, c.scales) == key}
        lines.append([key[0], key[1], f"L={key[2]}", *(_cell(at[n]) if n in at else "" for n in shown)])
    return markdown(["", "", "", *(f"C={n}" for n in shown)], lines, left=3)


def _cell(c: CudaCompiled) -> str:
    text = f"{c.registers} ({c.blocks}, {c.occupancy:.0%})"
    return text + (f" **{c.stack} B, {c.spill_stores + c.spill_loads} sp**" if c.in_memory else "")
