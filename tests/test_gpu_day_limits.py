"""The step "limits" of a GPU day: floors, what nvcc makes of rates.cu, tools that answer and tools that fail."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.gpu.cards import CARDS
from benchmarks.gpu_day import child, limits, ncu, one_step, sanitizer, tool_stand_ins
from benchmarks.gpu_day.child import Ended, run_child
from benchmarks.gpu_day.day import CRASHED, FAILED, HUNG, OK, SKIPPED, Clock, Day, Row
from benchmarks.gpu_day.floors import Rates, default_ratios, floor, work

_ROOT = Path(__file__).resolve().parents[1]
_SOURCE = _ROOT / "benchmarks" / "gpu_day" / "rates.cu"


# Floors -----------------------------------------------------------------------------------------------------------

# Counted by hand for the redesign: (C, L, axes) -> by operator FP32 and special, forward then backward; the products as
# multiply-adds and as those of the matrix units, forward.
_COUNTED = {
    (9, 4, 2): (
        dict(originals=(144, 36), add=(396, 0), mul=(594, 110), awf=(757, 126), cat=(495, 99), maps=(96, 54)),
        dict(originals=(216, 36), add=(729, 0), mul=(990, 110), awf=(1651, 126), cat=(792, 99), maps=(288, 48)),
        (108, 237),
        (2268, 17664),
    ),
    (14, 5, 3): (
        dict(originals=(280, 70), add=(1456, 0), mul=(2184, 390), awf=(2820, 420), cat=(1820, 364), maps=(218, 122)),
        dict(originals=(420, 70), add=(2618, 0), mul=(3640, 390), awf=(6202, 420), cat=(2912, 364), maps=(654, 109)),
        (224, 492),
        (14700, 57600),
    ),
    (3, 5, 3): (
        dict(originals=(60, 15), add=(312, 0), mul=(468, 104), awf=(781, 134), cat=(390, 78), maps=(218, 122)),
        dict(originals=(90, 15), add=(561, 0), mul=(780, 104), awf=(1853, 134), cat=(624, 78), maps=(654, 109)),
        (48, 105),
        (675, 19968),
    ),
    (9, 5, 3): (
        dict(originals=(180, 45), add=(936, 0), mul=(1404, 260), awf=(1905, 290), cat=(1170, 234), maps=(218, 122)),
        dict(originals=(270, 45), add=(1683, 0), mul=(2340, 260), awf=(4237, 290), cat=(1872, 234), maps=(654, 109)),
        (144, 316),
        (6075, 44544),
    ),
}
_H100 = Rates.of_data_sheet(CARDS[0])


@pytest.mark.parametrize("problem", _COUNTED, ids=str)
def test_operations_are_those_counted_by_hand(problem: tuple[int, int, int]) -> None:
    classes, scales, dims = problem
    *passes, interpolation, (products, matrix) = _COUNTED[problem]
    for i, (found, counted) in enumerate(zip(work(classes, default_ratios(scales, dims), dims), passes, strict=True)):
        for name, (fp32, special) in counted.items():
            assert (found.fp32[name], found.special[name]) == (fp32, special), name
        assert (found.fp32["interpolation"], found.special["interpolation"]) == (interpolation[i], 0)
        assert set(found.fp32) == set(found.special) == {*counted, "interpolation"}
        assert (found.products, found.matrix) == ((3 if i else 1) * products, (3 if i else 1) * matrix)


def test_a_floor_is_the_slowest_resource_of_each_pass() -> None:
    # 26.6 clocks a pixel and core forward, 48.0 backward, over 132 cores at 1.83 GHz.
    found = floor(9, 4, 2, 6 * 224**2, _H100)
    assert found.forward_ms == pytest.approx(301056 * 26.6 / 132 / 1.83e6, rel=2e-3)
    assert found.backward_ms == pytest.approx(301056 * 48.1 / 132 / 1.83e6, rel=2e-3)
    assert found.step_ms == found.forward_ms + found.backward_ms
    assert (found.binding, found.measured) == ("forward special, backward issue", False)
    assert floor(9, 4, 2, 12 * 224**2, _H100).step_ms == pytest.approx(2 * found.step_ms)


def test_a_floor_takes_the_better_of_multiply_adds_and_matrix_units() -> None:
    without = floor(9, 4, 2, 301056, dataclasses.replace(_H100, tensor=0.0))
    assert without.forward_ms == pytest.approx(301056 * (2590 + 2268 + 425) / _H100.issue * 1e3)
    slow = floor(9, 4, 2, 301056, dataclasses.replace(_H100, tensor=1e12))
    assert slow == without
    assert floor(9, 4, 2, 301056, _H100).step_ms < without.step_ms
    bound = floor(9, 4, 2, 301056, dataclasses.replace(_H100, tensor=1.45e14))
    assert bound.forward_ms == pytest.approx(301056 * 17664 / 1.45e14 * 1e3)
    assert bound.binding == "tensor"


def test_a_floor_counts_the_bytes_that_must_move() -> None:
    slow = dataclasses.replace(_H100, memory=1e9)
    logits = 2 * 9 * (1 / 32**2 + 1 / 16**2 + 1 / 8**2 + 1 / 4**2)
    found = floor(9, 4, 2, 10**6, slow, itemsize=2, label_bytes=1)
    assert found.forward_ms == pytest.approx(1e6 * (logits + 1) / 1e9 * 1e3)
    assert found.backward_ms == pytest.approx(1e6 * (2 * logits + 1) / 1e9 * 1e3)
    assert found.binding == "memory"
    volume = floor(1, 1, 3, 1000, dataclasses.replace(_H100, memory=1e6), ratios=(2,))
    assert volume.forward_ms == pytest.approx(4 / 8 + 8)
    with pytest.raises(ValueError, match="ratios: got 3 for 4 scales"):
        floor(9, 4, 2, 1, _H100, ratios=(4, 2, 1))


def test_rates_from_measures_and_from_data_sheets() -> None:
    names = {"ffma": 4.0, "ex2": 3.0, "issue": 5.0, "copy": 2.0, "mma_half": 9.0, "other": 1.0}
    measures = [{"name": name, "value": value} for name, value in names.items()]
    assert Rates.of_measures({"measures": measures}) == Rates(4.0, 3.0, 5.0, 9.0, 2.0)
    assert Rates.of_measures({"measures": measures[:4]}).tensor == 0
    for bad in (None, "fast", 0, math.nan, math.inf):
        with pytest.raises(ValueError, match="for ex2, expected a positive number"):
            Rates.of_measures({"measures": [*measures, {"name": "ex2", "value": bad}]})
    with pytest.raises(ValueError, match="for copy"):
        Rates.of_measures({"measures": measures[:3]})
    a100 = Rates.of_data_sheet(CARDS[1])
    assert a100.fp32 == pytest.approx(108 * 1.41e9 * 64) and a100.issue == pytest.approx(2 * a100.fp32)
    assert a100.tensor == pytest.approx(108 * 1.41e9 * 1024, rel=0.01) and not a100.measured


# rates.cu ---------------------------------------------------------------------------------------------------------

# Kernel -> what its loop must execute, and instructions of the loop besides, at most.
_LOOPS = {
    "multiply_adds": ({"FFMA": 256}, 8),
    "exponentials": ({"MUFU.EX2": 64}, 8),
    "issued": ({"FFMA": 128, "LOP3.LUT": 128}, 8),
    "shared_word_lane": ({"LDS": 32}, 40),
    "shared_word_uniform": ({"LDS": 32}, 40),
    "shared_four_lane": ({"LDS.128": 32, "FFMA": 64}, 8),
    "shared_four_uniform": ({"LDS.128": 32, "FFMA": 64}, 8),
    "matrix_half": ({"HMMA.16816.F32": 32}, 12),
    "matrix_tf32": ({"HMMA.1688.F32.TF32": 32}, 12),
    "second_cache": ({"LDG.E.128.STRONG.GPU": 16, "FFMA": 32}, 200),
}
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)


def _disassembler() -> str | None:
    beside = shutil.which("cuobjdump")
    if beside is not None:
        return beside
    triton = pytest.importorskip("triton", reason="cuobjdump is not here, and neither is triton, which has one")
    found = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(found) if found.exists() else None


def _loop(listing: str) -> list[tuple[int, str, str]]:
    """The longest loop: from a branch backwards to where it goes; the branch to itself behind the end is none."""
    found = [(int(at, 16), op, rest) for at, op, rest in _INSTRUCTION.findall(listing)]
    loops = [
        [one for one in found if int(target[1], 16) <= one[0] <= at]
        for at, op, rest in found
        if op == "BRA" and (target := re.search(r"0x([0-9a-f]+)", rest)) and int(target[1], 16) < at
    ]
    return max(loops, key=len, default=[])


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90"])
def test_compilers_leave_the_loops_of_rates_whole(arch: str, tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc")
    disassembler = _disassembler()
    if disassembler is None:
        pytest.skip("there is no cuobjdump")
    binary = tmp_path / "rates.cubin"
    command = ["nvcc", "-std=c++17", "-O3", f"-arch={arch}", "-Werror", "all-warnings", "-cubin", "-o", binary, _SOURCE]
    subprocess.run(command, check=True)
    text = subprocess.run([disassembler, "-sass", binary], check=True, capture_output=True, text=True).stdout
    kernels = dict(re.findall(r"Function : (\w+)\n(.*?)(?=Function : |\Z)", text, re.DOTALL))
    assert set(_LOOPS) <= set(kernels)
    for name, (wanted, besides) in _LOOPS.items():
        loop = _loop(kernels[name])
        counts = Counter(op for _, op, _ in loop)
        for op, count in wanted.items():  # the rest of the loop may have a few of its own
            assert count <= counts[op] <= count + 2, (name, op, counts)
        assert len(loop) - sum(wanted.values()) <= besides, (name, counts)
    # As many results as chains, or operations wait for each other.
    for name, op, chains in (
        ("multiply_adds", "FFMA", 16),
        ("exponentials", "MUFU.EX2", 16),
        ("issued", "FFMA", 8),
        ("issued", "LOP3.LUT", 8),
        ("matrix_half", "HMMA.16816.F32", 8),
        ("matrix_tf32", "HMMA.1688.F32.TF32", 8),
    ):
        assert len({rest.split(",")[0] for _, found, rest in _loop(kernels[name]) if found == op}) >= chains, (name, op)


def test_the_program_says_why_it_cannot_measure(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc")
    program = tmp_path / "rates"
    subprocess.run(["nvcc", "-std=c++17", "-arch=sm_90", "-o", program, _SOURCE], check=True)
    done = subprocess.run(
        [program], env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert re.match(r"rates: cudaSetDevice\(0\) failed: \w.*", done.stderr), done.stderr
    assert done.stdout == ""


def _printed(text: str, status: int | None = 0) -> Ended:
    return Ended(status, text, 70.0)


def test_rates_are_read_and_made_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert tool_stand_ins.rates([]) == 0
    found, reason = limits.read_rates(_printed(capsys.readouterr().out))
    assert found is not None and reason == ""
    rows = limits.rate_rows(found)
    of = {row.what: row for row in rows}
    assert all(row.step == "limits" and row.subject == "card" and row.status == OK for row in rows)
    assert (of["copy"].value, of["copy"].unit) == (pytest.approx(2800), "GB/s")
    assert (of["launch"].value, of["launch"].unit) == (pytest.approx(2), "us")
    uniform = of["clocks of LDS.128, 16 bytes for all lanes"]
    assert (uniform.value, uniform.unit) == (pytest.approx(132 * 1.8e9 / 2.3e11), "clk/warp")
    assert of["multiply-adds of an SM"].value == pytest.approx(3e13 / 132 / 1.8e9)
    assert "132 SMs, capability 9.0" in of["clock"].note
    rates = limits.rates_of(rows)
    assert rates is not None
    assert dataclasses.astuple(rates) == pytest.approx((3e13, 3.8e12, 3e13, 3e14, 2.8e12, True))
    assert limits.rates_of([row for row in rows if row.what != "exponentials"]) is None
    assert limits.rates_of([dataclasses.replace(row, step="fast") for row in rows]) is None
    assert limits.rates_of([]) is None
    floors = {(row.case, row.what): row for row in limits.floor_rows(rates)}
    assert len(floors) == 3 * len((*limits.FIRST, *limits.REST))
    step = floors["slices_b6", "floor of step"]
    assert step.value == pytest.approx(floor(9, 4, 2, 6 * 224**2, rates).step_ms) and "measured" in step.note
    assert all("model" in row.note for row in limits.floor_rows(_H100))


@pytest.mark.parametrize(
    "ended, message",
    [
        (_printed("", None), "killed after 70 s"),
        (_printed("rates: cudaMalloc failed: out of memory\n", 1), "exit status 1: rates: cudaMalloc failed"),
        (_printed('{"measures": [{"name"'), "cannot be read"),
        (_printed("[]"), "cannot be read"),
        (_printed('{"measures": [{"name": "copy", "value": "much"}]}'), "no number"),
        (_printed('{"measures": [{"value": 3}]}'), "cannot be read"),
    ],
)
def test_rates_that_are_none(ended: Ended, message: str) -> None:
    found, reason = limits.read_rates(ended)
    assert found is None and message in reason


# ncu --------------------------------------------------------------------------------------------------------------

_TIME, _ISSUE, _CONFLICTS = (
    next(m for m in ncu.METRICS if m.what == what) for what in ("time", "issue active", "bank conflicts")
)
_ASKED = {metric: metric.names[0] for metric in (_TIME, _ISSUE, _CONFLICTS)}
_COLUMNS = "ID,Process ID,Process Name,Host Name,Kernel Name,Context,Stream,Block Size,Grid Size,Device,CC"
_HEAD = ",".join(f'"{name}"' for name in _COLUMNS.split(","))
_BEFORE = '"{}","7","python3.12","127.0.0.1","{}","1","7","(256, 1, 1)","(588, 1, 1)","0","9.0"'
_FEW = "void lomix::cuda::gradients_few<float, (int)4, (int)9>(lomix::cuda::Call<T1>)"


def _long(*rows: tuple[int, str, str, str, str]) -> str:
    lines = [
        "==PROF== Connected to process 7",
        "non_integer loss 1,5",
        f'{_HEAD},"Section Name","Metric Name","Metric Unit","Metric Value"',
    ]
    for number, kernel, name, unit, value in rows:
        lines.append(f'{_BEFORE.format(number, kernel)},"Command line profiler metrics","{name}","{unit}","{value}"')
    return "\n".join([*lines, "==PROF== Disconnected from process 7"])


def test_lines_of_ncu_are_read() -> None:
    text = _long(
        (0, "statistics_kernel", _TIME.names[0], "ns", "1,234,567"),
        (0, "statistics_kernel", _ISSUE.names[0], "%", "61.25"),
        (0, "statistics_kernel", _CONFLICTS.names[0], "", "12,345"),
        (0, "statistics_kernel", "sm__cycles_elapsed.max", "cycle", "5"),
        (1, "void at::native::vectorized_gather_kernel<16, long>(char *)", _TIME.names[0], "ns", "9"),
        (2, _FEW, _TIME.names[0], "us", "2.5"),
        (2, _FEW, _ISSUE.names[0], "%", "n/a"),
        (2, _FEW, _CONFLICTS.names[0], "", "nan"),
    )
    first, second = ncu.launches(text, _ASKED)
    assert first == ncu.Launch(
        "statistics_kernel", {"time": pytest.approx(1.234567), "issue active": 61.25, "bank conflicts": 12345}
    )
    assert second.kernel == "gradients_few" and second.values["time"] == pytest.approx(2.5e-3)
    assert math.isnan(second.values["issue active"]) and math.isnan(second.values["bank conflicts"])


def test_columns_of_ncu_are_read() -> None:
    blank = ",".join(['""'] * 11)
    text = f'{_HEAD},"{_TIME.names[0]}","{_ISSUE.names[0]}"\n{blank},"ms","%"\n{_BEFORE.format(4, _FEW)},"1.5","50"\n'
    assert ncu.launches(text, _ASKED) == [ncu.Launch("gradients_few", {"time": 1.5, "issue active": 50})]


@pytest.mark.parametrize("cut", range(0, 900, 37))
def test_broken_text_of_ncu_is_no_error(cut: int) -> None:
    text = _long((0, _FEW, _TIME.names[0], "ns", "1,000,000"), (0, _FEW, _ISSUE.names[0], "%", "50"))
    for launch in ncu.launches(text[:cut], _ASKED):
        assert launch.kernel == "gradients_few" and launch.values.items() <= {"time": 1.0, "issue active": 50.0}.items()
    assert ncu.launches(text.replace('"ns"', '"parsec"'), _ASKED)[0].values["time"] != 1.0


def test_names_of_kernels() -> None:
    names = {
        _FEW: "gradients_few",
        "statistics_kernel": "statistics_kernel",
        "void (anonymous namespace)::gather_kernel<float>(Call<float>)": "gather_kernel",
        "lomix::finish_kernel(int *)": "finish_kernel",
        "statistics_few<double, (int)3>": "statistics_few",
    }
    assert {written: ncu.base_name(written) for written in names} == names
    for kernel in ncu.KERNELS:
        assert re.fullmatch(ncu.FILTER.removeprefix("regex:"), kernel)


def test_kernels_that_are_watched_are_in_the_sources() -> None:
    text = "".join(
        path.read_text() for path in [*(_ROOT / "csrc/cuda").glob("*.cu*"), *(_ROOT / "kernels").glob("*.py")]
    )
    for kernel in (*ncu.KERNELS, sanitizer._KNOWN["triton", "racecheck"]):
        assert re.search(rf"\b{kernel}\(", text), kernel


def _listed(*names: str) -> frozenset[str]:
    lines = "".join(f"{name.partition('.')[0]:60} Counter   %   what it is\n" for name in names)
    return ncu.known_metrics(f"Device NVIDIA H100 (GH100)\n-----\nMetric Name  Type\n{lines}")


def test_metrics_that_ncu_knows_are_asked_for() -> None:
    firsts = [metric.names[0] for metric in ncu.METRICS]
    assert ncu.chosen(_listed(*firsts)) == dict(zip(ncu.METRICS, firsts, strict=True))
    assert ncu.known_metrics('"Metric Name","Type"\n"sm__warps_active","Counter"\n') == {"sm__warps_active"}
    # One that is unknown under its first name, and one under all.
    other = ncu.chosen(_listed(*(n for n in firsts if n not in _ISSUE.names), _ISSUE.names[1]))
    assert other[_ISSUE] == _ISSUE.names[1]
    assert _TIME not in ncu.chosen(_listed(*(n for n in firsts if n not in _TIME.names)))
    # A list that knows nothing is none.
    assert len(ncu.chosen(_listed("sm__cycles"))) == len(ncu.chosen(frozenset())) == len(ncu.METRICS)
    text = f"==ERROR== Failed to find metric regex:^{_ISSUE.names[0].partition('.')[0]}(\\..*)?$"
    assert ncu.refused_metrics(text) == {"smsp__issue_active"}
    assert ncu.chosen(frozenset(), ncu.refused_metrics(text))[_ISSUE] == _ISSUE.names[1]
    assert ncu.refused_metrics(
        "==ERROR== Failed to find metric sm__a.avg\n==ERROR== failed to find metric: 'sm__b'"
    ) == {"sm__a", "sm__b"}


def test_what_ncu_complains_of() -> None:
    assert "performance counters" in ncu.complaint("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission")
    assert ncu.complaint("==PROF== x\n==ERROR== unrecognised option '--csv'\n") == "unrecognised option '--csv'"
    assert ncu.complaint("==WARNING== No kernels were profiled.\n") == "ncu saw no kernel"
    assert ncu.complaint("==PROF== Connected\n") == ""


def test_launches_are_divided_among_cases() -> None:
    one = [ncu.Launch("statistics_few", {"time": float(i)}) for i in range(4)]
    other = [ncu.Launch("gather_kernel", {"time": float(i)}) for i in range(2)]
    found = ncu.by_case([*one, *other], ("a", "b"), windowed=True)
    assert [(case, launch.values["time"]) for case, launch in found] == [("a", 1), ("b", 3), ("a", 0), ("b", 1)]
    assert ncu.by_case(one, ("a", "b"), windowed=False) == [("a", one[1]), ("b", one[3])]
    assert ncu.by_case(other, ("a", "b"), windowed=False) == [("", other[1])]


# compute-sanitizer ------------------------------------------------------------------------------------------------


def _report(*lines: str) -> str:
    return "a line of the program\n" + "".join(f"========= {line}\n" for line in ("COMPUTE-SANITIZER", *lines))


_INVALID = (
    "Invalid __global__ read of size 4 bytes",
    f"    at {_FEW}+0x90 in few.cu:12",
    "    by thread (3,0,0) in block (1,0,0)",
)


def _races(count: int) -> str:
    return f"RACECHECK SUMMARY: {count} hazards displayed ({count} errors, 0 warnings)"


_RACE = (
    "Error: Race reported between Read access at statistics_kernel+0x430 in forward.py:150",
    "    and Write access at statistics_kernel+0x470 in forward.py:151 [8 hazards]",
)


@pytest.mark.parametrize(
    "lines, count, kernels",
    [
        (("ERROR SUMMARY: 0 errors",), 0, ()),
        ((*_INVALID, "ERROR SUMMARY: 1 error"), 1, ("gradients_few",)),
        ((*_RACE, _races(3)), 3, ("statistics_kernel",)),
        (("Uninitialized", " at 0x88 in gather_kernel(int *)", "ERROR SUMMARY: 9 errors"), 9, ("gather_kernel",)),
        (("Invalid __shared__ read", " at 0x8 in few.cu:7:void l::f<int>(int)", "ERROR SUMMARY: 1 error"), 1, ("f",)),
        (_INVALID, None, ("gradients_few",)),
        ((), None, ()),
    ],
)  # fmt: skip
def test_findings_are_counted_and_named(lines: tuple[str, ...], count: int | None, kernels: tuple[str, ...]) -> None:
    found = sanitizer.findings(_report(*lines))
    assert (found.count, found.kernels) == (count, kernels)
    assert found.first == (lines[0] if kernels else "")


@pytest.mark.parametrize(
    "backend, tool, status, lines, expected",
    [
        ("cuda", "memcheck", 0, ("ERROR SUMMARY: 0 errors",), (OK, "")),
        ("cuda", "memcheck", 1, ("ERROR SUMMARY: 0 errors",), (CRASHED, "exit status 1: boom")),
        ("cuda", "memcheck", 17, (*_INVALID, "ERROR SUMMARY: 1 error"), (FAILED, "1 in gradients_few: Invalid")),
        ("triton", "racecheck", 17, (*_RACE, _races(1)), (OK, "known and harmless")),
        ("triton", "initcheck", 17, (*_RACE, "ERROR SUMMARY: 500 errors"), (OK, "only the first 100 were named")),
        ("triton", "memcheck", 17, (*_RACE, "ERROR SUMMARY: 1 error"), (FAILED, "statistics_kernel")),
        ("cuda", "racecheck", 17, (*_RACE, _races(1)), (FAILED, "statistics_kernel")),
        ("triton", "racecheck", 17, (*_RACE, *_INVALID, _races(2)), (FAILED, "gradients_few")),
        ("triton", "racecheck", 17, (_races(2),), (FAILED, "no kernel named")),
        ("cuda", "synccheck", -11, (), (CRASHED, "exit status -11")),
        ("cuda", "synccheck", None, ("ERROR SUMMARY: 0 errors",), (HUNG, "killed after 70 s")),
    ],
)  # fmt: skip
def test_verdicts(
    backend: str, tool: str, status: int | None, lines: tuple[str, ...], expected: tuple[str, str]
) -> None:
    found, note = sanitizer.verdict(backend, tool, _printed("boom\n", status), _report(*lines))
    assert found == expected[0] and expected[1] in note and bool(note) == bool(expected[1])


# Programs and the step as a whole ---------------------------------------------------------------------------------


def _day(tmp_path: Path, rehearse: bool = False) -> Day:
    return Day("cuda:0", rehearse, tmp_path / "out", 2)


def _write(program: Path, text: str) -> None:
    program.parent.mkdir(exist_ok=True)
    program.write_text(text)
    program.chmod(0o755)


def test_a_program_that_hangs_is_killed_with_what_it_started(tmp_path: Path) -> None:
    note = tmp_path / "pids"
    # One child in its process group, one in a group of its own.
    text = f"set -m; sleep 100 & echo $! >> {note}; set +m; sleep 100 & echo $! >> {note}; echo began; wait"
    began = time.monotonic()
    ended = run_child(["bash", "-c", text], os.environ, tmp_path / "new" / "log", 1.0)
    assert ended.status is None and ended.text == "began\n" and ended.last == "began"
    assert 1.0 <= ended.seconds < 20 and time.monotonic() - began < 20
    time.sleep(0.2)
    pids = note.read_text().split()
    assert len(pids) == 2
    for pid in pids:  # gone, or waiting for somebody to ask how it ended
        stat = Path("/proc", pid, "stat")
        assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"
    assert child.late(ended)[0] == SKIPPED and child.late(_printed("", None)) == (HUNG, "killed after 70 s")


def test_a_program_that_ends(tmp_path: Path) -> None:
    ended = run_child(["bash", "-c", "pwd; echo two >&2; exit 3"], os.environ, tmp_path / "log", 60)
    assert (ended.status, ended.text) == (3, f"{_ROOT}\ntwo\n")
    with pytest.raises(OSError, match="nothing-there"):
        run_child(["nothing-there"], os.environ, tmp_path / "log", 60)


def _run(day: Day, seconds: float = 60.0) -> list[Row]:
    rows: list[Row] = []
    limits.run(day, Clock(seconds), rows.append)
    return rows


def _only(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Nothing but that folder's programs and the system's, wherever CUDA may be."""
    monkeypatch.setattr(limits, "_find", lambda name, variables: shutil.which(name, path=str(folder)))


