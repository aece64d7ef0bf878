"""The table of the largest batch for people, the file for machines, and what is promised about the figures."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import capability
from .large_batch_measure import Figures, Setting
from .large_batch_rows import FUSED, Patch, row
from .large_batch_search import AT_MOST, EXACTLY, MORE_THAN, Bound, Found, Trial
from .measure import percentiles
from .results import size_text

_OURS = "lomix_fused"
# Plainly written losses that the fused LoMix loss has to take less memory than, sample for sample.
_RIVALS = ("last_layer_plain", "deep_supervision_plain")
_FIGURES = ("p20_ms", "p50_ms", "p80_ms", "peak_mib", "before_mib", "empty_mib", "gradients_mib")
_SUMS = ("mib_a_sample", "extra_mib_a_sample", "fixed_mib")
COLUMNS = (
    *("row", "loss", "written", "figure", "B", "C", "L", "spatial", "native_scales", "dtype", "threads", "capability"),
    *("budget_gib", "margin_gib", "fits", "n", *_FIGURES, *_SUMS),
)


def table(rows: Sequence[Figures], setting: Setting) -> str:
    """The table in Markdown, with a line for each row of the run."""
    patch, small, budget = setting.patch.edge, setting.time_patch.edge, setting.budget_mib / 2**10
    edges = list(dict.fromkeys((patch, small)))
    header = [
        "loss",
        "written",
        f"largest batch in {budget:g} GiB",
        "MiB there",
        "MiB with one more",
        "MiB a sample",
        "beyond its inputs",
        "fixed MiB",
        "samples/s there",
        *(f"ms a step, {edge}^3" for edge in edges),
        f"x fused, {small}^3",
    ]
    lines = [_line(one, rows, edges) for one in rows]
    text = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * 2 + ["---:"] * (len(header) - 2), *lines)]
    slow = [
        f"{one.name} {one.first_ms[patch] / 1e3:.0f} s"
        for one in rows
        if row(one.name).compiles and one.first_ms.get(patch)
    ]
    notes = [f"First step of what is compiled, from nothing, in none of the times: {', '.join(slow)}."] if slow else []
    notes += [f"{one.name} failed: {one.failure.strip().splitlines()[-1]}" for one in rows if one.failure]
    return "\n".join(text) + "".join(f"\n\n{note}" for note in notes)


def _line(one: Figures, rows: Sequence[Figures], edges: Sequence[int]) -> list[str]:
    mine, found = row(one.name), one.found
    names = [mine.loss.replace("_", " "), mine.written]
    if found is None:
        measured = ["failed", *["-"] * 6]
    else:
        best, more = found.trial(found.largest), found.trial(found.largest + 1)
        speed = f"{1e3 * best.batch / best.step_ms:.3g}" if best else "-"
        bounds = (found.a_sample, found.extra_a_sample, found.fixed)
        largest = f"{'at least ' if found.open_ended else ''}{found.largest}"
        measured = [largest, _peak(best), _peak(more), *map(_mib, bounds), speed]
    base = next(
        (other for other in rows if row(other.name).loss == mine.loss and row(other.name).written == FUSED), None
    )
    ours, theirs = (None if base is None else _median(base, edges[-1])), _median(one, edges[-1])
    ratio = f"{theirs / ours:.2f}" if ours and theirs else "-"
    return [*names, *measured, *(_time(one, edge) for edge in edges), ratio]


def _time(one: Figures, edge: int) -> str:
    """Median, or why there is none: one sample does not fit, or the process of the timed steps was stopped."""
    if (ms := _median(one, edge)) is not None:
        return _number(ms)
    if one.failure:
        return "failed"
    return "does not fit" if one.found is not None and one.found.largest == 0 else "stopped"


def _median(one: Figures, edge: int) -> float | None:
    return percentiles(one.times[edge])[1] if one.times.get(edge) else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.{1 if value < 1000 else 0}f}"


def _peak(trial: Trial | None) -> str:
    return "-" if trial is None else f"{'more than ' if trial.stopped else ''}{trial.peak_mib:,.0f}"


def _mib(bound: Bound) -> str:
    return f"{'' if bound.word == EXACTLY else bound.word + ' '}{_number(bound.mib)}"


def judge(rows: Sequence[Figures]) -> list[tuple[bool | None, str]]:
    """The promises: whether each is kept (None: not measured), and a line about it."""
    by_name = {one.name: one.found for one in rows if one.found is not None}
    verdicts = [_leaner(by_name, rival) for rival in _RIVALS]
    text = "the fused LoMix loss fits at least as large a batch as every loss that is not fused"
    ours, others = by_name.get(_OURS), {n: one for n, one in by_name.items() if row(n).written != FUSED}
    if ours is None or not others:
        return [*verdicts, (None, text)]
    best = max(others, key=lambda name: others[name].largest)
    text = f"{text}: {ours.largest}, and at most {others[best].largest} ({best}) of {len(others)}"
    if others[best].open_ended:  # more of it may fit
        return [*verdicts, (None, text)]
    return [*verdicts, (ours.largest >= others[best].largest, text)]


def _leaner(by_name: Mapping[str, Found], rival: str) -> tuple[bool | None, str]:
    text = f"the fused LoMix loss takes less memory a sample beyond its inputs than {rival}"
    ours, theirs = by_name.get(_OURS), by_name.get(rival)
    if ours is None or theirs is None:
        return None, text
    mine, other = ours.extra_a_sample, theirs.extra_a_sample
    text = f"{text}: {_mib(mine)} and {_mib(other)} MiB"
    if mine.word == MORE_THAN or other.word == AT_MOST:  # bounds on the wrong side tell nothing
        return None, text
    return mine.mib < other.mib, text


def write_csv(path: Path, rows: Sequence[Figures], setting: Setting, common: Mapping[str, object]) -> int:
    """Write all figures of the rows, with the machine in every line, and return how many lines there are.

    The folder is made when missing. `figure` says what a line holds:
        trial: one step at batch B: its peak (of a "stopped" one what was held when it was stopped), what was resident
            before, its gradients, its time; `fits` is "yes", "no" or "stopped".
        largest: B is the largest batch, with what a sample takes and what is fixed where these are exact.
        step: times of steps at batch 1.
        first_step: the first step of a process at batch 1, compilation included.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [line for one in rows for line in _lines(one, setting)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, (*COLUMNS, *common))
        writer.writeheader()
        writer.writerows({**line, **common} for line in lines)
    return len(lines)


