"""What is timed, and one step of whoever is timed on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from ..mixing import awf_rows
from ..testing.cases import BENCHMARK_CASES, Case, make_inputs
from ..testing.devices import Device, Gpu
from ..testing.step import Case as Given
from ..testing.step import make_step

GPU: tuple[Case, ...] = BENCHMARK_CASES
# The same two problems, small enough for the official style to take its turns within a minute on two cores.
CPU: tuple[Case, ...] = (
    replace(BENCHMARK_CASES[0], name="slices_224_batch_2", batch=2),
    replace(BENCHMARK_CASES[1], name="volume_48", full=(48,) * 3, native=tuple((48 // r,) * 3 for r in (8, 4, 2, 1))),
)


def of(device: Device) -> tuple[Case, ...]:
    """What is timed on a device: on a CPU small problems, for the official style takes seconds a step on large ones."""
    return GPU if isinstance(device, Gpu) else CPU


OFFICIAL = "official-style"  # the subject that is no backend
# Largest error at full size: of the loss, relative, and of a gradient, as norm of the error over norm of the truth.
# Wider than on the list of cases, for float32 loses digits over a million pixels.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3


def draw(subject: str, workload: Case, where: torch.device) -> Given:
    """Numbers of a workload on a device; the same for every subject and in every process.

    Args:
        subject: name of a backend, or `OFFICIAL`.
        workload: what to draw; all operators, all originals.
        where: the device.
    """
    inputs, plan = make_inputs(workload), workload.plan
    generator = torch.Generator().manual_seed(1)
    rows = awf_rows(plan, "size")[0]  # shared as in the authors' code; never more than the pairs that were drawn
    values = {"alpha": torch.randn(plan.num_maps, generator=generator)}
    values |= {name: value for name, value in inputs.parameters.items() if value is not None}
    values |= {name: values[name][:rows] for name in ("awf_weight", "awf_bias")}
    logits = [z.to(where) for z in inputs.logits]
    parameters = {name: value.to(where, values["cat_weight"].dtype) for name, value in values.items()}
    return Given(logits, inputs.target.to(where), parameters, "auto" if subject == OFFICIAL else subject)


def tiny(given: Given) -> Given:
    """One sample of 32 labels an axis or fewer: what wakes threads and libraries up."""
    return given.tiny()


def step_of(subject: str, given: Given) -> Callable[[], dict[str, Tensor]]:
    """Function that does one step forward and backward; it returns the loss and the gradients by name."""
    return make_step("official_style" if subject == OFFICIAL else "fused", given)


@cache
def truth(workload: Case, where: torch.device) -> dict[str, Tensor]:
    """Loss and gradients in float64, one map at a time, for the reference would need tens of gigabytes; on the CPU.

    Computed on the device itself: two cores take minutes for a volume that a GPU does in a second. What it is made of
    is plain PyTorch, and held against the reference by the list of cases.
    """
    found = step_of("eager", draw("eager", workload, where).double())()
    return {name: value.cpu() for name, value in found.items()}


def wrong(workload: Case, found: dict[str, Tensor], where: torch.device) -> str | None:
    """Hold a full-size step against `truth`.

    It is there for what goes wrong only when problems are large; the list of cases is the sharper test.

    Args:
        workload: what was computed.
        found: what a step returned.
        where: the device that ran it.

    Returns:
        None, or what is wrong.
    """
    for name, exact in truth(workload, where).items():
        limit = LOSS_TOLERANCE if name == "loss" else GRADIENT_TOLERANCE
        off = float((found[name].cpu().double() - exact).norm() / exact.norm().clamp_min(1e-30))
        if not off <= limit:
            return f"{name} is off by {off:.2e} of its norm against float64, allowed {limit:.0e}"
    return None