def test_missing_tools_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _only(monkeypatch, tmp_path)
    rows = _run(_day(tmp_path))
    assert [(row.what, row.status, row.note) for row in rows] == [
        ("rates", SKIPPED, "there is no nvcc"),
        ("ncu", SKIPPED, "there is no ncu"),
        ("compute-sanitizer", SKIPPED, "there is no compute-sanitizer"),
    ]
    assert {row.note for row in _run(_day(tmp_path), seconds=1.0)} == {"no time left"}


def test_a_part_that_fails_costs_the_others_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _only(monkeypatch, tmp_path / "bin")
    _write(tmp_path / "bin" / "nvcc", "#!/bin/sh\necho 'rates.cu: fatal error' >&2; exit 2\n")
    _write(tmp_path / "bin" / "ncu", "no program\n" * 3)  # cannot be started at all
    _write(tmp_path / "bin" / "compute-sanitizer", "#!/bin/sh\necho 'no GPU'; exit 1\n")
    rows = _run(_day(tmp_path))
    of = {(row.subject, row.what): row for row in rows}
    assert of["card", "rates"].status == FAILED and "status 2: rates.cu: fatal error" in of["card", "rates"].note
    assert of["card", "ncu"].status == FAILED and "Exec format error" in of["card", "ncu"].note
    # Each case of each backend under each tool, by itself, since together they crashed.
    checked = [row for row in rows if row.what in sanitizer.TOOLS]
    assert len(checked) == 2 * len(sanitizer.TOOLS) * len(sanitizer.CASES)
    assert {(row.status, row.note) for row in checked} == {(CRASHED, "exit status 1: no GPU")}


