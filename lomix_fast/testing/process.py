"""Work in processes of their own: watched for memory and time, so that what crashes or hangs costs only itself."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, TypeVar
from unittest import mock

from .peak import resident_mib

# Between two looks at the memory of a process. It cannot touch much more than 50 MiB of new memory meanwhile.
_LOOK_SECONDS = 0.005
_PATIENCE_SECONDS = 10
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>

Job = TypeVar("Job")


class Ended(RuntimeError):
    """A method raised, or its process died; the message says which and how.

    Attributes:
        exit_code: of the process that died, negative for the signal that killed it; None when a method raised.
    """

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class TooLong(Ended):
    """A method took longer than it may and its process was killed."""


class TooLarge(Exception):
    """The process passed its limit of memory and was killed.

    Attributes:
        resident_mib: what it held when it was.
    """

    def __init__(self, message: str, resident_mib: float) -> None:
        super().__init__(message)
        self.resident_mib = resident_mib


class Process:
    """An object in a process of its own, asked by name of method.

    On Linux it is the first process that the system kills should memory run out, and it ends when the one that started
    it does.

    Args:
        name: for messages.
        make: called with `arguments` in the process, when it is first asked, to make the object; both can be pickled.
        limit_mib: most that the process may hold while it is at work, in MiB of resident memory; None for any.
        environment: variables that the process finds set before it imports anything.
    """

    def __init__(
        self,
        name: str,
        make: Callable[..., object],
        arguments: tuple[object, ...] = (),
        limit_mib: float | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self._limit = name, limit_mib
        self._asked, self._begun = "", 0.0
        # spawn: a forked copy would share the memory, the thread pools and the GPU contexts of this process.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, os.getpid(), make, arguments))
        with mock.patch.dict(os.environ, environment or {}):
            self._process.start()
        theirs.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it: at once while it is at work, for nobody watches it any more, otherwise when it has tidied up."""
        self._pipe.close()
        if not self._asked:
            self._process.join(_PATIENCE_SECONDS)
        self.kill()

    def ask(self, command: str, *arguments: object, seconds: float | None = None) -> Any:
        """What this method of the object returns.

        Args:
            command: name of the method.
            arguments: of the method.
            seconds: most that it may take, the start of the process included; None for any.

        Raises:
            TooLarge, TooLong: the process passed a limit; it is dead now.
            Ended: the method raised, or the process died of something else.
        """
        self.begin(command, *arguments)
        deadline = None if seconds is None else time.monotonic() + seconds
        while not self.is_ready(_LOOK_SECONDS if self._limit is not None else 0.2):
            self._look()
            if deadline is not None and time.monotonic() > deadline:
                raise self.give_up()
        return self.answer()

    def answer_within(self, seconds: float) -> Any:
        """What the method that was begun returns, if it does within so many seconds from now.

        Raises:
            TooLong: it does not; the process is dead now.
            Ended: it raised, or the process died.
        """
        if not self.is_ready(max(0.0, seconds)):
            raise self.give_up()
        return self.answer()

    def begin(self, command: str, *arguments: object) -> None:
        """Start a method and go on; `answer` brings what it returns."""
        self._asked, self._begun = command, time.monotonic()
        with contextlib.suppress(OSError):  # it is dead: `answer` says so
            self._pipe.send((command, arguments))

    def is_ready(self, seconds: float = 0.0) -> bool:
        """Whether `answer` would not have to wait, after so many seconds at most."""
        try:
            return self._pipe.poll(seconds)
        except OSError:  # it has been closed: `answer` says so
            return True

    @property
    def is_at_work(self) -> bool:
        """Whether a method has been begun whose answer nobody has taken."""
        return bool(self._asked)

    @property
    def connection(self) -> Connection:
        """For multiprocessing.connection.wait: readable when `answer` would not have to wait."""
        return self._pipe

    def answer(self) -> Any:
        """What the method that was begun returns; waits for it.

        Raises:
            Ended: it raised, or the process died.
        """
        command = self._asked
        try:
            fine, answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(_PATIENCE_SECONDS)
            code = self._process.exitcode
            raise Ended(
                f"{self.name}: its process ended during {command!r} with exit code {code} (negative: killed by that "
                "signal, -9 usually because the machine ran out of memory)",
                code,
            ) from error
        self._asked = ""
        if not fine:
            raise Ended(f"{self.name}: failed during {command!r}:\n{answer}")
        return answer

    def give_up(self) -> TooLong:
        """Kill it in the middle of its work; returns what to raise."""
        self.kill()
        taken = time.monotonic() - self._begun
        return TooLong(f"{self.name}: {self._asked!r} took longer than {taken:.0f} s and was stopped", -signal.SIGKILL)

    def _look(self) -> None:
        if self._limit is None:
            return
        held = resident_mib(pid=self._process.pid or 0)
        if held > self._limit:
            self.kill()
            raise TooLarge(
                f"{self.name}: held {held:.0f} MiB during {self._asked!r}, was allowed {self._limit:.0f} and was "
                "stopped",
                held,
            )

    def pause(self, is_paused: bool) -> None:
        """Stop the process and those that it started, where they are, or have them go on."""
        with contextlib.suppress(ProcessLookupError):
            if self._process.is_alive():
                os.killpg(self._process.pid or 0, signal.SIGSTOP if is_paused else signal.SIGCONT)

    def kill(self) -> None:
        """End the process at once, and those that it started, such as a compiler."""
        if not self._process.is_alive():  # its number may be somebody else's by now
            return
        with contextlib.suppress(ProcessLookupError):  # it has not come as far as a group of its own
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        self._process.kill()
        self._process.join()


