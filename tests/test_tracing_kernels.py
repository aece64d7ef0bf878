"""What stands between the op and the kernels of each backend waits for no GPU and branches on no value.

The same is checked of everything around the op in test_tracing.py. Kernels are stood in for by nothing: their outputs
are whatever memory holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from in_training import USES, Use
from torch import Tensor
from torch.utils._pytree import tree_map
from watch import HostError, Watch

from lomix_fast import cuda_backend, eager, labels, reference, target, triton_backend
from lomix_fast.backends import BACKENDS
from lomix_fast.target import Target

uses = pytest.mark.parametrize("name", USES)
FULL = (16, 24)
SIZES = ((2, 3), (4, 6), (16, 24))
Arguments = tuple[Any, ...]


def arguments_of(use: Use, dtype: torch.dtype = torch.float32) -> Arguments:
    """What the op hands to a backend in the backward pass of a step: grad_stats, logits, target, parameters, plan."""
    found: list[Arguments] = []

    def backward(*arguments: Any) -> Any:
        found.append(arguments)
        return eager.backward(*arguments)

    usual = BACKENDS["eager"]
    BACKENDS["eager"] = replace(usual, backward=backward)
    try:
        use.criterion("eager")(use.logits(2, SIZES, dtype), **use.call(2, FULL)).backward()
    finally:
        BACKENDS["eager"] = usual
    return found[0]


def changed(change: Callable[[Tensor], Tensor], arguments: Arguments) -> Arguments:
    """The same call with every tensor changed."""
    grad_stats, logits, given, parameters, plan = arguments
    tensors = {n: getattr(given, n) for n in ("labels", "weight_map", "ce_weight")}
    of_target = {n: None if t is None else change(t) for n, t in tensors.items()}
    changed_target = replace(given, **of_target)
    rest = tree_map(lambda t: change(t) if isinstance(t, Tensor) else t, (grad_stats, list(logits), list(parameters)))
    return rest[0], rest[1], changed_target, rest[2], plan


def spoilt(t: Tensor) -> Tensor:
    """NaN, or numbers that are no class."""
    return (
        torch.full_like(t, torch.nan)
        if t.is_floating_point()
        else torch.full_like(t, True if t.dtype == torch.bool else 77)
    )


# The passes of each backend without their kernels ---------------------------------------------------------------------


@torch.no_grad()
def run_eager(grad_stats: Tensor, logits: list[Tensor], given: Target, parameters: list[Any], plan: Any) -> None:
    eager.forward(logits, given, parameters, plan)
    eager.backward(grad_stats, logits, given, parameters, plan)


def run_reference(grad_stats: Tensor, logits: list[Tensor], given: Target, parameters: list[Any], plan: Any) -> None:
    """Forward, and autograd as plain PyTorch has it."""
    leaves = [z.detach().requires_grad_() for z in logits]
    stats, _ = reference.forward(leaves, given, parameters, plan)
    torch.autograd.grad(stats, leaves, grad_stats, allow_unused=True)


@torch.no_grad()
def run_cuda(grad_stats: Tensor, logits: list[Tensor], given: Target, parameters: list[Any], plan: Any) -> None:
    def forward(logits: list[Tensor], labels: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        assert labels.dtype in target.KERNEL_DTYPES or given.dense
        return torch.empty_like(grad_stats), grad_stats.new_empty(grad_stats.shape[0], 1 + logits[0].shape[1])

    def backward(grad_stats: Tensor, logits: list[Tensor], *rest: Any) -> list[Tensor]:
        empty = grad_stats.new_empty(0)
        return [
            *(torch.empty_like(z) for z in logits),
            *(empty if p is None else torch.empty_like(p) for p in parameters),
        ]

    ops = SimpleNamespace(map_stats_forward=forward, map_stats_backward=backward)
    cuda_backend.run_forward(ops, logits, given, parameters, plan)
    cuda_backend.run_backward(ops, grad_stats, logits, given, parameters, plan)


@torch.no_grad()
def run_triton(grad_stats: Tensor, logits: list[Tensor], given: Target, parameters: list[Any], plan: Any) -> None:
    triton_backend.forward(logits, given, parameters, plan)
    triton_backend.backward(grad_stats, logits, given, parameters, plan)


PASSES = {"reference": run_reference, "eager": run_eager, "cuda": run_cuda, "triton": run_triton}


class NoKernel:
    """In place of a Triton kernel: kernel[grid](...) does nothing."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *arguments, **constants: None


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors whose values the host may not look at, and no kernels."""
    for module in (labels, target):
        monkeypatch.setattr(module, "may_look", lambda device: False)
    if triton_backend.load_error() is None:
        from lomix_fast.kernels import launch

        for kernel in ("statistics_kernel", "gradients_kernel", "gather_kernel", "bad_labels_kernel"):
            monkeypatch.setattr(launch, kernel, NoKernel())


def skip_without(impl: str) -> None:
    if impl == "triton" and (reason := triton_backend.load_error()) is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("impl", PASSES)
@uses
def test_no_value_is_read_and_none_decides(name: str, impl: str, as_on_a_gpu: None) -> None:
    """The same ops with the same shapes whatever the numbers, bad labels and NaN among them."""
    skip_without(impl)
    given = arguments_of(USES[name])
    PASSES[impl](*given)  # tables of a plan and of sizes are made once, and kept
    issued = []
    for change in (lambda t: t.detach().clone(), spoilt):
        arguments = changed(change, given)
        with Watch(scalars=impl == "triton") as watch:
            PASSES[impl](*arguments)
        issued.append(watch.ops)
    assert issued[0] and issued[0] == issued[1]


LABELS = {
    "uint16": lambda y: y.to(torch.uint16),
    "float16": lambda y: y.half(),
    "float32": lambda y: y.float(),
    "int32": lambda y: y.int(),
}


@pytest.mark.parametrize("impl", PASSES)
@pytest.mark.parametrize("dtype", LABELS)
@pytest.mark.parametrize("name", ["as published", "ignored labels"])
def test_labels_of_other_types(name: str, dtype: str, impl: str, as_on_a_gpu: None) -> None:
    skip_without(impl)
    given = arguments_of(USES[name], torch.float16)
    given = (*given[:2], replace(given[2], labels=LABELS[dtype](given[2].labels)), *given[3:])
    PASSES[impl](*given)
    with Watch(scalars=impl == "triton"):
        PASSES[impl](*given)


@pytest.mark.parametrize("impl", ["reference", "eager", "cuda"])
@uses
def test_all_is_done_on_the_device(name: str, impl: str) -> None:
    """On the device "meta", which has no values: nothing is looked at, fetched from the CPU or left there."""
    arguments = changed(lambda t: t.to("meta"), arguments_of(USES[name]))
    with Watch():
        PASSES[impl](*arguments)


def test_the_watch_sees_through_a_backend(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With values to look at, as on a CPU, the same tests fail."""
    monkeypatch.setattr(labels, "may_look", lambda device: True)
    arguments = arguments_of(USES["as published"])
    with pytest.raises(HostError, match="depends on values"), Watch():
        run_eager(*arguments)