def test_what_is_found_in_all_cases_together_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _only(monkeypatch, tmp_path / "bin")
    monkeypatch.setattr(sanitizer, "TOOLS", ("memcheck", "synccheck"))
    # Finds an error in whatever cuda does under memcheck with several cases, and under synccheck with one of them.
    _write(
        tmp_path / "bin" / "compute-sanitizer",
        f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\ngiven = sys.argv\n"
        "at = given.index('benchmarks.gpu_day.one_step')\nbackend, cases = given[at + 1], given[at + 2:]\n"
        "bad = backend == 'cuda' and ('volume' in cases if 'synccheck' in given else len(cases) > 1)\n"
        "Path(given[given.index('--log-file') + 1]).write_text(f'========= ERROR SUMMARY: {int(bad)} errors\\n')\n"
        "sys.exit(17 * bad)\n",
    )
    rows = [row for row in _run(_day(tmp_path)) if row.what in sanitizer.TOOLS]
    failed = {(row.subject, row.what, row.case) for row in rows if row.status == FAILED}
    assert failed == {("cuda", "memcheck", "together"), ("cuda", "synccheck", "volume")}
    assert len(rows) == 2 * 2 * len(sanitizer.CASES) + 1 and {row.status for row in rows} == {OK, FAILED}


@pytest.mark.slow
def test_tools_that_hang_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _only(monkeypatch, tmp_path / "bin")
    monkeypatch.setattr(child, "_LONG_SECONDS", 0.5)
    monkeypatch.setattr(limits, "_BUILD_SECONDS", 1.0)
    for name in ("nvcc", "ncu", "compute-sanitizer"):
        _write(tmp_path / "bin" / name, "#!/bin/sh\nsleep 100\n")
    monkeypatch.setattr(sanitizer, "TOOLS", ("memcheck",))
    monkeypatch.setattr(limits, "_FEWEST_SECONDS", 0.5)
    began = time.monotonic()
    rows = _run(_day(tmp_path), seconds=8.0)
    assert time.monotonic() - began < 20
    status = {(row.subject, row.what): row.status for row in rows}
    assert status["card", "rates"] == HUNG and status["cuda", "memcheck"] == HUNG
    assert HUNG in {row.status for row in rows if row.what == "ncu"}


