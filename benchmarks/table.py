"""The table a person reads: medians, spread, and ratios against the fused kernel."""

from __future__ import annotations

from collections.abc import Sequence

from .contenders import BASELINE
from .measure import DIRECTIONS, Measurement
from .results import describe

_HEADER = (
    *("contender", "forward ms", "backward ms", "step ms", "(p20 - p80)", "n", "x forward", "x backward", "x step"),
    *("peak MiB", "x peak", "first step s"),
)


def table(measurements: Sequence[Measurement]) -> str:
    """Text for the measurements of ONE case. "x" columns are ratios to fused, or to the first when it is not there."""
    by_name: dict[str, dict[str, Measurement]] = {}
    for m in measurements:
        by_name.setdefault(m.contender, {})[m.direction] = m
    base = BASELINE if BASELINE in by_name else next(iter(by_name))
    rows = [_HEADER, *(_row(name, found, by_name[base]) for name, found in by_name.items())]
    widths = [max(len(r[i]) for r in rows) for i in range(len(_HEADER))]
    lines = [
        "  ".join([r[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(r[1:], widths[1:], strict=True))])
        for r in rows
    ]
    return "\n".join([describe(measurements[0].case), f"medians; x: times as much as {base}", *lines])


def _row(name: str, found: dict[str, Measurement], base: dict[str, Measurement]) -> tuple[str, ...]:
    step = found["step"]
    peak, base_peak = found["memory"].extra_peak_mib, base["memory"].extra_peak_mib
    assert peak is not None and base_peak is not None
    return (
        name,
        *(f"{found[d].p50_ms:.2f}" for d in DIRECTIONS),
        f"({step.p20_ms:.2f} - {step.p80_ms:.2f})",
        str(step.n),
        *(_times(found[d].p50_ms, base[d].p50_ms) for d in DIRECTIONS),
        f"{peak:.1f}",
        _times(peak, base_peak),
        f"{(found['first_step'].p50_ms or 0) / 1e3:.2f}",
    )


def _times(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f}" if value is not None and base else "-"
