"""The loss's share of step time and of peak memory over a run, from steps of the training itself."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .laps import LAPS, Clock, Meter, Peak, measured
from .options import MEMORY_STEPS


class Costs:
    """Measures the steps of a run that are to be measured, each by one meter.

    Time in logged steps but the run's first, which wakes up threads and libraries; memory in the last `MEMORY_STEPS`
    steps, whose time does not count, because measuring memory on a CPU slows them down.

    Make it before the network; see `Peak`.

    Args:
        device: what the steps run on.
        log_every: steps from one logged step to the next.
        steps: of the whole run.

    Attributes:
        no_memory: why memory cannot be measured here, or None.
    """

    def __init__(self, device: torch.device, log_every: int, steps: int) -> None:
        self.log_every, self.steps = log_every, steps
        self.clock, self.peak, self.no_memory = Clock(device), None, None
        try:
            self.peak = Peak(device)
        except RuntimeError as error:
            self.no_memory = str(error)
        self.times: list[dict[str, float]] = []
        self.peaks: list[dict[str, tuple[int, int]]] = []
        self._is_first = True

    @contextlib.contextmanager
    def of(self, step: int, criterion: nn.Module) -> Iterator[dict[str, Any]]:
        """Measure the training step done inside, if it is one to measure.

        Args:
            step: its number, from 1.
            criterion: the loss; see `laps.measured`.

        Yields:
            A dict that holds "share", the loss's share of the step's time, after a timed step.
        """
        is_last = step > self.steps - MEMORY_STEPS
        is_timed = step % self.log_every == 0 and not is_last and not self._is_first
        meter: Meter | None = self.peak if is_last else self.clock if is_timed else None
        if meter is self.peak is not None and not self.peaks:
            self.peak.prepare()
        said: dict[str, Any] = {}
        with measured(criterion, meter) as laps:
            yield said
        self._is_first = False
        if is_timed:
            self.times.append(laps)
            said["share"] = share_of(laps)
        elif meter is not None:
            self.peaks.append(laps)


def time_share(steps: Sequence[dict[str, float]]) -> dict[str, Any] | None:
    """The loss's share of step time.

    Args:
        steps: of each timed step, by lap, the seconds.

    Returns:
        steps, the medians over them in ms of every lap and of step, and share, the median over steps of (loss_forward +
        loss_backward) / step; None if there were no steps.
    """
    if not steps:
        return None
    medians = {name: 1000 * statistics.median(step[name] for step in steps) for name in LAPS}
    whole = 1000 * statistics.median(sum(step.values()) for step in steps)
    shares = [share_of(step) for step in steps]
    return {"steps": len(steps), "ms": {**medians, "step": whole}, "share": statistics.median(shares)}


def share_of(step: dict[str, float]) -> float:
    """The loss's share of one step's time, 0 to 1."""
    return (step["loss_forward"] + step["loss_backward"]) / sum(step.values())


def memory_share(steps: Sequence[dict[str, tuple[int, int]]]) -> dict[str, Any] | None:
    """The loss's share of peak memory.

    Args:
        steps: of each measured step, by lap, the bytes at the highest and at its end.

    Returns:
        steps, and medians over them in MiB: step (the highest of the step), before_loss (held when the loss began),
        loss (how far the loss rose above that), added (how much lower the highest would be over the other laps alone);
        share, the median of loss / step. None if there were no steps.
    """
    if not steps:
        return None
    rows = []
    for laps in steps:
        step = max(high for high, _ in laps.values())
        before = laps["network_forward"][1]
        loss = max(laps[name][0] for name in ("loss_forward", "loss_backward")) - before
        others = max(laps[name][0] for name in ("network_forward", "rest"))
        rows.append({"step": step, "before_loss": before, "loss": loss, "added": step - others})
    medians = {name: statistics.median(row[name] for row in rows) / 2**20 for name in rows[0]}
    return {
        "steps": len(rows),
        "mib": medians,
        "share": statistics.median(row["loss"] / row["step"] for row in rows),
    }
