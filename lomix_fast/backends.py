"""The table of backends. A backend is one row: why it cannot run, its forward pass, its backward pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from . import cpu, cuda_backend, eager, reference, triton_backend
from .names import did_you_mean
from .plan import MixPlan
from .target import Target

Forward = Callable[[Sequence[Tensor], Target, Sequence["Tensor | None"], MixPlan], "tuple[Tensor, Tensor]"]
Backward = Callable[
    [Tensor, Sequence[Tensor], Target, Sequence["Tensor | None"], MixPlan],
    "tuple[list[Tensor], list[Tensor | None]]",
]


@dataclass(frozen=True)
class Backend:
    """One implementation of the statistics and their gradient.

    Attributes:
        name: what users pass as `impl`.
        why_not: device -> None when the backend can run there, otherwise the reason in one sentence.
        forward: (logits [B, C, *native] each, `Target`, (W, b, u, v) or None each, plan) ->
            (stats [B, M, 1 + 2C], target_stats [B, 1 + C]).
        backward: (grad_stats, logits, target, (W, b, u, v), plan) -> (gradients of the logits, gradients of the four
            parameters or None where there is none). Inputs are never written to.
    """

    name: str
    why_not: Callable[[torch.device], str | None]
    forward: Forward
    backward: Backward


def _always(device: torch.device) -> str | None:
    return None


BACKENDS: dict[str, Backend] = {
    row.name: row
    for row in (
        Backend("reference", _always, reference.forward, reference.backward),
        Backend("eager", _always, eager.forward, eager.backward),
        Backend("cpu", cpu.why_not, cpu.forward, cpu.backward),
        Backend("cuda", cuda_backend.why_not, cuda_backend.forward, cuda_backend.backward),
        Backend("triton", triton_backend.why_not, triton_backend.forward, triton_backend.backward),
    )
}

# What "auto" tries on a kind of device, in order; "eager" runs anywhere. Not triton on a CPU: that is its interpreter.
_PREFERENCE = {"cpu": ("cpu", "eager"), "cuda": ("cuda", "triton", "eager")}


USABLE = "usable"


def available_backends(device: torch.device | str = "cpu") -> dict[str, str]:
    """Which backends can run on a device.

    Args:
        device: a torch device or its name.

    Returns:
        For every backend name "usable", or the reason why it is not.
    """
    return {name: why_not(name, device) or USABLE for name in BACKENDS}


def why_not(name: str, device: torch.device | str = "cpu") -> str | None:
    """The reason why a backend cannot run on a device, or None."""
    return named(name).why_not(torch.device(device))


def named(impl: str) -> Backend:
    """The backend of that name.

    Raises:
        ValueError: there is none.
    """
    if impl not in BACKENDS:
        raise ValueError(
            f"impl: got {impl!r}, expected 'auto' or one of {tuple(BACKENDS)}{did_you_mean(impl, BACKENDS)}"
        )
    return BACKENDS[impl]


@lru_cache(maxsize=8)
def _warn_of_fallback(missing: tuple[tuple[str, str], ...]) -> None:
    """Say once a process that the slow path runs; pip hides what the build has said.

    Args:
        missing: names of the backends that would have been fast, with the reason why each cannot run.
    """
    names = " or ".join(name for name, _ in missing)
    reasons = [reason if len(missing) == 1 else f"{name}: {reason}" for name, reason in missing]
    warnings.warn(
        f"impl='auto' runs plain PyTorch instead of the fused {names} kernel: {'; '.join(reasons)}. "
        "Pass impl='eager' to accept it in silence",
        RuntimeWarning,
        stacklevel=2,
    )


@torch.compiler.assume_constant_result  # looks at what is installed, which torch.compile need not trace
def choose(impl: str, device: torch.device) -> str:
    """Resolve `impl` to the name of a backend that can run on `device`.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: a named backend cannot run there; the message holds its reason. Only "auto" falls back.
    """
    if impl == "auto":
        order = _PREFERENCE.get(device.type, ("eager",))
        missing = []
        for name in order:
            reason = BACKENDS[name].why_not(device)
            if reason is None:
                break
            missing.append((name, reason))
        if name == "eager" and missing:
            _warn_of_fallback(tuple(missing))
        return name
    reason = why_not(impl, device)
    if reason is not None:
        raise RuntimeError(f"impl: got {impl!r}, which cannot run here: {reason}. Use impl='auto' to let it fall back")
    return impl