def test_nvcc_that_sees_no_card_builds_what_any_can_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _only(monkeypatch, tmp_path / "bin")
    asked = tmp_path / "asked"
    warning = "nvcc warning : Cannot find valid GPU for '-arch=native', default arch is used"
    printed = json.dumps({"measures": [{"name": "copy", "value": 1e12}]})
    _write(tmp_path / "bin" / "built", f"#!/bin/sh\necho '{printed}'\n")
    _write(
        tmp_path / "bin" / "nvcc",
        f'#!/bin/sh\necho "$*" >> {asked}\ncase "$*" in *native*) echo "{warning}";; esac\n'
        f"cp {tmp_path}/bin/built {tmp_path}/out/rates\n",
    )
    rows = _run(_day(tmp_path))
    assert re.findall(r"-arch=(\S+)", asked.read_text()) == ["native", "sm_80"]
    of = {row.what: row for row in rows}
    assert of["copy"].value == 1000
    assert of["floor"].status == FAILED and "ffma" in of["floor"].note  # one measure is not enough


def _pretend_ncu(folder: Path, *answers: str) -> Path:
    """An ncu that gives these answers one after the other, then the last one again; what it is given is noted."""
    for i, answer in enumerate(answers):
        (folder / f"answer{i}").write_text(answer)
    calls = folder / "calls"
    _write(
        folder / "ncu",
        f'#!/bin/sh\n[ "$1" = --query-metrics ] && exit 0\necho "$*" >> {calls}\n'
        f"n=$(($(wc -l < {calls}) - 1)); [ $n -gt {len(answers) - 1} ] && n={len(answers) - 1}\n"
        f'while [ "$1" != --log-file ]; do shift; done\ncp {folder}/answer$n "$2"\n',
    )
    return calls


