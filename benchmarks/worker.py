"""A process for one contender and one case, and the handle by which the main process tells it what to do.

Each contender has a process of its own, because memory that one has freed would serve the next unseen, and because
thread pools, allocators and compiled code of one would be there for the other. All processes of a case live side by
side and wait on a pipe; one works at a time.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lomix_fast.testing.devices import Cpu, Device
from lomix_fast.testing.process import Process

from . import gate
from .cases import BenchmarkCase
from .contenders import contender
from .prepared import Prepared
from .problem import make_problem


@dataclass(frozen=True)
class Memory:
    """First full-size step.

    Attributes:
        extra_peak_mib: how far the resident set rose, or what torch had allocated on a GPU.
        gradients_mib: the part of it that gradients of logits and parameters are bound to take.
        first_step_ms: milliseconds from cold.
        fingerprint: loss and norms of the gradients; empty for what is not the loss.
    """

    extra_peak_mib: float
    gradients_mib: float
    first_step_ms: float
    fingerprint: dict[str, float]


class Session:
    """What runs inside the process. Every public method is a command.

    Args:
        name: of the contender.
        one: the case.
        threads: torch threads; None leaves them.
        device: where.
    """

    def __init__(self, name: str, one: BenchmarkCase, threads: int | None = None, device: Device | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._contender, self._one, self._device = contender(name), one, device or Cpu()
        self._prepared: Prepared | None = None

    def errors(self) -> dict[str, float]:
        """Errors on the small case; also the tiny warm-up that wakes threads and loads code before memory is measured.

        At full size nothing may have run before: a scratch buffer that an implementation allocates in its first call
        and keeps is part of what it needs.
        """
        return gate.errors(self._contender, self._one.small, self._device.where)

    def memory(self) -> Memory:
        """The first full-size steps, from a baseline at which inputs and parameters exist and gradients do not.

        The gradients of the inputs count: a step cannot be had without them. Which step it is, see `Device.peak`; the
        memory of a compiler is not the step's.
        """
        prepared = self._prepared = self._contender.prepare(make_problem(self._one.case).to(self._device.where))
        kept: list[Tensor] = []

        def step() -> None:
            loss = prepared.loss()
            loss.backward()
            kept[:] = [loss.detach()]

        found = self._device.peak(step, prepared.clear, self._contender.compiles)
        is_loss = self._contender.own_errors is None
        fingerprint = gate.fingerprint(kept[-1], prepared) if is_loss else {}
        return Memory(found.extra_mib, prepared.gradient_bytes() / 2**20, found.first_ms, fingerprint)

    def clear(self) -> None:
        """Drop the gradients of the last step."""
        if self._prepared is not None:
            self._prepared.clear()

    def repetitions(self, count: int) -> list[tuple[float, float]]:
        """Milliseconds of forward (with its graph, as in training) and of backward, `count` times.

        Gradients are dropped before the clock starts, and the collector of Python objects is held off meanwhile.
        """
        times = []
        with self._ready() as (forward, backward, clear):
            for _ in range(count):
                clear()
                first, second = self._device.laps(forward, backward)
                times.append((first, second))
        return times

    def host(self, count: int) -> list[float]:
        """Milliseconds for which forward and backward keep the host busy, `count` times, the device idle at first."""
        times = []
        with self._ready() as (forward, backward, clear):
            for _ in range(count):
                clear()
                times.append(self._device.host_ms(lambda: (forward(), backward())))
        return times

    def launches(self) -> dict[str, int]:
        """How often a step launches each kernel, by name, as torch's profiler sees it; copies and fills count."""
        kind = torch.autograd.DeviceType.CUDA if self._device.where.type == "cuda" else torch.autograd.DeviceType.CPU
        with self._ready() as (forward, backward, clear):
            clear()
            with torch.profiler.profile(acc_events=True) as profiler:
                self._device.host_ms(lambda: (forward(), backward()))  # which waits for the device at the end
        found = [
            event.name
            for event in profiler.events()
            if event.device_type == kind and not getattr(event, "is_user_annotation", False)
        ]
        return {name: found.count(name) for name in dict.fromkeys(found)}

    @contextlib.contextmanager
    def _ready(self) -> Iterator[tuple[Callable[[], object], Callable[[], object], Callable[[], object]]]:
        """Forward, backward and what drops the gradients, without collections of Python objects."""
        assert self._prepared is not None
        prepared, losses = self._prepared, []

        def backward() -> None:
            losses.pop().backward()

        gc.collect()
        gc.disable()
        try:
            yield lambda: losses.append(prepared.loss()), backward, prepared.clear
        finally:
            gc.enable()


class Worker:
    """Handle on the process of one contender.

    Args:
        name: of the contender.
        one: the case.
        threads: torch threads inside the process.
        environment: variables that the process finds set before it imports anything.
    """

    def __init__(
        self, name: str, one: BenchmarkCase, threads: int, environment: Mapping[str, str] | None = None
    ) -> None:
        self._process = Process(name, Session, (name, one, threads), environment=environment)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.close()

    def errors(self) -> dict[str, float]:
        """See `gate.errors`."""
        return self._process.ask("errors")

    def memory(self) -> Memory:
        """One full-size step; call it once, before any time is taken."""
        return self._process.ask("memory")

    def repetitions(self, count: int = 1) -> list[tuple[float, float]]:
        """Milliseconds of forward and backward of `count` steps."""
        return self._process.ask("repetitions", count)
