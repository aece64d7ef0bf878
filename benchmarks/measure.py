"""One case from gate to figures: check all contenders, measure memory, then take times in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from lomix_fast.testing.cases import Case

from . import gate
from .cases import BenchmarkCase
from .worker import Worker

DIRECTIONS = ("forward", "backward", "step")


@dataclass(frozen=True)
class Measurement:
    """One figure of one contender: times in milliseconds, or the extra peak in MiB.

    Attributes:
        case, contender: of whom.
        direction: "forward", "backward", "step" (both, of the same repetition), "memory", or "first_step" (one time,
            from cold, compilation included where there is any and no cache of the compiler has it already).
        p20_ms, p50_ms, p80_ms: percentiles over the repetitions; None for memory.
        n: repetitions.
        extra_peak_mib: for "memory", else None.
    """

    case: Case
    contender: str
    direction: str
    n: int
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    extra_peak_mib: float | None = None


def percentiles(times: Sequence[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile, interpolated linearly; one time is all three of them."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def measure(
    one: BenchmarkCase, names: Sequence[str], *, rounds: int, threads: int, say: Callable[[str], None]
) -> list[Measurement]:
    """Measure contenders on a case.

    Every round asks each contender for one repetition, beginning with another one each time, so that whatever else
    the machine is doing meets all alike and ratios of medians are fair. A round before the first is thrown away.

    Args:
        one: the case.
        names: contenders, at least one.
        rounds: repetitions of each, at least 1.
        threads: torch threads of each process.
        say: told what goes on, a line at a time.

    Raises:
        GateError: somebody's numbers are wrong; nothing was timed.
        WorkerError: somebody failed or its process died.
    """
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(name, one, threads)) for name in names]
        for worker in workers:
            worst = gate.check(worker.name, one.small, worker.errors())
            say(f"  gate  {worker.name}: largest relative error {worst:.1e}")
        memory = {}
        for worker in workers:
            memory[worker.name] = worker.memory()
            say(f"  peak  {worker.name}: {memory[worker.name].extra_peak_mib:.1f} MiB")
        gate.check_agreement(one.case, {name: found.fingerprint for name, found in memory.items()})
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for turn in range(rounds + 1):
            first = turn % len(workers)
            for worker in workers[first:] + workers[:first]:
                repetition = worker.repetitions()
                if turn > 0:
                    times[worker.name] += repetition
            if turn > 0:
                say(f"  round {turn} of {rounds}")
    found = []
    for name in names:
        forward, backward = ([pair[i] for pair in times[name]] for i in (0, 1))
        step = [sum(pair) for pair in times[name]]
        for direction, values in zip(DIRECTIONS, (forward, backward, step), strict=True):
            found.append(Measurement(one.case, name, direction, len(values), *percentiles(values)))
        cold = memory[name].first_step_ms
        found.append(Measurement(one.case, name, "first_step", 1, cold, cold, cold))
        found.append(Measurement(one.case, name, "memory", 1, extra_peak_mib=memory[name].extra_peak_mib))
    return found
