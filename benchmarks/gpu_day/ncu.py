"""What Nsight Compute (ncu) is asked about the main kernels, and its answers read.

Names of metrics differ between cards and versions, and one that ncu does not know makes it refuse all of them. So it is
asked first which it knows; if it refuses one all the same, it is asked again without that one.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

# Kernels as the sources call them; other libraries have kernels whose names contain these.
KERNELS = (
    *("statistics_few", "statistics_many", "gradients_few", "gradients_many"),
    *("statistics_kernel", "gradients_kernel", "gather_kernel"),
)
# Right whether ncu searches for it or wants all of a name, and with a namespace before the name or not.
FILTER = f"regex:.*({'|'.join(KERNELS)}).*"
_ACTIVE, _ELAPSED = "avg.pct_of_peak_sustained_active", "avg.pct_of_peak_sustained_elapsed"
_PLAUSIBLE = 0.5  # of the metrics wanted, which any list of metrics must know to be believed
_TIME = {"ns": 1e-6, "nsecond": 1e-6, "us": 1e-3, "usecond": 1e-3, "ms": 1.0, "msecond": 1.0, "s": 1e3, "second": 1e3}


@dataclass(frozen=True)
class Metric:
    """One figure of a kernel.

    Attributes:
        what: its name in a row, before " of <kernel>".
        unit: its unit in a row.
        names: what ncu calls it; the first one that it knows is taken.
    """

    what: str
    unit: str
    names: tuple[str, ...]


def _stall(what: str, reason: str) -> Metric:
    return Metric(
        f"warps waiting, {what},", "warps", (f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio",)
    )


METRICS = (
    Metric("time", "ms", ("gpu__time_duration.sum",)),
    Metric("issue active", "%", (f"smsp__issue_active.{_ACTIVE}", f"sm__inst_issued.{_ACTIVE}")),
    Metric("instructions", "warp instructions", ("smsp__inst_executed.sum", "sm__inst_executed.sum")),
    Metric("FMA pipe", "%", (f"sm__inst_executed_pipe_fma.{_ACTIVE}", f"sm__pipe_fma_cycles_active.{_ACTIVE}")),
    Metric("ALU pipe", "%", (f"sm__inst_executed_pipe_alu.{_ACTIVE}", f"sm__pipe_alu_cycles_active.{_ACTIVE}")),
    Metric("special function pipe", "%", (f"sm__inst_executed_pipe_xu.{_ACTIVE}",)),
    Metric("LSU pipe", "%", (f"sm__inst_executed_pipe_lsu.{_ACTIVE}",)),
    Metric(
        "tensor pipe",
        "%",
        (
            f"sm__pipe_tensor_cycles_active.{_ACTIVE}",
            f"sm__inst_executed_pipe_tensor.{_ACTIVE}",
            f"sm__pipe_tensor_op_hmma_cycles_active.{_ACTIVE}",
        ),
    ),
    Metric("LSU data pipe", "%", (f"l1tex__data_pipe_lsu_wavefronts.{_ELAPSED}",)),
    Metric("shared memory wavefronts", "wavefronts", ("l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",)),
    Metric(
        "bank conflicts",
        "wavefronts",
        ("l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum", "l1tex__data_bank_conflicts_pipe_lsu.sum"),
    ),
    Metric("warps active", "%", (f"sm__warps_active.{_ACTIVE}",)),
    Metric("L2 throughput", "%", (f"lts__throughput.{_ELAPSED}",)),
    Metric("memory throughput", "%", (f"dram__throughput.{_ELAPSED}", f"gpu__dram_throughput.{_ELAPSED}")),
    _stall("shared memory and special functions", "short_scoreboard"),
    _stall("global memory", "long_scoreboard"),
    _stall("queue of memory instructions", "mio_throttle"),
    _stall("busy math pipe", "math_pipe_throttle"),
    _stall("result of the last instruction", "wait"),
    _stall("barrier", "barrier"),
    _stall("instruction cache", "no_instruction"),
)


@dataclass(frozen=True)
class Launch:
    """One launch that was watched: the kernel's name and values by the names of metrics, in the units of `METRICS`.

    A value that ncu could not tell is NaN.
    """

    kernel: str
    values: Mapping[str, float]


def base_name(written: str) -> str:
    """The name of a function alone, of whatever a tool writes: "void lomix::f<float, 9>(Call<float>)" is "f"."""
    name = re.sub(r"\(anonymous namespace\)::|<unnamed>::", "", written.strip())
    name = re.split(r"[<(]", name, maxsplit=1)[0]
    return re.split(r"::|:|\s", name.strip())[-1]


def known_metrics(text: str) -> frozenset[str]:
    """Metrics in what --query-metrics writes, as a table or as CSV: their names without the part behind the dot."""
    first = (re.match(r'\s*"?([a-z0-9]+__[a-zA-Z0-9_]+)', line) for line in text.splitlines())
    return frozenset(match[1] for match in first if match)


def chosen(known: Collection[str], refused: Collection[str] = ()) -> dict[Metric, str]:
    """The name to ask for, of each metric that has one.

    Args:
        known: see `known_metrics`; a list that knows hardly any is not believed, and all are asked for.
        refused: names that ncu has not found, as it wrote them or without what is behind the dot.
    """

    def taken(names: Sequence[str], believed: bool) -> str | None:
        return next(
            (
                name
                for name in names
                if not {name, name.partition(".")[0]} & set(refused)
                and (not believed or name.partition(".")[0] in known)
            ),
            None,
        )

    believed = sum(taken(m.names, True) is not None for m in METRICS) >= _PLAUSIBLE * len(METRICS)
    found = {metric: taken(metric.names, believed) for metric in METRICS}
    return {metric: name for metric, name in found.items() if name is not None}


def refused_metrics(text: str) -> frozenset[str]:
    """Metrics that ncu says it has not found: "==ERROR== Failed to find metric NAME", or a pattern that begins so."""
    return frozenset(re.findall(r"[Ff]ailed to find metric:?\s+(?:regex:\^?)?[\"']?([a-zA-Z0-9_]+)", text))


def complaint(text: str) -> str:
    """Why ncu has watched nothing, in its words or ours; "" where it does not complain."""
    if "ERR_NVGPUCTRPERM" in text:
        return "this user may not read the card's performance counters (ERR_NVGPUCTRPERM)"
    errors = re.findall(r"==ERROR==\s*(.+)", text)
    if errors:
        return str(errors[0].strip()[:200])
    return "ncu saw no kernel" if re.search(r"No kernels were profiled", text, re.IGNORECASE) else ""


def command(program: str, names: Sequence[str], log: str, target: Sequence[str], windowed: bool) -> list[str]:
    """How to start it.

    Args:
        program: ncu.
        names: metrics.
        log: file for all that ncu itself writes.
        target: program to watch, with its arguments.
        windowed: whether only what the target marks with cudaProfilerStart is to be watched.
    """
    return [
        *(program, "--csv", "--print-units", "base", "--clock-control", "none", "--kernel-name", FILTER),
        *(("--profile-from-start", "off") if windowed else ()),
        *("--launch-count", "40", "--metrics", ",".join(names), "--log-file", log, *target),
    ]


def _number(text: str, unit: str, metric: Metric) -> float:
    """A value in the unit of the metric, NaN for "n/a" and everything else that is none."""
    try:
        value = float(text.replace(",", "").replace(" ", ""))
    except ValueError:
        return math.nan
    if metric.unit == "ms":
        return value * _TIME[unit] if unit in _TIME else math.nan
    return value if math.isfinite(value) else math.nan


def launches(text: str, asked: Mapping[Metric, str]) -> list[Launch]:
    """The launches in what ncu --csv writes, in order; lines that are no CSV, and broken ones, are passed over.

    ncu writes a line for each metric, or, asked for its raw page, a column for each and units in a second header.
    """
    metric_of = {name: metric for metric, name in asked.items()}
    found: dict[str, tuple[str, dict[str, float]]] = {}
    header: list[str] = []
    units: dict[str, str] = {}
    for cells in csv.reader(line for line in text.splitlines() if line.startswith('"')):
        if "Kernel Name" in cells:
            header, units = cells, {}
            continue
        if len(cells) != len(header):
            continue
        row = dict(zip(header, cells, strict=True))
        if not row.get("ID"):
            units = row
            continue
        kernel = base_name(row["Kernel Name"])
        if kernel not in KERNELS:
            continue
        _, values = found.setdefault(row["ID"], (kernel, {}))
        if "Metric Name" in row:
            given = [(row["Metric Name"], row.get("Metric Unit", ""), row.get("Metric Value", ""))]
        else:
            given = [(name, units.get(name, ""), value) for name, value in row.items()]
        for name, unit, value in given:
            if name in metric_of:
                values[metric_of[name].what] = _number(value, unit, metric_of[name])
    return [Launch(kernel, values) for kernel, values in found.values()]


def by_case(found: Sequence[Launch], cases: Sequence[str], windowed: bool) -> list[tuple[str, Launch]]:
    """Which case each launch belongs to, by their order, and of several of a kernel in one step the last.

    Args:
        found: launches of a program that took one watched step for each case, or two where `windowed` is not.
        cases: in order.
        windowed: see `command`.

    Returns:
        (case, launch); case "" where a kernel's launches cannot be divided evenly among the cases.
    """
    result = []
    for kernel in dict.fromkeys(one.kernel for one in found):
        ours = [one for one in found if one.kernel == kernel]
        parts = len(cases) * (1 if windowed else 2)
        if len(ours) % parts:
            result.append(("", ours[-1]))
            continue
        size = len(ours) // len(cases)
        result += [(case, ours[(i + 1) * size - 1]) for i, case in enumerate(cases)]
    return result
