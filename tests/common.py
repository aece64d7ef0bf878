"""What tests share: the backends that run here, and how a backend is run on a case and judged against float64."""

from __future__ import annotations

import math

from torch import Tensor

from lomix_fast import MixPlan, available_backends
from lomix_fast.testing.judge import (
    Outcome,
    check_gradients,
    check_stats,
    conditioning,
    cotangent,
    plain_of,
    run_backend,
    truth_of,
)

__all__ = [
    "BACKENDS",
    "CAPABILITIES",
    "COMPILED",
    "NATIVE",
    "Outcome",
    "best_capability",
    "check_gradients",
    "check_stats",
    "conditioning",
    "cotangent",
    "largest_relative_difference",
    "plain_of",
    "run_backend",
    "small_plan",
    "truth_of",
]

# Every backend that runs here. test_backends.py fails when the compiled one is missing by accident.
BACKENDS = [name for name, reason in available_backends().items() if reason == "usable"]
# Those with kernels of our own, which promise the same bits every time; PyTorch's matrix products make no such promise.
COMPILED = [name for name in BACKENDS if name not in ("reference", "eager")]
# The copies of the CPU kernel, each for the machines of the one before it and more.
CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")


def best_capability() -> str:
    """The copy of the CPU kernel that this process runs."""
    from lomix_fast import _C

    return str(_C.cpu_capability())


# Without triton, which on a CPU runs in its interpreter, thousands of times slower: it takes the whole list of cases
# and tests of its own (test_triton.py), not those that call a backend hundreds of times or do not depend on which.
NATIVE = [name for name in BACKENDS if name != "triton"]


def largest_relative_difference(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|, 0 for two empty tensors."""
    if not b.numel():
        return 0.0
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=math.ulp(0.0))).item()


def small_plan(operators: tuple[str, ...] = ("add", "mul", "cat", "awf"), num_scales: int = 2) -> MixPlan:
    """The plan most tests use when the plan is not what they are about."""
    return MixPlan.create(num_scales, operators)
