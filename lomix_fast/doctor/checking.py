"""Correctness: every backend on every case of the shared list, judged against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ..testing.cases import Case, make_inputs
from ..testing.judge import judge, plain_of, run_backend
from ..testing.placement import move_inputs
from .devices import Device
from .errors import one_line


@dataclass(frozen=True)
class CaseOutcome:
    """What became of one case.

    Attributes:
        name: of the case.
        passed: whether everything was within its limits.
        ratio: the largest error over what is allowed; None when there was nothing to compare.
        message: why it failed, every complaint of it; None when it passed.
    """

    name: str
    passed: bool
    ratio: float | None
    message: str | None


@dataclass(frozen=True)
class Checked:
    """A backend on a device, over all chosen cases."""

    device: str
    backend: str
    cases: list[CaseOutcome] = field(default_factory=list)

    @property
    def failures(self) -> list[CaseOutcome]:
        """The cases that failed."""
        return [one for one in self.cases if not one.passed]

    @property
    def worst(self) -> CaseOutcome | None:
        """The case with the largest ratio; None when no case gave one."""
        judged = [one for one in self.cases if one.ratio is not None]
        return max(judged, key=lambda one: one.ratio or 0.0, default=None)


def check_backend(backend: str, device: Device, cases: Sequence[Case], say: Callable[[str], None]) -> Checked:
    """Run a backend over cases on a device.

    Whatever a case raises is its outcome. A device that stops computing altogether (an illegal access does that to a
    GPU, for the rest of the process) ends the run; the cases not run have failed, with that as their message.

    Args:
        backend: name of a backend that can run there.
        device: the device.
        cases: what to run.
        say: told of every failure when it happens.
    """
    done = Checked(device.name, backend)
    broken = device.complaint()
    for case in cases:
        if broken is not None:
            done.cases.append(CaseOutcome(case.name, False, None, f"not run, the device no longer computes: {broken}"))
            continue
        outcome = check_case(backend, device.where, case)
        done.cases.append(outcome)
        if not outcome.passed:
            say(f"  FAILED {backend} on {device.name}, case {case.name}: {outcome.message}")
            broken = device.complaint()
    return done


def check_case(backend: str, where: torch.device, case: Case) -> CaseOutcome:
    """Run a backend on one case, forward and backward, in the very strides of the case, and judge it."""
    try:
        plain_of(case, where)  # first and apart: where the yardstick fails, the backend is not to blame
    except Exception as error:
        message = f"cannot be judged, plain PyTorch itself raised {one_line(error)}"
        return CaseOutcome(case.name, False, None, message)
    try:
        got = run_backend(case, backend, move_inputs(make_inputs(case), where)).cpu()
    except Exception as error:  # of any kind: it is the result
        return CaseOutcome(case.name, False, None, f"raised {one_line(error)}")
    findings = judge(case, got, where)
    complaints = [one.complaint for one in findings if one.complaint is not None]
    ratio = max(one.ratio for one in findings)
    return CaseOutcome(case.name, not complaints, ratio, "; ".join(complaints) or None)
