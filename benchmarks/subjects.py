"""What is measured together: a subject is a list of participants that take turns in one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lomix_fast.testing.environment import cores

from . import capability
from .cases import CASES, BenchmarkCase
from .contenders import contender

# Room for what estimates leave out, such as temporaries of the backward pass.
_MARGIN = 1.15


def label(contender: str, case: str | None, threads: int | None, capability: str | None) -> str:
    """A participant in words, for example "fused synapse2d 2 threads"; None is passed over."""
    count = None if threads is None else f"{threads} thread{'s' if threads > 1 else ''}"
    return " ".join(part for part in (contender, case, count, capability) if part is not None)


@dataclass(frozen=True)
class Entry:
    """One participant, a process of its own.

    Attributes:
        one: its problem.
        contender: name of a contender.
        threads: torch threads; None for those of the run.
        capability: which copy of the kernels, a name out of `capability.ORDER`; None for the best.
        every: takes part in every so many rounds only, for those whose step takes minutes.
    """

    one: BenchmarkCase
    contender: str
    threads: int | None = None
    capability: str | None = None
    every: int = 1

    @property
    def case(self) -> str:
        """Name of its problem."""
        return self.one.name

    @property
    def label(self) -> str:
        """What people call it; unique within a subject."""
        return label(self.contender, self.case, self.threads, self.capability)

    def obstacle(self) -> str | None:
        """Reason why this machine cannot run it, None when it can. Contenders have a `why_not` besides."""
        if self.threads is not None and self.threads > cores():
            return f"this machine has {cores()} core{'s' if cores() > 1 else ''}"
        if self.capability is not None and (reason := capability.why_not(self.capability)) is not None:
            return reason
        needed, free = contender(self.contender).estimate(self.one.case), _available_bytes()
        if _MARGIN * needed > free:
            return f"it needs about {_MARGIN * needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} are free"
        return None


@dataclass(frozen=True)
class Subject:
    """Participants that take turns.

    Attributes:
        name: unique; the rows of a results file carry it.
        title: what it shows, for people.
        entries: who takes part, the one that others are compared with first.
        rounds: how often each takes its turn unless --rounds says otherwise.
    """

    name: str
    title: str
    entries: tuple[Entry, ...]
    rounds: int

    def keeping(self, wanted: Callable[[Entry], bool]) -> Subject:
        """The same with only those entries that are wanted."""
        return replace(self, entries=tuple(entry for entry in self.entries if wanted(entry)))

    def by(self, contenders: Sequence[str]) -> Subject:
        """Every problem, number of threads and capability there is, taken by these contenders instead."""
        settings = dict.fromkeys(replace(entry, contender="", every=1) for entry in self.entries)
        return replace(self, entries=tuple(replace(s, contender=name) for s in settings for name in contenders))


def _available_bytes() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), float("inf"))


def _comparison(case: str, title: str, contenders: Sequence[str], rare: Sequence[str], rounds: int) -> Subject:
    """Contenders on one case; the rare ones take part in every fourth round."""
    one = CASES[case]
    return Subject(case, title, tuple(Entry(one, name, every=4 if name in rare else 1) for name in contenders), rounds)


_ALL = ("fused", "compile", "plain", "eager", "official", "exp_floor", "exp_floor_accurate", "exp_floor_own")
_NOT_COMPILED = tuple(name for name in _ALL if name != "compile")
_OTHERS = "fused against other implementations"
_TRY = "to try the harness; times mean nothing"

# torch.compile takes many minutes on volumes and is left to --contenders there. In patch3d14 the official-style loss
# has a patch of its own, the largest it can take; fused is there a second time, so that results of one size are
# compared.
COMPARISONS: dict[str, Subject] = {
    subject.name: subject
    for subject in (
        _comparison("synapse2d", f"2D slices, {_OTHERS}", _ALL, (), 11),
        _comparison("patch3d", f"3D patch, {_OTHERS}", _NOT_COMPILED, ("official",), 9),
        Subject(
            "patch3d14",
            "3D patch of 14 classes and five scales, fused against official-style on the largest patch it can take",
            (
                Entry(CASES["patch3d14"], "fused"),
                Entry(CASES["official3d14"], "fused"),
                Entry(CASES["official3d14"], "official", every=4),
            ),
            9,
        ),
        _comparison("tiny2d", _TRY, _NOT_COMPILED, (), 3),
        _comparison("tiny3d", _TRY, _NOT_COMPILED, (), 3),
    )
}
QUICK = ("tiny2d", "tiny3d")
