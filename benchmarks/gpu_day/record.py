"""What a GPU day leaves: a CSV file of rows, a JSON file with verdicts and the machine as well, a table for people."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .day import OK, STATUSES, Row

FORMAT = 1  # of the JSON file; raise it when a key changes its meaning
_COMMON = ("card", "driver", "torch", "cuda", "triton", "numpy", "python", "package", "commit", "date")
_MOST_BYTES = 2**18
COLUMNS = (*(field.name for field in fields(Row)), *_COMMON)


@dataclass(frozen=True)
class Spent:
    """How long a step took of how much it was given, in seconds."""

    step: str
    seconds: float
    limit: float


@dataclass(frozen=True)
class Verdict:
    """A promise, what was found, and whether it is kept: None where nothing was measured that could tell."""

    promise: str
    kept: bool | None
    figure: str


def write(
    folder: Path, machine: dict[str, Any], rows: Sequence[Row], spent: Sequence[Spent], verdicts: Sequence[Verdict]
) -> None:
    """Write `rows.csv` and `day.json` into a folder, which is made when it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    common = {name: machine.get(name, "") for name in _COMMON}
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows:
            writer.writerow({name: "" if value is None else value for name, value in asdict(row).items()} | common)
    whole = {
        "format": FORMAT,
        "machine": machine,
        "steps": [asdict(one) for one in spent],
        "verdicts": [asdict(one) for one in verdicts],
        "rows": [{name: _finite(value) for name, value in asdict(row).items()} for row in rows],
    }
    (folder / "day.json").write_text(json.dumps(whole, indent=1, allow_nan=False, default=str) + "\n")


def merge_logs(logs: Path, folder: Path) -> None:
    """Move what steps have left in a folder of their own to the end of `log.txt`: three files are all there is to send.

    Of a long text its end is kept, 256 KiB; programs are dropped.
    """
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        for one in sorted(path for path in logs.iterdir() if path.is_file()):
            data = one.read_bytes()
            if data and b"\0" not in data[:4096]:
                log.write(f"==== {one.name}\n{data[-_MOST_BYTES:].decode(errors='replace').rstrip()}\n")
            one.unlink()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(rows: Sequence[Row], spent: Sequence[Spent], verdicts: Sequence[Verdict]) -> str:
    """What became of each step, what failed, the times side by side, and a verdict on each promise last."""
    return "\n".join(
        [
            *_steps(rows, spent),
            *_failures(rows),
            *_times(rows),
            "",
            "promise",
            *(f"{_WORDS[one.kept]}  {one.promise}: {one.figure}" for one in verdicts),
        ]
    )


_WORDS = {True: "kept     ", False: "BROKEN   ", None: "not known"}
_MOST_FAILURES = 30


def _steps(rows: Sequence[Row], spent: Sequence[Spent]) -> list[str]:
    lines = [f"{'step':<12}{'s':>6}{'of':>6}  found"]
    for one in spent:
        own = [row for row in rows if row.step == one.step.partition(" ")[0]]
        counts = ((status, sum(row.status == status for row in own)) for status in STATUSES)
        found = ", ".join(f"{count} {status}" for status, count in counts if count)
        lines.append(f"{one.step:<12}{one.seconds:>6.0f}{one.limit:>6.0f}  {found or 'nothing'}")
    return lines


def _failures(rows: Sequence[Row]) -> list[str]:
    bad = [row for row in rows if row.status != OK]
    lines = [
        f"  {row.status}: {' '.join(filter(None, (row.step, row.subject, row.case, row.what)))}: {row.note[:200]}"
        for row in bad[:_MOST_FAILURES]
    ]
    more = [f"  and {len(bad) - _MOST_FAILURES} more, see rows.csv"] if len(bad) > _MOST_FAILURES else []
    return ["", "not ok", *lines, *more] if bad else ["", "all ok"]


def _times(rows: Sequence[Row]) -> list[str]:
    figures = {(row.case, row.subject, row.what): row for row in rows if row.step == "fast" and row.value is not None}
    who = list(dict.fromkeys(subject for _, subject, _ in figures))
    lines = [
        "",
        "ms of a step (median) and MiB beyond inputs and gradients",
        f"{'':<24}" + "".join(f"{n:>18}" for n in who),
    ]
    for case in dict.fromkeys(case for case, _, _ in figures):
        line = f"{case:<24}"
        for name in who:
            step, memory = figures.get((case, name, "step")), figures.get((case, name, "memory"))
            text = "-" if step is None or step.value is None else f"{step.value:.3f}"
            text += "" if memory is None or memory.value is None else f" | {memory.value:.0f}"
            line += f"{text:>18}"
        lines.append(line)
    return lines if figures else []
