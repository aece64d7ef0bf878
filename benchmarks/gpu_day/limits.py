"""Step "limits": what the card can do at best, how near to it the kernels come, and whether they touch only their own.

Three parts, each with its own limit of time: rates of the card (rates.cu) with the floors that follow from them, ncu on
the main kernels, and compute-sanitizer. What a machine lacks is a row that says so.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import ncu, sanitizer, tool_stand_ins
from .build import environment
from .child import Ended, late, run_child, visible
from .day import CRASHED, FAILED, OK, SKIPPED, Clock, Day, Emit, Row
from .floors import Rates, floor
from .problems import FIRST, REST

_SOURCE = Path(__file__).with_name("rates.cu")
# Seconds at most for each part, and what the later parts are left at least as a share of the time there is.
_RATES_SECONDS, _BUILD_SECONDS, _NCU_SECONDS = 40.0, 40.0, 60.0
_NCU_SHARE = 0.5
_FEWEST_SECONDS = 3.0  # in which nothing is worth starting
_CLOSER_SECONDS = 8.0  # likewise for checking each case by itself, after all of them together
_TRIES = 4  # of ncu, after metrics that it has refused
_PORT, _PORTS = 49152, 16  # of the sanitizer's: the first, and how many each process may use

# Measures of rates.cu as rows: what, unit, and the unit's size.
_MEASURES = {
    "copy": ("copy", "GB/s", 1e9),
    "copy_kernel": ("copy by a kernel", "GB/s", 1e9),
    "copy_size": ("bytes copied at once", "MB", 1e6),
    "l2": ("L2 read", "GB/s", 1e9),
    "ffma": ("multiply-adds", "G/s", 1e9),
    "ex2": ("exponentials", "G/s", 1e9),
    "issue": ("instructions issued", "G/s", 1e9),
    "mma_half": ("matrix multiply-adds, half precision", "G/s", 1e9),
    "mma_tf32": ("matrix multiply-adds, tf32", "G/s", 1e9),
    "clock": ("clock", "GHz", 1e9),
    "launch": ("launch", "us", 1e-6),
    "launch_and_wait": ("launch and wait", "us", 1e-6),
}
_LOADS = {
    "lds32_lane": "LDS, a word a lane",
    "lds32_uniform": "LDS, one word for all lanes",
    "lds128_lane": "LDS.128, 16 bytes a lane",
    "lds128_uniform": "LDS.128, 16 bytes for all lanes",
}


def run(day: Day, clock: Clock, emit: Emit) -> None:
    """Do the three parts; a part that fails is a row, and the next one starts."""
    day.out.mkdir(parents=True, exist_ok=True)
    with _variables(day) as variables:
        parts: tuple[tuple[str, Callable[[Day, Clock, Emit, dict[str, str]], None], float], ...] = (
            ("rates", _measure_rates, _RATES_SECONDS + _BUILD_SECONDS),
            ("ncu", _watch_kernels, min(_NCU_SECONDS, _NCU_SHARE * clock.left)),
            ("compute-sanitizer", _sanitize, math.inf),
        )
        for name, part, seconds in parts:
            if clock.left < _FEWEST_SECONDS:
                emit(Row("limits", "card", "", name, SKIPPED, note="no time left"))
                continue
            try:
                part(day, Clock(min(seconds, clock.left), clock), emit, variables)
            except Exception as error:  # whatever it is, the other parts are worth having
                emit(Row("limits", "card", "", name, FAILED, note=f"{type(error).__name__}: {error}"[:300]))


@contextlib.contextmanager
def _variables(day: Day) -> Iterator[dict[str, str]]:
    """Environment variables of everything that is started here."""
    # Messages and numbers as the parsers know them.
    variables = {**os.environ, **environment(day), "LC_ALL": "C", "OMP_NUM_THREADS": "1", **visible(day.device)}
    if not day.rehearse:
        yield variables
        return
    with tool_stand_ins.folder() as programs:
        yield tool_stand_ins.first_on_path(variables, programs)


def _find(program: str, variables: Mapping[str, str]) -> str | None:
    """Where a program is: on the PATH, or where CUDA's installers put it."""
    homes = [variables[name] for name in ("CUDA_HOME", "CUDA_PATH") if variables.get(name)]
    places = [variables.get("PATH", ""), *(f"{home}/bin" for home in (*homes, "/usr/local/cuda"))]
    return shutil.which(program, path=os.pathsep.join(places))


