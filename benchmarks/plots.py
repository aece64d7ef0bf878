"""The pictures of the report: one function for each kind, figures of one subject in, a PNG file out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from .measure import Measurement
from .results import size_text

# Told apart by the colour-blind too; a contender that is not listed is grey.
_COLOURS = {
    "fused": "#0072b2",
    "compile": "#e69f00",
    "plain": "#56b4e9",
    "eager": "#009e73",
    "official": "#d55e00",
    "exp_floor": "#666666",
    "exp_floor_accurate": "#999999",
    "exp_floor_own": "#bbbbbb",
}
_NAMES = {
    "fused": "lomix_fast",
    "compile": "torch.compile of plain",
    "plain": "plain PyTorch",
    "eager": "lomix_fast, eager",
    "official": "official-style",
    "exp_floor": "its exponentials alone",
    "exp_floor_accurate": "its exponentials, accurate",
    "exp_floor_own": "its exponentials, by its own exp2",
}
_WIDTH = 8.4


def name_of(contender: str) -> str:
    """How people are told who it is."""
    return _NAMES.get(contender, contender)


def _colour(contender: str) -> str:
    return _COLOURS.get(contender, "#bbbbbb")


def _figure(title: str, subtitle: str, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=12)
    figure.supxlabel(subtitle, fontsize=8, color="#555555")
    return figure, list(axes)


def _spread(measurements: Sequence[Measurement], scale: Callable[[Measurement], float]) -> list[list[float]]:
    """Lengths of the error bars below and above the medians, for p20 and p80."""
    triples = [((m.p20_ms or 0), (m.p50_ms or 0), (m.p80_ms or 0), scale(m)) for m in measurements]
    return [[(p50 - p20) * k for p20, p50, _, k in triples], [(p80 - p50) * k for _, p50, p80, k in triples]]


def draw_comparison(path: Path, title: str, subtitle: str, measurements: Sequence[Measurement]) -> None:
    """Bars of step time and of extra peak memory, both on logarithmic axes, a line for each contender."""
    steps = [m for m in measurements if m.direction == "step"]
    peaks = [m for m in measurements if m.direction == "memory" and not m.contender.startswith("exp_floor")]
    figure, (left, right) = _figure(title, subtitle, 0.42 * len(steps) + 1.7, columns=2)
    for axes, found, value, unit in (
        (left, steps, lambda m: m.p50_ms, "step, ms (log scale)"),
        (right, peaks, lambda m: m.extra_peak_mib, "extra peak, MiB (log scale)"),
    ):
        values = [max(value(m) or 0, 1e-3) for m in found]
        bars = axes.barh([name_of(m.contender) for m in found], values, color=[_colour(m.contender) for m in found])
        axes.bar_label(bars, [f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in values], padding=3, fontsize=9)
        axes.set(xscale="log", xlabel=unit, xlim=(min(values) / 2, max(values) * 5))
        axes.invert_yaxis()
    medians, spread = [m.p50_ms or 0 for m in steps], _spread(steps, lambda m: 1)
    left.errorbar(medians, range(len(steps)), xerr=spread, fmt="none", ecolor="black", elinewidth=1)
    figure.savefig(path, dpi=110)


def draw_pixels(path: Path, title: str, subtitle: str, measurements: Sequence[Measurement]) -> None:
    """Nanoseconds a pixel against the pixels of one sample."""
    steps = sorted((m for m in measurements if m.direction == "step"), key=lambda m: math.prod(m.full))
    figure, (axes,) = _figure(title, subtitle, 4.2)
    x = [math.prod(m.full) for m in steps]
    _line(axes, x, steps, lambda m: m.ns_per_pixel or 0, lambda m: 1e6 / m.pixels)
    axes.set(xscale="log", xlabel="size of one sample (batch)", ylabel="step, ns per pixel", ylim=(0, None))
    axes.set_xticks(x, [f"{size_text(m.full)}\n({m.batch})" for m in steps])
    axes.xaxis.set_minor_locator(NullLocator())
    figure.savefig(path, dpi=110)


def draw_scales(path: Path, title: str, subtitle: str, measurements: Sequence[Measurement]) -> None:
    """Nanoseconds a pixel against L, with the exponentials alone for comparison, on a logarithmic axis."""
    figure, (axes,) = _figure(title, subtitle, 4.2)
    ticks: dict[int, str] = {}
    for contender, steps in _by_contender(measurements):
        steps = sorted(steps, key=lambda m: m.scales)
        ticks |= {m.scales: f"{m.scales}\n{m.maps} maps" for m in steps}
        _line(
            axes, [m.scales for m in steps], steps, lambda m: m.ns_per_pixel or 0, lambda m: 1e6 / m.pixels, contender
        )
    axes.set(yscale="log", xlabel="scales L", ylabel="step, ns per pixel (log scale)")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def draw_classes(path: Path, title: str, subtitle: str, measurements: Sequence[Measurement]) -> None:
    """Picoseconds for each (pixel, map, class) against C, with the exponentials alone for comparison."""
    figure, (axes,) = _figure(title, subtitle, 4.2)
    ticks: list[int] = []
    for contender, steps in _by_contender(measurements):
        steps = sorted(steps, key=lambda m: m.classes)
        ticks = [m.classes for m in steps]
        scale = lambda m: 1e9 / (m.pixels * m.maps * m.classes)  # noqa: E731
        _line(axes, ticks, steps, lambda m: m.ps_per_entry or 0, scale, contender)
    axes.set(xscale="log", xlabel="classes C", ylabel="step, ps per (pixel, map, class)", ylim=(0, None))
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def draw_threads(path: Path, title: str, subtitle: str, measurements: Sequence[Measurement]) -> None:
    """How many times faster than one thread, against threads; the dotted line is what could be had at best."""
    figure, (axes,) = _figure(title, subtitle, 4.2)
    counts: list[int] = []
    for contender, steps in _by_contender(measurements):
        steps = sorted(steps, key=lambda m: m.threads)
        counts = [m.threads for m in steps]
        alone = steps[0].p50_ms or math.nan
        gains = [alone / (m.p50_ms or math.nan) for m in steps]
        label = f"{name_of(contender)}: {gains[-1]:.2f} with {counts[-1]}"
        axes.plot(counts, gains, marker="o", color=_colour(contender), label=label)
    axes.plot(counts, counts, linestyle=":", color="black", label="as many times as threads", zorder=0)
    axes.set(xlabel="threads", ylabel="times faster than one thread", xticks=counts)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def draw_isa(path: Path, title: str, subtitle: str, measurements: Sequence[Measurement]) -> None:
    """Bars of the step time of each copy of the kernels."""
    steps = [m for m in measurements if m.direction == "step"]
    figure, (axes,) = _figure(title, subtitle, 0.42 * len(steps) + 1.7)
    values = [m.p50_ms or 0 for m in steps]
    bars = axes.barh([m.capability for m in steps], values, color=_colour("fused"), xerr=_spread(steps, lambda m: 1))
    axes.bar_label(bars, [f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in values], padding=8, fontsize=9)
    axes.set(xlabel="step, ms")
    axes.margins(x=0.12)
    axes.invert_yaxis()
    figure.savefig(path, dpi=110)


DRAWERS: dict[str, Callable[[Path, str, str, Sequence[Measurement]], None]] = {
    "synapse2d": draw_comparison,
    "patch3d": draw_comparison,
    "tiny2d": draw_comparison,
    "tiny3d": draw_comparison,
    "pixels2d": draw_pixels,
    "pixels3d": draw_pixels,
    "scales": draw_scales,
    "classes": draw_classes,
    "threads": draw_threads,
    "isa": draw_isa,
}


def _by_contender(measurements: Sequence[Measurement]) -> list[tuple[str, list[Measurement]]]:
    steps = [m for m in measurements if m.direction == "step"]
    names = dict.fromkeys(m.contender for m in steps)
    return [(name, [m for m in steps if m.contender == name]) for name in names]


def _line(
    axes: Axes,
    x: Sequence[float],
    steps: Sequence[Measurement],
    value: Callable[[Measurement], float],
    scale: Callable[[Measurement], float],
    contender: str = "fused",
) -> None:
    """Medians of one contender with bars from p20 to p80; `scale` turns milliseconds into the unit of `value`."""
    y, spread = [value(m) for m in steps], _spread(steps, scale)
    colour, name = _colour(contender), name_of(contender)
    axes.errorbar(x, y, yerr=spread, marker="o", markersize=5, capsize=3, color=colour, label=name)
