"""Question 2 of a GPU day: is the loss at home on a GPU? Runs tests/test_gpu.py, a few tests a process.

A test that fails may leave the device of its process unusable, so it ends the process (pytest -x), and the tests that
it had yet to run get another. One that hangs or crashes takes down nothing but itself.
"""

from __future__ import annotations

import ast
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from . import build
from .child import visible
from .day import CRASHED, FAILED, HUNG, OK, SKIPPED, Clock, Day, Emit, Row
from .workers import variables

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests" / "test_gpu.py"
BACKENDS = ("cuda", "triton")  # what the tests' `impl` is
ALONE = ("compiled", "without_warm_up")  # in the name of those that get a process of their own, and start first
TEST_SECONDS = 60.0  # for one test; twice that for those that run alone, of which some compile
START_SECONDS = 60.0  # more, for the first of a process: imports, and the start of CUDA
REPORT = "LOMIX_FAST_FEATURES_REPORT"  # variable that names the file where a process says how it gets on


def run(
    day: Day,
    clock: Clock,
    emit: Emit,
    *,
    tests: Path = TESTS,
    per_process: int | None = None,
    test_seconds: float = TEST_SECONDS,
) -> None:
    """Run every test and emit a row for each: ("features", backend, "", name of the test, status).

    The text of every failure goes to day.out/features.log.

    Args:
        day, clock, emit: as every step of a GPU day.
        tests: file of tests.
        per_process: tests that share a process, in turn; None for a number that suits the machine.
        test_seconds: for one test, twice that for one of `ALONE`; one that takes longer is HUNG, one that still
            runs when time is up is SKIPPED.
    """
    clock, names = Clock(clock.left, clock), test_names(tests)
    # A process takes seconds to start, which a rehearsal on two cores has not got for every test.
    share = per_process or (-(-len(names) // 2) if day.rehearse else 5)
    waiting: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
    for names_of_one in in_processes(names, share, day.rehearse):
        waiting.put(names_of_one)
    lock = threading.Lock()

    with (day.out / "features.log").open("w") as log:

        def report(name: str, found: Found) -> None:
            function, _, parameter = name.partition("[")
            subject = parameter.rstrip("]") or "eager"
            with lock:
                emit(Row("features", subject, "", function.removeprefix("test_"), found.status, note=found.note))
                if found.text:
                    print(f"{'=' * 20} {name}: {found.status}\n{found.text}\n", file=log, flush=True)

        def work() -> None:
            while True:
                try:
                    left = waiting.get_nowait()
                except queue.Empty:
                    return
                while left:
                    done = dict(_one_process(tests, left, environment(day), clock, test_seconds))
                    for name, found in done.items():
                        report(name, found)
                    left = [name for name in left if name not in done]

        workers = [threading.Thread(target=work) for _ in range(max(1, min(day.workers, 8)))]
        for worker in workers:
            worker.start()
        try:
            for worker in workers:
                worker.join()
        finally:
            clock.deadline = 0.0  # where this is interrupted, the workers kill their processes and come to an end
            for worker in workers:
                worker.join()


def test_names(tests: Path) -> list[str]:
    """Names of the tests of a file, with each backend for those that take `impl`, without starting pytest."""
    found = []
    for node in ast.parse(tests.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            takes = {argument.arg for argument in node.args.args}
            found += [f"{node.name}[{impl}]" for impl in BACKENDS] if "impl" in takes else [node.name]
    return found


def in_processes(names: Sequence[str], share: int, rehearse: bool) -> list[list[str]]:
    """Deal out tests to processes, those first that take longest; neighbours, which are alike, to different ones."""
    alone = [] if rehearse else [name for name in names if _is_alone(name)]
    others = [name for name in names if name not in alone]
    count = max(1, -(-len(others) // share))
    return [[name] for name in alone] + [others[i::count] for i in range(count) if others[i::count]]


def _is_alone(name: str) -> bool:
    return any(word in name for word in ALONE)


def environment(day: Day) -> dict[str, str]:
    """Environment of the processes: the package with what `build` has made of it comes before that of the sources."""
    found = {**os.environ, **variables(day), **visible(day.device), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    found |= build.environment(day)
    path = [one for one in found.get("PYTHONPATH", "").split(os.pathsep) if one]
    found["PYTHONPATH"] = os.pathsep.join(path if str(ROOT) in path else [*path, str(ROOT)])
    return found


@dataclass
class Found:
    """What became of a test: status, the reason in a line, and all that there is to read about it."""

    status: str
    note: str = ""
    text: str = ""


@dataclass
class _Progress:
    """What a process has said so far: tests that have ended, and the one that is running, since when."""

    ended: dict[str, Found] = field(default_factory=dict)
    current: str | None = None
    since: float = field(default_factory=time.monotonic)

    def read(self, lines: Iterator[str]) -> None:
        for line in lines:
            said = json.loads(line)
            if "status" in said:
                self.ended[said["name"]] = Found(said["status"], said["note"], said["text"])
                self.current = None
            else:
                self.current = said["name"]
            self.since = time.monotonic()


def _one_process(
    tests: Path, names: Sequence[str], variables: dict[str, str], clock: Clock, test_seconds: float
) -> Iterator[tuple[str, Found]]:
    """Run tests in turn in one process until one of them is not ok. At least one of the names is accounted for."""
    if clock.left <= 0:
        for name in names:
            yield name, Found(SKIPPED, "no time left")
        return
    with tempfile.TemporaryDirectory() as folder:
        said, output = Path(folder, "said"), Path(folder, "output")
        said.touch()
        options = ["-x", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", __name__, "--rootdir", str(ROOT)]
        with output.open("w") as out, said.open() as lines:
            process = subprocess.Popen(
                [sys.executable, "-m", "pytest", *options, *(f"{tests}::{name}" for name in names)],
                cwd=ROOT,
                env={**variables, REPORT: str(said)},
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            progress = _Progress()
            try:
                late = _wait(process, progress, lines, len(names), clock, test_seconds)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            progress.read(_whole_lines(lines))
        tail = output.read_text(errors="replace")[-20_000:]
    yield from progress.ended.items()
    left = [name for name in names if name not in progress.ended]
    if not left or any(found.status not in (OK, SKIPPED) for found in progress.ended.values()):
        return
    if late is not None:
        yield progress.current or left[0], Found(late.status, late.note, tail)
    elif process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        yield progress.current or left[0], Found(CRASHED, f"{name}: {_last_line(tail)}", tail)
    elif progress.current is not None:
        yield progress.current, Found(CRASHED, f"exit status {process.returncode}: {_last_line(tail)}", tail)
    else:  # it has not even begun with them, and would not the next time
        for name in left:
            yield name, Found(FAILED, f"pytest, exit status {process.returncode}: {_last_line(tail)}", tail)


def _wait(
    process: subprocess.Popen[bytes],
    progress: _Progress,
    lines: TextIO,
    count: int,
    clock: Clock,
    test_seconds: float,
) -> Found | None:
    """Wait for the end of a process; None, or what became of the test that took too long."""
    while True:
        has_ended = process.poll() is not None
        progress.read(_whole_lines(lines))
        if has_ended:
            return None
        began = bool(progress.ended) or progress.current is not None
        limit = test_seconds * (2 if _is_alone(progress.current or "") else 1) + (0.0 if began else START_SECONDS)
        taken = time.monotonic() - progress.since
        what = "still running" if progress.current else "has not begun" if not began else "does not end"
        if taken > limit or (len(progress.ended) == count and taken > 10):
            return Found(HUNG, f"{what} after {taken:.0f} s")
        if clock.left <= 0:
            return Found(SKIPPED, f"{what} after {taken:.0f} s, when time was up")
        time.sleep(0.05)


def _whole_lines(lines: TextIO) -> Iterator[str]:
    """Lines that have been written to their end; a half one waits for the next time."""
    while True:
        at = lines.tell()
        line = lines.readline()
        if not line.endswith("\n"):
            lines.seek(at)
            return
        yield line


def _last_line(text: str) -> str:
    """The last line that says anything; where there is one, that of a fatal error, which a list of calls follows."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in lines:
        for words in ("Fatal Python error", "terminate called"):
            if words in line:
                return line[line.index(words) :][:300]
    return (lines or ["no output"])[-1][:300]


# In the process, as a plugin of pytest --------------------------------------------------------------------------------


def _say(**what: Any) -> None:
    with Path(os.environ[REPORT]).open("a") as file:
        file.write(json.dumps(what) + "\n")


_phases: dict[str, Found] = {}


def pytest_runtest_logstart(nodeid: str) -> None:
    """Say that a test begins."""
    _phases.clear()
    _say(name=nodeid.rpartition("::")[2])


def pytest_runtest_logreport(report: Any) -> None:
    """Say what became of a test, after its teardown."""
    if report.failed and "bad" not in _phases:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = crash.message if crash is not None else str(report.longrepr)
        where = "" if report.when == "call" else f"{report.when}: "
        _phases["bad"] = Found(FAILED, where + message.strip().split("\n", 1)[0][:300], report.longreprtext)
    elif report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _phases["skipped"] = Found(SKIPPED, reason.removeprefix("Skipped: "))
    if report.when == "teardown":
        found = _phases.get("bad") or _phases.get("skipped") or Found(OK)
        _say(name=report.nodeid.rpartition("::")[2], status=found.status, note=found.note, text=found.text)