# Rates ------------------------------------------------------------------------------------------------------------


def _measure_rates(day: Day, clock: Clock, emit: Emit, variables: dict[str, str]) -> None:
    program, reason, status = _built_rates(day, clock, variables)
    if day.rehearse:
        if status != OK:
            emit(Row("limits", "card", "", "rates, compiling", status, note=reason))
        program = Path(_find("rates", variables) or "rates")
    elif status != OK:
        emit(Row("limits", "card", "", "rates", status, note=reason))
        return
    ended = run_child([str(program)], variables, day.out / "rates.json", clock.at_most(_RATES_SECONDS))
    found, reason = read_rates(ended)
    if found is None:
        status = late(ended)[0] if ended.status is None else CRASHED if ended.status else FAILED
        emit(Row("limits", "card", "", "rates", status, note=reason))
        return
    for row in rate_rows(found):
        emit(row)
    try:
        rates = Rates.of_measures(found)
    except ValueError as error:
        emit(Row("limits", "card", "", "floor", FAILED, note=str(error)))
        return
    for row in floor_rows(rates):
        emit(row)


def _built_rates(day: Day, clock: Clock, variables: Mapping[str, str]) -> tuple[Path | None, str, str]:
    """Compile rates.cu: the program, or None with the reason; and the status."""
    compiler = _find("nvcc", variables)
    if compiler is None:
        return None, "there is no nvcc", SKIPPED
    program, log = day.out / "rates", day.out / "rates-build.log"
    # Where nvcc cannot see the card it builds for an old one; code for sm_80 is compiled on by the driver.
    for arch in ("sm_90",) if day.rehearse else ("native", "sm_80"):
        command = [compiler, "-std=c++17", "-O3", f"-arch={arch}", "-o", str(program), str(_SOURCE)]
        ended = run_child(command, variables, log, clock.at_most(_BUILD_SECONDS))
        if ended.status is None:
            status, note = late(ended)
            return None, f"nvcc: {note}", status
        if ended.status == 0 and "Cannot find valid GPU" not in ended.text:
            return program, "", OK
    return None, f"nvcc ended with status {ended.status}: {ended.last}", FAILED


def read_rates(ended: Ended) -> tuple[dict[str, Any] | None, str]:
    """What rates.cu printed, or None and why it is no use."""
    if ended.status is None:
        return None, late(ended)[1]
    if ended.status != 0:
        return None, f"exit status {ended.status}: {ended.last}"
    try:
        found = json.loads(ended.text)
        if all(isinstance(m["name"], str) and isinstance(m["value"], int | float) for m in found["measures"]):
            return found, ""
        return None, "rates.cu printed a measure that is no number"
    except (ValueError, TypeError, KeyError) as error:
        return None, f"rates.cu printed what cannot be read ({type(error).__name__}): {ended.text[:100]!r}"


def rate_rows(found: Mapping[str, Any]) -> list[Row]:
    """What rates.cu printed, as rows."""
    card = f"{found.get('device', '')}, {found.get('sms', '?')} SMs, capability {found.get('capability', '?')}"
    rows = []
    for measure in found["measures"]:
        name, value, of_core = measure["name"], measure["value"], measure.get("per_sm_clock")
        clock = f"at {measure['clock_ghz']:.3f} GHz; " if "clock_ghz" in measure else ""
        if name in _LOADS:
            if of_core:
                row = Row("limits", "card", "", f"clocks of {_LOADS[name]}", value=1 / of_core, unit="clk/warp")
                rows.append(row)
            continue
        what, unit, size = _MEASURES.get(name, (name, measure.get("unit", ""), 1.0))
        rows.append(Row("limits", "card", "", what, value=value / size, unit=unit, note=f"{clock}{card}"))
        if of_core:
            rows.append(Row("limits", "card", "", f"{what} of an SM", value=of_core, unit="/clk"))
    return rows


