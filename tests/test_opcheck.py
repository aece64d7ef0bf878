"""The registered ops as torch.library and torch.compile see them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from common import BACKENDS, NATIVE, cotangent
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from lomix_fast import LoMixLoss, MixPlan, map_stats
from lomix_fast.testing.cases import Case, case, make_inputs

backends = pytest.mark.parametrize("impl", NATIVE)
THREE = case("linear_dice")
CHECKED = (
    THREE,
    replace(THREE, name="half", dtype=torch.float16),
    replace(THREE, name="bfloat16_mixed_strides", dtype=torch.bfloat16, layout="mixed"),
    replace(THREE, name="double_labels_uint8", dtype=torch.float64, target_dtype=torch.uint8),
    case("finest_only"),
    case("kept_without_a_scale"),
    case("volume_thin"),
    case("line_channels_last"),
    case("empty_batch"),
    case("base_expanded"),
    case("sigmoid_masked"),
    case("label_smoothing_weights"),
    case("scales_8"),
)


def arguments(one: Case, impl: str) -> tuple[object, ...]:
    inputs = make_inputs(one)
    target = inputs.target_for(one)
    weights = (target.weight_map, target.ce_weight)
    return inputs.logits, target.labels, *weights, *inputs.parameters.values(), one.plan.key, target.rule.key, impl


@backends
@pytest.mark.parametrize("one", CHECKED, ids=lambda c: c.name)
def test_forward_op(one: Case, impl: str) -> None:
    torch.library.opcheck(torch.ops.lomix_fast.map_stats_forward.default, arguments(one, impl))


@pytest.mark.parametrize("impl", sorted(set(BACKENDS) - set(NATIVE)))
@pytest.mark.parametrize("name", ["finest_only", "empty_batch"])
def test_ops_of_an_interpreted_backend(name: str, impl: str) -> None:
    """The cheapest cases: opcheck calls an op again and again."""
    given = arguments(case(name), impl)
    torch.library.opcheck(torch.ops.lomix_fast.map_stats_forward.default, given)
    grad_stats = cotangent(case(name)).to(torch.float32)
    torch.library.opcheck(torch.ops.lomix_fast.map_stats_backward.default, (grad_stats, *given))


# Not "reference": opcheck asks for the storage of every tensor, and those inside the torch.func.vjp it uses have none.
@pytest.mark.parametrize("impl", [name for name in NATIVE if name != "reference"])
@pytest.mark.parametrize("one", CHECKED, ids=lambda c: c.name)
def test_backward_op(one: Case, impl: str) -> None:
    grad_stats = cotangent(one).to(torch.float64 if one.dtype == torch.float64 else torch.float32)
    op = torch.ops.lomix_fast.map_stats_backward.default
    torch.library.opcheck(op, (grad_stats, *arguments(one, impl)))


@pytest.mark.parametrize("one", CHECKED, ids=lambda c: c.name)
def test_fake_outputs_describe_the_real_ones(one: Case) -> None:
    """Shapes, dtypes and strides on the meta device, where nothing is computed."""
    inputs, fake = make_inputs(one), make_inputs(one)
    fake.logits = [torch.empty_strided(z.shape, z.stride(), dtype=z.dtype, device="meta") for z in inputs.logits]
    fake.target = inputs.target.to("meta")
    arguments = {n: p.to("meta") if isinstance(p, Tensor) else p for n, p in inputs.arguments(one).items()}
    for z in (*fake.logits, *(arguments[n] for n in inputs.parameters if arguments[n] is not None)):
        z.requires_grad_()
    inputs.requires_grad_()
    outputs = map_stats(inputs.logits, inputs.target, one.plan, **inputs.arguments(one), impl="eager")
    imagined = map_stats(fake.logits, fake.target, one.plan, **arguments, impl="eager")
    real_grads = torch.autograd.grad(outputs[0].sum(), inputs.logits, allow_unused=True)
    fake_grads = torch.autograd.grad(imagined[0].sum(), fake.logits, allow_unused=True)
    for real, meta in zip((*outputs, *real_grads), (*imagined, *fake_grads), strict=True):
        assert (real is None) == (meta is None)
        if real is not None:
            assert meta.device.type == "meta"
            assert (real.shape, real.dtype, real.stride()) == (meta.shape, meta.dtype, meta.stride())


def step(criterion: torch.nn.Module, run: object, logits: list[Tensor], target: Tensor) -> tuple[Tensor, ...]:
    """Loss, gradients of logits, gradients of parameters."""
    criterion.zero_grad()
    leaves = [z.detach().clone().requires_grad_() for z in logits]
    loss = run(leaves, target)
    loss.backward()
    return loss.detach(), *(z.grad for z in leaves), *(p.grad for p in criterion.parameters())


def assert_same(a: tuple[Tensor | None, ...], b: tuple[Tensor | None, ...]) -> None:
    for x, y in zip(a, b, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def draw(*sizes: tuple[int, ...], batch: int = 2) -> tuple[list[Tensor], Tensor]:
    return [torch.randn(batch, 3, *n) for n in sizes], torch.randint(3, (batch, *sizes[-1]))


@pytest.mark.slow
@backends
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"supervision": "last_layer"},
        {"supervision": "mutation"},
        pytest.param(
            {"concat": "resampled", "weighting": "fixed"},
            marks=pytest.mark.xfail(reason="dynamo cannot trace draws from a torch.Generator", strict=True),
        ),
        {"batch": False, "order": "fine_to_coarse", "awf_sharing": "scale"},
    ],
    ids=str,
)
def test_compile_in_one_graph(options: dict[str, object], impl: str) -> None:
    torch._dynamo.reset()
    criterion = LoMixLoss(3, 2, impl=impl, **options)
    logits, target = draw((3, 4), (6, 8))
    if criterion.order == "fine_to_coarse":
        logits.reverse()
    state = None if criterion._generator is None else criterion._generator.get_state()
    expected = step(criterion, criterion, logits, target)
    if state is not None:
        criterion._generator.set_state(state)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    assert_same(step(criterion, compiled, logits, target), expected)


@backends
def test_compile_with_sizes_that_vary(impl: str) -> None:
    torch._dynamo.reset()
    criterion = LoMixLoss(3, 2, impl=impl)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(criterion, fullgraph=True, backend=counter, dynamic=True)
    # No two sizes of the first call are equal: dynamo takes equal sizes for one and the same symbol.
    for batch, coarse, fine in ((2, (5, 4), (10, 8)), (3, (2, 5), (7, 9)), (4, (4, 3), (11, 6))):
        logits, target = draw(coarse, fine, batch=batch)
        assert_same(step(criterion, compiled, logits, target), step(criterion, criterion, logits, target))
        assert counter.frame_count == 1, f"compiled again for {(batch, coarse, fine)}"


@pytest.mark.parametrize("scales", [1, 2, 3])
def test_compile_without_gradients(scales: int) -> None:
    """Validation: nothing asks for a gradient, which dynamo traces in another way than training."""
    torch._dynamo.reset()
    criterion = LoMixLoss(3, scales)
    logits, target = draw(*[(n + 1, n + 2) for n in range(scales)])
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(logits, target), criterion(logits, target))


def test_compile_a_single_tensor() -> None:
    torch._dynamo.reset()
    criterion = LoMixLoss(3, 2)
    logits, target = draw((4, 5))
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits[0], target), criterion(logits[0], target))


def test_compile_map_stats_alone() -> None:
    torch._dynamo.reset()
    plan = MixPlan.create(3, ("add", "mul"))
    logits, target = draw((1, 2), (3, 4), (6, 8))
    compiled = torch.compile(lambda z, y: map_stats(z, y, plan), fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(logits, target), map_stats(logits, target, plan), strict=True):
        torch.testing.assert_close(found, expected)
