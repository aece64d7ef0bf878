"""What nvcc makes of the CUDA kernels for few classes: promises, and the table of figures that is kept."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="its wheel brings nvdisasm, which lists the machine code")

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import cuda_compiled, cuda_shapes
from benchmarks.gpu.compiled import Compiled
from benchmarks.gpu.cuda_build import Usage, kernel_name, nvcc, usages
from benchmarks.gpu.cuda_compiled import (
    ARCHITECTURES,
    CLASSES,
    SCALES,
    CudaCompiled,
    compile_cuda,
    judge_cuda,
    read_cuda_csv,
    write_cuda_csv,
)
from benchmarks.gpu.table import write_csv

_ROOT = Path(__file__).resolve().parents[1]
_TABLE = _ROOT / "benchmarks" / "results" / "cuda-compiled.csv"
_SAMPLE = [(arch, classes) for classes in (4, 9, 14, 16) for arch in ("sm_80", "sm_90")]
# Another nvcc may need a few registers more; beyond that something in the kernels has grown.
_FEW_REGISTERS = 8
_GOOD = CudaCompiled("backward", "sm_80", 9, 4, 128, 0, 0, 0, 128, 33344, 4, 0.25, 6000)
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to ask the headers with")
needs_nvcc = pytest.mark.skipif(not nvcc()[0], reason="there is no nvcc to compile the kernels with")


@pytest.fixture(scope="module")
def sample() -> tuple[list[CudaCompiled], str]:
    return compile_cuda(_SAMPLE, 2)


@pytest.mark.slow
@needs_nvcc
def test_a_sample_keeps_the_promises(sample: tuple[list[CudaCompiled], str]) -> None:
    compiled, _ = sample
    assert len(compiled) == len(_SAMPLE) * 2 * len(SCALES)
    assert [f"{v.promise}: {v.figure}" for v in judge_cuda(compiled) if v.kept is not True] == []


@pytest.mark.slow
@needs_nvcc
def test_a_sample_is_what_the_table_says(sample: tuple[list[CudaCompiled], str]) -> None:
    compiled, version = sample
    kept, kept_version = read_cuda_csv(_TABLE)
    known = {c.name: c for c in kept}
    if version == kept_version:
        changed = [f"{c.name}: got {c}, the table has {known[c.name]}" for c in compiled if c != known[c.name]]
    else:
        most = {name: c.registers + _FEW_REGISTERS for name, c in known.items()}
        changed = [f"{c.name}: {c.registers} registers" for c in compiled if c.registers > most[c.name]]
    assert changed == [], "the kernels changed: run make gpu-report ARGS=--cuda and look at what became of them"


def test_the_table_keeps_the_promises() -> None:
    kept, _ = read_cuda_csv(_TABLE)
    names = {c.name for c in kept}
    assert len(names) == len(kept) == 2 * len(ARCHITECTURES) * len(CLASSES) * len(SCALES)
    assert [f"{v.promise}: {v.figure}" for v in judge_cuda(kept) if v.kept is not True] == []


@pytest.mark.parametrize(
    "change,broken",
    [
        ({}, []),
        ({"stack": 8}, [0]),
        ({"spill_stores": 4}, [0]),
        ({"spill_loads": 4}, [0]),
        ({"spill_loads": 4, "scales": 6}, []),
        ({"spill_loads": 4, "arch": "sm_89"}, []),
        ({"occupancy": 0.2344}, [1]),
        ({"occupancy": 0.1875, "classes": 10}, []),
        ({"occupancy": 0.1875, "scales": 5}, []),
        ({"occupancy": 0.0625, "classes": 16}, [2]),
        ({"shared": 100 * 1024}, [3]),
        ({"shared": 100 * 1024 - 1}, []),
    ],
)
def test_a_broken_promise_is_seen(change: dict[str, object], broken: list[int]) -> None:
    found = judge_cuda([_GOOD, replace(_GOOD, **change)])  # type: ignore[arg-type]
    assert [n for n, verdict in enumerate(found) if verdict.kept is False] == broken
    assert all(verdict.kept is None for verdict in judge_cuda([]))


def test_the_table_comes_back(tmp_path: Path) -> None:
    write_cuda_csv(tmp_path / "one.csv", [_GOOD], "13.0.88")
    assert read_cuda_csv(tmp_path / "one.csv") == ([_GOOD], "13.0.88")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="got a, b, expected the columns kernel, arch"):
        read_cuda_csv(tmp_path / "other.csv")


_SAID = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN5lomix4cuda13gradients_fewIfLi5ELi9EEEvNS0_4CallIT_EE' for 'sm_80'
ptxas info    : Function properties for _ZN5lomix4cuda13gradients_fewIfLi5ELi9EEEvNS0_4CallIT_EE
    16 bytes stack frame, 20 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 2896 bytes cmem[0], 12 bytes cmem[2]
ptxas info    : Compiling entry function '_ZN5lomix4cuda14statistics_fewIfLi9EEEvNS0_4CallIT_EE' for 'sm_80'
ptxas info    : Function properties for _ZN5lomix4cuda14statistics_fewIfLi9EEEvNS0_4CallIT_EE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 102 registers, used 1 barriers, 2896 bytes cmem[0], 48 bytes cmem[2]
"""


