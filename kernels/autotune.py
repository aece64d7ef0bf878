"""Timing launch configurations, only when LOMIX_FAST_AUTOTUNE=1 asks for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence

import torch
from triton.runtime.errors import OutOfResources, PTXASError

from .config import Config
from .tables import is_capturing

_chosen: dict[Hashable, Config] = {}


def wanted(device: torch.device) -> bool:
    """Whether LOMIX_FAST_AUTOTUNE=1 is set, and the host may wait: not while this device captures a CUDA graph."""
    return os.environ.get("LOMIX_FAST_AUTOTUNE") == "1" and not is_capturing(device)


def _milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """Best of three runs after one to compile; makes the host wait for the device."""
    work()
    times = []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(device):
            start.record()
            work()
            end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)


def best(
    key: Hashable,
    candidates: Sequence[Config],
    run: Callable[[Config], object],
    device: torch.device,
    time: Callable[[Callable[[], object], torch.device], float] = _milliseconds,
) -> Config:
    """The quickest of `candidates`, timed once a process and key.

    The key names what the best configuration depends on (kernel, device, classes, scales, axes) and no size that
    varies from batch to batch, so the first batch of a kind is slow and no other.

    Args:
        key: see above.
        candidates: at least one; the first is what would be used without timing.
        run: does the work under a configuration; may raise for one that does not fit the device.
        device: where the work runs.
        time: (work, device) -> time of it.

    Raises:
        Whatever `run` raises when it fails for every candidate.
    """
    if key not in _chosen:
        times: list[tuple[float, int]] = []
        failure: Exception | None = None
        for position, config in enumerate(candidates):
            try:
                times.append((time(lambda config=config: run(config), device), position))  # type: ignore[misc]
            except (
                RuntimeError,
                ValueError,
                OutOfResources,
                PTXASError,
            ) as error:  # too many registers or too much memory for this device
                failure = error
        if not times:
            assert failure is not None
            raise failure
        _chosen[key] = candidates[min(times)[1]]
    return _chosen[key]
