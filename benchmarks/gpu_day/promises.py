"""What is promised of the GPU kernels, and whether the rows of a day keep it."""

from __future__ import annotations

from collections.abc import Sequence

from ..cases import map_bytes
from .day import BROKEN, NO_MEMORY, OK, SKIPPED, Row
from .problems import FIRST, REST
from .record import Verdict
from .right import BACKENDS

# The compiled loss of plain PyTorch is the opponent that counts: the official style is slower by far.
_OPPONENT = "compile"
# MiB that a step may take beyond inputs and gradients, and one map [B, C, *full] of float32 besides. README, Limits:
# scratch, sums and parameter gradients of 64 each, and what tiles write to be gathered, no more than about that map.
_EXTRA_MIB = 192.0
_NEAR = 2.0  # times the floor, the goal of the redesign


def judge(rows: Sequence[Row]) -> list[Verdict]:
    """A verdict for each promise, on the rows of all steps."""
    verdicts = [_built(rows)]
    for name in BACKENDS:
        verdicts.append(_all_ok(f"{name}: right on every shared case, to float64", rows, "right", name, "error"))
        verdicts.append(_all_ok(f"{name}: right at full size", rows, "right", name, "full size"))
        verdicts.append(_all_ok(f"{name}: at home on a GPU", rows, "features", name))
    for name in BACKENDS:
        verdicts.append(_faster(rows, name, _OPPONENT))
        verdicts.append(_faster(rows, name, "official"))
    verdicts.append(_lean(rows))
    verdicts.append(_largest(rows))
    verdicts.append(_near_the_floor(rows))
    for name in BACKENDS:
        tools = ("memcheck", "racecheck", "initcheck", "synccheck")
        verdicts.append(_all_ok(f"{name}: nothing found by compute-sanitizer", rows, "limits", name, *tools))
    return verdicts


def _of(rows: Sequence[Row], step: str, subject: str, *whats: str) -> list[Row]:
    return [
        row
        for row in rows
        if row.step == step and row.subject == subject and (not whats or row.what in (*whats, "can run"))
    ]


def _built(rows: Sequence[Row]) -> Verdict:
    own = [row for row in rows if row.step == "build"]
    bad = [row for row in own if row.status != OK]
    figure = "; ".join(f"{row.subject}: {row.status} {row.note}".strip() for row in bad or own)
    return Verdict("builds for the card that is there", not bad if own else None, figure or "not tried")


def _all_ok(promise: str, rows: Sequence[Row], step: str, subject: str, *whats: str) -> Verdict:
    """Every row is OK; where some were skipped and none failed, nobody knows."""
    own = _of(rows, step, subject, *whats)
    good = sum(row.status == OK for row in own)
    bad = [row for row in own if row.status in (*BROKEN, NO_MEMORY)]
    names = ", ".join(dict.fromkeys(row.case or row.what for row in bad))
    figure = f"{good} of {len(own)}" + (f"; not {names[:300]}" if bad else "")
    kept = False if bad else None if not own or any(row.status == SKIPPED for row in own) else True
    return Verdict(promise, kept, figure if own else "not tried")


def figures(rows: Sequence[Row], subject: str, what: str, step: str = "fast") -> dict[str, float]:
    """Case -> the figure of a subject."""
    own = _of(rows, step, subject, what)
    return {row.case: row.value for row in own if row.status == OK and row.value is not None}


def _faster(rows: Sequence[Row], name: str, opponent: str) -> Verdict:
    own, theirs = figures(rows, name, "step"), figures(rows, opponent, "step")
    ratios = {case: theirs[case] / own[case] for case in own if case in theirs}
    figure = ", ".join(f"{case} {ratio:.2f} x" for case, ratio in ratios.items())
    kept = min(ratios.values()) > 1 if ratios else None
    return Verdict(f"{name}: a step is faster than that of {opponent}", kept, figure or "not measured on one problem")


def _lean(rows: Sequence[Row]) -> Verdict:
    promise = f"a step takes less than {_EXTRA_MIB:.0f} MiB and one full-size map beyond inputs and gradients"
    maps = {one.name: map_bytes(one) / 2**20 for one in (*FIRST, *REST)}
    found = {
        f"{name} {case}": (mib, _EXTRA_MIB + maps.get(case, 0.0))
        for name in BACKENDS
        for case, mib in figures(rows, name, "memory").items()
    }
    if not found:
        return Verdict(promise, None, "not measured")
    worst = max(found, key=lambda name: found[name][0] / found[name][1])
    mib, limit = found[worst]
    return Verdict(promise, mib < limit, f"at most {mib:.1f} of {limit:.1f} MiB, {worst}")


def _largest(rows: Sequence[Row]) -> Verdict:
    """More patches fit than with the finest scale alone in plain PyTorch."""
    promise = "larger batches fit than with CE + Dice of the finest scale in plain PyTorch"
    own, theirs = (
        {row.what: row.value for row in rows if row.step == "small" and row.subject == who and row.value is not None}
        for who in ("lomix_cuda", "last_layer_plain")
    )
    both = {what: (count, theirs[what]) for what, count in own.items() if what in theirs}
    figure = ", ".join(f"{what}: {count:.0f} against {other:.0f}" for what, (count, other) in both.items())
    return Verdict(promise, all(a > b for a, b in both.values()) if both else None, figure or "not measured")


def _near_the_floor(rows: Sequence[Row]) -> Verdict:
    steps, floors = figures(rows, "cuda", "step"), figures(rows, "card", "floor of step", "limits")
    ratios = {case: ms / floors[case] for case, ms in steps.items() if case in floors}
    figure = ", ".join(f"{case} {ratio:.1f} x" for case, ratio in ratios.items())
    kept = max(ratios.values()) <= _NEAR if ratios else None
    return Verdict(
        f"cuda: a step takes at most {_NEAR:g} x its floor", kept, figure or "the card's rates are not known"
    )
