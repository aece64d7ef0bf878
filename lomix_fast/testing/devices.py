"""Devices: the only place that knows how a CPU and a GPU differ in timing and memory, for doctor and benchmarks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch

from .errors import one_line
from .peak import extra_peak_mib

Work = Callable[[], object]
_MOST_AHEAD_MS = 100.0


@dataclass(frozen=True)
class Peak:
    """Memory of a step.

    Attributes:
        extra_mib: by how much memory rose at the highest, over what was held before the first step.
        first_ms: milliseconds of the first step, compilation included where there is any.
    """

    extra_mib: float
    first_ms: float


class Device(Protocol):
    """One place where backends can run."""

    @property
    def name(self) -> str:
        """What --device takes: "cpu" or "cuda:0"."""

    @property
    def where(self) -> torch.device:
        """The torch device that tensors go to."""

    def laps(self, *stages: Work) -> list[float]:
        """Run stages one after the other, once, and return the milliseconds of each."""

    def host_ms(self, work: Work) -> float:
        """Milliseconds for which `work` keeps the host busy."""

    def peak(self, step: Work, clear: Work, compiles: bool = False) -> Peak:
        """Memory of a step whose inputs are there and whose gradients are not.

        Args:
            step: forward and backward.
            clear: drops what the step has left.
            compiles: whether the first step compiles code, whose memory is not the step's.
        """

    def release(self) -> None:
        """Give memory that is kept for later back to the system."""

    def complaint(self) -> str | None:
        """None when the device still computes, otherwise what happens when it is asked to."""


@dataclass(frozen=True)
class Cpu:
    """The processor. Memory is that of the whole process, so a process of its own should ask for it."""

    name: str = "cpu"
    where: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def laps(self, *stages: Work) -> list[float]:
        """Wall clock time of each stage."""
        times, results = [], []
        for stage in stages:
            begin = time.perf_counter()
            results.append(stage())  # giving results back is not part of the stage
            times.append(1e3 * (time.perf_counter() - begin))
        return times

    def host_ms(self, work: Work) -> float:
        """The same as its time: the host is the device."""
        return self.laps(work)[0]

    def peak(self, step: Work, clear: Work, compiles: bool = False) -> Peak:
        """Rise of the resident set in the first step, or in the second where the first compiles."""
        begin = time.perf_counter()
        if compiles:
            step()
            first = time.perf_counter() - begin
            clear()
            return Peak(extra_peak_mib(step), 1e3 * first)
        extra = extra_peak_mib(step)
        return Peak(extra, 1e3 * (time.perf_counter() - begin))

    def release(self) -> None:
        """Do nothing: the allocator of the CPU keeps no blocks of this size."""

    def complaint(self) -> str | None:
        """None: a processor that fails takes this program with it."""
        return None


@dataclass
class Gpu:
    """A CUDA or ROCm device; torch gives both the same interface.

    Attributes:
        name: "cuda:0".
        where: the torch device.
        cuda: `torch.cuda`, or what stands in for it.
    """

    name: str
    where: torch.device
    cuda: Any = torch.cuda
    _ahead_ms: float = field(default=0.0, init=False)
    _l2: torch.Tensor | None = field(default=None, init=False)

    def laps(self, *stages: Work) -> list[float]:
        """Time of each stage between events of the current stream, with a cold L2, while the host runs ahead.

        The device is kept busy before the first stage for about as long as the host takes to issue the stages, as the
        network before a loss keeps it busy; so gaps between launches do not count, unless the host waits in a stage.
        """
        with self.cuda.device(self.where):
            events = [self.cuda.Event(enable_timing=True) for _ in range(len(stages) + 1)]
            self.cuda.synchronize(self.where)
            self._flush()
            self._keep_busy(self._ahead_ms)
            results = []
            begin = time.perf_counter()
            events[0].record()
            for stage, after in zip(stages, events[1:], strict=True):
                results.append(stage())
                after.record()
            issued = 1e3 * (time.perf_counter() - begin)
            events[-1].synchronize()
            # A step that waits for the device takes the wait with it, so there is an end.
            self._ahead_ms = min(1.5 * issued, _MOST_AHEAD_MS)
            return [float(a.elapsed_time(b)) for a, b in pairwise(events)]

    def _flush(self) -> None:
        """Write twice as many bytes as L2 holds."""
        if self._l2 is None:
            size = 2 * int(getattr(self.cuda.get_device_properties(self.where), "L2_cache_size", 2**26))
            self._l2 = torch.empty(size, dtype=torch.uint8, device=self.where)
        self._l2.zero_()

    def _keep_busy(self, ms: float) -> None:
        if ms > 0:
            self.cuda._sleep(int(ms * 1.5e6))  # clocks, of a card of 1.5 GHz or a little more

    def host_ms(self, work: Work) -> float:
        """Time to issue `work` to an idle device; what it waits for counts."""
        self.cuda.synchronize(self.where)
        begin = time.perf_counter()
        result = work()
        taken = 1e3 * (time.perf_counter() - begin)
        self.cuda.synchronize(self.where)
        del result
        return taken

    def peak(self, step: Work, clear: Work, compiles: bool = False) -> Peak:
        """Peak of torch's allocator in the second step, over what was allocated before the first.

        The first step compiles and tunes; memory that it has allocated and kept counts all the same.
        """
        self._l2 = None
        with self.cuda.device(self.where):
            self.cuda.synchronize(self.where)
            before = self.cuda.memory_allocated(self.where)
            begin = time.perf_counter()
            step()
            self.cuda.synchronize(self.where)
            first = 1e3 * (time.perf_counter() - begin)
            clear()
            self.cuda.reset_peak_memory_stats(self.where)
            step()
            self.cuda.synchronize(self.where)
            return Peak(float(self.cuda.max_memory_allocated(self.where) - before) / 2**20, first)

    def release(self) -> None:
        """Empty torch's cache of free blocks; a device that is broken has nothing to give."""
        self._l2 = None
        with contextlib.suppress(RuntimeError):
            self.cuda.empty_cache()

    def complaint(self) -> str | None:
        """What an addition raises: after an illegal access every call fails until the process ends."""
        try:
            torch.ones(2, device=self.where).sum().item()
            self.cuda.synchronize(self.where)
        except RuntimeError as error:
            return one_line(error)
        return None
