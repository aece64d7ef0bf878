"""One trial of --find-batch: two training steps in this process, and how much memory they took.

Started by `batch_search`, with what to try as JSON on stdin; the answer is JSON in the last line of stdout. Images are
random numbers, so the data set of a real run comes on top.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from lomix_fast.demo.data import CLASS_NAMES
from lomix_fast.testing.errors import is_out_of_memory

from .options import Settings
from .processes import Place
from .step import Trainer, build_trainer

_STEPS = 2  # from the second on the optimizer's state is there during forward and backward
_SLACK = 256 * 2**20  # address space beyond the budget, for what is reserved and never touched
_STACK = 16 * 2**20  # likewise, for each thread


def main() -> None:
    """Read, try, answer."""
    asked = json.load(sys.stdin)
    torch.set_num_threads(asked["threads"])
    settings = Settings(**{**asked["settings"], "patch": tuple(asked["settings"]["patch"])})
    device, budget = torch.device(asked["device"]), int(asked["budget"])
    try:
        limit(device, budget)
        seconds = try_steps(settings, device)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        answer: dict[str, Any] = {"fits": False, "why": "an allocation failed", "peak": None, "seconds": None}
    else:
        highest = peak(device)
        answer = {"fits": highest <= budget, "peak": highest, "seconds": seconds, "why": None}
        if highest > budget:
            answer["why"] = "the peak is over the budget"
    print(json.dumps(answer))


def limit(device: torch.device, budget: int) -> None:
    """See to it that this process cannot take much more than the budget, in bytes.

    On CUDA the allocator refuses what goes beyond. On a CPU the address space for data is capped, which catches one
    huge allocation at once; whoever started this process watches its resident set besides.

    Raises:
        MemoryError: the budget is used up already.
    """
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, budget / torch.cuda.get_device_properties(device).total_memory), device
        )
        return
    import resource  # not on Windows, where batch_search has refused already

    with contextlib.suppress(OSError):  # should memory run out all the same, this process goes first
        Path("/proc/self/oom_score_adj").write_text("1000")
    left = budget - status("VmRSS")
    if left <= 0:
        raise MemoryError("the budget is used up by the libraries")
    most = status("VmData") + left + _SLACK + _STACK * torch.get_num_threads()
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def try_steps(settings: Settings, device: torch.device) -> float:
    """Do the steps and return the seconds of the last one."""
    trainer: Trainer = build_trainer(settings, Place(0, 1, device))
    images = torch.randn(settings.batch, 1, *settings.patch, device=device)
    labels = torch.randint(len(CLASS_NAMES), (settings.batch, *settings.patch), dtype=torch.uint8, device=device)
    trainer.module.train()
    for _ in range(_STEPS):
        begin = time.perf_counter()
        trainer.step(images, labels).item()
        seconds = time.perf_counter() - begin
    return seconds


def peak(device: torch.device) -> int:
    """Bytes at the highest: on CUDA reserved by the allocator, on a CPU resident, libraries included."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else status("VmHWM")


def status(field: str, process: int | str = "self") -> int:
    """A field of /proc/<process>/status in bytes; 0 for a process that has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
