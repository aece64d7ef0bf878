"""The report on compiled kernels: parsers, promises, and the arithmetic of its model."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("lomix_fast._C", reason="the model counts the loss around the kernels with the C++ backend")

from benchmarks import report
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import amdgcn, cards, model, sass
from benchmarks.gpu.compiled import Compiled
from benchmarks.gpu.counts import Executed, count, load_counts, save_counts
from benchmarks.gpu.hooks import Counts
from benchmarks.gpu.occupancy import programs_per_core
from benchmarks.gpu.official import Step, Traffic, official_memory, official_step
from benchmarks.gpu.page import write_page
from benchmarks.gpu.table import judge, read_csv, write_csv

_ROOT = Path(__file__).resolve().parents[1]

_SASS = """
        .size           gather_kernel,(.L_x_116 - gather_kernel)
.text.gather_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   S2UR UR9, SR_CTAID.X ;
        /*0020*/              @!P0 FMUL R37, R37, 0.5 ;
        /*0030*/                   FFMA R3, R4, R5, R3 ;
        /*0040*/                   MUFU.EX2 R41, R37 ;
        /*0050*/               @P2 BRA `(.L_x_25) ;
        /*0060*/                   LDG.E.64 R34, desc[UR10][R34.64+0x800] ;
.L_x_25:
        /*0070*/             @!UP2 STG.E desc[UR10][R34.64], R41 ;
        /*0080*/                   FSETP.GEU.AND P3, PT, R37, -126, PT ;
        /*0090*/                   HMMA.1688.F32.TF32 R4, R8, R12, R4 ;
        /*00a0*/                   SHFL.BFLY PT, R2, R3, 0x10, 0x1f ;
        /*00b0*/                   LDSM.16.M88.4 R4, [R2] ;
        /*00c0*/                   IMAD.WIDE R2, R7, 0x4, R2 ;
        /*00d0*/                   STL.64 [R1+0x8], R2 ;
        /*00e0*/                   LDL.LU R2, [R1] ;
        /*00f0*/                   I2F.RP R0, R5 ;
        /*12340*/                  UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8] ;
        /*12350*/                  NOP ;
"""
_USAGE = """
Resource usage:
 Common:
  GLOBAL:11 CONSTANT[4]:8
 Function statistics_kernel:
  REG:155 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:720 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
_AMD = """
statistics_kernel:
\ts_load_dwordx4 s[0:3], s[0:1], 0x0
\ts_waitcnt lgkmcnt(0)
\ts_nop 1
\tv_fmac_f32_e32 v1, v2, v3
\tv_dual_mul_f32 v1, v2, v3 :: v_dual_add_f32 v4, v5, v6
\tv_add_f32_dpp v1, v2, v3 row_shr:1
\tv_exp_f32_e32 v1, v2
\tv_cmp_gt_f32_e64 s[0:1], v1, v2
\tv_add_u32_e32 v1, v2, v3
\tv_writelane_b32 v63, s4, 0
\tv_mfma_f32_16x16x4_f32 a[0:3], v1, v2, a[0:3]
\tglobal_load_dword v1, v[2:3], off
\tbuffer_store_dwordx2 v[1:2], v3, s[0:3], 0 offen
\tds_write_b32 v1, v2
\tds_bpermute_b32 v1, v2, v3
\tscratch_load_dword v1, off, s32 ; 4-byte Folded Reload
\tv_cvt_f32_u32_e32 v1, v2
\ts_cbranch_scc1 .LBB0_2
\t.amdgpu_metadata
  - .agpr_count:     4
    .group_segment_fixed_size: 1024
    .name:           s_notaninstruction
    .private_segment_fixed_size: 12
    .sgpr_count:     106
    .sgpr_spill_count: 77
    .vgpr_count:     62
    .vgpr_spill_count: 3
"""


def test_sass_by_class() -> None:
    found = sass.instructions(_SASS)
    assert found == {
        **{"constant": 1, "integer": 2, "float": 2, "special": 1, "control": 1, "global_load": 1, "global_store": 1},
        **{"compare": 1, "matrix": 2, "shuffle": 1, "shared": 1, "spill_store": 1, "spill_load": 1, "convert": 1},
    }


def test_usage_of_nvidia() -> None:
    assert sass.usage(_USAGE) == {"REG": 155, "STACK": 16, "SHARED": 1024, "LOCAL": 8}
    with pytest.raises(ValueError, match="got no LOCAL, REG, STACK in 'nothing'"):
        sass.usage("nothing")


def test_amd_by_class() -> None:
    found = amdgcn.instructions(_AMD)
    assert found == {
        **{"scalar": 1, "control": 2, "float": 3, "shuffle": 2, "special": 1, "compare": 1, "integer": 1, "lane": 1},
        **{"matrix": 1, "global_load": 1, "global_store": 1, "shared": 1, "spill_load": 1, "convert": 1},
    }


def test_usage_of_amd() -> None:
    used = amdgcn.usage(_AMD)
    assert used["vgpr_count"] == 62 and used["agpr_count"] == 4 and used["sgpr_spill_count"] == 77
    assert used["vgpr_spill_count"] == 3 and used["private_segment_fixed_size"] == 12
    with pytest.raises(ValueError, match=r"none with \.vgpr_count"):
        amdgcn.usage("")


@pytest.mark.parametrize(
    "arch,registers,warps,shared,expected",
    [
        ("sm_90", 155, 4, 0, 3),  # 160 a thread: 3 warps of 512 / 160 in each of four parts, 12 of 4
        ("sm_90", 255, 4, 0, 2),
        ("sm_90", 32, 4, 0, 16),  # 64 warps
        ("sm_120", 32, 4, 0, 12),  # 48 warps
        ("sm_90", 170, 4, 0, 2),  # 176 a thread
        ("sm_80", 32, 4, 54 * 1024, 2),  # 164 KiB, 55 each with what every program takes
        ("gfx942", 108, 4, 0, 4),  # 4 warps of 512 / 112 in each of four parts
        ("gfx1100", 111, 4, 0, 6),  # 12 warps of 1536 / 120 in each of two parts
    ],
)
def test_programs_of_a_core(arch: str, registers: int, warps: int, shared: int, expected: int) -> None:
    assert programs_per_core(arch, registers, warps, shared) == expected


def test_unknown_architecture() -> None:
    with pytest.raises(ValueError, match="arch: got 'sm_1', expected one of sm_80"):
        programs_per_core("sm_1", 1, 1, 0)


@pytest.mark.slow
def test_a_kernel_is_compiled_and_read() -> None:
    code = (
        "import dataclasses, json; from benchmarks.gpu.compiled import compile_one;"
        "print(json.dumps(dataclasses.asdict(compile_one('gather', 'sm_90', 9, 2))))"
    )
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    one = json.loads(done.stdout)
    assert one["error"] == "" and 16 < one["registers"] <= 255 and one["warps"] == 4 and one["programs"] >= 2
    assert one["spills"] == 0 and one["stack_bytes"] == 0
    assert one["static"]["global_load"] > 10 and one["static"]["integer"] > 100
    assert one["cpu_seconds"] > 0.1


class _Parameter:
    def __init__(self, constant: bool, free: bool) -> None:
        self.name, self.is_constexpr, self.do_not_specialize = "L", constant, free


class _Source:
    """What is looked at of a compiled source; L is the second argument."""

    def __init__(self, constants: dict[tuple[int, ...], object], parameter: _Parameter) -> None:
        self.constants, self.fn, self.arg_names = constants, self, ["C", "L"]
        self.params, self.__name__ = [parameter], "kernel"


def test_one_binary_serves_any_number_of_scales() -> None:
    from benchmarks.gpu.compiled import require_any_scales

    require_any_scales(_Source({(0,): 9}, _Parameter(False, True)))
    with pytest.raises(AssertionError, match="L is a constant"):
        require_any_scales(_Source({(1,): 4}, _Parameter(False, True)))
    with pytest.raises(AssertionError, match="L is specialised on"):
        require_any_scales(_Source({}, _Parameter(False, False)))


_GOOD = Compiled("forward", "sm_90", 9, 2, 4, 155, 0, 0, 0, 0, 16, 3, 0.1875, 3.0, 2.5, {"float": 100, "integer": 300})


@pytest.mark.parametrize(
    "change,status",
    [
        ({}, 0),
        ({"spills": 1}, 1),
        ({"stack_bytes": 8}, 1),
        ({"spills": 9, "classes": 17}, 0),
        ({"spills": 9, "arch": "sm_100"}, 0),
        ({"cpu_seconds": 20.0}, 1),
        ({"seconds": 60.0}, 0),  # a busy machine
        ({"error": "CompilationError"}, 1),
    ],
)
def test_a_broken_promise_is_an_exit_status(change: dict[str, object], status: int, tmp_path: Path) -> None:
    csv, page = tmp_path / "gpu-compiled.csv", tmp_path / "gpu.md"
    write_csv(csv, [_GOOD, dataclasses.replace(_GOOD, kernel="backward", **change)], "3.9.0")
    arguments = ["--saved", "--no-model", "--csv", str(csv), "--page", str(page)]
    assert gpu.main(arguments) == 0
    assert gpu.main([*arguments, "--check"]) == status
    assert ("**broken**" in page.read_text()) == bool(status)


def test_nothing_compiled_judges_nothing() -> None:
    assert [v.kept for v in judge([])] == [None, None, None]


def test_the_file_comes_back(tmp_path: Path) -> None:
    write_csv(tmp_path / "one.csv", [_GOOD], "3.9.0")
    (one,), triton = read_csv(tmp_path / "one.csv")
    assert triton == "3.9.0" and one.static is not None and one.static["integer"] == 300 and one.instructions == 400
    assert dataclasses.replace(one, static=None, occupancy=0) == dataclasses.replace(_GOOD, static=None, occupancy=0)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="got other columns"):
        read_csv(tmp_path / "other.csv")


def test_other_reports_leave_the_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_csv(tmp_path / "gpu-compiled.csv", [_GOOD], "3.9.0")
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    with pytest.raises(SystemExit):
        report.main(["--page", str(tmp_path / "page.md")])
    assert "no results files in" in capsys.readouterr().err


def test_wrong_usage(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for arguments, message in (
        (["--sample"], "TRITON_INTERPRET: got 1, expected 0"),
        (["--saved", "--sample"], "--sample: got it with --saved"),
        (["--saved", "--cuda"], "--cuda: got it with --saved, expected one of them"),
        (["--workers", "0"], "--workers: got 0"),
    ):
        with pytest.raises(SystemExit) as stop:
            gpu.main(arguments)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert len(gpu.SAMPLE) <= 8


_EXECUTED = Executed(
    pixels=256,
    threads=128,
    elements={"macs": 4096},
    warps={
        **{"float": 100, "fused": 20, "choice": 10, "exp": 4, "log": 1, "divide": 2, "convert": 3},
        **{"load_scratch": 40, "store_images": 5, "shuffle": 6, "integer": 999, "address": 999, "macs": 128},
    },
    wavefronts={"load_scratch": 60, "store_images": 7},
    bytes={"load_scratch": 1000, "store_scratch": 500, "operands": 1280},
    touched=4096,
    scratch=8192,
    sums=64,
    launches=9,
)


def test_instructions_of_a_tile() -> None:
    tile = model.tile_cost(_EXECUTED, {"float": 90, "compare": 10, "integer": 150, "control": 50, "special": 7}, True)
    floats = 100 - 20 + 10 + 3 + 4 * 4 + 20 * 1 + 7 * 2
    assert tile.floats == floats
    assert tile.special == 6
    assert tile.issued == floats + 6 + 45 + 6 + 3 * 4096 / 1024
    assert tile.other == 2 * floats
    assert tile.wavefronts == 67 + 2 * 10
    assert tile.macs == 3 * 4096
    plain = model.tile_cost(_EXECUTED, {"float": 100, "integer": 0}, False)
    assert plain.floats == floats + 4096 / 32 and plain.macs == 0 and plain.other == 0


def test_bounds_by_hand() -> None:
    card = cards.Card("made up", "sm_90", 10, 1e9, 64, 16, 4000, 10000, 1e12, 1e11, 10**9, 1e13)
    tile = model.Tile(400, 200, 240, 12, 300, 1000, scratch_loads=1000, scratch_stores=500, touched=2000)
    spread = model.Spread(tiles=100, busiest=12, resident=4, programs=1000, compulsory=6e5)
    found = model.bounds(tile, spread, card)
    clock = 0.6e9
    assert found["issue"] == pytest.approx(12 * 600 / 4 / clock)
    assert found["arithmetic"] == pytest.approx(12 * 400 / 4 / clock)
    assert found["float32"] == pytest.approx(12 * 240 * 32 / 64 / clock)
    assert found["special"] == pytest.approx(12 * 12 * 2 / clock)
    assert found["loads and stores"] == pytest.approx(12 * 300 / clock)
    assert found["matrix"] == pytest.approx(2 * 1000 * 10 * 12 / 0.6e13)
    traffic = 100 * (500 + 0.5 * 1000)  # L1 holds 2 of 4 programs
    assert found["L2"] == pytest.approx(traffic / 0.6e12)
    missed = 1 - 10000 / (40 * 2000)  # 40 programs on the card
    assert found["memory"] == pytest.approx((6e5 + missed * traffic) / 0.6e11)
    assert model.worst(found)[0] == "memory"
    assert model.worst({"arithmetic": 9.0, "issue": 1.0, "L2": 2.0}) == ("L2", 2.0)


def test_a_step_is_its_kernels_and_its_launches() -> None:
    one = model.Estimate(
        model.WORKLOADS[0],
        cards.CARDS[0],
        {"issue": 3e-3, "L2": 2e-3, "arithmetic": 1e-3},
        {"issue": 5e-3, "L2": 1e-3, "arithmetic": 4e-3},
        100,
        (0.02, 0.03, 0.004),
        0,
    )
    assert one.seconds == pytest.approx(8e-3 + 100 * 5e-6)
    assert one.seconds_arithmetic == pytest.approx(6e-3 + 100 * 5e-6)
    assert one.official_low == pytest.approx(0.034)


def test_tiles_lie_as_the_package_lays_them() -> None:
    workload = model.Workload("2D, C=9, L=4", (224, 224), 6)
    problem = model.PROBLEMS[workload.problem]
    spread = model.spread_of("forward", workload, problem, _EXECUTED, 3, cards.CARDS[0])
    tile = model.config.forward_config(model.config.Target("cuda", 90, 132, 32), (1, 224, 224), 9).tile
    assert spread.tiles == 6 * -(-224 // tile[1]) * -(-224 // tile[2])
    assert spread.busiest * 132 >= spread.tiles and 1 <= spread.resident <= 3
    native = 6 * 9 * 4 * (7**2 + 14**2 + 28**2 + 56**2)
    assert spread.compulsory >= native + 6 * 224 * 224 * 8


@pytest.mark.slow
def test_counts_of_a_small_problem(tmp_path: Path) -> None:
    # Two scales: subsets {0}, {1}, {0, 1}; maps: 2 originals, then add, mul, cat, awf of both.
    classes = 2
    found = count(classes, 2, (2, 1), image=(16, 16))
    forward, backward = found["forward"], found["backward"]
    # Forward: groups of 4 maps of one operator, filled up: originals and add, mul, cat, awf; 2 members' attention each.
    assert forward.per_pixel("exp") == 4 * 4 * classes + 4 * 2
    assert forward.per_pixel("log") == 4 * 4
    # Backward: 6 maps, and the attention of 2 members.
    assert backward.per_pixel("exp") == 6 * classes + 2
    assert backward.elements["macs"] > 0
    # Every map's gradient is stored once, and every logit once; gradients of logits are cleared and added to.
    assert backward.per_pixel("store_scratch") > 6 * classes + 2 * 2 * classes
    assert forward.warps["exp"] == forward.elements["exp"] / 32
    assert "store_images" not in forward.bytes
    # The gradient of the scale at full size, where the tile of 8 x 32 has pixels; more for the other scale's.
    assert 4 * classes * 8 * 16 < backward.bytes["store_images"] < 2 * 4 * classes * 8 * 16
    assert forward.scratch > forward.touched > 0 and forward.launches > 1 and backward.launches > 3
    save_counts(tmp_path / "counts.json", {"small": found})
    assert load_counts(tmp_path / "counts.json") == {"small": found}


def test_accesses_by_hand() -> None:
    counts = Counts(128)
    counts.place("scratch", 1000, 4096)
    on = np.ones(256, bool)
    counts.access("load", np.uint64(1000) + 4 * np.arange(256, dtype=np.uint64), on, 4)
    assert counts.wavefronts["load_scratch"] == 8 and counts.touched == 1024  # lines count from the tensor's start
    assert counts.warps["load_scratch"] == 4  # of 2 floats a thread
    counts.access("load", np.uint64(1000) + 128 * np.arange(32, dtype=np.uint64), on[:32], 4)
    assert counts.warps["load_scratch"] == 4 + 4  # all four warps hold 32 elements
    columns = np.uint64(1000) + 8 * np.arange(128, dtype=np.uint64)
    counts.access("store", columns, columns < 1000 + 8 * 40, 4)
    assert counts.wavefronts["store_scratch"] == 2 + 1 and counts.bytes["store_scratch"] == 160
    counts.access("load", np.array([1000], np.uint64), on[:1], 4)
    assert counts.wavefronts["load_scalars"] == 4 and counts.elements["load_scalars"] == 1
    counts.access("load", np.array([9999999] * 4, np.uint64), on[:4], 4)
    assert counts.elements["load_tables"] == 4


def test_the_page_calls_its_model_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("official_step", "rest_of_ours"):
        monkeypatch.setattr(f"benchmarks.gpu.official.{name}", lambda *_: Step(10**6, 100, 4, 100))
    compiled = [
        dataclasses.replace(_GOOD, kernel=kernel, arch=card.arch, classes=p.classes, dims=p.dims)
        for kernel in ("forward", "backward")
        for card in cards.CARDS
        for p in model.PROBLEMS.values()
    ]
    executed = {name: {"forward": _EXECUTED, "backward": _EXECUTED} for name in model.PROBLEMS}
    write_page(tmp_path / "gpu.md", compiled, judge(compiled), "3.9.0", executed)
    head, found = (tmp_path / "gpu.md").read_text().split("## Model\n")
    assert "L = 1 to 6" in head and "No kernel was run on a GPU" in head
    assert found.count("modelled ms") == 2 and "measured" not in found and "60 %" in found
    assert found.count("**does not fit**") == 4  # 128^3 on all cards, 96^3 with 14 classes on the smallest
    with pytest.raises(ValueError, match="got no \\('forward', 'sm_90', 9, 2\\)"):
        write_page(tmp_path / "gpu.md", compiled[5:], [], "3.9.0", executed)


def test_traffic_counts_what_moves() -> None:
    a, b = torch.ones(4, 5), torch.ones(4, 5)
    with Traffic() as traffic:
        product = a * b
        assert (traffic.bytes, traffic.launches) == (3 * 80, 1)
        product.view(20)[2:].reshape(-1)
        assert (traffic.bytes, traffic.launches) == (3 * 80, 1)
        product.add_(a[:1].expand(4, 5))  # 20 bytes exist of it
        assert traffic.launches == 2 and traffic.bytes == 3 * 80 + 80 + 20 + 80
        assert product.sum().item() == 40
        assert traffic.launches == 3 and traffic.syncs == 1


def test_the_literal_loss() -> None:
    step = official_step(2, 2, (2, 1))
    assert step.syncs == 6 * 2  # a class and map
    assert step.launches > 200 and step.bytes > 100 * step.pixels * 2 * 4
    # 96^3, C=14, batch 4, L=5: 112 GiB
    assert official_memory(14, 5, 4 * 96**3) / 2**30 == pytest.approx(112.5, abs=0.05)
    # L=4, C=9: 209 maps saved, 44 mixed
    assert official_memory(9, 4, 1) == pytest.approx((209 + 44) * 9 * 4, rel=1e-3)
