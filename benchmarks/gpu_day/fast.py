"""Question 3, is it fast: forward, backward, step, time of the host, launches and extra memory, against the others.

Every contender has a process of its own for all problems; on a problem they take turns. Numbers come first: one that is
wrong, on a small problem against float64 or at full size against the others, is not timed.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lomix_fast.testing.errors import is_out_of_memory, one_line
from lomix_fast.testing.precision import full_float32
from lomix_fast.testing.process import Ended, Process

from .. import gate
from ..cases import BenchmarkCase
from ..contenders import CONTENDERS, contender, plain_with
from ..measure import percentiles
from ..plain import plain_loss
from ..worker import Memory, Session
from .day import FAILED, NO_MEMORY, SKIPPED, Clock, Day, Emit, Row
from .right import BACKENDS
from .workers import about, open_device, start, status_of

# Who takes part; official computes in float32 whatever the logits are.
CONTESTANTS = (*BACKENDS, "plain", "compile", "official")
# Whose full-size results the others are held against: the first of these that could compute them.
_TRUST = ("plain", "official", "compile", "triton", "cuda")
# Problems whose compilation by torch.compile, minutes each, is begun when the day begins.
_HEAD_STARTS = 3
# What a problem may take of the card's memory by estimate to be there beside the others; a larger one waits till last.
_SHARE = 0.3
_ROUNDS, _STEPS = 4, 6  # so many rounds after the first, of so many steps each
_PREPARE_SECONDS, _TURN_SECONDS, _LEAST_SECONDS = 60.0, 20.0, 3.0


@dataclass(frozen=True)
class Ready:
    """A contestant that may be timed on a problem."""

    memory: Memory
    worst_error: float


class Contestant:
    """What runs in the process.

    Args:
        name: of the contender.
        device: name of the device.
    """

    def __init__(self, name: str, device: str) -> None:
        torch.set_num_threads(2)
        self._name, self._device = name, open_device(device)
        self._at: dict[str, Session] = {}
        full_float32().__enter__()  # for as long as this process lives

    def prepare(self, one: BenchmarkCase) -> Ready | str:
        """Check the numbers and take the first steps; the message when there is not enough memory.

        Raises:
            GateError: wrong numbers.
        """
        found: Ready | str
        try:
            session = Session(self._name, one, device=self._device)
            # torch.compile would take minutes for a problem of another size; what it is made of is checked instead, and
            # its result at full size against those of others.
            checked = traced if self._name == "compile" else contender(self._name)
            errors = gate.errors(checked, one.small, self._device.where)
            found = Ready(session.memory(), gate.check(self._name, one.small, errors))
            session.clear()
            self._at[one.name] = session
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            found = one_line(error)
        session = None  # what did not fit
        self._device.release()  # others need the memory while this one waits for its turn
        return found

    def steps(self, problem: str, count: int) -> list[tuple[float, float]]:
        """Milliseconds of forward and of backward."""
        return self._at[problem].repetitions(count)

    def host(self, problem: str, count: int) -> list[float]:
        """Milliseconds of the host."""
        return self._at[problem].host(count)

    def launches(self, one: BenchmarkCase) -> dict[str, int]:
        """Launches of a step by kernel, of a problem that need not be prepared."""
        if one.name not in self._at:
            session = self._at[one.name] = Session(self._name, one, device=self._device)
            session.memory()
        return self._at[one.name].launches()

    def drop(self, problem: str) -> None:
        """Give the memory of a problem back."""
        self._at.pop(problem, None)
        self._device.release()


# torch.compile by what is quick on a CPU, for rehearsals.
traced = replace(
    CONTENDERS["compile"],
    prepare=lambda problem: plain_with(problem, torch.compile(plain_loss, fullgraph=True, backend="aot_eager")),
)


class Field:
    """All contestants, over the whole day.

    Args:
        day: where.
    """

    def __init__(self, day: Day) -> None:
        self._day = day
        self._processes: dict[str, Process] = {}
        self._compiling: dict[str, Process] = {}
        self._clock = Clock(0.0)  # of the step that is on
        self._late: dict[str, BenchmarkCase] = {}  # problems that others were measured on while theirs compiled
        self._references: dict[str, dict[str, float]] = {}  # fingerprints of the first whose numbers were right

    def start_compiling(self, cases: Sequence[BenchmarkCase]) -> None:
        """Begin the compilations of the first problems, a process each, which nobody waits for yet."""
        for one in cases[:_HEAD_STARTS]:
            process = self._compiling[one.name] = self._start("compile", one.name)
            process.begin("prepare", one)

    def _start(self, name: str, problem: str = "") -> Process:
        real = f"{__name__}:traced" if name == "compile" and self._day.rehearse else name
        return start(self._day, f"{name} {problem}".strip(), Contestant, real, self._day.device)

    def close(self) -> None:
        """End all processes."""
        for process in (*self._processes.values(), *self._compiling.values()):
            process.close()

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Compilations that go on are stopped meanwhile: they would take cores, and the GPU for what they try."""
        busy = [process for process in self._compiling.values() if process.is_at_work and not process.is_ready()]
        for process in busy:
            process.pause(True)
        try:
            yield
        finally:
            for process in busy:
                process.pause(False)

    def run(self, cases: Sequence[BenchmarkCase], clock: Clock, emit: Emit) -> None:
        """Measure problem after problem while there is time; rows say for which there was none."""
        self._clock = clock
        memory_mib = about(self._day)["memory_mib"]
        for one in cases:
            if clock.left < _LEAST_SECONDS:
                emit(Row("fast", "", one.name, "step", SKIPPED, note="time was up"))
                continue
            names = [name for name in CONTESTANTS if name != "compile"]
            if one.name in self._compiling:
                if self._compiling[one.name].is_ready():
                    names.append("compile")
                else:
                    self._late[one.name] = one
            small = [name for name in names if self._needs(name, one) < _SHARE * memory_mib]
            for heat in (small, *([name] for name in names if name not in small)):
                self._heat(heat, one, clock, emit)

    def run_late(self, clock: Clock, emit: Emit, is_last: bool) -> None:
        """Measure torch.compile on the problems on which it was not ready in time, as far as it is now.

        The last time it is waited for while there is time, and rows say where that did not help.
        """
        self._clock = clock
        for name, one in list(self._late.items()):
            if self._compiling[name].is_ready(max(clock.left - _LEAST_SECONDS, 0) if is_last else 0):
                del self._late[name]
                self._heat(["compile"], one, clock, emit)
            elif is_last:
                emit(Row("fast", "compile", name, "step", SKIPPED, note="torch.compile was still compiling"))

    def count_launches(self, one: BenchmarkCase, clock: Clock, emit: Emit) -> None:
        """Launches of a step by everyone but torch.compile, in new processes: a profiler slows those that it was in."""
        processes = {name: self._start(name, "launches") for name in CONTESTANTS if name != "compile"}
        try:
            for process in processes.values():
                process.begin("launches", one)
            until = time.monotonic() + clock.at_most(_PREPARE_SECONDS)
            for name, process in processes.items():
                try:
                    emit(_launches_row(name, one, process.answer_within(until - time.monotonic())))
                except Ended as error:
                    emit(Row("fast", name, one.name, "launches", status_of(error, clock), note=_last_line(error)))
        finally:
            for process in processes.values():
                process.close()

    def _needs(self, name: str, one: BenchmarkCase) -> float:
        """MiB by estimate."""
        return CONTENDERS[name].estimate(one.case) / 2**20

    def _process(self, name: str, one: BenchmarkCase) -> Process:
        if name == "compile":
            return self._compiling[one.name]
        if name not in self._processes:
            self._processes[name] = self._start(name)
        return self._processes[name]

    def _heat(self, names: Sequence[str], one: BenchmarkCase, clock: Clock, emit: Emit) -> None:
        """Contestants that share the card: numbers, memory, then times in turn."""
        for name in names:
            if name != "compile":  # whose answer is waiting
                self._process(name, one).begin("prepare", one)
        ready: dict[str, Memory] = {}
        until = time.monotonic() + clock.at_most(_PREPARE_SECONDS)
        for name in sorted(names, key=_TRUST.index):
            found = self._asked(name, one, emit, lambda p: p.answer_within(until - time.monotonic()))
            if isinstance(found, str):
                emit(Row("fast", name, one.name, "step", NO_MEMORY, note=found))
            elif found is not None and self._agrees(name, one, found.memory, emit):
                ready[name] = found.memory
                emit(_memory_row(name, one, found.memory, found.worst_error))
        with self.quiet():
            times = self._times(list(ready), one, clock, emit)
        for name, taken in times.items():
            for row in _time_rows(name, one, taken):
                emit(row)
        if "compile" in times and clock.left > _LEAST_SECONDS:  # whose process is not timed again
            ask = lambda p: p.ask("launches", one, seconds=max(clock.left, 1.0))  # noqa: E731
            found = self._asked("compile", one, emit, ask)
            if found is not None:
                emit(_launches_row("compile", one, found))
        for name in names:
            if name in (self._compiling if name == "compile" else self._processes):
                self._asked(name, one, emit, lambda p: p.ask("drop", one.name, seconds=20.0))

    def _times(
        self, names: Sequence[str], one: BenchmarkCase, clock: Clock, emit: Emit
    ) -> dict[str, list[tuple[float, float]]]:
        """Steps in turns, after a round that wakes everybody up, and the time of the host."""
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for turn in range(_ROUNDS + 1):
            order = list(times)
            first = turn % max(1, len(order))
            for name in order[first:] + order[:first]:
                seconds = clock.at_most(_TURN_SECONDS)
                if turn > 1 and seconds < _LEAST_SECONDS:
                    continue  # what there is must do
                count = _STEPS if turn else 2
                ask = lambda p: p.ask("steps", one.name, count, seconds=max(seconds, 1.0))  # noqa: B023, E731
                found = self._asked(name, one, emit, ask)
                if found is None:
                    del times[name]
                elif turn:
                    times[name] += found
        for name in list(times):
            if clock.left < _LEAST_SECONDS:
                break
            ask = lambda p: p.ask("host", one.name, _STEPS, seconds=max(clock.left, 1.0))  # noqa: E731
            host = self._asked(name, one, emit, ask)
            if host is not None:
                p20, p50, p80 = percentiles(host)
                emit(Row("fast", name, one.name, "host", value=p50, unit="ms", p20=p20, p80=p80, n=len(host)))
        return times

    def _agrees(self, name: str, one: BenchmarkCase, memory: Memory, emit: Emit) -> bool:
        if all(map(math.isfinite, memory.fingerprint.values())):
            self._references.setdefault(one.name, memory.fingerprint)
        reference = self._references.get(one.name, {"loss": math.nan})
        try:
            gate.check_agreement(one.case, {"the first": reference, name: memory.fingerprint})
        except gate.GateError as error:
            emit(Row("fast", name, one.name, "step", FAILED, note=one_line(error)))
            return False
        return True

    def _asked(self, name: str, one: BenchmarkCase, emit: Emit, ask: Callable[[Process], Any]) -> Any:
        """An answer; None when there is none, which a row tells, and then the process is another one afterwards."""
        process = self._process(name, one)
        try:
            return ask(process)
        except Ended as error:
            emit(Row("fast", name, one.name, "step", status_of(error, self._clock), note=_last_line(error)))
            process.close()
            if name == "compile":
                del self._compiling[one.name]
            else:
                del self._processes[name]
            return None


