"""The CUDA half of the GPU report: machine code executed on the CPU is right, and so are the counts and the model."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="its wheel brings nvdisasm, which lists the machine code")

from benchmarks.gpu import cards, cuda_call, cuda_model, cuda_page, cuda_shapes
from benchmarks.gpu.counts import load_counts
from benchmarks.gpu.cuda_build import compile_few, nvcc
from benchmarks.gpu.cuda_compiled import CudaCompiled
from benchmarks.gpu.cuda_counts import Counted, TileCount, count_tile, load_counted, part_of, save_counted
from benchmarks.gpu.cuda_listing import elf_sections, function_at
from benchmarks.gpu.cuda_run import Machine, make_machine
from benchmarks.gpu.model import Estimate
from benchmarks.gpu.table import read_csv
from benchmarks.gpu.workloads import PROBLEMS, WORKLOADS, Problem
from lomix_fast.plan import MixPlan
from lomix_fast.reference import map_stats_reference
from lomix_fast.target import Target

_ROOT = Path(__file__).resolve().parents[1]
_COUNTED = _ROOT / "benchmarks" / "results" / "cuda-counted.json"
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to ask the headers with")
needs_nvcc = pytest.mark.skipif(not nvcc()[0], reason="there is no nvcc to compile the kernels with")


def launched(which: str, arch: str, classes: int, full: tuple[int, int, int]) -> tuple[Machine, cuda_call.Inputs]:
    """A launch over a whole image of three scales, the finest at full size; every block has run."""
    inputs = cuda_call.make_inputs(classes, full, (4, 2, 1))
    tiles = cuda_call.fit_tiles(cuda_shapes.tiles_of(which, arch, 100, classes, 3, full, 1), full, 1)
    machine = make_machine(compile_few(arch, classes), cuda_call.make_launch(which, inputs, tiles))
    pixels, issued = tiles.items * np.prod(tiles.sizes), Counter[str]()
    for item in range(tiles.items):
        block = machine.run(item)
        for one, times in zip(machine.kernel.code, block.issued, strict=True):
            known = [name for name in one.functions if "differentiate" not in one.functions or name != "unmix_cat"]
            for function in {*known, "everything"}:
                issued[f"{function} {'.'.join(one.op.split('.')[:2])}"] += int(times)
    per_pixel = {name: 32 * times / pixels for name, times in issued.items()}
    pairs, maps = cuda_shapes.pairs_of(3), cuda_shapes.maps_of(3)
    # Arithmetic that has to come out, whatever the compiler does around it.
    assert per_pixel["mix_cat FFMA.FTZ"] == pairs * classes**2
    assert per_pixel["everything MUFU.EX2"] == maps * classes + (2 if which == "forward" else 3) * pairs
    if which == "backward":
        assert per_pixel["unmix_cat FFMA.FTZ"] == 2 * pairs * classes**2  # with mix_cat in it, and W^T
    return machine, inputs


def plain(inputs: cuda_call.Inputs) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Statistics and label counts of the plain implementation in float64, and what they depend on."""
    flat = inputs.full[0] == 1
    logits = [torch.from_numpy(z)[None].double() for z in inputs.logits]
    logits = [(z[:, :, 0] if flat else z).requires_grad_() for z in logits]
    labels = torch.from_numpy(inputs.labels)[None]
    target = Target(labels[:, 0] if flat else labels)
    parameters = [torch.from_numpy(p).double().requires_grad_() for p in inputs.parameters]
    stats, counts = map_stats_reference(logits, target, MixPlan.create(3), *parameters)
    return stats[0], counts[0], logits, parameters


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("arch,classes,full", [("sm_80", 4, (1, 16, 24)), ("sm_90", 9, (8, 8, 8))])
def test_machine_code_computes_the_statistics(arch: str, classes: int, full: tuple[int, int, int]) -> None:
    machine, inputs = launched("forward", arch, classes, full)
    stats, counts, _, _ = plain(inputs)
    np.testing.assert_allclose(machine.result("partial").sum(0), stats.detach(), rtol=2e-5, atol=1e-4)
    np.testing.assert_array_equal(machine.result("counts").sum(0)[1:], counts[1:])


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("arch,classes,full", [("sm_90", 4, (1, 16, 24)), ("sm_80", 9, (8, 8, 8))])
def test_machine_code_computes_the_gradients(arch: str, classes: int, full: tuple[int, int, int]) -> None:
    machine, inputs = launched("backward", arch, classes, full)
    stats, _, logits, parameters = plain(inputs)
    stats.backward(torch.from_numpy(machine.launch.arrays["grad_stats"]).double())
    for i, z in enumerate(logits):
        made = machine.result(f"scales.{i}.grad") if machine.launch.call.scales[i].same else gathered(machine, i)
        np.testing.assert_allclose(made, z.grad[0].numpy().reshape(made.shape), rtol=1e-4, atol=1e-4)
    products = machine.result("products").astype(np.float64).sum(0)
    weight, _, score, score_bias = (p.grad.numpy() for p in parameters)
    np.testing.assert_allclose(products[:, :-1, :-1], weight, rtol=1e-4, atol=2e-3)
    np.testing.assert_allclose(products[:, -1, :-1], score, rtol=1e-4, atol=2e-3)
    np.testing.assert_allclose(products[:, -1, -1], score_bias, rtol=1e-4, atol=2e-3)


