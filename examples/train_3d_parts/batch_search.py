"""--find-batch: for each loss, the largest batch whose whole training step fits a budget of memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lomix_fast.testing.peak import PLAIN_MALLOC

from .options import OptionError, Settings
from .trial import status

MEANING = {
    "cpu": "resident set of a process at its highest over two training steps: network, loss, optimizer, one batch "
    "and the libraries, without a data set; memory that is freed is given back at once (MALLOC_MMAP_THRESHOLD_)",
    "cuda": "what PyTorch's allocator has reserved at its highest over two training steps: network, loss, optimizer "
    "and one batch; the CUDA context is not in it",
}
_LOOK_SECONDS = 0.02  # from one look at the resident set of a trial to the next


@dataclass(frozen=True)
class Trial:
    """What came of one batch.

    Attributes:
        batch: patches. fits: whether the step stayed within the budget.
        peak_mib, seconds: of a step that came to its end, or None. why: of one that does not fit.
    """

    batch: int
    fits: bool
    peak_mib: float | None
    seconds: float | None
    why: str | None


def largest(attempt: Callable[[int], Trial], most: int) -> list[Trial]:
    """Look for the largest batch that fits, first doubling, then halving the interval.

    Args:
        attempt: tries one batch. If a batch fits, smaller ones do.
        most: no larger batch is tried, at least 1.

    Returns:
        All trials in order. The largest that fits is the answer, 0 if there is none; the next one up has been tried
        too and does not fit, unless the answer is `most`.
    """
    trials: list[Trial] = []

    def fits(batch: int) -> bool:
        trials.append(attempt(batch))
        return trials[-1].fits

    low, high = 0, 1  # low fits
    while fits(high):
        if high == most:
            return trials
        low, high = high, min(2 * high, most)
    while high - low > 1:  # and high does not
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return trials


def answer(trials: list[Trial]) -> int:
    """The largest batch that fitted, or 0."""
    return max((trial.batch for trial in trials if trial.fits), default=0)


def check_budget(budget: int, device: torch.device) -> None:
    """Refuse a budget that this machine does not have.

    Args:
        budget: bytes.
        device: what the steps run on.

    Raises:
        OptionError: more than there is; or a CPU where the memory of a process cannot be watched.
    """
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    elif not sys.platform.startswith("linux"):
        raise OptionError(f"--find-batch: watches memory on a CPU through Linux's /proc, got {sys.platform}; use CUDA")
    else:
        lines = Path("/proc/meminfo").read_text().splitlines()
        there = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    if budget > there:
        raise OptionError(
            f"--memory: got {budget / 2**30:g} GiB, expected at most the {there / 2**30:.1f} GiB that are "
            f"{'on the device' if device.type == 'cuda' else 'free on this machine'}"
        )


def run_trial(settings: Settings, device: torch.device, budget: int, timeout: float) -> Trial:
    """Try one batch in a process of its own.

    Args:
        settings: with the batch to try.
        device: what the steps run on.
        budget: bytes.
        timeout: seconds that it may take.

    Raises:
        RuntimeError: the process failed for another reason than memory, or took too long.
    """
    folder = Path(__file__).resolve().parents[1]
    search = os.pathsep.join([str(folder), str(folder.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    asked = {
        "settings": asdict(settings),
        "device": str(device),
        "budget": budget,
        "threads": torch.get_num_threads(),
    }
    with subprocess.Popen(
        [sys.executable, "-m", "train_3d_parts.trial"],
        env={**os.environ, **PLAIN_MALLOC, "PYTHONPATH": search},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            over = _watch(child, json.dumps(asked), budget if device.type == "cpu" else None, timeout)
            wrote, complained = child.communicate()
        except BaseException:
            child.kill()
            raise
    return _judge(settings.batch, over, child.returncode, wrote, complained)


def _watch(child: subprocess.Popen[str], asked: str, budget: int | None, timeout: float) -> bool:
    """Send the question, wait for the end of the trial, and end it once its resident set is over the budget.

    Returns:
        Whether it was ended for that.

    Raises:
        RuntimeError: it took longer than `timeout`; it is left for the caller to end.
    """
    assert child.stdin is not None
    child.stdin.write(asked)
    child.stdin.close()
    child.stdin = None  # so that communicate() leaves it alone
    begin = time.monotonic()
    while child.poll() is None:
        if budget is not None and status("VmRSS", child.pid) > budget:
            child.kill()
            return True
        if time.monotonic() - begin > timeout:
            raise RuntimeError(f"a trial of --find-batch took longer than --timeout {timeout:g} seconds")
        time.sleep(_LOOK_SECONDS)
    return False


def _judge(batch: int, over: bool, code: int, wrote: str, complained: str) -> Trial:
    if over:
        return Trial(batch, False, None, None, "ended when its resident set passed the budget")
    if code == -signal.SIGKILL:
        return Trial(batch, False, None, None, "killed from outside, as a system does that runs out of memory")
    if code == -signal.SIGABRT and "bad_alloc" in complained:
        return Trial(batch, False, None, None, "an allocation failed")
    if code != 0:
        raise RuntimeError(f"a trial of batch {batch} failed with exit status {code}:\n{complained[-2000:]}")
    found: dict[str, Any] = json.loads(wrote.splitlines()[-1])
    peak = None if found["peak"] is None else found["peak"] / 2**20
    return Trial(batch, found["fits"], peak, found["seconds"], found["why"])


def search(
    settings: Settings, losses: tuple[str, ...], device: torch.device, budget: int, most: int, timeout: float
) -> dict[str, Any]:
    """Look for the largest batch under each loss and print a table as it grows.

    Args:
        settings: network and patch; batch and loss are replaced.
        losses: names out of `options.LOSSES`.
        device, budget, timeout: as for `run_trial`.
        most: largest batch to try.

    Returns:
        Plain values for a report: settings that matter, budget_gib, meaning, and by loss largest, searched_to_the_end
        (False where `most` itself fits), peak_mib and step_seconds of the largest, and all trials.
    """
    names = ("network", "patch", "scales", "filters", "amp", "seed")
    every = {name: value for name, value in asdict(settings).items() if name in names}
    report: dict[str, Any] = {
        "settings": every,
        "device": device.type,
        "budget_gib": budget / 2**30,
        "max_batch": most,
        "meaning": MEANING[device.type],
        "losses": {},
    }
    print(
        f"  {'loss':18s}{'largest batch':>14s}{'peak':>13s}{'step':>10s}{'patches/s':>11s}   the next one", flush=True
    )
    for loss in losses:

        def attempt(batch: int, loss: str = loss) -> Trial:
            return run_trial(replace(settings, loss=loss, batch=batch), device, budget, timeout)

        trials = largest(attempt, most)
        report["losses"][loss] = found = _summary(trials, most)
        print(_row(loss, found, trials), flush=True)
    return report


def _summary(trials: list[Trial], most: int) -> dict[str, Any]:
    best = answer(trials)
    its = next((trial for trial in trials if trial.batch == best), None)
    return {
        "largest": best,
        "searched_to_the_end": best < most,
        "peak_mib": None if its is None else its.peak_mib,
        "step_seconds": None if its is None else its.seconds,
        "trials": [asdict(trial) for trial in sorted(trials, key=lambda trial: trial.batch)],
    }


def _row(loss: str, found: dict[str, Any], trials: list[Trial]) -> str:
    best = found["largest"]
    after = next((t for t in trials if t.batch == best + 1), None)
    next_one = "not tried, --max-batch" if after is None else str(after.why)
    if after is not None and after.peak_mib is not None:
        next_one += f" ({after.peak_mib:.0f} MiB)"
    if best == 0:
        return f"  {loss:18s}{0:>14d}{'':34s}   {next_one}"
    peak, seconds = found["peak_mib"], found["step_seconds"]
    return f"  {loss:18s}{best:>14d}{peak:>9.0f} MiB{seconds:>8.2f} s{best / seconds:>11.2f}   {next_one}"
