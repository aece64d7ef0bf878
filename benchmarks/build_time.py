"""How long the extension takes to build from nothing: all its sources, for all capabilities the compiler knows."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import build_cpp

from .measure import Measurement, timed

NAME = "build"
TITLE = "building the extension from nothing"
JOBS = 2


class BuildFailed(RuntimeError):
    """The build did not succeed; the message holds what it wrote."""


def measure_build(say: Callable[[str], None], root: Path = build_cpp.ROOT) -> list[Measurement]:
    """Copy build_cpp.py and csrc/ of `root` to an empty folder, build there with `JOBS` jobs, and time it.

    Raises:
        build_cpp.CannotBuild: something the build needs is missing on this machine.
        BuildFailed: it was started and failed.
    """
    toolchain = build_cpp.find_toolchain()
    settings = {name: value for name, value in os.environ.items() if name not in ("DEBUG", "LOMIX_FAST_WERROR")}
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(root / "csrc", Path(scratch, "csrc"))
        shutil.copy(root / "build_cpp.py", scratch)
        begin = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "build_cpp.py"],
            cwd=scratch,
            env=settings | {"MAX_JOBS": str(JOBS)},
            capture_output=True,
            text=True,
            check=False,
        )
        milliseconds = 1e3 * (time.perf_counter() - begin)
    if done.returncode != 0:
        raise BuildFailed(f"building the extension from nothing failed:\n{done.stdout}{done.stderr}")
    say(f"  built in {milliseconds / 1e3:.0f} s")
    blank = Measurement(
        subject=NAME,
        case="",
        contender="build_cpp",
        batch=0,
        classes=0,
        scales=0,
        maps=0,
        full=(),
        native=(),
        dtype="",
        direction="",
        threads=JOBS,
        capability=" ".join(toolchain.capabilities),
        n=0,
    )
    return [timed(blank, NAME, [milliseconds])]
