"""What the doctor prints and writes: text for people, the same numbers as plain values for an issue."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..testing.cases import Case
from ..testing.devices import Device
from ..testing.environment import load
from . import workloads
from .checking import CaseOutcome, Checked
from .selftest import Selftest
from .timing import Timing
from .workloads import OFFICIAL

FORMAT = 1  # of the JSON file; raise it when a key changes its meaning
_MOST_FAILURES, _MOST_OF_ONE = 20, 4  # that an issue has room for: in all, and of a backend on a device


def describe(found: dict[str, Any]) -> str:
    """Text of what `overview` returns: versions, processor, GPUs, and what runs where."""
    here, build = found["environment"], found["build"]
    built = f"torch {build['torch']} by {build['compiler']}, for {build['capabilities']}" if "torch" in build else ""
    rows = [
        ("lomix_fast", here["package"] + (f", commit {here['commit']}" if here["commit"] else "")),
        ("extension", built or build.get("skipped") or build.get("error") or "no record of a build"),
        *([("CUDA part", _cuda_part(build))] if "torch" in build else []),
        ("python", f"{here['python']} on {here['platform']}"),
        ("torch", here["torch"]),
        ("triton", here["triton"] or "not installed"),
        ("CUDA, ROCm", _toolkits(here)),
        ("GPU driver", here["driver"] or "none found"),
        ("CPU", f"{here['cpu']}, {here['cpu_capability']}, {here['cores']} cores, {here['threads']} threads"),
        *(("GPU", _gpu(one)) for one in here["gpus"]),
        *([] if here["gpus"] else [("GPU", "none that torch can use")]),
    ]
    lines = [f"{name:<12}{value}" for name, value in rows]
    for device, backends in found["devices"].items():
        lines += ["", f"backends on {device}"]
        lines += [f"  {name:<12}{'usable' if reason is None else f'no: {reason}'}" for name, reason in backends.items()]
    return "\n".join(lines)


def _toolkits(here: dict[str, Any]) -> str:
    """What torch was built for."""
    found = [f"{name} {here[key]}" for name, key in (("CUDA", "cuda"), ("ROCm", "hip")) if here[key]]
    return " and ".join(found) or "torch is built without either"


def _cuda_part(build: dict[str, str]) -> str:
    if "cuda" in build:
        return f"by CUDA {build['cuda']}, for {build['cuda_archs']}"
    return f"none: {build.get('cuda_skipped') or 'its build has recorded no reason'}"


def _gpu(one: dict[str, Any]) -> str:
    if "error" in one:
        return f"{one['device']}: {one['error']}"
    return f"{one['device']}: {one['name']}, {one['arch']}, {one['memory_mib']:,} MiB"


def table(done: Selftest, devices: Sequence[Device], most_failures: int | None = None) -> str:
    """One line for each device and backend, and one for the official style; then workloads, reasons and failures.

    Args:
        done: what to show.
        devices: those that were tested, for the sizes of their workloads.
        most_failures: that are listed; None for all.
    """
    axes = sorted({len(one.full) for device in devices for one in workloads.of(device)})
    sizes = {(device.name, len(one.full)): one for device in devices for one in workloads.of(device)}
    head = ["device", "backend", "cases", "worst error"]
    head += [text for n in axes for text in (f"{n}D ms", "speed-up", "peak MiB")]
    lines, notes = [head], []
    for device in devices:
        rows: list[tuple[str, Checked | None]] = [(r.backend, r) for r in done.checked if r.device == device.name]
        for subject, checked in [*rows, (OFFICIAL, None)]:
            line = [device.name, subject, *_correctness(checked)]
            for n in axes:
                one = _find(done.timings, device.name, subject, sizes.get((device.name, n)))
                line += _figures(one)
                if one is not None and one.status != "timed":
                    notes.append(f"{subject} on {device.name}, {one.workload}: {one.status}, {one.reason}")
                if one is not None and one.is_unsteady:
                    notes.append(
                        f"{subject} on {device.name}, {one.workload}: unsteady, {one.p20_ms:,.1f} to {one.p80_ms:,.1f} "
                        "ms (p20 to p80); the machine was busy with something else, do not quote these times"
                    )
            lines.append(line)
    text = [*_aligned(lines), ""]
    text += [
        "worst error: the largest of all cases over what is allowed there, that of plain PyTorch and a little more",
        f"ms: median of a step forward and backward; speed-up: over {OFFICIAL}; peak: extra memory of a step",
        *(f"{n}D on {device}: {_size(one)}" for (device, n), one in sizes.items()),
        *notes,
    ]
    failures = done.failures
    if failures:
        text += ["", f"{len(failures)} failed:"]
        text += [f"  {f.backend} on {f.device}, {f.case}: {f.message}" for f in failures[:most_failures]]
        if most_failures is not None and len(failures) > most_failures:
            text.append(f"  and {len(failures) - most_failures} more")
    else:
        text += ["", "everything usable passed"]
    return "\n".join(text)


def _correctness(checked: Checked | None) -> list[str]:
    if checked is None:
        return ["", ""]
    passed = len(checked.cases) - len(checked.failures)
    worst = checked.worst
    ratio = "-" if worst is None or worst.ratio is None else f"{worst.ratio:.2f}"
    return [f"{passed}/{len(checked.cases)}", ratio]


def _find(timings: Iterable[Timing], device: str, subject: str, workload: Case | None) -> Timing | None:
    if workload is None:
        return None
    wanted = (device, subject, workload.name)
    return next((one for one in timings if (one.device, one.subject, one.workload) == wanted), None)


def _figures(one: Timing | None) -> list[str]:
    if one is None:
        return ["-", "-", "-"]
    if one.p50_ms is None:
        return [one.status, "-", "-"]
    speedup = "-" if one.speedup is None else f"{one.speedup:.1f}x"
    peak = "-" if one.peak_mib is None else f"{one.peak_mib:,.1f}"
    return [f"{one.p50_ms:,.1f}" if one.p50_ms >= 10 else f"{one.p50_ms:.3f}", speedup, peak]


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    left = 2  # columns of words; the rest is numbers
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def _size(one: Case) -> str:
    full, native = ("x".join(map(str, size)) for size in (one.full, one.native[0]))
    finest = "x".join(map(str, one.native[-1]))
    return (
        f"{one.name}, batch {one.batch}, {one.classes} classes, {full}, {one.plan.num_maps} maps, "
        f"{len(one.native)} scales of {native} to {finest}"
    )


def record(
    found: dict[str, Any], done: Selftest | None, devices: Sequence[Device], names: Sequence[str]
) -> dict[str, Any]:
    """Everything as plain values that JSON can hold; a number that is not finite is null.

    Args:
        found: what `overview` returned.
        done: the selftest, or None when there was none.
        devices: those that were tested.
        names: of the cases that were chosen.

    Returns:
        format, the keys of `overview`, and selftest: None, or passed, seconds, load_after (environment holds
        that before), tf32, cases (names), checked (device,
        backend, passed, total, worst_ratio, worst_case, cases), workloads (by device, sizes), timings (see `Timing`)
        and failures (device, backend, case, message).
    """
    result: dict[str, Any] = {"format": FORMAT, **found, "selftest": None}
    if done is not None:
        result["selftest"] = {
            "passed": not done.failures,
            "seconds": round(done.seconds, 1),
            "load_after": load(),
            "tf32": False,
            "cases": list(names),
            "checked": [_checked(row) for row in done.checked],
            "workloads": {device.name: [_workload(one) for one in workloads.of(device)] for device in devices},
            "timings": [{name: _finite(value) for name, value in asdict(one).items()} for one in done.timings],
            "failures": [asdict(one) for one in done.failures],
        }
    return result


def _checked(row: Checked) -> dict[str, Any]:
    worst = row.worst
    return {
        "device": row.device,
        "backend": row.backend,
        "passed": len(row.cases) - len(row.failures),
        "total": len(row.cases),
        "worst_ratio": None if worst is None else _finite(worst.ratio),
        "worst_case": None if worst is None else worst.name,
        "cases": [_outcome(one) for one in row.cases],
    }


def _outcome(one: CaseOutcome) -> dict[str, Any]:
    return {name: _finite(value) for name, value in asdict(one).items()}


def _workload(one: Case) -> dict[str, Any]:
    names = ("name", "batch", "classes", "full", "native", "operators")
    return {name: getattr(one, name) for name in names} | {"dtype": str(one.dtype), "maps": one.plan.num_maps}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def issue(found: dict[str, Any], done: Selftest | None, devices: Sequence[Device], names: Sequence[str]) -> str:
    """One Markdown text to paste into an issue: what people read first, then the numbers as JSON, folded away.

    Of the cases only those that failed are in it, so that an issue has room for it (65,536 characters on GitHub).

    Args:
        found, done, devices, names: as `record` takes them.
    """
    values = record(found, done, devices, names)
    if values["selftest"] is not None:
        del values["selftest"]["cases"]
        del values["selftest"]["failures"]  # they are among the cases
        for row in values["selftest"]["checked"]:
            row["cases"] = [one for one in row["cases"] if not one["passed"]][:_MOST_OF_ONE]
    tested = "" if done is None else f"\n```\n{table(done, devices, _MOST_FAILURES)}\n```\n"
    numbers = json.dumps(values, allow_nan=False)
    return (
        "**What I did, what I expected, what happened instead:**\n\n\n"
        f"```\n{describe(found)}\n```\n{tested}\n"
        f"<details><summary>The same as JSON</summary>\n\n```json\n{numbers}\n```\n\n</details>\n"
    )


def write_text(path: Path, text: str) -> None:
    """Write a text, making the folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write(path: Path, values: dict[str, Any]) -> None:
    """Write plain values as JSON, making the folder if it is missing."""
    write_text(path, json.dumps(values, indent=2, allow_nan=False) + "\n")