def test_what_ptxas_says() -> None:
    assert usages(_SAID) == {"backward 5": Usage(168, 16, 20, 32), "forward": Usage(102, 0, 0, 0)}
    assert kernel_name("_ZN5lomix4cuda14statistics_fewIfLi9EEEvNS0_4CallIT_EE") == "forward"
    assert kernel_name("_ZN5lomix4cuda11pack_kernelIfEEv") == ""
    with pytest.raises(ValueError, match="got 'nothing', expected what ptxas -v says"):
        usages("nothing")


def test_shapes_are_those_of_the_header() -> None:
    text = (_ROOT / "csrc" / "cuda" / "shapes.h").read_text()
    for which, constant in (("forward", "kForwardThreads"), ("backward", "kBackwardThreads")):
        declared = re.search(rf"{constant} = (\d+);", text)
        assert declared and cuda_shapes.shapes()[which, 9, 4].threads == int(declared[1])
    with pytest.raises(RuntimeError, match=r"csrc/cuda: got this from g\+\+"):
        cuda_shapes._ask("int main() { return nothing; }")


def test_tiles_by_hand() -> None:
    # Halved until two blocks fit the 227 KiB that 228 less 1 a block leave; along x 8 pixels first, then evenly.
    shape = cuda_shapes.shapes()["forward", 9, 4]
    tiles = cuda_shapes.tiles_of("forward", "sm_90", 132, 9, 4, (1, 224, 224), 6)
    assert math_product(tiles.sizes) == tiles.strips * shape.strip
    assert tiles.sizes[0] == 1 and tiles.sizes[1] in (tiles.sizes[2], tiles.sizes[2] // 2)
    assert tiles.shared <= 228 * 1024 // shape.blocks - 1024
    larger = shape.shared_fixed + 2 * tiles.strips * shape.shared_per_strip
    assert larger > 228 * 1024 // shape.blocks - 1024 or tiles.strips == shape.most_strips
    assert tiles.counts == (1, -(-224 // tiles.sizes[1]), -(-224 // tiles.sizes[2]))
    assert 6 * tiles.per_sample <= tiles.items * tiles.chunk_tiles and tiles.blocks <= shape.blocks * 132
    # An image of fewer pixels than a strip: as small as a tile can be.
    small = cuda_shapes.tiles_of("forward", "sm_90", 132, 9, 4, (1, 3, 3), 1)
    assert small.strips == shape.least_strips and small.items == small.chunks == small.per_sample


def math_product(sizes: tuple[int, ...]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def test_maps_are_counted_as_the_plan_has_them() -> None:
    from lomix_fast import MixPlan

    for scales in range(1, 7):
        plan = MixPlan.create(scales)
        assert cuda_shapes.maps_of(scales) == plan.num_maps and cuda_shapes.pairs_of(scales) == plan.num_pairs


def test_without_nvcc_the_report_says_so(tmp_path: Path) -> None:
    hidden = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH")} | {"PATH": str(tmp_path)}
    code = "from benchmarks.gpu import cuda_build as b; b._build().DEFAULT_HOME = '/nowhere'; b.compile_few('sm_80', 1)"
    done = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, env=hidden, capture_output=True, text=True)
    assert "nvcc: got none, expected one on PATH or in CUDA_HOME" in done.stderr


def test_a_table_of_registers_marks_spills() -> None:
    table = cuda_compiled.cuda_table([_GOOD, replace(_GOOD, classes=16, registers=255, stack=8, spill_loads=12)])
    assert "| 128 (4, 25%) | 255 (4, 25%) **8 B, 12 sp** |" in table


@pytest.mark.parametrize("stack,status", [(0, 0), (8, 1)])
def test_a_broken_promise_is_an_exit_status(stack: int, status: int, tmp_path: Path) -> None:
    csv, page = tmp_path / "gpu-compiled.csv", tmp_path / "gpu.md"
    write_csv(csv, [Compiled("forward", "sm_90", 9, 2, 4, 155, static={"float": 1})], "3.9.0")
    write_cuda_csv(tmp_path / "cuda-compiled.csv", [replace(_GOOD, stack=stack)], "13.0.88")
    assert gpu.main(["--saved", "--no-model", "--check", "--csv", str(csv), "--page", str(page)]) == status