def test_ncu_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    _only(monkeypatch, folder)
    good = _long(*((i, "gradients_few", _ISSUE.names[1], "%", f"{i}5") for i in range(4)))
    calls = _pretend_ncu(
        folder, f"==ERROR== Failed to find metric {_ISSUE.names[0]}\n", "==WARNING== No kernels were profiled.\n", good
    )
    rows = [row for row in _run(_day(tmp_path)) if row.subject == "cuda"]
    first, second, third = calls.read_text().splitlines()[:3]
    assert _ISSUE.names[0] in first and _ISSUE.names[0] not in second and _ISSUE.names[1] in second
    assert "--profile-from-start off" in second and "--profile-from-start" not in third
    values = {row.case: row.value for row in rows if row.what == "issue active of gradients_few"}
    assert values == {"slices_224": 15, "volume_96": 35}
    times = [row for row in rows if row.what == "time of gradients_few"]
    assert [(row.status, row.note) for row in times] == [(SKIPPED, "n/a")] * 2


def test_counters_that_are_forbidden_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    _only(monkeypatch, folder)
    calls = _pretend_ncu(folder, "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n")
    rows = [row for row in _run(_day(tmp_path)) if row.what == "ncu"]
    assert [(row.subject, row.status) for row in rows] == [("cuda", SKIPPED), ("triton", SKIPPED)]
    assert "performance counters" in rows[0].note and len(calls.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "device, given, seen",
    [("cuda:0", None, "0"), ("cuda", "", "0"), ("cuda:1", "4,7", "7"), ("cuda:2", None, "2"), ("cpu", None, None)],
)  # fmt: skip
def test_programs_see_the_device_as_their_first(
    device: str, given: str | None, seen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert limits.visible(device).get("CUDA_VISIBLE_DEVICES") == seen


# One step ---------------------------------------------------------------------------------------------------------


def test_cases_that_are_watched_exist() -> None:
    for name in (*sanitizer.CASES, "slices_224", "volume_96"):
        assert one_step.named(name).name == name
    assert one_step.named("slices_224_small").pixels < 1000
    kinds = [one_step.named(name) for name in sanitizer.CASES]
    assert {len(one.full) for one in kinds} == {2, 3} and any(one.sigmoid for one in kinds)
    assert any(one.dtype.itemsize == 2 for one in kinds) and any(one.classes > 16 for one in kinds)


def test_a_profiler_is_told_of_the_second_step_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []
    runtime = SimpleNamespace(
        cudaProfilerStart=lambda: told.append("start"), cudaProfilerStop=lambda: told.append("stop")
    )
    cuda = SimpleNamespace(cudart=lambda: runtime, synchronize=lambda: told.append("wait"))
    with one_step.watched(cuda):
        told.append("step")
    assert told == ["start", "step", "wait", "stop"]


@pytest.mark.slow
def test_the_step_is_rehearsed(tmp_path: Path) -> None:
    rows = _run(_day(tmp_path, rehearse=True), seconds=250.0)
    assert not [row for row in rows if row.status not in (OK, SKIPPED)], [
        r for r in rows if r.status not in (OK, SKIPPED)
    ]
    assert limits.rates_of(rows) is not None
    for backend, kernel in (("cuda", "statistics_few"), ("triton", "statistics_kernel")):
        of = {row.what: row for row in rows if row.subject == backend}
        assert (
            of[f"time of {kernel}"].value == pytest.approx(1.234567) and of[f"time of {kernel}"].case == "non_integer"
        )
        assert of["ncu metrics"].note == "unknown to this ncu: ALU pipe, L2 throughput"
        assert of[f"tensor pipe of {kernel}"].note == "n/a"
        assert "loss" in (tmp_path / "out" / f"ncu-{backend}.log").read_text()
    memcheck = [row for row in rows if row.what == "memcheck"]
    assert [row.case for row in memcheck] == ["non_integer", "sigmoid_bool"]
    assert all("with the others: exit status 1: Error: the target" in row.note for row in memcheck)
    assert all("known and harmless" in row.note for row in rows if row.what == "racecheck")
