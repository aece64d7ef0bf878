"""The processes that compute on the device: the one that steers a GPU day does not, so nothing can break it."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from lomix_fast.testing.devices import Gpu
from lomix_fast.testing.process import Ended, Process, TooLong

from .day import CRASHED, FAILED, HUNG, SKIPPED, Clock, Day


def open_device(name: str) -> Gpu:
    """The GPU of this name; in a rehearsal its stand-in, which computes on the CPU, and with it the backends' own."""
    from .stand_in import StandInCuda, install, rehearsing

    if not rehearsing():
        return Gpu(name, torch.device(name))
    install()
    from .faults import spoil_backends

    spoil_backends()
    return Gpu(name, torch.device("cpu"), StandInCuda())


def start(day: Day, name: str, make: Callable[..., object], *arguments: object) -> Process:
    """A process around `make(*arguments)`, which may open the device."""
    return Process(name, make, arguments, environment=variables(day))


def variables(day: Day) -> dict[str, str]:
    """Environment of processes that use the device. The built package is found by their path, see `build.run`."""
    # Inductor's own pool would start a process for each core in each of ours.
    few = {"TORCHINDUCTOR_COMPILE_THREADS": "4", "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    return {**few, **day.variables}


@lru_cache(maxsize=1)
def about(day: Day) -> dict[str, Any]:
    """What a process says of the device and of the package, asked once a day; see `Asking.everything`.

    Raises:
        Ended: it says nothing, or not within a minute.
    """
    with start(day, "asking", Asking, day.device) as process:
        return process.ask("everything", seconds=60.0)


def status_of(error: Ended, clock: Clock) -> str:
    """What became of a process: one that is stopped because time is up has not hung."""
    if isinstance(error, TooLong):
        return SKIPPED if clock.left < 1 else HUNG
    return FAILED if error.exit_code is None else CRASHED


class Asking:
    """What can be asked without computing."""

    def __init__(self, name: str) -> None:
        self._device = open_device(name)

    def everything(self) -> dict[str, Any]:
        """Card, driver, versions, commit (`lomix_fast.testing.environment`), and of every backend why it cannot run."""
        from lomix_fast.doctor.overview import why_not
        from lomix_fast.testing.environment import environment

        cuda = self._device.cuda
        its = cuda.get_device_properties(self._device.where)
        return {
            **environment(),
            "backends": why_not(self._device.where),
            "card": its.name,
            "compute_capability": "{}.{}".format(*cuda.get_device_capability(self._device.where)),
            "multiprocessors": its.multi_processor_count,
            "memory_mib": its.total_memory // 2**20,
            "l2_mib": getattr(its, "L2_cache_size", 0) / 2**20,
            "numpy": importlib.import_module("numpy").__version__,
            "cores_of_machine": os.cpu_count(),
        }
