"""What the parts of the build share: its errors, its switches, and a compiler's complaint in one line."""

from __future__ import annotations

import os
import subprocess


class BuildError(RuntimeError):
    """The build cannot do what was asked; the message says what to do."""


class CannotBuild(BuildError):
    """Something the extension needs is missing on this machine."""


def werror() -> bool:
    """Whether warnings of our own sources are errors."""
    return os.environ.get("LOMIX_FAST_WERROR") == "1"


def debug() -> bool:
    """Whether to compile for a debugger instead of for speed."""
    return os.environ.get("DEBUG") == "1"


def complaint(command: list[str]) -> str | None:
    """Return None when a command succeeds, otherwise the first line that says why not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    if done.returncode == 0:
        return None
    lines = (done.stderr or done.stdout).splitlines() or [f"exit status {done.returncode}"]
    return next((line for line in lines if "error" in line), lines[0])
