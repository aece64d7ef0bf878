"""Devices: the only place that knows how a CPU and a GPU differ in timing, memory and running out of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..testing.cases import Case
from ..testing.environment import gpus
from . import workloads
from .errors import one_line
from .peak import peak_in_a_process

Step = Callable[[], object]


class Device(Protocol):
    """One place where backends can run."""

    @property
    def name(self) -> str:
        """What --device takes: "cpu" or "cuda:0"."""

    @property
    def where(self) -> torch.device:
        """The torch device that tensors go to."""

    @property
    def workloads(self) -> tuple[Case, ...]:
        """What is timed there."""

    def milliseconds(self, step: Step) -> float:
        """Run a step once and return how long it took."""

    def peak_mib(self, subject: str, workload: Case) -> float:
        """Return by how many MiB memory rises at the highest during one step.

        Raises:
            DoesNotFitError: there is not enough memory.
            Exception: whatever the step raises.
        """

    def release(self) -> None:
        """Give memory that is kept for later back to the system."""

    def complaint(self) -> str | None:
        """None when the device still computes, otherwise what happens when it is asked to."""


@dataclass(frozen=True)
class Cpu:
    """The processor. Memory is measured in a process of its own, see `peak`."""

    name: str = "cpu"
    where: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def workloads(self) -> tuple[Case, ...]:
        """Small ones: the official style takes seconds a step on the large ones."""
        return workloads.CPU

    def milliseconds(self, step: Step) -> float:
        """Wall clock time of one step."""
        begin = time.perf_counter()
        result = step()
        elapsed = time.perf_counter() - begin
        del result  # giving gradients back is not part of the step
        return 1e3 * elapsed

    def peak_mib(self, subject: str, workload: Case) -> float:
        """Peak of a fresh process over its size before the step, see `peak.peak_in_a_process`."""
        return peak_in_a_process(subject, workload)

    def release(self) -> None:
        """Do nothing: the allocator of the CPU keeps no blocks of this size."""

    def complaint(self) -> str | None:
        """None: a processor that fails takes this program with it."""
        return None


@dataclass(frozen=True)
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

    @property
    def workloads(self) -> tuple[Case, ...]:
        """The problems that the promises of speed and memory are made about."""
        return workloads.GPU

    def milliseconds(self, step: Step) -> float:
        """Time between two events of the device's stream, launches included where the device waits for them."""
        with self.cuda.device(self.where):
            start, end = self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True)
            self.cuda.synchronize(self.where)
            start.record()
            result = step()
            end.record()
            end.synchronize()
            del result
            return float(start.elapsed_time(end))

    def peak_mib(self, subject: str, workload: Case) -> float:
        """Peak of torch's allocator over what was allocated before the first step, once inputs were there.

        The first step compiles and tunes, the second one is measured; scratch memory that the first has allocated and
        kept counts all the same, since a step cannot be had without it.
        """
        self.release()
        with self.cuda.device(self.where):
            given = workloads.draw(subject, workload, self.where)
            workloads.step_of(subject, workloads.tiny(given))()  # libraries get the workspaces that all share
            step = workloads.step_of(subject, given)
            self.cuda.synchronize(self.where)
            before = self.cuda.memory_allocated(self.where)
            step()
            self.cuda.synchronize(self.where)
            self.cuda.reset_peak_memory_stats(self.where)
            step()
            self.cuda.synchronize(self.where)
            return float(self.cuda.max_memory_allocated(self.where) - before) / 2**20

    def release(self) -> None:
        """Empty torch's cache of free blocks; a device that is broken has nothing to give."""
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


def present() -> list[Device]:
    """Every device there is: the CPU first, then each GPU that torch can use."""
    found: list[Device] = [Cpu()]
    return found + [Gpu(one["device"], torch.device(one["device"])) for one in gpus() if "error" not in one]


def choose(names: Sequence[str] | None, devices: Sequence[Device]) -> list[Device]:
    """The devices that --device names, in their order here; all of them for None. "cuda" means every GPU.

    Raises:
        ValueError: a name that is not there; the message lists those that are.
    """
    if names is None:
        return list(devices)
    for name in names:
        if name not in {label for one in devices for label in _labels(one)}:
            raise ValueError(
                f"--device: got {name!r}, expected names out of {', '.join(one.name for one in devices)}, "
                "the devices that torch finds here"
            )
    return [one for one in devices if not _labels(one).isdisjoint(names)]


def _labels(device: Device) -> set[str]:
    return {device.name, device.name.partition(":")[0]}
