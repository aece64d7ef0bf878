"""What the steps of a GPU day share: the rows they find, the time they have, and where and how they run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# What became of something that was tried. Only OK is good; SKIPPED is what this machine cannot do or had no time for.
OK, FAILED, HUNG, CRASHED, NO_MEMORY, SKIPPED = "ok", "failed", "hung", "crashed", "out of memory", "skipped"
STATUSES = (OK, FAILED, HUNG, CRASHED, NO_MEMORY, SKIPPED)
BROKEN = (FAILED, HUNG, CRASHED)


@dataclass(frozen=True)
class Row:
    """One thing found, a line of the CSV file.

    Attributes:
        step: "build", "right", "features", "fast", "small" or "limits".
        subject: whom it is about: a backend, a contender, or "card".
        case: on which problem; "" where there is none.
        what: which figure or behaviour, such as "step", "extra peak" or "graph_capture".
        status: one of `STATUSES`.
        value, unit: the figure and what it counts ("ms", "MiB", "launches", "GB/s", ...), or None and "".
        p20, p80: percentiles beside a value that is a median; n: repetitions.
        note: a sentence; the reason where the status is not OK.
    """

    step: str
    subject: str
    case: str
    what: str
    status: str = OK
    value: float | None = None
    unit: str = ""
    p20: float | None = None
    p80: float | None = None
    n: int = 0
    note: str = ""


Emit = Callable[[Row], None]


class Clock:
    """How much time is left: until a deadline, and never beyond that of the whole.

    Args:
        seconds: from now.
        whole: the clock that this one may not outlast.
    """

    def __init__(self, seconds: float, whole: Clock | None = None) -> None:
        self.began = time.monotonic()
        self.deadline = self.began + seconds
        if whole is not None:
            self.deadline = min(self.deadline, whole.deadline)

    @property
    def left(self) -> float:
        """Seconds left, 0 when time is up."""
        return max(0.0, self.deadline - time.monotonic())

    @property
    def elapsed(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self.began

    def at_most(self, seconds: float) -> float:
        """So many seconds, or what is left if that is less."""
        return min(seconds, self.left)


@dataclass(frozen=True)
class Day:
    """Where and how the steps run.

    Attributes:
        device: name of the device, "cuda:0"; in a rehearsal the stand-in of `stand_in.py`, which computes on the CPU.
        rehearse: whether this is a rehearsal: small sizes, stand-ins for what only a GPU has.
        out: folder for what a step leaves besides its rows, such as logs; moved into log.txt after it.
        workers: processes that may compute at once where times do not matter.
    """

    device: str
    rehearse: bool
    out: Path
    workers: int

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables of every process that a step starts."""
        return {"LOMIX_FAST_REHEARSE": "1"} if self.rehearse else {}
