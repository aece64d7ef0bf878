"""The table of a subject that a person reads: medians, spread, cost per pixel, and ratios against the first line."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .measure import DIRECTIONS, Measurement
from .results import size_text

# What may tell participants apart: a column each where they differ, words above the table where they do not.
_SETTINGS: dict[str, Callable[[Measurement], str]] = {
    "size": lambda m: size_text(m.full),
    "B": lambda m: str(m.batch),
    "C": lambda m: str(m.classes),
    "L": lambda m: str(m.scales),
    "maps": lambda m: str(m.maps),
    "native": lambda m: ", ".join(map(size_text, m.native)),
    "dtype": lambda m: m.dtype,
    "threads": lambda m: str(m.threads),
    "ISA": lambda m: m.capability,
}
_FIGURES = (
    *("forward ms", "backward ms", "step ms", "p20 - p80", "n", "x step per pixel", "ns/pixel", "ps/(pixel map class)"),
    *("peak MiB", "without gradients", "x peak", "first step s"),
)
# Not worth a column of its own: native sizes follow from the full one in sweeps.
_ONLY_ABOVE = ("native",)
# A column for the name of the problem, where settings do not tell lines apart.
_CASE = "case"


def rows(measurements: Sequence[Measurement]) -> tuple[list[str], list[list[str]], dict[str, str]]:
    """The table of ONE subject.

    Returns:
        Header, lines, and what all lines have in common by name. Ratios ("x") are to the first line.
    """
    participants: dict[tuple[str, ...], dict[str, Measurement]] = {}
    for m in measurements:
        key = (m.case, m.contender, *(setting(m) for setting in _SETTINGS.values()))
        participants.setdefault(key, {})[m.direction] = m
    steps = [found["step"] for found in participants.values()]
    common = {name: text(steps[0]) for name, text in _SETTINGS.items() if len({text(m) for m in steps}) == 1}
    varied = [name for name in _SETTINGS if name not in common and name not in _ONLY_ABOVE]
    told = {
        (found["step"].contender, *(_SETTINGS[n](found["step"]) for n in varied)) for found in participants.values()
    }
    if len(told) < len(participants):
        varied.insert(0, _CASE)
    base = next(iter(participants.values()))
    lines = [
        [found["step"].contender, *(_cell(name, found["step"]) for name in varied), *_figures(found, base)]
        for found in participants.values()
    ]
    return ["contender", *varied, *_FIGURES], lines, common


def _cell(name: str, measurement: Measurement) -> str:
    return measurement.case if name == _CASE else _SETTINGS[name](measurement)


def _figures(found: dict[str, Measurement], base: dict[str, Measurement]) -> list[str]:
    step, memory = found["step"], found["memory"]
    return [
        *(_text(found[d].p50_ms) for d in DIRECTIONS),
        f"{_text(step.p20_ms)} - {_text(step.p80_ms)}",
        str(step.n),
        _times(step.ns_per_pixel, base["step"].ns_per_pixel),
        _text(step.ns_per_pixel),
        _text(step.ps_per_entry),
        _text(memory.extra_peak_mib),
        _text(memory.mib_over_gradients),
        _times(memory.extra_peak_mib, base["memory"].extra_peak_mib),
        _text((found["first_step"].p50_ms or 0) / 1e3),
    ]


def describe(common: dict[str, str]) -> str:
    """What all lines of a table have in common, in words."""
    return ", ".join(f"{name} {value}" for name, value in common.items())


def table(title: str, measurements: Sequence[Measurement]) -> str:
    """Text for the measurements of one subject."""
    header, lines, common = rows(measurements)
    every = [header, *lines]
    widths = [max(len(line[i]) for line in every) for i in range(len(header))]
    text = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in every
    ]
    return "\n".join([title, describe(common), "medians; x: times as much as the first line", *text])


def _text(value: float | None) -> str:
    """Four digits or more of a figure."""
    if value is None:
        return "-"
    return f"{value:.{2 if value < 100 else 1 if value < 1000 else 0}f}"


def _times(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f}" if value is not None and base else "-"
