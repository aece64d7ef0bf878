"""Tables and pictures out of results files: `python -m benchmarks.report`, from the top of the repository."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import build_cpp

from . import build_time
from .measure import Measurement
from .plots import DRAWERS
from .promises import PROMISES
from .results import FOLDER, ResultsError, read_csv
from .sweeps import SUBJECTS
from .table import describe, rows

OK, USAGE = 0, 2
_ROOT = build_cpp.ROOT
_TITLES = {name: one.title for name, one in SUBJECTS.items()} | {build_time.NAME: build_time.TITLE}
_HEAD = """<!-- Made by `make bench-report` out of results files; changes made here are lost. -->
# Benchmarks

The lines of a table took turns in one run, each in a process of its own, after loss and gradients had been checked
against the float64 reference. Times are medians; thin bars reach from the 20th to the 80th percentile. A step is
forward and backward. Peak memory is what the resident set rises by during a step: gradients of the logits are part of
it, inputs are not. How it is measured: [benchmarks/README.md](../benchmarks/README.md).
"""


@dataclass(frozen=True)
class Source:
    """The newest figures of one subject, and where they come from."""

    path: Path
    run: dict[str, str]
    measurements: list[Measurement]

    @property
    def machine(self) -> str:
        """One line about the machine, for a picture."""
        run = self.run
        cores = f"{run['cores']} core{'s' if run['cores'] != '1' else ''}"
        commit = run["commit"][:10] + ("-dirty" if run["commit"].endswith("-dirty") else "")
        isa = run["cpu_capability"] or self.measurements[0].capability
        return f"{run['cpu_model']}, {cores}, {isa}, torch {run['torch']}, commit {commit}, {run['date'][:10]}"


def newest(paths: Sequence[Path]) -> dict[str, Source]:
    """For every subject the figures of the newest run that has it, in the order of `SUBJECTS`.

    Raises:
        ResultsError: a file is no results file.
    """
    found: dict[str, Source] = {}
    for path in paths:
        measurements, run = read_csv(path)
        for subject in dict.fromkeys(m.subject for m in measurements):
            if subject not in found or run["date"] >= found[subject].run["date"]:
                found[subject] = Source(path, run, [m for m in measurements if m.subject == subject])
    order = [*SUBJECTS, build_time.NAME]
    return dict(sorted(found.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def write_report(sources: dict[str, Source], page: Path, figures: Path) -> list[Path]:
    """Write the page and a picture for every subject that has one.

    Args:
        sources: by subject, from `newest`.
        page: Markdown file.
        figures: folder of the pictures, named by subject.

    Returns:
        All files written.
    """
    page.parent.mkdir(parents=True, exist_ok=True)
    figures.mkdir(parents=True, exist_ok=True)
    written = []
    parts = [_HEAD, _sources(sources), _promises(sources)]
    for subject, source in sources.items():
        title = _TITLES.get(subject, "")
        part = [f"## {subject}: {title}" if title else f"## {subject}", source.machine + "."]
        if subject in DRAWERS:
            picture = figures / f"{subject}.png"
            DRAWERS[subject](picture, title, source.machine, source.measurements)
            part.append(f"![{title}]({_relative(picture, page.parent)})")
            written.append(picture)
        part.append(_build(source) if subject == build_time.NAME else _table(source))
        parts.append("\n\n".join(part) + "\n")
    page.write_text("\n".join(parts), encoding="utf-8")
    return [page, *written]


def _sources(sources: dict[str, Source]) -> str:
    header = ["subject", "file", "processor", "cores", "commit", "date"]
    lines = [
        [name, s.path.name, s.run["cpu_model"], s.run["cores"], s.run["commit"] or "unknown", s.run["date"]]
        for name, s in sources.items()
    ]
    return f"## Where the figures come from\n\n{_markdown(header, lines, left=len(header))}\n"


def _promises(sources: dict[str, Source]) -> str:
    """Every promise judged on the newest figures of its subject."""
    lines = []
    for promise in PROMISES:
        source = sources.get(promise.subject)
        verdict = promise.judge(source.measurements if source else [])
        word = {True: "kept", False: "**broken**", None: "not measured"}[verdict.kept]
        lines.append([word, verdict.text])
    return f"## Promises\n\n{_markdown(['', 'promise: figure'], lines, left=2)}\n"


def _table(source: Source) -> str:
    header, lines, common = rows(source.measurements)
    return f"{describe(common)}. x: times as much as the first line.\n\n{_markdown(header, lines)}"


def _build(source: Source) -> str:
    lines = [
        [m.capability, str(m.threads), source.run["compiler"] or "unknown", f"{(m.p50_ms or 0) / 1e3:.0f}"]
        for m in source.measurements
    ]
    return _markdown(["capabilities", "jobs", "compiler", "seconds"], lines)


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table whose first `left` columns are words, the rest numbers."""
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))


def _relative(picture: Path, folder: Path) -> str:
    try:
        return picture.resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        return picture.resolve().as_posix()


def main(arguments: Sequence[str] | None = None) -> int:
    """Write docs/benchmarks.md and docs/figures/*.png; returns the exit status, 2 when there is nothing to read."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="results files; default all in benchmarks/results")
    parser.add_argument("--page", type=Path, default=_ROOT / "docs" / "benchmarks.md", help="Markdown file to write")
    parser.add_argument("--figures", type=Path, help="folder of the pictures; default figures/ beside the page")
    given = parser.parse_args(arguments)
    paths = given.files or sorted(path for path in FOLDER.glob("*.csv") if not path.name.startswith(("gpu-", "cuda-")))
    if not paths:
        parser.error(f"no results files in {FOLDER}; make bench writes them")
    try:
        sources = newest(paths)
    except (OSError, ResultsError) as error:
        parser.error(str(error))
    for path in write_report(sources, given.page, given.figures or given.page.parent / "figures"):
        print(path)
    return OK


if __name__ == "__main__":
    sys.exit(main())