def rates_of(rows: Iterable[Row]) -> Rates | None:
    """The card's rates from rows that `run` has emitted, None where they were not measured."""
    of_name = {what: (name, size) for name, (what, _, size) in _MEASURES.items()}
    measures = [
        {"name": of_name[row.what][0], "value": row.value * of_name[row.what][1]}
        for row in rows
        if (row.step, row.subject, row.status) == ("limits", "card", OK)
        and row.value is not None
        and row.what in of_name
    ]
    try:
        return Rates.of_measures({"measures": measures})
    except ValueError:
        return None


def floor_rows(rates: Rates) -> list[Row]:
    """Floors of the problems that are timed: forward, backward and step."""
    rows = []
    for one in (*FIRST, *REST):
        found = floor(
            one.classes,
            len(one.native),
            len(one.full),
            one.batch * one.pixels,
            rates,
            ratios=[round(one.full[0] / size[0]) for size in one.native],
            itemsize=one.dtype.itemsize,
        )
        source = "over measured rates" if found.measured else "a model: over data-sheet rates"
        note = f"binding: {found.binding}; operations counted, {source}"
        for what, value in (("forward", found.forward_ms), ("backward", found.backward_ms), ("step", found.step_ms)):
            rows.append(Row("limits", "card", one.name, f"floor of {what}", value=value, unit="ms", note=note))
    return rows


# ncu --------------------------------------------------------------------------------------------------------------


def _one_step(backend: str, cases: Iterable[str]) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu_day.one_step", backend, *cases]


def _watch_kernels(day: Day, clock: Clock, emit: Emit, variables: dict[str, str]) -> None:
    program = _find("ncu", variables)
    if program is None:
        emit(Row("limits", "card", "", "ncu", SKIPPED, note="there is no ncu"))
        return
    query = run_child([program, "--query-metrics"], variables, day.out / "ncu-metrics.log", 0.25 * clock.left)
    known = ncu.known_metrics(query.text)
    cases = ("non_integer",) if day.rehearse else ("slices_224", "volume_96")
    for left, backend in ((2, "cuda"), (1, "triton")):
        if clock.left < _FEWEST_SECONDS:
            emit(Row("limits", backend, "", "ncu", SKIPPED, note="no time left"))
            continue
        _watch(day, Clock(clock.left / left, clock), emit, variables, program, backend, cases, known)


def _watch(
    day: Day,
    clock: Clock,
    emit: Emit,
    variables: dict[str, str],
    program: str,
    backend: str,
    cases: tuple[str, ...],
    known: frozenset[str],
) -> None:
    """Watch the kernels of one backend, with fewer metrics each time that ncu refuses some."""
    log = day.out / f"ncu-{backend}.csv"
    refused: frozenset[str] = frozenset()
    windowed = True
    for _ in range(_TRIES):
        asked = ncu.chosen(known, refused)
        log.unlink(missing_ok=True)
        command = ncu.command(program, tuple(asked.values()), str(log), _one_step(backend, cases), windowed)
        ended = run_child(command, variables, day.out / f"ncu-{backend}.log", clock.left)
        # What it cannot write to its log, such as a wrong option, is among the messages of the program.
        text = (log.read_text(errors="replace") if log.exists() else "") + ended.text
        found, reason = ncu.launches(text, asked), ncu.complaint(text)
        more = ncu.refused_metrics(text) - refused
        if found or clock.left < _FEWEST_SECONDS:
            break
        if more:
            refused |= more
        elif windowed and ended.status is not None and "performance counters" not in reason:
            windowed = False  # the mark where to start may not have come through
        else:
            break
    if not found:
        status, note = SKIPPED if "performance counters" in reason else FAILED, reason or ended.last
        if ended.status is None:
            status, note = late(ended)
        emit(Row("limits", backend, "", "ncu", status, note=note))
        return
    missing = [metric.what for metric in ncu.METRICS if metric not in asked]
    if missing:
        emit(Row("limits", backend, "", "ncu metrics", SKIPPED, note=f"unknown to this ncu: {', '.join(missing)}"))
    for case, launch in ncu.by_case(found, cases, windowed):
        for metric in asked:
            value = launch.values.get(metric.what, math.nan)
            what = f"{metric.what} of {launch.kernel}"
            if math.isnan(value):
                emit(Row("limits", backend, case, what, SKIPPED, note="n/a"))
            else:
                emit(Row("limits", backend, case, what, value=value, unit=metric.unit))


