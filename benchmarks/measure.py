"""One subject from gate to figures: check all participants, measure memory, then take times in turn."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from . import capability, gate
from .subjects import Entry, Subject
from .worker import Memory, Worker

DIRECTIONS = ("forward", "backward", "step")


@dataclass(frozen=True)
class Measurement:
    """One figure of one participant, with all that tells it from others: a row of a results file.

    Attributes:
        subject, case, contender: of what and whom.
        batch, classes, scales, maps: B, C, L and M; 0 where no problem is solved.
        full, native: spatial sizes of the labels and of every scale, coarsest first.
        dtype: of the logits, without "torch.".
        direction: "forward", "backward", "step" (both, of the same repetition), "memory", "first_step" (one time, from
            cold, compilation included where there is any and no cache of the compiler has it already), or "build".
        threads, capability: what it ran with.
        n: repetitions.
        p20_ms, p50_ms, p80_ms: percentiles over the repetitions; None for memory.
        extra_peak_mib: for "memory", else None.
        gradients_mib: for "memory" the part of it that is gradients of logits and parameters.
    """

    subject: str
    case: str
    contender: str
    batch: int
    classes: int
    scales: int
    maps: int
    full: tuple[int, ...]
    native: tuple[tuple[int, ...], ...]
    dtype: str
    direction: str
    threads: int
    capability: str
    n: int
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    extra_peak_mib: float | None = None
    gradients_mib: float | None = None

    @property
    def pixels(self) -> int:
        """Pixels or voxels of the whole batch."""
        return self.batch * math.prod(self.full)

    @property
    def ns_per_pixel(self) -> float | None:
        """Median in nanoseconds per pixel."""
        return None if self.p50_ms is None or not self.pixels else 1e6 * self.p50_ms / self.pixels

    @property
    def mib_over_gradients(self) -> float | None:
        """The extra peak without the gradients that any implementation has to make."""
        if self.extra_peak_mib is None or self.gradients_mib is None:
            return None
        return self.extra_peak_mib - self.gradients_mib

    @property
    def ps_per_entry(self) -> float | None:
        """Median in picoseconds per (pixel, map, class)."""
        each = self.ns_per_pixel
        return None if each is None else 1e3 * each / (self.maps * self.classes)


def percentiles(times: Sequence[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile, interpolated linearly; one time is all three of them."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def timed(blank: Measurement, direction: str, times: Sequence[float]) -> Measurement:
    """The figure of a direction from its times in milliseconds, at least one; all else as in `blank`."""
    p20, p50, p80 = percentiles(times)
    return replace(blank, direction=direction, n=len(times), p20_ms=p20, p50_ms=p50, p80_ms=p80)


def takes_part(entry: Entry, turn: int) -> bool:
    """Whether an entry has a turn in a round; 0 is the round thrown away, which those that come rarely sit out."""
    return (turn - 1) % entry.every == 0


def measure(subject: Subject, *, rounds: int, threads: int, say: Callable[[str], None]) -> list[Measurement]:
    """Measure a subject.

    Every round asks each participant for one repetition, beginning with another one each time, so that whatever else
    the machine is doing meets all alike and ratios of medians are fair. A round before the first is thrown away.

    Args:
        subject: with at least one entry.
        rounds: repetitions of each, at least 1; fewer of those that take part in some rounds only.
        threads: torch threads of those entries that name no number.
        say: told what goes on, a line at a time.

    Raises:
        GateError: somebody's numbers are wrong; nothing was timed.
        Ended: somebody failed or its process died.
    """
    with ExitStack() as stack:
        workers = {entry: stack.enter_context(_worker(entry, threads)) for entry in subject.entries}
        for entry, worker in workers.items():
            worst = gate.check(entry.label, entry.one.small, worker.errors())
            say(f"  gate  {entry.label}: largest relative error {worst:.1e}")
        memory = {}
        for entry, worker in workers.items():
            memory[entry] = worker.memory()
            say(f"  peak  {entry.label}: {memory[entry].extra_peak_mib:.1f} MiB")
        for one in dict.fromkeys(entry.one for entry in workers):
            same = {entry.label: memory[entry].fingerprint for entry in workers if entry.one == one}
            gate.check_agreement(one.case, {label: found for label, found in same.items() if found})
        times: dict[Entry, list[tuple[float, float]]] = {entry: [] for entry in workers}
        for turn in range(rounds + 1):
            first = turn % len(workers)
            for entry in subject.entries[first:] + subject.entries[:first]:
                if takes_part(entry, turn):
                    repetition = workers[entry].repetitions()
                    times[entry] += repetition if turn > 0 else []
            if turn > 0:
                say(f"  round {turn} of {rounds}")
    return [m for entry in workers for m in _figures(subject.name, entry, threads, times[entry], memory[entry])]


def _worker(entry: Entry, threads: int) -> Worker:
    environment = {} if entry.capability is None else {capability.VARIABLE: entry.capability}
    return Worker(entry.contender, entry.one, entry.threads or threads, environment)


def _figures(
    subject: str, entry: Entry, threads: int, times: Sequence[tuple[float, float]], memory: Memory
) -> list[Measurement]:
    """All rows of one entry, in the order forward, backward, step, first_step, memory."""
    case = entry.one.case
    blank = Measurement(
        subject=subject,
        case=case.name,
        contender=entry.contender,
        batch=case.batch,
        classes=case.classes,
        scales=len(case.native),
        maps=case.plan.num_maps,
        full=case.full,
        native=case.native,
        dtype=str(case.dtype).removeprefix("torch."),
        direction="",
        threads=entry.threads or threads,
        capability=entry.capability or capability.in_use(),
        n=0,
    )
    forward, backward = ([pair[i] for pair in times] for i in (0, 1))
    step = [sum(pair) for pair in times]
    peak, gradients = memory.extra_peak_mib, memory.gradients_mib
    return [
        *(timed(blank, d, values) for d, values in zip(DIRECTIONS, (forward, backward, step), strict=True)),
        timed(blank, "first_step", [memory.first_step_ms]),
        replace(blank, direction="memory", n=1, extra_peak_mib=peak, gradients_mib=gradients),
    ]
