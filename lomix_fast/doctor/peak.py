"""Peak memory of one step on the CPU, in a process of its own: there, freed memory cannot be used again unseen."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import torch

from ..testing.cases import Case
from ..testing.peak import PLAIN_MALLOC, extra_peak_mib
from . import workloads
from .errors import DoesNotFitError, is_out_of_memory, one_line

_SECONDS = 300  # after this the process is taken for stuck


def peak_in_a_process(subject: str, workload: Case) -> float:
    """Start a fresh Python, do one step there and return by how many MiB its resident set rose.

    Args:
        subject: see `workloads.draw`.
        workload: what to compute.

    Returns:
        MiB over what the process held once its inputs were there and its libraries awake.

    Raises:
        DoesNotFitError: memory ran out, or the process was killed, which is what running out looks like on Linux.
        RuntimeError: it failed otherwise, or took longer than five minutes; the message holds what it wrote.
    """
    root = str(Path(__file__).resolve().parents[2])  # so that the process finds this package and no other
    search = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            [sys.executable, "-m", "lomix_fast.doctor.peak"],
            input=pickle.dumps((subject, workload, torch.get_num_threads())),
            env={**os.environ, **PLAIN_MALLOC, "PYTHONPATH": search},
            capture_output=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"measuring the memory of {subject} took longer than {_SECONDS} s") from error
    if done.returncode == -9:
        raise DoesNotFitError(f"{subject}: the process that measures memory was killed, usually for want of memory")
    if done.returncode != 0:
        wrote = done.stderr.decode(errors="replace")[-2000:]
        raise RuntimeError(f"measuring the memory of {subject} failed with exit status {done.returncode}:\n{wrote}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "does_not_fit" in answer:
        raise DoesNotFitError(answer["does_not_fit"])
    return float(answer["mib"])


def main() -> None:
    """Read (subject, workload, threads) from stdin, measure, and print the result as JSON in the last line."""
    subject, workload, threads = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)
    given = workloads.draw(subject, workload, torch.device("cpu"))
    workloads.step_of(subject, workloads.tiny(given))()
    step = workloads.step_of(subject, given)
    try:
        print(json.dumps({"mib": extra_peak_mib(step)}))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(json.dumps({"does_not_fit": one_line(error)}))


if __name__ == "__main__":
    main()
