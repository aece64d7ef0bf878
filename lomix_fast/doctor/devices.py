"""Which devices there are, and which of them the doctor is to look at."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..testing.devices import Cpu, Device, Gpu
from ..testing.environment import gpus


def present() -> list[Device]:
    """Every device there is: the CPU first, then each GPU that torch can use."""
    found: list[Device] = [Cpu()]
    return found + [Gpu(one["device"], torch.device(one["device"])) for one in gpus() if "error" not in one]


def named(name: str) -> Device:
    """The device of this name, "cpu" or "cuda:0", whether it is there or not."""
    return Cpu() if name == "cpu" else Gpu(name, torch.device(name))


def choose(names: Sequence[str] | None, devices: Sequence[Device]) -> list[Device]:
    """The devices that --device names, in their order here; all of them for None. "cuda" means every GPU.

    Raises:
        ValueError: a name that is not there; the message lists those that are.
    """
    if names is None:
        return list(devices)
    for name in names:
        if name not in {label for one in devices for label in _labels(one)}:
            raise ValueError(
                f"--device: got {name!r}, expected names out of {', '.join(one.name for one in devices)}, "
                "the devices that torch finds here"
            )
    return [one for one in devices if not _labels(one).isdisjoint(names)]


def _labels(device: Device) -> set[str]:
    return {device.name, device.name.partition(":")[0]}