def _last_line(error: Ended) -> str:
    return str(error).strip().splitlines()[-1]


def _launches_row(name: str, one: BenchmarkCase, found: dict[str, int]) -> Row:
    most = sorted(found, key=found.__getitem__, reverse=True)[:3]
    note = ", ".join(f"{kernel[:60]} x{found[kernel]}" for kernel in most)
    return Row("fast", name, one.name, "launches", value=sum(found.values()), unit="launches", note=note)


def _memory_row(name: str, one: BenchmarkCase, memory: Memory, worst: float) -> Row:
    """Extra memory of a step beyond inputs and the gradients that it must make."""
    beyond = memory.extra_peak_mib - memory.gradients_mib
    note = (
        f"and {memory.gradients_mib:.1f} MiB of gradients; first step {memory.first_step_ms:.0f} ms; "
        f"largest relative error {worst:.1e}"
    )
    return Row("fast", name, one.name, "memory", value=beyond, unit="MiB", n=1, note=note)


def _time_rows(name: str, one: BenchmarkCase, taken: Sequence[tuple[float, float]]) -> list[Row]:
    rows = []
    parts = {
        "forward": [pair[0] for pair in taken],
        "backward": [pair[1] for pair in taken],
        "step": [sum(pair) for pair in taken],
    }
    for what, times in parts.items():
        if times:
            p20, p50, p80 = percentiles(times)
            rows.append(Row("fast", name, one.name, what, value=p50, unit="ms", p20=p20, p80=p80, n=len(times)))
    return rows
