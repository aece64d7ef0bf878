"""Network and criterion together under torch.compile, torch.export, checkpointing and gradient accumulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import NATIVE
from in_training import USES, Joined, SmallUNet
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

backends = pytest.mark.parametrize("impl", NATIVE)
FULL = {2: (16, 24), 3: (8, 16, 8)}


def make(name: str = "as published", axes: int = 2, impl: str = "auto") -> Joined:
    return Joined(SmallUNet(USES[name].classes, axes), USES[name].criterion(impl))


def draw(
    name: str = "as published", batch: int = 2, full: tuple[int, ...] = FULL[2]
) -> tuple[Tensor, dict[str, Tensor]]:
    return torch.randn(batch, 1, *full), USES[name].call(batch, full)


def step_of(module: nn.Module, run: Callable[..., Tensor], image: Tensor, call: dict[str, Tensor]) -> dict[str, Any]:
    """Loss and the gradients of image, network and criterion, by name."""
    module.zero_grad()
    image = image.clone().requires_grad_()
    loss = run(image, **call)
    loss.backward()
    return {"loss": loss.detach(), "image": image.grad, **{name: p.grad for name, p in module.named_parameters()}}


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    """No larger difference than `tolerance` times the largest number of each tensor."""
    assert found.keys() == expected.keys()
    for name, e in expected.items():
        f = found[name]
        assert (f is None) == (e is None), name
        if e is not None:
            assert f.dtype == e.dtype, name
            size = float(e.double().abs().max())
            torch.testing.assert_close(f, e, rtol=0, atol=tolerance * size, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


# torch.compile --------------------------------------------------------------------------------------------------------


VOLUMES = ("as published", "fixed", "pixels weighed", "regions")


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        pytest.param(name, axes, marks=[pytest.mark.slow] if name != "as published" else [])
        for name, axes in [(n, 2) for n in USES] + [(n, 3) for n in VOLUMES]
    ],
)
def test_one_graph(name: str, axes: int) -> None:
    """Every weighting, order, kind of target and weight of pixels; forward and backward, static shapes."""
    step, (image, call) = make(name, axes), draw(name, full=FULL[axes])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    expected = step_of(step, step, image, call)
    for _ in range(2):
        assert_same(step_of(step, compiled, image, call), expected)
    assert counter.frame_count == 1


SIZES = {
    # No scale is of one pixel, which dynamo takes for a constant.
    "batch": [(2, FULL[2]), (3, FULL[2]), (5, FULL[2])],
    "space": [(2, (16, 24)), (2, (40, 32)), (2, (24, 56))],
    "space, 3D": [(2, (16, 24, 32)), (2, (40, 32, 16))],
    "odd sizes": [(2, (16, 24)), (3, (23, 50))],
}


CHANGING = [("as published", c) for c in SIZES] + [("pixels weighed", "batch"), ("pruned", "space")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "changing"), CHANGING)
def test_compiled_once_while_training_on_sizes_that_change(name: str, changing: str) -> None:
    """dynamic=True, with steps of the optimizer between the calls, which move alpha and all other parameters."""
    step = make(name, axes=len(SIZES[changing][0][1]))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    optimizer = torch.optim.SGD(step.parameters(), lr=0.01)
    alphas = []
    for batch, full in SIZES[changing]:
        image, call = draw(name, batch, full)
        assert_same(step_of(step, compiled, image, call), step_of(step, step, image, call))
        optimizer.step()
        alphas.append(step.criterion.alpha.detach().clone())
        assert counter.frame_count == 1, f"compiled again for {(batch, full)}"
    assert not torch.equal(alphas[0], alphas[-1])


def test_other_values_of_parameters_compile_nothing_anew() -> None:
    """Static shapes: alpha, the mixes and the network at other numbers, set in place and loaded."""
    step, (image, call) = make(), draw()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    losses = []
    for change in (0.0, 0.5, -3.0):
        with torch.no_grad():
            for p in step.parameters():
                p.add_(change)
        found = step_of(step, compiled, image, call)
        assert_same(found, step_of(step, step, image, call))
        losses.append(found["loss"].item())
    step.load_state_dict(make().state_dict())
    assert_same(step_of(step, compiled, image, call), step_of(step, step, image, call))
    assert counter.frame_count == 1 and len(set(losses)) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_inside_the_compiled_region(dtype: torch.dtype) -> None:
    step, (image, call) = make(), draw()
    seen = []
    step.criterion.register_forward_pre_hook(lambda _, args: seen.append({z.dtype for z in args[0]}))

    def run(image: Tensor, target: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return step(image, target)

    expected = step_of(step, run, image, call)
    assert seen == [{dtype}] and expected["loss"].dtype == torch.float32
    step.criterion._forward_pre_hooks.clear()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same(step_of(step, compiled, image, call), expected, 2 * torch.finfo(dtype).eps)


@pytest.mark.slow
def test_inductor() -> None:
    """The compiler that users have, generated C++ and all: one small step, on two sizes of batch."""
    step = make(axes=1)
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for batch in (2, 3):
        image, call = draw(batch=batch, full=(24,))
        assert_same(step_of(step, compiled, image, call), step_of(step, step, image, call))


# torch.export ---------------------------------------------------------------------------------------------------------


def test_the_network_exports_as_if_there_were_no_loss() -> None:
    """The same program before there is a loss at all and after a backward pass through it."""
    network, (image, call) = SmallUNet().eval(), draw()
    before = torch.export.export(network, (image,))
    step = Joined(network, USES["as published"].criterion())
    step(image, **call).backward()
    after = torch.export.export(step.network, (image,))
    assert after.graph_module.code == before.graph_module.code and "lomix" not in after.graph_module.code
    assert after.state_dict.keys() == before.state_dict.keys()
    for found, again, expected in zip(after.module()(image), before.module()(image), network(image), strict=True):
        torch.testing.assert_close(found, expected)
        assert torch.equal(found, again)


@pytest.mark.parametrize("name", ["as published", "pixels weighed"])
def test_network_and_loss_export_together(name: str) -> None:
    step, (image, call) = make(name), draw(name)
    program = torch.export.export(step, (image,), kwargs=call)
    assert "lomix_fast.map_stats_forward" in program.graph_module.code
    other_image, other_call = draw(name)
    torch.testing.assert_close(program.module()(other_image, **other_call), step(other_image, **other_call))


# Recomputed, accumulated, repeated ------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("around", ["network", "network and loss"])
def test_activation_checkpointing(around: str, use_reentrant: bool, impl: str) -> None:
    step, (image, call) = make("pixels weighed", impl=impl), draw("pixels weighed")
    expected = step_of(step, step, image, call)
    runs = []
    step.network.register_forward_pre_hook(lambda *_: runs.append(1))

    def recomputed(image: Tensor, **call: Tensor) -> Tensor:
        if around == "network":
            maps = checkpoint(lambda x: tuple(step.network(x)), image, use_reentrant=use_reentrant)
            return step.criterion(maps, **call)
        return checkpoint(lambda x: step(x, **call), image, use_reentrant=use_reentrant)

    assert_same(step_of(step, recomputed, image, call), expected)
    assert len(runs) == 2  # once for the loss, once more for its gradient


@backends
@pytest.mark.parametrize("name", ["as published", "uncertainty", "pruned"])
def test_gradients_accumulate_over_micro_batches(name: str, impl: str) -> None:
    step = make(name, impl=impl)
    batches = [draw(name, batch) for batch in (2, 1, 3)]
    each = [step_of(step, step, image, call) for image, call in batches]
    step.zero_grad()
    for image, call in batches:
        step(image, **call).backward()
    found = {key: p.grad for key, p in step.named_parameters()}
    assert_same(found, {key: sum(one[key] for one in each) for key in found})


@backends
def test_two_calls_under_one_backward(impl: str) -> None:
    """Two batches, one graph: their gradients add up, and neither spoils what the other has saved."""
    step, first, second = make(impl=impl), draw(), draw(batch=1, full=(24, 8))
    each = [step_of(step, step, image, call) for image, call in (first, second)]
    step.zero_grad()
    (step(first[0], **first[1]) + 3 * step(second[0], **second[1])).backward()
    found = {key: p.grad for key, p in step.named_parameters()}
    assert_same(found, {key: each[0][key] + 3 * each[1][key] for key in found})


@backends
def test_a_retained_graph_gives_the_same_gradients_again(impl: str) -> None:
    step, (image, call) = make("pixels weighed", impl=impl), draw("pixels weighed")
    loss = step(image, **call)
    parameters = list(step.parameters())
    first, second = (torch.autograd.grad(loss, parameters, retain_graph=True) for _ in range(2))
    doubled = torch.autograd.grad(2 * loss, parameters)
    for a, b, c in zip(first, second, doubled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(2 * a, c, rtol=1e-6, atol=1e-7)
