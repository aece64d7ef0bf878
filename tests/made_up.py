"""Benchmark figures that nobody measured, for tests of what is made of them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks.measure import Measurement
from benchmarks.subjects import Entry
from benchmarks.sweeps import SUBJECTS


def figure(subject: str, entry: Entry, direction: str, **values: object) -> Measurement:
    """One figure of a participant; threads default to 2, capability to AVX512."""
    case = entry.one.case
    known = (subject, case.name, entry.contender, case.batch, case.classes, len(case.native), case.plan.num_maps)
    setting = (entry.threads or 2, entry.capability or "AVX512")
    return Measurement(*known, case.full, case.native, "float32", direction, *setting, 5, **values)  # type: ignore[arg-type]


def figures(subject: str, entry: Entry, ms: float, mib: float = 10.0, gradients: float = 1.0) -> list[Measurement]:
    """All rows of a participant: half of `ms` forward and half backward."""
    times = {"forward": ms / 2, "backward": ms / 2, "step": ms, "first_step": 2 * ms}
    rows = [figure(subject, entry, d, p20_ms=0.9 * t, p50_ms=t, p80_ms=1.2 * t) for d, t in times.items()]
    return [*rows, figure(subject, entry, "memory", extra_peak_mib=mib, gradients_mib=gradients)]


def contender_figures(subject: str, **ms: float) -> list[Measurement]:
    """Contenders on the case called like the subject, by their step times."""
    one = SUBJECTS[subject].entries[0].one
    return [m for name, t in ms.items() for m in figures(subject, Entry(one, name), t)]


def sweep_figures(subject: str, ns_per_pixel: float = 100.0, **changed: float) -> list[Measurement]:
    """Every participant of a subject at the same cost a pixel, but for the cases named, which cost so many ns."""
    rows = []
    for entry in SUBJECTS[subject].entries:
        case = entry.one.case
        ns = changed.get(case.name, ns_per_pixel)
        rows += figures(subject, entry, ns * case.batch * case.pixels / 1e6)
    return rows


def build_figure(seconds: float) -> Measurement:
    """The one figure of the build."""
    first = contender_figures("synapse2d", fused=1.0)[0]
    ms = 1e3 * seconds
    nothing = {"case": "", "batch": 0, "classes": 0, "scales": 0, "maps": 0, "full": (), "native": (), "dtype": ""}
    named = {"subject": "build", "contender": "build_cpp", "direction": "build", "n": 1}
    return replace(first, **nothing, **named, p20_ms=ms, p50_ms=ms, p80_ms=ms)
