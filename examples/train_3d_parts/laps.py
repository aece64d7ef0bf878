"""What a training step spends in the network and in the loss, time or memory, without changing the step.

A step falls into four laps: the network's forward pass, the loss's forward pass, the loss's backward pass, and the rest
(the network's backward pass and the optimizer). Hooks tell them apart: the loss begins when the criterion is called,
and it ends when the first gradient of a logit map reaches the network. Autograd does the whole of the loss's backward
pass before anything of the network's, because it runs what was recorded last first.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

LAPS = ("network_forward", "loss_forward", "loss_backward", "rest")

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_M_MMAP_THRESHOLD = -3  # of glibc's mallopt


class Meter(Protocol):
    """What measures a lap."""

    def lap(self) -> Any:
        """What happened since the last call."""
        ...


class Clock:
    """Seconds a lap, with all work of the device done.

    Args:
        device: what the step runs on. On CUDA every lap waits for it, so clock some steps only.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.last = device, time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before, self.last = self.last, time.perf_counter()
        return self.last - before


class Peak:
    """Bytes held at the highest in a lap and at its end.

    On CUDA what PyTorch's allocator has handed out. On a CPU the resident set of the process, less what it was when
    this object was made: make it before the network, so that libraries and data do not count. malloc is told to give
    freed memory back at once, which makes the step slower and the figures repeatable, so do not time such a step.

    Args:
        device: what the step runs on.

    Raises:
        RuntimeError: the high-water mark of the resident set cannot be reset here (not Linux, or a container forbids
            it).
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.base = device, 0
        if device.type == "cuda":
            return
        if not sys.platform.startswith("linux"):
            raise RuntimeError("the memory of a step on a CPU is measured on Linux only")
        try:
            _CLEAR.write_text("5")
        except OSError as error:
            raise RuntimeError(f"the high-water mark of this process cannot be reset: {error}") from None
        _give_back()
        self.base = _resident("VmRSS")

    def prepare(self) -> None:
        """To be called once, before the first step that is measured; slows down all later ones on a CPU."""
        if self.device.type != "cuda":
            libc = ctypes.CDLL(None)
            if hasattr(libc, "mallopt"):
                libc.mallopt(_M_MMAP_THRESHOLD, 128 * 1024)
        self.lap()

    def lap(self) -> tuple[int, int]:
        """Bytes at the highest since the last call, and now."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            highest, now = torch.cuda.max_memory_allocated(self.device), torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return highest, now
        highest = _resident("VmHWM")
        _give_back()
        _CLEAR.write_text("5")
        return highest - self.base, _resident("VmRSS") - self.base


def _give_back() -> None:
    """Have malloc give back what has been freed (glibc; others keep it, and the figures are upper bounds)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


@contextlib.contextmanager
def measured(criterion: nn.Module, meter: Meter | None) -> Iterator[dict[str, Any]]:
    """Measure the laps of the step done inside; the step is not changed.

    Args:
        criterion: called once inside, with the logits, a tensor or a list of them, as first argument.
        meter: what to measure; None measures nothing.

    Yields:
        A dict that holds, after the block, what `meter` said of each lap of `LAPS`; empty without a meter.

    Raises:
        RuntimeError: the block ended without a forward and a backward pass of the loss.
    """
    laps: dict[str, Any] = {}
    if meter is None:
        yield laps
        return

    def loss_begins(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        maps = [arguments[0]] if isinstance(arguments[0], Tensor) else list(arguments[0])
        for one in maps:
            one.register_hook(gradient_arrives)
        laps["network_forward"] = meter.lap()

    def loss_turns(*_: Any) -> None:
        laps["loss_forward"] = meter.lap()

    def gradient_arrives(_: Tensor) -> None:
        if "loss_backward" not in laps:  # the first of L
            laps["loss_backward"] = meter.lap()

    handles = [criterion.register_forward_pre_hook(loss_begins), criterion.register_forward_hook(loss_turns)]
    try:
        meter.lap()
        yield laps
        laps["rest"] = meter.lap()
    finally:
        for handle in handles:
            handle.remove()
    if missing := [name for name in LAPS if name not in laps]:
        raise RuntimeError(f"a measured step ended without {', '.join(missing)}; expected a whole training step")
