"""The floor: how many exponentials a step cannot avoid, and contenders that compute those and nothing else.

By whose exponential makes a difference: at::vec's exp_u20 is the yardstick of the promise, its accurate exp and the
kernel's own exp2 are timed beside it. The kernel's own is the quickest, so over it a step looks worse.

Every softmax entry that is no product of others needs an exponential, forward and again backward, since no map is
kept. A floor takes part in the rounds as if it were a loss: forward computes the exponentials of the forward pass,
backward those of the backward pass, on as many threads as torch uses. Its gate is that they are exponentials.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import build_cpp
from lomix_fast import MixPlan

from . import capability
from .prepared import Prepared
from .problem import Problem

_SOURCE = Path(__file__).with_name("exp_floor.cpp")
# In the order of the enum in exp_floor.cpp.
FUNCTIONS = ("exp_u20", "exp", "own")
_FOLDER = build_cpp.ROOT / "build" / "exp_floor"


def exponentials(plan: MixPlan, classes: int) -> int:
    """Exponentials a pixel and direction that no implementation of the loss can spare.

    C for every scale that is supervised itself or in an `add` map (whose exponentials are products of these), C for
    every map of `mul`, `cat` and `awf`, and one for every (subset, member) pair whose attention is computed.
    """
    plain = {scale for spec in plan.maps if spec.operator in ("orig", "add") for scale in spec.members}
    mixed = sum(spec.operator in ("mul", "cat", "awf") for spec in plan.maps)
    return classes * (len(plain) + mixed) + (plan.num_pairs if plan.uses_awf else 0)


def prepare(problem: Problem, function: str) -> Prepared:
    """As many exponentials as the problem's forward pass needs, and the same again in the backward pass.

    Args:
        problem: only its sizes and its plan matter.
        function: out of `FUNCTIONS`: at::vec's exp_u20, which allows an error of 20 units, or its accurate exp, or the
            kernel's own.
    """
    case = problem.case
    count = exponentials(case.plan, case.classes) * case.batch * case.pixels
    anchor = torch.zeros((), requires_grad=True)
    return Prepared(lambda: _Exponentials.apply(anchor, count, function), {})


def errors(function: str) -> dict[str, float]:
    """Largest relative error of the exponentials timed, on arguments from -8 to 0, under the name "exponential"."""
    x = torch.linspace(-8, 0, 10_001)
    y = torch.full_like(x, torch.nan)
    _library().exp_floor_values(x.data_ptr(), y.data_ptr(), x.numel(), FUNCTIONS.index(function))
    exact = x.double().exp()
    return {"exponential": float(((y.double() - exact) / exact).abs().max().nan_to_num(torch.inf))}


def why_not() -> str | None:
    """None when the floor is compiled or can be, otherwise the reason."""
    if _path().is_file():
        return None
    try:
        build_cpp.find_toolchain()
    except build_cpp.CannotBuild as error:
        return str(error)
    return None


class _Exponentials(torch.autograd.Function):
    """`count` exponentials in the forward pass and `count` in the backward pass; the value is a sum of some."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, count: int, function: str) -> Tensor:
        ctx.work = count, function
        return anchor.new_tensor(_run(count, function))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        _run(*ctx.work)
        return None, None, None


def _run(count: int, function: str) -> float:
    return float(_library().exp_floor_run(count, torch.get_num_threads(), FUNCTIONS.index(function)))


def _path() -> Path:
    """Where the library for this source, torch and capability lives once it is compiled."""
    sources = _SOURCE.read_bytes() + (build_cpp.ROOT / "csrc/cpu/simd.h").read_bytes()
    key = hashlib.sha256(sources + str(torch.__version__).encode()).hexdigest()[:12]
    return _FOLDER / f"{key}.{_capability()}.so"


def _capability() -> str:
    here = capability.in_use()
    return here if here in capability.ORDER else "DEFAULT"


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    path = _path()
    if not path.is_file():
        _compile(path)
    library = ctypes.CDLL(str(path))
    library.exp_floor_run.argtypes = ctypes.c_int64, ctypes.c_int, ctypes.c_int
    library.exp_floor_run.restype = ctypes.c_double
    library.exp_floor_values.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.exp_floor_values.restype = None
    return library


def _compile(path: Path) -> None:
    """Compile with the kernel's own flags and torch's OpenMP, then move into place, so that half a file is never found.

    Raises:
        build_cpp.BuildError: there is no toolchain, or the compiler failed.
    """
    toolchain = build_cpp.find_toolchain()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    flags = build_cpp.compile_flags(toolchain, _capability())
    command = [*toolchain.cxx, "-shared", *flags, str(_SOURCE), *build_cpp.link_flags(toolchain), "-o", str(unfinished)]
    done = subprocess.run(command, cwd=build_cpp.ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise build_cpp.BuildError(f"{_SOURCE.name} does not compile:\n{done.stderr}")
    unfinished.replace(path)
