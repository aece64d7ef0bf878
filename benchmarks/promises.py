"""What the project promises about speed and memory, as checks on the figures of one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .measure import Measurement


@dataclass(frozen=True)
class Verdict:
    """Whether a promise holds, and the line that says so."""

    kept: bool
    text: str


class Promise(Protocol):
    """A row of `PROMISES`."""

    @property
    def case(self) -> str: ...

    @property
    def contenders(self) -> tuple[str, ...]: ...

    def judge(self, measurements: Sequence[Measurement]) -> Verdict: ...


@dataclass(frozen=True)
class Faster:
    """`who` is at least `times` faster than `than`, by medians of one run."""

    case: str
    than: str
    times: float
    who: str = "fused"
    direction: str = "step"

    @property
    def contenders(self) -> tuple[str, ...]:
        """Who must have been measured."""
        return self.who, self.than

    def judge(self, measurements: Sequence[Measurement]) -> Verdict:
        """Compare the two medians."""
        text = f"{self.case}: {self.direction} of {self.who} at least {self.times:g}x faster than {self.than}"
        mine, other = (_find(measurements, self.case, name, self.direction) for name in self.contenders)
        if mine is None or other is None or not mine.p50_ms or not other.p50_ms:
            return Verdict(False, f"{text}: not measured")
        ratio = other.p50_ms / mine.p50_ms
        return Verdict(ratio >= self.times, f"{text}: {ratio:.2f}x ({mine.p50_ms:.2f} and {other.p50_ms:.2f} ms)")


@dataclass(frozen=True)
class PeakAtMost:
    """The extra peak memory of a step of `who` is at most `mib`."""

    case: str
    mib: float
    who: str = "fused"

    @property
    def contenders(self) -> tuple[str, ...]:
        """Who must have been measured."""
        return (self.who,)

    def judge(self, measurements: Sequence[Measurement]) -> Verdict:
        """Compare the peak with the limit."""
        text = f"{self.case}: extra peak memory of {self.who} at most {self.mib:g} MiB"
        found = _find(measurements, self.case, self.who, "memory")
        if found is None or found.extra_peak_mib is None:
            return Verdict(False, f"{text}: not measured")
        return Verdict(found.extra_peak_mib <= self.mib, f"{text}: {found.extra_peak_mib:.1f} MiB")


PROMISES: tuple[Promise, ...] = (
    Faster("synapse2d", than="official", times=8),
    PeakAtMost("synapse2d", 64),
    PeakAtMost("patch3d", 128),
)


def needed(case: str, promises: Sequence[Promise] = PROMISES) -> tuple[str, ...]:
    """Contenders that the promises about a case compare, each once."""
    return tuple(dict.fromkeys(name for p in promises if p.case == case for name in p.contenders))


def _find(measurements: Sequence[Measurement], case: str, contender: str, direction: str) -> Measurement | None:
    wanted = (case, contender, direction)
    return next((m for m in measurements if (m.case.name, m.contender, m.direction) == wanted), None)
