"""Programs that a step starts: with a limit of time, and nothing left of them when it is over."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .day import HUNG, SKIPPED

ROOT = Path(__file__).resolve().parents[2]
_LONG_SECONDS = 60.0  # what is not done by then hangs; before that there was no time for it


@dataclass(frozen=True)
class Ended:
    """How a program ended.

    Attributes:
        status: exit status, negative for a signal; None when it ran too long and was killed.
        text: what it wrote, messages and errors together.
        seconds: it ran.
    """

    status: int | None
    text: str
    seconds: float

    @property
    def last(self) -> str:
        """The last line that says anything, at most 200 characters of it; "" for none."""
        return next((line.strip()[:200] for line in reversed(self.text.splitlines()) if line.strip()), "")


def visible(device: str) -> dict[str, str]:
    """The variable by which programs find the device as their first: none of those started here takes a number."""
    kind, _, number = device.partition(":")
    if kind != "cuda":
        return {}
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    index = int(number or 0)
    listed = given.split(",") if given else []
    return {"CUDA_VISIBLE_DEVICES": listed[index] if index < len(listed) else str(index)}


def run_child(
    command: Sequence[str],
    variables: Mapping[str, str],
    log: Path,
    seconds: float,
    *,
    folder: Path = ROOT,
    patience: float = 0.0,
) -> Ended:
    """Run a program until it ends, or kill it and all that it has started.

    Args:
        command: program and arguments.
        variables: all its environment variables.
        log: where its output goes; what the file held is lost. A file, not a pipe: what it has left behind may keep a
            pipe open for ever.
        seconds: limit.
        folder: where it runs, the repository's root.
        patience: seconds that it has from being asked to end (SIGTERM) until it is killed.

    Raises:
        OSError: it cannot be started.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=dict(variables),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        status: int | None = None
        try:
            status = process.wait(timeout=max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            pass
        finally:  # when this process is interrupted as well
            if patience and process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=patience)
            _kill_session(process)
    return Ended(status, log.read_text(errors="replace"), time.monotonic() - began)


def late(ended: Ended) -> tuple[str, str]:
    """Status and note of a program that was killed: whether it hung, or had no time."""
    if ended.seconds < _LONG_SECONDS:
        return SKIPPED, f"not done in the {ended.seconds:.0f} s that there were"
    return HUNG, f"killed after {ended.seconds:.0f} s"


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    """Kill the process group, which nothing can escape by starting another, then groups of their own in its session."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # it may have ended meanwhile
            if int((folder / "stat").read_text().rpartition(")")[2].split()[3]) == process.pid:
                os.kill(int(folder.name), signal.SIGKILL)
    process.wait()
