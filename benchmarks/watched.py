"""A process under watch: the one that started it kills it as soon as it holds more memory than it may."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

# Between two looks at the process. It cannot touch much more than 50 MiB of new memory meanwhile.
_LOOK_SECONDS = 0.005
_PATIENCE_SECONDS = 10
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>


class Ended(RuntimeError):
    """A method raised, or its process died; the message says which and how."""


class TooLarge(Exception):
    """The process passed its limit and was killed.

    Attributes:
        resident_mib: what it held when it was.
    """

    def __init__(self, message: str, resident_mib: float) -> None:
        super().__init__(message)
        self.resident_mib = resident_mib


def resident_mib(field: str = "VmRSS", pid: int | str = "self") -> float:
    """Resident set of a process in MiB: "VmRSS" for now, "VmHWM" for its highest. 0 when the process is a corpse.

    Raises:
        RuntimeError: not on Linux.
        FileNotFoundError: no such process.
    """
    if not Path("/proc/self/status").exists():
        raise RuntimeError("memory: got a system without /proc, expected Linux")
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 2**10
    return 0.0


class Watched:
    """An object in a process of its own, asked by name of method.

    Should the machine run out of memory in spite of the watch, this process is the first that Linux kills, and it ends
    when the one that started it does.

    Args:
        name: for messages.
        make: called with `arguments` in the process, once, to make the object; both can be pickled.
        limit_mib: most that the process may hold while it is at work, in MiB of resident memory.
        environment: variables that the process finds set before it imports anything.
    """

    def __init__(
        self,
        name: str,
        make: Callable[..., object],
        arguments: tuple[object, ...],
        limit_mib: float,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self._limit, self._is_at_work = name, limit_mib, False
        # spawn: a forked copy would share the memory and the thread pools of this process.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, os.getpid(), make, arguments))
        with mock.patch.dict(os.environ, environment or {}):
            self._process.start()
        theirs.close()

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        if not self._is_at_work:  # then it ends by itself and tidies up; nobody watches what is still at work
            self._process.join(_PATIENCE_SECONDS)
        self._kill()

    def ask(self, command: str, *arguments: object) -> Any:
        """What this method of the object returns.

        Raises:
            TooLarge: the process passed its limit; it is dead now.
            Ended: the method raised, or the process died of something else.
        """
        try:
            self._is_at_work = True
            self._pipe.send((command, arguments))
            while not self._pipe.poll(_LOOK_SECONDS):
                self._look(command)
            fine, answer = self._pipe.recv()
            self._is_at_work = False
        except (EOFError, OSError) as error:
            self._process.join(_PATIENCE_SECONDS)
            raise Ended(
                f"{self.name}: its process ended during {command!r} with exit code {self._process.exitcode} (negative: "
                "killed by that signal, -9 usually because the machine ran out of memory)"
            ) from error
        if not fine:
            raise Ended(f"{self.name}: failed during {command!r}:\n{answer}")
        return answer

    def _look(self, command: str) -> None:
        held = resident_mib(pid=self._process.pid or 0)
        if held > self._limit:
            self._kill()
            raise TooLarge(
                f"{self.name}: held {held:.0f} MiB during {command!r}, was allowed {self._limit:.0f} and was stopped",
                held,
            )

    def _kill(self) -> None:
        """End the process, and those that it started, such as a compiler."""
        if not self._process.is_alive():  # its number may be somebody else's by now
            return
        with contextlib.suppress(ProcessLookupError):  # it has not come as far as a group of its own
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        self._process.kill()
        self._process.join()


def _serve(pipe: Connection, parent: int, make: Callable[..., object], arguments: tuple[object, ...]) -> None:
    """Answer commands (method, arguments) with (True, result) or (False, traceback) until the pipe closes."""
    os.setsid()  # a group of its own, to be killed with all that it starts
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
