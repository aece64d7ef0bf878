"""What runs inside the process of one row: the check of its numbers, a step whose peak is measured, steps to time."""

from __future__ import annotations

import ctypes
import gc
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from lomix_fast.testing.peak import extra_peak_mib, resident_mib

from . import gate
from .large_batch_rows import Patch, draw, errors, row
from .prepared import Prepared


@dataclass(frozen=True)
class Held:
    """Resident memory in MiB: `empty` before the inputs were made, `before` once they and the parameters are there."""

    empty: float
    before: float


@dataclass(frozen=True)
class Peak:
    """One step.

    Attributes:
        peak_mib: highest resident set of the process during the step.
        before_mib: resident just before it.
        gradients_mib: size of all gradients.
        step_ms, first_step_ms: time of this step and of the first one; the same unless that compiled.
        fingerprint: loss and norms of the gradients; only for a batch of one, since norms take memory.
    """

    peak_mib: float
    before_mib: float
    gradients_mib: float
    step_ms: float
    first_step_ms: float
    fingerprint: dict[str, float]


class Session:
    """One row on one patch: `errors` alone, or `make`, then `peak`, then `repetition` any number of times.

    Args:
        name: of the row.
        patch: its problem.
        threads: torch threads.
    """

    def __init__(self, name: str, patch: Patch, threads: int) -> None:
        torch.set_num_threads(threads)
        self._row, self._patch = row(name), patch
        self._prepared: Prepared | None = None
        self._batch = 0

    def errors(self) -> dict[str, float]:
        """See `large_batch_rows.errors`."""
        return errors(self._row, self._patch)

    def make(self, batch: int) -> Held:
        """Draw the inputs."""
        gc.collect()
        empty = resident_mib()
        self._batch = batch
        self._prepared = self._row.prepare(draw(self._patch.case(self._row.loss, batch)))
        return Held(empty, resident_mib())

    def peak(self) -> Peak:
        """One step, the first in this process; the second where the first compiles.

        All that a first step takes and keeps belongs to it, except the compiler, whose leavings were there before.
        """
        assert self._prepared is not None
        losses: list[Tensor] = []
        times: list[float] = []

        def step() -> None:
            losses[:] = [self._step(times)]

        if self._row.compiles:
            step()
            self._prepared.clear()
        extra = extra_peak_mib(step)  # sets the high-water mark back before the step
        peak = resident_mib("VmHWM")
        gradients = self._prepared.gradient_bytes() / 2**20
        fingerprint = gate.fingerprint(losses[0], self._prepared) if self._batch == 1 else {}
        self._prepared.clear()
        return Peak(peak, peak - extra, gradients, times[-1], times[0], fingerprint)

    def repetition(self) -> float:
        """Milliseconds of one more step, forward and backward. No gradient is there when the clock starts.

        Memory is given back afterwards, so that the rows that wait for their turn leave it to the one at work. A step
        that nobody times comes first, so that the timed one finds freed memory to use again, as in training.
        """
        assert self._prepared is not None
        times: list[float] = []
        gc.collect()
        gc.disable()
        for _ in range(2):
            self._step(times)
            self._prepared.clear()
        gc.enable()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)
        return times[-1]

    def _step(self, times: list[float]) -> Tensor:
        assert self._prepared is not None
        begin = time.perf_counter()
        loss = self._prepared.loss()
        loss.backward()
        times.append(1e3 * (time.perf_counter() - begin))
        return loss.detach()