def gathered(machine: Machine, i: int) -> np.ndarray:
    """What gather_gradients of common.cu makes of the tiles: the sum of what touches a native pixel."""
    call, tiles = machine.launch.call, machine.launch.tiles
    scale, classes = call.scales[i], call.num_classes
    size, reach = tuple(scale.size), tuple(scale.reach)
    length = tiles.per_sample * classes * int(np.prod(reach))
    parts = machine.result("native_partial")[scale.partial : scale.partial + length]
    parts = parts.reshape(*tiles.counts, classes, *reach)
    summed = np.zeros((classes, *(n + r for n, r in zip(size, reach, strict=True))))
    for place in np.ndindex(*tiles.counts):
        origin = [p * t for p, t in zip(place, tiles.sizes, strict=True)]
        low = [cuda_call.source_of(o, f, n) for o, f, n in zip(origin, call.full, size, strict=True)]
        summed[(slice(None), *(slice(a, a + r) for a, r in zip(low, reach, strict=True)))] += parts[place]
    return summed[(slice(None), *(slice(0, n) for n in size))]


@pytest.mark.slow
@needs_nvcc
def test_a_tile_is_counted(tmp_path: Path) -> None:
    problem = Problem(2, 2, (2, 1))
    tiles = cuda_shapes.tiles_of("forward", "sm_80", 1, 2, 2, (1, 64, 64), 1)
    one = count_tile(compile_few("sm_80", 2), "small", problem, "forward", tiles)
    assert one.pixels == np.prod(tiles.sizes) == tiles.strips * cuda_shapes.shapes()["forward", 2, 2].strip
    assert one.per_pixel(one.tile.ops["MUFU.EX2"]) == 6 * 2 + 2 * 2  # maps x classes; members, with rescaling
    assert one.tile.issued == sum(one.tile.parts.values()) == sum(one.tile.ops.values())
    assert one.tile.wavefronts == sum(one.tile.part_wavefronts.values())
    assert sum(one.tile.parts[p] for p in ("", "statistics_few")) < 0.2 * one.tile.issued
    assert one.tile.floats < one.tile.issued and one.start.issued > 0
    assert 0 <= one.tile.conflicts < one.tile.wavefronts
    # Labels once, logits once and a border, the sums of the item so far.
    assert one.tile.different >= one.pixels * (8 + 4 * 2 * 1.25) and one.tile.loaded > one.tile.different
    assert one.tile.stored >= 6 * 5 * 4
    save_counted(tmp_path / "one.json", [one], "13.0.88")
    assert load_counted(tmp_path / "one.json") == ([one], "13.0.88")


def test_the_saved_counts_add_up() -> None:
    counted, _ = load_counted(_COUNTED)
    assert {(one.problem, one.which) for one in counted} == {(p, w) for p in PROBLEMS for w in ("forward", "backward")}
    for one in counted:
        problem = PROBLEMS[one.problem]
        maps, pairs = cuda_shapes.maps_of(len(problem.ratios)), cuda_shapes.pairs_of(len(problem.ratios))
        members = (2 if one.which == "forward" else 3) * pairs
        assert one.per_pixel(one.tile.ops["MUFU.EX2"]) == maps * problem.classes + members
        least = 2 * problem.classes**2 * pairs if one.which == "backward" else problem.classes**2 * pairs
        assert one.per_pixel(one.tile.ops["FFMA"]) > least
        assert one.tile.issued == sum(one.tile.parts.values())
        assert one.tile.parts[""] < 0.01 * one.tile.issued


def test_functions_of_the_sources() -> None:
    source = _ROOT / "csrc" / "cuda" / "few_maps.cuh"
    lines = source.read_text().splitlines()
    head = next(n for n, line in enumerate(lines, 1) if " mix_cat(" in line)
    inside = next(n for n in range(head, len(lines)) if "fused(" in lines[n - 1])
    assert function_at(str(source), inside) == "mix_cat"
    assert function_at(str(source), 1) == "" and function_at("/nowhere/cuda_fp16.hpp", 5) == ""
    assert part_of(("fused", "for_members", "mix_cat", "make_map", "sweep_map")) == "mix_cat"
    assert part_of(("elsewhere",)) == ""


