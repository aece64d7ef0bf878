"""Where a warning is to point."""

from __future__ import annotations

import sys
from types import FrameType


def stacklevel_outside() -> int:
    """The `stacklevel` under which the function that asks can warn at the line that called into this package.

    Frames of torch are passed over as well: a module is called by way of torch.nn.Module.
    """
    frame: FrameType | None = sys._getframe(1)
    level = 1
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("lomix_fast", "torch"):
        frame, level = frame.f_back, level + 1
    return level
