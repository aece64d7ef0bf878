"""A process for one contender and one case, and the handle by which the main process tells it what to do.

Each contender has a process of its own, because memory that one has freed would serve the next unseen, and because
thread pools, allocators and compiled code of one would be there for the other. All processes of a case live side by
side and wait on a pipe; one works at a time.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from lomix_fast.testing.peak import extra_peak_mib

from . import gate
from .cases import BenchmarkCase
from .contenders import contender
from .prepared import Prepared
from .problem import make_problem


class WorkerError(RuntimeError):
    """A contender failed or its process died; the message says which and how."""


@dataclass(frozen=True)
class Memory:
    """First full-size step.

    Attributes:
        extra_peak_mib: how far the resident set rose.
        gradients_mib: the part of it that gradients of logits and parameters are bound to take.
        first_step_ms: milliseconds from cold.
        fingerprint: loss and norms of the gradients; empty for what is not the loss.
    """

    extra_peak_mib: float
    gradients_mib: float
    first_step_ms: float
    fingerprint: dict[str, float]


class _Session:
    """What runs inside the process. Every public method is a command."""

    def __init__(self, name: str, one: BenchmarkCase) -> None:
        self._contender, self._one = contender(name), one
        self._prepared: Prepared | None = None

    def errors(self) -> dict[str, float]:
        """Errors on the small case; also the tiny warm-up that wakes threads and loads code before memory is measured.

        At full size nothing may have run before: a scratch buffer that an implementation allocates in its first call
        and keeps is part of what it needs.
        """
        return gate.errors(self._contender, self._one.small)

    def memory(self) -> Memory:
        """One full-size step from a baseline at which inputs and parameters exist and gradients do not.

        The gradients of the inputs count: a step cannot be had without them. A contender that compiles takes its
        first step before the baseline, because the compiler's memory is not the step's.
        """
        prepared = self._prepared = self._contender.prepare(make_problem(self._one.case))
        kept: list[Tensor] = []

        def step() -> None:
            loss = prepared.loss()
            loss.backward()
            kept.append(loss.detach())

        begin = time.perf_counter()
        if self._contender.compiles:
            step()
            first = time.perf_counter() - begin
            prepared.clear()
            peak = extra_peak_mib(step)
        else:
            peak = extra_peak_mib(step)
            first = time.perf_counter() - begin
        is_loss = self._contender.own_errors is None
        fingerprint = gate.fingerprint(kept[-1], prepared) if is_loss else {}
        return Memory(peak, prepared.gradient_bytes() / 2**20, 1e3 * first, fingerprint)

    def repetitions(self, count: int) -> list[tuple[float, float]]:
        """Milliseconds of forward (with its graph, as in training) and of backward, `count` times.

        Gradients are dropped before the clock starts, and the collector of Python objects is held off meanwhile.
        """
        assert self._prepared is not None
        times = []
        gc.collect()
        gc.disable()
        for _ in range(count):
            self._prepared.clear()
            begin = time.perf_counter()
            loss = self._prepared.loss()
            middle = time.perf_counter()
            loss.backward()
            end = time.perf_counter()
            times.append((1e3 * (middle - begin), 1e3 * (end - middle)))
            del loss
        gc.enable()
        return times


def _serve(pipe: Connection, name: str, one: BenchmarkCase, threads: int) -> None:
    """Answer commands (method, arguments) with (True, result) or (False, traceback) until the pipe closes."""
    torch.set_num_threads(threads)
    session: _Session | None = None
    while True:
        try:
            command, arguments = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            session = session or _Session(name, one)
            answer = (True, getattr(session, command)(*arguments))
        except KeyboardInterrupt:
            return
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)


@contextlib.contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for processes started meanwhile; those of this process are put back afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


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
        self.name = name
        # spawn: a forked copy of a process whose thread pools have run may hang, and would share its memory.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, one, threads))
        with _variables(environment or {}):
            self._process.start()
        theirs.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def errors(self) -> dict[str, float]:
        """See `gate.errors`."""
        return self._ask("errors")

    def memory(self) -> Memory:
        """One full-size step; call it once, before any time is taken."""
        return self._ask("memory")

    def repetitions(self, count: int = 1) -> list[tuple[float, float]]:
        """Milliseconds of forward and backward of `count` steps."""
        return self._ask("repetitions", count)

    def _ask(self, command: str, *arguments: object) -> Any:
        try:
            self._pipe.send((command, arguments))
            fine, answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(10)
            raise WorkerError(
                f"{self.name}: its process ended during {command!r} with exit code {self._process.exitcode} "
                "(negative: killed by that signal, -9 usually for want of memory)"
            ) from error
        if not fine:
            raise WorkerError(f"{self.name}: failed during {command!r}:\n{answer}")
        return answer