# compute-sanitizer ------------------------------------------------------------------------------------------------


def _sanitize(day: Day, clock: Clock, emit: Emit, variables: dict[str, str]) -> None:
    """Check all cases of a backend and tool in one process, and each in its own where something was found.

    Most of a process's time is its start. Where the cases together are clean, each of them is.
    """
    program = _find("compute-sanitizer", variables)
    if program is None:
        emit(Row("limits", "card", "", "compute-sanitizer", SKIPPED, note="there is no compute-sanitizer"))
        return
    variables = {**variables, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # or all tensors lie in one allocation
    cases: tuple[str, ...] = sanitizer.CASES
    wanted = [(b, t) for t in sanitizer.TOOLS for b in ("cuda", "triton")]
    if day.rehearse:
        cases, wanted = ("non_integer", "sigmoid_bool"), [("cuda", "memcheck"), ("triton", "racecheck")]

    def check(number: int, backend: str, tool: str, names: tuple[str, ...], limit: Clock) -> tuple[str, str]:
        if limit.left < _FEWEST_SECONDS:
            return SKIPPED, "no time left"
        stem = day.out / f"sanitizer-{number}-{backend}-{tool}"
        log = stem.with_suffix(".log")
        log.unlink(missing_ok=True)
        command = sanitizer.command(program, tool, str(log), _PORT + _PORTS * number, _one_step(backend, names))
        ended = run_child(command, variables, stem.with_suffix(".out"), limit.left)
        text = log.read_text(errors="replace") if log.exists() else ""
        return sanitizer.verdict(backend, tool, ended, text or ended.text)

    with ThreadPoolExecutor(max(1, day.workers)) as pool:
        most = Clock(0.75 * clock.left, clock)  # the rest is for looking closer
        together = [pool.submit(check, i, *one, cases, most) for i, one in enumerate(wanted)]
        closer: list[tuple[str, str, str, str, Future[tuple[str, str]]]] = []
        for (backend, tool), future in zip(wanted, together, strict=True):
            status, note = future.result()
            if status == OK or clock.left < _CLOSER_SECONDS:
                note = note if status == OK else f"{', '.join(cases)} in one process: {note}"
                for name in cases:
                    emit(Row("limits", backend, name, tool, status, note=note))
                continue
            for name in cases:
                number = len(wanted) + len(closer)
                one = pool.submit(check, number, backend, tool, (name,), clock)
                closer.append((backend, tool, name, note, one))
        found: set[tuple[str, str]] = set()
        for backend, tool, name, before, future in closer:
            status, note = future.result()
            if status == FAILED:
                found.add((backend, tool))
            emit(Row("limits", backend, name, tool, status, note=note or f"alone; with the others: {before}"[:300]))
        for (backend, tool), future in zip(wanted, together, strict=True):
            status, note = future.result()
            alone = any((backend, tool) == one[:2] for one in closer)
            if status == FAILED and alone and (backend, tool) not in found:  # it must not get lost
                emit(Row("limits", backend, "together", tool, FAILED, note=f"{', '.join(cases)}: {note}"))
