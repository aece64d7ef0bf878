"""The CSV file: every figure with the machine, the versions and the commit it came from; written here and read back."""

from __future__ import annotations

import csv
import importlib.metadata
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

from lomix_fast import _build_info
from lomix_fast.testing.environment import environment

from .measure import Measurement

FOLDER = Path(__file__).resolve().parent / "results"
_SIZES = ("spatial", "native_scales")
COLUMNS = (
    *("subject", "case", "contender", "B", "C", "L", "maps", *_SIZES, "dtype", "direction", "threads", "capability"),
    *("p20_ms", "p50_ms", "p80_ms", "n", "extra_peak_mib", "gradients_mib"),
    *("cores", "cpu_model", "cpu_capability", "torch", "triton", "python", "compiler", "lomix_fast", "commit", "date"),
)


class ResultsError(ValueError):
    """A file is no results file; the message names it and the line."""


def machine() -> dict[str, object]:
    """The columns that are the same in all rows of a run."""
    here = environment()
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    return {
        "cores": here["cores"],
        "cpu_model": here["cpu"],
        "cpu_capability": here["cpu_capability"],
        "torch": here["torch"],
        "triton": triton,
        "python": here["python"],
        "compiler": _build_info.read().get("compiler", ""),
        "lomix_fast": here["package"],
        "commit": here["commit"] or "",
        "date": here["date"],
    }


def row(m: Measurement, common: Mapping[str, object]) -> dict[str, object]:
    """One line of the file."""
    return {
        **{"subject": m.subject, "case": m.case, "contender": m.contender},
        **{"B": m.batch, "C": m.classes, "L": m.scales, "maps": m.maps},
        **{"spatial": size_text(m.full), "native_scales": " ".join(map(size_text, m.native)), "dtype": m.dtype},
        **{"direction": m.direction, "threads": m.threads, "capability": m.capability, "n": m.n},
        **{name: _text(getattr(m, name)) for name in ("p20_ms", "p50_ms", "p80_ms", "extra_peak_mib", "gradients_mib")},
        **common,
    }


def write_csv(path: Path, measurements: Sequence[Measurement], common: Mapping[str, object]) -> None:
    """Write all rows with a header; the folder is made when missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(row(m, common) for m in measurements)


def read_csv(path: Path) -> tuple[list[Measurement], dict[str, str]]:
    """Read what `write_csv` wrote, now or before subjects were introduced: a case was its own subject then.

    Returns:
        The measurements, and the columns that are the same in all of them.

    Raises:
        ResultsError: it has no rows, or one that makes no sense.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ResultsError(f"{path}: got no rows, expected a file written by python -m benchmarks")
    found = []
    for line, one in enumerate(rows, start=2):
        try:
            found.append(_measurement(one))
        except (KeyError, ValueError, TypeError) as error:
            raise ResultsError(
                f"{path}, line {line}: {type(error).__name__}: {error}; expected a file written by python -m benchmarks"
            ) from error
    return found, {name: rows[0].get(name) or "" for name in machine()}


def _measurement(one: Mapping[str, str]) -> Measurement:
    scales = int(one["L"])
    return Measurement(
        subject=one.get("subject") or one["case"],
        case=one["case"],
        contender=one["contender"],
        batch=int(one["B"]),
        classes=int(one["C"]),
        scales=scales,
        maps=int(one["maps"]) if "maps" in one else scales + 4 * (2**scales - 1 - scales),
        full=_size(one["spatial"]),
        native=tuple(map(_size, one["native_scales"].split())),
        dtype=one["dtype"],
        direction=one["direction"],
        threads=int(one["threads"]),
        capability=one["capability"],
        n=int(one["n"]),
        p20_ms=_number(one["p20_ms"]),
        p50_ms=_number(one["p50_ms"]),
        p80_ms=_number(one["p80_ms"]),
        extra_peak_mib=_number(one["extra_peak_mib"]),
        gradients_mib=_number(one.get("gradients_mib", "")),
    )


def default_path() -> Path:
    """results/bench-<UTC date and time>.csv, so that no run overwrites another."""
    return FOLDER / f"bench-{datetime.now(timezone.utc):%Y%m%d-%H%M%S}.csv"


def size_text(size: Sequence[int]) -> str:
    """(96, 96, 96) -> "96x96x96"."""
    return "x".join(map(str, size))


def _size(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split("x")) if text else ()


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _number(text: str) -> float | None:
    return float(text) if text else None
