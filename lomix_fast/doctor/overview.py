"""What is installed and what runs where, asked so that nothing that is broken can stop the asking."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import _build_info
from ..backends import BACKENDS
from ..testing.devices import Device
from ..testing.environment import environment
from ..testing.errors import one_line


def overview(devices: Sequence[Device]) -> dict[str, Any]:
    """Describe the installation.

    Args:
        devices: those to ask every backend about.

    Returns:
        Plain values: environment (see `lomix_fast.testing.environment`), build (what the build of the extension has
        recorded, with "error" instead when that cannot be read), devices (name -> backend -> None or the reason why
        it cannot run there).
    """
    return {
        "environment": environment(),
        "build": _asked(_build_info.read, lambda reason: {"error": reason}),
        "devices": {one.name: why_not(one.where) for one in devices},
    }


def why_not(where: torch.device) -> dict[str, str | None]:
    """For every backend None when it can run on a device, otherwise the reason; one that cannot even be asked too."""

    def ask(name: str) -> str | None:
        return _asked(lambda: BACKENDS[name].why_not(where), lambda reason: f"asking it raised {reason}")

    return {name: ask(name) for name in BACKENDS}


def _asked(question: Callable[[], Any], instead: Callable[[str], Any]) -> Any:
    try:
        return question()
    except Exception as error:  # whatever a broken installation raises is the answer
        return instead(one_line(error))