def _lines(one: Figures, setting: Setting) -> list[dict[str, object]]:
    lines = []
    if one.found is not None:
        for trial in one.found.trials:
            word = "stopped" if trial.stopped else "yes" if trial.fits(setting.budget_mib) else "no"
            values = {name: getattr(trial, name) or "" for name in _FIGURES if hasattr(trial, name)}
            head = _head(one, "trial", setting.patch, trial.batch, setting)
            lines.append(head | values | {"fits": word, "n": 1, "p50_ms": trial.step_ms or ""})
        bounds = (one.found.a_sample, one.found.extra_a_sample, one.found.fixed)
        sums = {name: bound.mib if bound.word == EXACTLY else "" for name, bound in zip(_SUMS, bounds, strict=True)}
        lines.append(_head(one, "largest", setting.patch, one.found.largest, setting) | sums)
    for patch in dict.fromkeys((setting.patch, setting.time_patch)):
        if times := one.times.get(patch.edge):
            percentile = dict(zip(_FIGURES[:3], percentiles(times), strict=True))
            lines.append(_head(one, "step", patch, 1, setting) | percentile | {"n": len(times)})
        if (first := one.first_ms.get(patch.edge)) is not None:
            lines.append(_head(one, "first_step", patch, 1, setting) | {"n": 1, "p50_ms": first})
    return [{name: f"{v:.4f}" if isinstance(v, float) else v for name, v in line.items()} for line in lines]


def _head(one: Figures, figure: str, patch: Patch, batch: int, setting: Setting) -> dict[str, object]:
    mine = row(one.name)
    case = patch.case(mine.loss, 1)
    return {
        **{"row": one.name, "loss": mine.loss, "written": mine.written, "figure": figure},
        **{"B": batch, "C": patch.classes, "L": patch.scales, "spatial": size_text(case.full)},
        "native_scales": " ".join(map(size_text, case.native)),
        **{"dtype": "float32", "threads": setting.threads, "capability": capability.in_use()},
        **{"budget_gib": setting.budget_mib / 2**10, "margin_gib": setting.margin_mib / 2**10},
    }
