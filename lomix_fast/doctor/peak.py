"""Peak memory of one step; on the CPU in a process of its own, where freed memory cannot be used again unseen."""

from __future__ import annotations

import signal

import torch

from ..testing.cases import Case
from ..testing.devices import Cpu, Device
from ..testing.errors import DoesNotFitError, is_out_of_memory, one_line
from ..testing.peak import PLAIN_MALLOC
from ..testing.process import Ended, Process, TooLong
from . import workloads

_SECONDS = 300  # after this the process is taken for stuck


def peak_mib(device: Device, subject: str, workload: Case) -> float:
    """By how many MiB memory rises at the highest during one step, once inputs are there and libraries awake.

    Args:
        device: where.
        subject: see `workloads.draw`.
        workload: what to compute.

    Raises:
        DoesNotFitError: memory ran out, or the process was killed, which is what running out looks like on Linux.
        Exception: whatever the step raises; RuntimeError when its process fails or takes longer than five minutes.
    """
    if not isinstance(device, Cpu):
        device.release()
        return _measure(device, subject, workload)
    with Process(f"memory of {subject}", _Measuring, (torch.get_num_threads(),), environment=PLAIN_MALLOC) as process:
        try:
            mib, does_not_fit = process.ask("measure", subject, workload, seconds=_SECONDS)
        except Ended as error:
            if error.exit_code == -signal.SIGKILL and not isinstance(error, TooLong):
                raise DoesNotFitError(f"{error}") from error
            raise
    if does_not_fit:
        raise DoesNotFitError(does_not_fit)
    return float(mib)


class _Measuring:
    """What runs in the process."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)

    def measure(self, subject: str, workload: Case) -> tuple[float, str]:
        """MiB, and why it does not fit or ""."""
        try:
            return _measure(Cpu(), subject, workload), ""
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return 0.0, one_line(error)


def _measure(device: Device, subject: str, workload: Case) -> float:
    given = workloads.draw(subject, workload, device.where)
    workloads.step_of(subject, workloads.tiny(given))()  # libraries get the workspaces that all share
    return device.peak(workloads.step_of(subject, given), lambda: None).extra_mib
