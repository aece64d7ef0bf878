"""The loss alone, fused against the official style: same numbers first, then time, then memory."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..testing.peak import PLAIN_MALLOC, extra_peak_mib
from ..testing.step import STYLES, Case, make_step

__all__ = ["STYLES", "TOLERANCE", "Case", "compare", "differences", "main", "make_step", "peak_memory", "step_times"]

TOLERANCE = 1e-4  # largest relative difference at which times and memory may be shown at all
_CHILD_SECONDS = 600  # after this a measuring process is taken for stuck


def differences(case: Case) -> dict[str, dict[str, float]]:
    """Compare both styles, as they train, with the official style computed in float64.

    The float64 value is the yardstick because a gradient that is a sum of nearly a million terms of both signs, such
    as that of a bias, comes out of plain float32 sums with an error larger than any difference between the two.

    Returns:
        By style, then by name, for the loss and the gradient of every logits tensor and parameter: largest absolute
        difference over largest absolute value; NaN where a side holds one.
    """
    truth = make_step("official_style", case.double())()
    result = {}
    for style in STYLES:
        found = make_step(style, case)()
        result[style] = {
            name: float((found[name] - exact).abs().max() / exact.abs().max().clamp_min(1e-30))
            for name, exact in truth.items()
        }
    return result


def step_times(case: Case, pairs: int, seconds: float) -> dict[str, list[float]]:
    """Seconds that a step takes, several times for each style.

    The two take turns, each going first in every other pair, so that a change in the load of the machine meets both.

    Args:
        case: the input.
        pairs: how many steps of each style at most, at least 1.
        seconds: no new pair begins after this long, once there are three.
    """
    steps = {style: make_step(style, case) for style in STYLES}
    for step in steps.values():
        step()  # the first call allocates and loads what later ones find
    times: dict[str, list[float]] = {style: [] for style in STYLES}
    start = time.perf_counter()
    for turn in range(pairs):
        for style in STYLES if turn % 2 == 0 else STYLES[::-1]:
            begin = time.perf_counter()
            steps[style]()
            times[style].append(time.perf_counter() - begin)
        if turn >= 2 and time.perf_counter() - start > seconds:
            break
    return times


def peak_memory(case: Case) -> dict[str, float]:
    """Extra peak memory of one step of each style in MiB, each measured in a process of its own.

    Raises:
        RuntimeError: a measuring process failed; the message holds what it wrote.
    """
    with tempfile.TemporaryDirectory(prefix="lomix_fast_") as folder:
        path = Path(folder) / "case.pt"
        torch.save({**dataclasses.asdict(case), "threads": torch.get_num_threads()}, path)
        return {style: _measure_elsewhere(path, style) for style in STYLES}


def _measure_elsewhere(path: Path, style: str) -> float:
    root = str(Path(__file__).resolve().parents[2])  # so that the process finds this package and no other
    search = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "lomix_fast.demo.compare", str(path), style]
    done = subprocess.run(
        command,
        env={**os.environ, **PLAIN_MALLOC, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=_CHILD_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(
            f"measuring the memory of the {style} loss failed with exit status {done.returncode} "
            f"(negative: killed by that signal, 9 usually for want of memory):\n{done.stderr[-2000:]}"
        )
    return float(json.loads(done.stdout.splitlines()[-1]))


def compare(case: Case, pairs: int = 15, seconds: float = 20.0) -> dict[str, Any]:
    """Correctness gate, then time, then memory.

    Args:
        case: the input; use trained logits, so that the numbers are those of real training.
        pairs, seconds: see `step_times`.

    Returns:
        Plain values: max_relative_difference (of the fused style), relative_difference (by style and name), step_ms
        (medians) and peak_mib by style, step_ms_range (fastest and slowest by style), speedup, case (sizes).

    Raises:
        ArithmeticError: the fused style is further than `TOLERANCE` from the float64 value; no time is taken then.
        RuntimeError: a measuring process failed.
    """
    by_style = differences(case)
    by_name = by_style["fused"]
    worst = max(by_name, key=lambda name: math.inf if math.isnan(by_name[name]) else by_name[name])
    if not by_name[worst] <= TOLERANCE:
        raise ArithmeticError(
            f"the fused loss differs from the official-style loss: {worst} by {by_name[worst]:.2e} of its "
            f"largest value, expected at most {TOLERANCE:g}, so no speed is reported; backend {case.impl!r}. "
            "Please report this with your processor and torch version"
        )
    times = step_times(case, pairs, seconds)
    medians = {style: 1000 * statistics.median(times[style]) for style in STYLES}
    return {
        "max_relative_difference": by_name[worst],
        "relative_difference": by_style,
        "step_ms": medians,
        "step_ms_range": {style: [1000 * min(times[style]), 1000 * max(times[style])] for style in STYLES},
        "speedup": medians["official_style"] / medians["fused"],
        "peak_mib": peak_memory(case),
        "case": {
            "batch": case.target.shape[0],
            "classes": case.logits[0].shape[1],
            "size": list(case.target.shape[1:]),
            "native_sizes": [list(z.shape[2:]) for z in case.logits],
            "pairs": len(times["fused"]),
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the extra peak memory of one style on a saved case and print it, in MiB, as the last line."""
    parser = argparse.ArgumentParser(prog="python -m lomix_fast.demo.compare", description=main.__doc__)
    parser.add_argument("file", type=Path, help="what peak_memory saved")
    parser.add_argument("style", choices=STYLES)
    given = parser.parse_args(arguments)
    saved = torch.load(given.file, weights_only=True)
    torch.set_num_threads(saved.pop("threads"))
    case = Case(**saved)
    make_step(given.style, case.tiny())()
    step = make_step(given.style, case)
    print(json.dumps(extra_peak_mib(step)))


if __name__ == "__main__":
    main()