def _serve(pipe: Connection, parent: int, make: Callable[..., object], arguments: tuple[object, ...]) -> None:
    """Answer commands (method, arguments) with (True, result) or (False, traceback) until the pipe closes."""
    os.setsid()  # a group of its own, to be killed with all that it starts
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
    made: object = None
    while True:
        try:
            command, given = pipe.recv()
        except EOFError:
            return
        try:
            made = make(*arguments) if made is None else made
            answer = (True, getattr(made, command)(*given))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)


# ---- many jobs ----


@dataclass(frozen=True)
class Done(Generic[Job]):
    """What became of a job: what its method returned, or why there is nothing.

    Attributes:
        job: as given.
        value: what the method returned; None when `error` is there.
        error: `Ended` or `TooLong`; None when all went well or the job was not begun.
        begun: false for jobs that the whole had no time for, those included that were at work when it was up.
    """

    job: Job
    value: Any = None
    error: Ended | None = None
    begun: bool = True


def in_processes(
    jobs: Sequence[Job],
    *,
    start: Callable[[int], Process],
    command: Callable[[Job], tuple[object, ...]],
    group: Callable[[Job], Hashable],
    workers: int,
    seconds: float,
    deadline: float,
    spoilt: Callable[[Any], bool] = lambda value: False,
) -> Iterator[Done[Job]]:
    """Do jobs in a pool of processes; one that crashes or hangs costs its own job only.

    A process goes on with jobs of the group that it is at, which share what it has loaded or compiled, and then takes
    up the first group that nobody has begun, or helps with one that somebody has.

    Args:
        jobs: what to do.
        start: number -> a new process; called again when one has died.
        command: job -> name of the method and its arguments.
        group: job -> what it shares with others.
        workers: processes at once.
        seconds: most that a job may take.
        deadline: of time.monotonic(), when the time of the whole is up.
        spoilt: value -> whether the process that returned it must not do more, as after an illegal access to a GPU.

    Yields:
        What became of each job, in the order in which they end.
    """
    waiting: dict[Hashable, list[Job]] = {}
    for job in jobs:
        waiting.setdefault(group(job), []).append(job)
    current: list[Hashable] = [None] * workers
    processes: dict[int, Process] = {}
    at_work: dict[int, tuple[Job, float]] = {}
    try:
        while waiting or at_work:
            for number in range(workers):
                if number in at_work or not waiting or time.monotonic() >= deadline:
                    continue
                if current[number] not in waiting:
                    fresh = next((name for name in waiting if name not in current), None)
                    current[number] = max(waiting, key=lambda name: len(waiting[name])) if fresh is None else fresh
                job = waiting[current[number]].pop(0)
                waiting = {name: left for name, left in waiting.items() if left}
                if number not in processes:
                    processes[number] = start(number)
                processes[number].begin(*command(job))  # type: ignore[arg-type]
                at_work[number] = job, time.monotonic() + seconds
            if not at_work:
                break
            until = min([deadline, *(end for _, end in at_work.values())])
            pipes = {processes[number].connection: number for number in at_work}
            ready = wait(list(pipes), max(0.0, until - time.monotonic()))
            now = time.monotonic()
            for number in [pipes[one] for one in ready]:  # type: ignore[index]
                job, _ = at_work.pop(number)
                try:
                    value = processes[number].answer()
                except Ended as error:
                    processes.pop(number).close()
                    yield Done(job, error=error)
                    continue
                if spoilt(value):
                    processes.pop(number).kill()
                yield Done(job, value)
            for number, (job, end) in list(at_work.items()):
                if now >= min(end, deadline):
                    del at_work[number]
                    stopped = processes.pop(number).give_up()
                    yield Done(job, error=stopped) if now >= end else Done(job, begun=False)
        for left in waiting.values():
            yield from (Done(job, begun=False) for job in left)
    finally:
        for process in processes.values():
            process.close()