def test_no_elf_file() -> None:
    with pytest.raises(ValueError, match="expected an ELF file"):
        elf_sections(b"no such thing")


# ---- the model, by hand ----


def _count(which: str, arch: str, problem: str, log_size: tuple[int, int, int]) -> TileCount:
    tile = Counted(
        Counter(float=600, compare=200, special=50, integer=100, control=40, global_load=20, shared=30, shuffle=10),
        Counter({"FFMA": 600}),
        Counter({"mix_cat": 1050}),
        Counter({"mix_cat": 80}),
        *(80, 5, 9000, 3000, 640),
    )
    start = Counted(Counter(integer=400, float=80), wavefronts=40, stored=64)
    return TileCount(problem, which, arch, log_size, 4, 2 ** sum(log_size), tile, start)


def test_a_tile_of_the_model() -> None:
    one = cuda_model.cuda_tile(_count("forward", "sm_80", "2D, C=9, L=4", (0, 3, 4)), chunk_tiles=8, l1=1500)
    assert one.floats == 800 + 80 / 8 and one.special == 50
    assert one.issued == one.floats + 50 + 60 and one.issued + one.other == 1050 + 480 / 8
    assert one.wavefronts == 80 + 5 and one.macs == 0
    assert one.scratch_stores == 3000 + 0.5 * 6000 + 640 + 8  # half of what is read again is in L1
    fits = cuda_model.cuda_tile(_count("forward", "sm_80", "2D, C=9, L=4", (0, 3, 4)), chunk_tiles=8, l1=4000)
    assert fits.scratch_stores == 3000 + 640 + 8


def test_tiles_lie_as_the_launch_lays_them() -> None:
    workload, card = WORKLOADS[0], cards.CARDS[0]
    tiles = cuda_model.tiles_on(workload, "backward", card.arch, card.cores)
    spread = cuda_model.cuda_spread("backward", workload, tiles, 4, card)
    assert spread.tiles == 6 * tiles.per_sample and spread.busiest * card.cores >= spread.tiles
    native = 6 * 9 * 4 * (7**2 + 14**2 + 28**2 + 56**2)
    assert spread.compulsory > 2 * native + 2 * 8 * 6 * 224 * 224
    assert 1 <= spread.resident <= 4
    forward = cuda_model.cuda_spread("forward", workload, tiles, 4, card)
    assert forward.compulsory == native + 8 * 6 * 224 * 224 + 2 * 4 * 48 * 19 * tiles.items


def test_what_the_model_needs_is_there() -> None:
    workload, card = WORKLOADS[0], cards.CARDS[0]
    counted = [
        _count(which, card.arch, workload.problem, cuda_model.tiles_on(workload, which, card.arch, card.cores).log_size)
        for which in ("forward", "backward")
    ]
    built = CudaCompiled("forward", card.arch, 9, 4, 100, 0, 0, 0, 256, 77404, 2, 0.25, 6000)
    compiled = [built, dataclasses.replace(built, kernel="backward")]
    found = cuda_model.cuda_estimate(workload, card, counted, compiled, around=50)
    assert found.launches == 63
    assert found.seconds == pytest.approx(
        sum(max(s for n, s in b.items() if n != "arithmetic") for b in (found.forward, found.backward)) + 63 * 5e-6
    )
    for given in ((counted[:1], compiled), (counted, compiled[:1])):
        with pytest.raises(ValueError, match="expected every tile that the model needs"):
            cuda_model.cuda_estimate(workload, card, *given, around=50)


def test_tables_of_the_page() -> None:
    counted, _ = load_counted(_COUNTED)
    executed = load_counts(_COUNTED.with_name("gpu-executed.json"))
    triton, _ = read_csv(_COUNTED.with_name("gpu-compiled.csv"))
    lines = cuda_page.pixel_table(counted, triton, executed).splitlines()
    assert len(lines) == 2 + len(counted)
    one = counted[0]
    assert f" {one.per_pixel(one.tile.issued):.0f} |" in lines[2] and f"| {one.arch} |" in lines[2]
    by_part = cuda_page.part_table(counted)
    assert "`multiply`" in by_part and "`unmix_cat`" in by_part and "others" in by_part
    workload, card = WORKLOADS[0], cards.CARDS[0]
    theirs = Estimate(workload, card, {"issue": 9e-3}, {"L2": 7e-3, "arithmetic": 1e-3}, 70, (0.0, 0.0, 0.0), 0)
    theirs.forward["arithmetic"] = 1e-3
    ours = cuda_model.CudaEstimate(workload, card, {"float32": 2e-3}, {"issue": 3e-3}, 60)
    (line,) = cuda_page.time_table([ours], [theirs]).splitlines()[2:]
    assert r"| 9.00 \| 2.00 (float32) | 7.00 \| 3.00 (issue) | 70 \| 60 | 16.35 \| **5.30** |" in line
