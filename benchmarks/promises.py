"""What the project promises about speed and memory, as checks on the figures of one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from . import build_time, recipes
from .measure import Measurement
from .subjects import Entry, label
from .sweeps import SWEEPS


@dataclass(frozen=True)
class Verdict:
    """Whether a promise holds (None: what it is about was not measured), and the line that says so."""

    kept: bool | None
    text: str


class Promise(Protocol):
    """A row of `PROMISES`, about the figures of one subject."""

    @property
    def subject(self) -> str: ...

    def wants(self, entry: Entry) -> bool:
        """Whether this participant of the subject must be measured."""
        ...

    def judge(self, measurements: Sequence[Measurement]) -> Verdict:
        """Compare with the limit; `measurements` may hold those of other subjects too."""
        ...


@dataclass(frozen=True)
class Who:
    """A participant of a subject; None leaves open what need not be told apart there."""

    contender: str = "fused"
    case: str | None = None
    threads: int | None = None
    capability: str | None = None

    def is_(self, other: Entry | Measurement) -> bool:
        """Whether it is this one."""
        names = ("contender", "case", "threads", "capability")
        return all(getattr(self, name) in (None, getattr(other, name)) for name in names)

    def find(self, measurements: Sequence[Measurement], subject: str, direction: str) -> Measurement | None:
        """Its figure for a direction, None when there is none."""
        return next((m for m in measurements if (m.subject, m.direction) == (subject, direction) and self.is_(m)), None)

    def __str__(self) -> str:
        return label(self.contender, self.case, self.threads, self.capability)


@dataclass(frozen=True)
class Faster:
    """The step of `who` is at least `times` faster than the fastest of `than`, by medians per pixel."""

    subject: str
    than: tuple[Who, ...]
    times: float
    goal: float | None = None
    who: Who = Who()

    def wants(self, entry: Entry) -> bool:
        return any(one.is_(entry) for one in (self.who, *self.than))

    def judge(self, measurements: Sequence[Measurement]) -> Verdict:
        rivals = " and ".join(map(str, self.than))
        text = f"{self.subject}: step of {self.who} at least {self.times:g}x faster than {rivals}{_goal(self.goal)}"
        mine, *others = (one.find(measurements, self.subject, "step") for one in (self.who, *self.than))
        if mine is None or None in others:
            return Verdict(None, text)
        best = min((other for other in others if other is not None), key=_per_pixel)
        ratio = _per_pixel(best) / _per_pixel(mine)
        return Verdict(ratio >= self.times, f"{text}: {ratio:.2f}x ({_time(mine)}; {best.contender} {_time(best)})")


@dataclass(frozen=True)
class NotSlower:
    """The step of `who` takes at most `times` as long as that of `than`, by medians."""

    subject: str
    than: Who
    times: float
    goal: float | None = None
    who: Who = Who()

    def wants(self, entry: Entry) -> bool:
        return self.who.is_(entry) or self.than.is_(entry)

    def judge(self, measurements: Sequence[Measurement]) -> Verdict:
        text = f"{self.subject}: step of {self.who} at most {self.times:g}x that of {self.than}{_goal(self.goal)}"
        mine, other = (one.find(measurements, self.subject, "step") for one in (self.who, self.than))
        if mine is None or other is None:
            return Verdict(None, text)
        ratio = _per_pixel(mine) / _per_pixel(other)
        return Verdict(ratio <= self.times, f"{text}: {ratio:.2f}x ({_time(mine)}; {other.contender} {_time(other)})")


@dataclass(frozen=True)
class Even:
    """Time per pixel, or per (pixel, map, class), differs by at most `times` between the cases of a sweep."""

    subject: str
    cases: tuple[str, ...]
    times: float
    per_entry: bool = False
    contender: str = "fused"

    @property
    def _everyone(self) -> tuple[Who, ...]:
        return tuple(Who(self.contender, case) for case in self.cases)

    def wants(self, entry: Entry) -> bool:
        return any(one.is_(entry) for one in self._everyone)

    def judge(self, measurements: Sequence[Measurement]) -> Verdict:
        per, unit = ("(pixel, map, class)", "ps") if self.per_entry else ("pixel", "ns")
        text = (
            f"{self.subject}: time of {self.contender} per {per}, {self.cases[0]} to {self.cases[-1]}, largest at most "
            f"{self.times:g}x the smallest"
        )
        costs = {}
        for one in self._everyone:
            found = one.find(measurements, self.subject, "step")
            cost = None if found is None else found.ps_per_entry if self.per_entry else found.ns_per_pixel
            if cost is None:
                return Verdict(None, text)
            costs[str(one.case)] = cost
        least, most = min(costs, key=costs.__getitem__), max(costs, key=costs.__getitem__)
        ratio = costs[most] / costs[least]
        figures = f"{costs[most]:.2f} {unit} for {most}, {costs[least]:.2f} {unit} for {least}"
        return Verdict(ratio <= self.times, f"{text}: {ratio:.2f}x ({figures})")


@dataclass(frozen=True)
class PeakAtMost:
    """The extra peak memory of a step of `who` is at most `mib`, its gradients counted or not."""

    subject: str
    mib: float
    over_gradients: bool = False
    who: Who = Who()

    def wants(self, entry: Entry) -> bool:
        return self.who.is_(entry)

    def judge(self, measurements: Sequence[Measurement]) -> Verdict:
        what = " over inputs and their gradients" if self.over_gradients else ""
        text = f"{self.subject}: extra peak memory of {self.who}{what} at most {self.mib:g} MiB"
        found = self.who.find(measurements, self.subject, "memory")
        if found is None or found.extra_peak_mib is None:
            return Verdict(None, text)
        if not self.over_gradients:
            return Verdict(found.extra_peak_mib <= self.mib, f"{text}: {found.extra_peak_mib:.1f} MiB")
        if (over := found.mib_over_gradients) is None:
            return Verdict(None, text)
        return Verdict(over <= self.mib, f"{text}: {over:.1f} MiB, {found.extra_peak_mib:.1f} with them")


@dataclass(frozen=True)
class PeakNotAbove:
    """The extra peak memory of a step of `who` is at most `times` that of `than`, gradients included in both."""

    subject: str
    than: Who
    times: float
    who: Who = Who()

    def wants(self, entry: Entry) -> bool:
        return self.who.is_(entry) or self.than.is_(entry)

    def judge(self, measurements: Sequence[Measurement]) -> Verdict:
        text = f"{self.subject}: extra peak memory of {self.who} at most {self.times:g}x that of {self.than}"
        mine, other = (one.find(measurements, self.subject, "memory") for one in (self.who, self.than))
        if mine is None or other is None or mine.extra_peak_mib is None or not other.extra_peak_mib:
            return Verdict(None, text)
        ratio = mine.extra_peak_mib / other.extra_peak_mib
        figures = f"{mine.extra_peak_mib:.2f} and {other.extra_peak_mib:.2f} MiB"
        return Verdict(ratio <= self.times, f"{text}: {ratio:.2f}x ({figures})")


@dataclass(frozen=True)
class BuiltWithin:
    """Building the extension from nothing takes at most so many seconds."""

    seconds: float
    subject: str = build_time.NAME

    def wants(self, entry: Entry) -> bool:
        return False

    def judge(self, measurements: Sequence[Measurement]) -> Verdict:
        text = f"{self.subject}: the extension from nothing with {build_time.JOBS} jobs in at most {self.seconds:g} s"
        found = next((m for m in measurements if m.direction == build_time.NAME), None)
        if found is None or found.p50_ms is None:
            return Verdict(None, text)
        return Verdict(found.p50_ms <= 1e3 * self.seconds, f"{text}: {found.p50_ms / 1e3:.0f} s ({found.capability})")


def _goal(times: float | None) -> str:
    return "" if times is None else f" (goal {times:g}x)"


def _per_pixel(found: Measurement) -> float:
    value = found.ns_per_pixel
    assert value, f"a step of {found.contender} without a time"
    return value


def _time(found: Measurement) -> str:
    return f"{found.p50_ms:.2f} ms, {found.ns_per_pixel:.2f} ns a pixel"


def _all_of(sweep: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(entry.case for entry in SWEEPS[sweep].entries))


def _recipe_promises() -> tuple[Promise, ...]:
    plain = Who(case=recipes.CASES[recipes.PLAIN].name)
    others = [Who(case=one.name) for name, one in recipes.CASES.items() if name != recipes.PLAIN]
    others += [Who(f"{recipes.__name__}:{name}", plain.case) for name in recipes.CRITERIA]
    times = (NotSlower(recipes.SUBJECT.name, plain, 1.5, who=who) for who in others)
    return (*times, *(PeakNotAbove(recipes.SUBJECT.name, plain, 1.3, who=who) for who in others))


PROMISES: tuple[Promise, ...] = (
    Faster("synapse2d", (Who("official"),), times=20, goal=30),
    Faster("synapse2d", (Who("plain"), Who("compile")), times=10, goal=15),
    NotSlower("synapse2d", Who("exp_floor"), times=2.5, goal=2),
    PeakAtMost("synapse2d", 32),
    Faster("threads", (Who(threads=1),), times=1.85, who=Who(threads=2)),
    Even("pixels2d", _all_of("pixels2d"), 1.25),
    Even("pixels3d", _all_of("pixels3d"), 1.25),
    Even("classes", tuple(f"classes_{n}" for n in (4, 5, 8, 9, 14, 16, 24, 32)), 1.6, per_entry=True),
    NotSlower("isa", Who(capability="AVX512"), times=2.2, who=Who(capability="AVX2")),
    BuiltWithin(240),
    PeakAtMost("patch3d14", 64, over_gradients=True, who=Who(case="patch3d14")),
    Faster("patch3d14", (Who("official", "official3d14"),), times=20, who=Who(case="patch3d14")),
    *_recipe_promises(),
)
# Measured beside what the promises compare, so that a run says more than whether they hold.
_BESIDES = (
    ("synapse2d", Who("exp_floor_accurate")),
    ("synapse2d", Who("exp_floor_own")),
    ("threads", Who("exp_floor")),
    ("isa", Who(capability="DEFAULT")),
    ("patch3d14", Who()),
)


def subjects_needed(promises: Sequence[Promise] = PROMISES) -> tuple[str, ...]:
    """Names of the subjects that the promises are about, each once."""
    return tuple(dict.fromkeys(promise.subject for promise in promises))


def is_needed(subject: str, entry: Entry) -> bool:
    """Whether --check measures this participant of a subject."""
    besides = any(name == subject and who.is_(entry) for name, who in _BESIDES)
    return besides or any(promise.subject == subject and promise.wants(entry) for promise in PROMISES)
