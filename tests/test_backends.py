"""Each backend on each case, forward and backward, judged against float64; and the promises every backend keeps."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from common import (
    BACKENDS,
    COMPILED,
    NATIVE,
    check_gradients,
    check_stats,
    plain_of,
    run_backend,
    small_plan,
    truth_of,
)
from torch import Tensor

from lomix_fast import MixPlan, available_backends, map_stats
from lomix_fast.testing.cases import CASES, Case, case, make_inputs

backends = pytest.mark.parametrize("impl", BACKENDS)
# For promises that do not depend on sizes: 19 maps of 3 classes, where "base" has 48 of 4.
SMALL = case("non_integer")
# Cases that triton's interpreter would spend most of its time on, and that something smaller stands for there:
# mechanisms of the CPU kernel; several tiles and blocks (test_triton.py makes tiles small); strides and dtypes of an
# image, which volumes have too; very many maps or classes. benchmarks/gpu_day compiles them all, runs them on a GPU.
NOT_INTERPRETED = frozenset((
    *("long_rows", "many_blocks", "volume_many_blocks", "larger_and_smaller_rows"),
    *("many_tiles", "classes_17_many_tiles", "weights_many_tiles", "soft_many_tiles", "sigmoid_many_tiles"),
    *("base_float16", "base_bfloat16", "base_channels_last", "base_sliced", "base_expanded", "base_transposed"),
    *("base_mixed", "sigmoid_base", "scales_8_all", "classes_200"),
))  # fmt: skip


def cases(*names: str) -> pytest.MarkDecorator:
    chosen = [case(name) for name in names] if names else CASES
    return pytest.mark.parametrize("one", chosen, ids=lambda c: c.name)


def test_the_compiled_backend_is_here() -> None:
    """Everything below runs over the backends that load; this keeps a broken build from passing unnoticed."""
    if os.environ.get("LOMIX_FAST_BUILD") == "none":
        pytest.skip("LOMIX_FAST_BUILD=none asks for no compiled backend")
    assert available_backends()["cpu"] == "usable", available_backends()["cpu"]


def test_names_of_cases_are_unique() -> None:
    assert len({c.name for c in CASES}) == len(CASES)


def test_fresh_memory_is_poisoned() -> None:
    """The fixture in conftest.py works, so an output nobody wrote would show as NaN below."""
    assert torch.empty(5).isnan().all() and torch.ones(3).new_empty(4, dtype=torch.float16).isnan().all()


@pytest.mark.parametrize(
    "one, impl",
    [(one, impl) for one in CASES for impl in BACKENDS if impl != "triton" or one.name not in NOT_INTERPRETED],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_forward_and_backward(one: Case, impl: str) -> None:
    got = run_backend(one, impl)
    assert got.stats.dtype == got.target_stats.dtype == plain_of(one).stats.dtype
    check_stats(one, got)
    check_gradients(one, got)


@cases(*(c.name for c in CASES if c.magnitude < 100))
def test_plain_pytorch_itself_is_near_float64(one: Case) -> None:
    """The yardstick above is only worth something while plain PyTorch is accurate."""
    truth, plain = truth_of(one), plain_of(one)
    limit = 1e-12 if one.dtype == torch.float64 else 1e-5
    scale = truth.stats.abs().amax(dim=2, keepdim=True) if truth.stats.numel() else torch.ones(1)
    assert ((plain.stats - truth.stats).abs() <= limit * max(1.0, one.magnitude) * scale).all()


@backends
@cases("non_integer", "volume", "line_channels_last", "half_channels_last", "bfloat16_sliced", "double_mixed")
def test_gradients_have_dtype_and_strides_of_their_inputs(one: Case, impl: str) -> None:
    inputs = make_inputs(one)
    got = run_backend(one, impl, inputs)
    for name, tensor in inputs.differentiable.items():
        gradient = got.gradients[name]
        assert gradient.dtype == tensor.dtype
        assert gradient.stride() == torch.empty_like(tensor).stride(), name


@backends
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded", "transposed", "mixed"])
def test_strides_do_not_change_the_result(layout: str, impl: str) -> None:
    """The same numbers in other strides give the same statistics, and the same gradient where they share memory."""
    one = replace(SMALL, layout=layout)
    inputs = make_inputs(one)
    strided = run_backend(one, impl, inputs)
    dense = make_inputs(one)
    dense.logits = [z.detach().clone(memory_format=torch.contiguous_format) for z in inputs.logits]
    plain = run_backend(one, impl, dense)
    torch.testing.assert_close(strided.stats, plain.stats, rtol=1e-5, atol=1e-4)
    for name, gradient in plain.gradients.items():
        torch.testing.assert_close(strided.gradients[name], gradient, rtol=1e-4, atol=1e-4)


@backends
@cases("non_integer", "volume_mixed", "base_expanded", "base_sliced", "half_16", "labels_sliced", "empty_batch")
def test_inputs_are_not_written_to(one: Case, impl: str) -> None:
    inputs, untouched = make_inputs(one), make_inputs(one)
    versions = [t._version for t in inputs.differentiable.values()]
    run_backend(one, impl, inputs)
    for name, tensor in inputs.differentiable.items():
        assert torch.equal(tensor, untouched.differentiable[name]), name
    assert torch.equal(inputs.target, untouched.target)
    assert versions == [t._version for t in inputs.differentiable.values()]


@backends
def test_memory_around_a_sliced_input_is_not_written_to(impl: str) -> None:
    whole = torch.randn(2, 6, 9, 9)
    before = whole.clone()
    view = whole[:, 1:-1, 1::2, 1::2].requires_grad_()
    stats, _ = map_stats([view], torch.randint(4, (2, 8, 8)), MixPlan.create(1, ()), impl=impl)
    torch.autograd.grad(stats.sum(), view)
    assert torch.equal(whole, before)


REPEATED = ("many_tiles", "scales_5", "long_line", "double_mixed", "volume_float16", "non_integer")


@pytest.mark.parametrize(
    "one, impl",
    [(case(name), impl) for impl in COMPILED for name in (REPEATED if impl != "triton" else REPEATED[-2:])],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_repeated_calls_give_the_same_bits(one: Case, impl: str) -> None:
    first, second = run_backend(one, impl), run_backend(one, impl)
    assert torch.equal(first.stats, second.stats)
    for name, gradient in first.gradients.items():
        assert torch.equal(gradient, second.gradients[name]), name


@pytest.mark.parametrize("impl", sorted(set(COMPILED) & set(NATIVE)))
@cases(
    "many_tiles",
    "base",
    "volume",
    "long_line",
    "scales_5",
    "double_mixed",
    "bfloat16_sliced",
    "paper",
    "one_pixel",
    "many_blocks",
    "volume_many_blocks",
)
def test_thread_count_does_not_change_a_bit(one: Case, impl: str) -> None:
    outcomes = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        outcomes.append(run_backend(one, impl))
    for other in outcomes[1:]:
        assert torch.equal(outcomes[0].stats, other.stats)
        for name, gradient in outcomes[0].gradients.items():
            assert torch.equal(gradient, other.gradients[name]), name


@pytest.mark.parametrize(
    "one, impl",
    [
        *((case(name), impl) for name in ("volume", "linear_dice") for impl in NATIVE),
        *((case("kept_a_few"), impl) for impl in BACKENDS if impl not in NATIVE),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_each_map_alone_sends_its_gradient_to_each_of_its_inputs(one: Case, impl: str) -> None:
    """A gradient that is wrongly zero, or wrong in one map, hides in a sum over all maps; here it stands alone."""
    inputs = make_inputs(one).requires_grad_()
    exact = make_inputs(one).to(torch.float64).requires_grad_()
    named, exact_named = inputs.differentiable, exact.differentiable
    stats, _ = map_stats(inputs.logits, inputs.target, one.plan, **inputs.parameters, impl=impl)
    exact_stats, _ = map_stats(exact.logits, exact.target, one.plan, **exact.parameters, impl="reference")
    groups = (slice(0, 1), slice(1, 1 + one.classes), slice(1 + one.classes, None))
    for m in range(one.plan.num_maps):
        columns = groups[m % 3]  # operators have enough maps to see all three groups
        weight = torch.zeros_like(exact_stats)
        weight[:, m, columns] = torch.randn_like(weight[:, m, columns])
        found = torch.autograd.grad(stats, list(named.values()), weight.float(), retain_graph=True)
        expected = torch.autograd.grad(exact_stats, list(exact_named.values()), weight, retain_graph=True)
        for name, got, want in zip(named, found, expected, strict=True):
            where = f"{one.plan.map_names[m]}, gradient of {name}"
            scale = want.abs().max()
            assert ((got.double() - want).abs() <= 2e-5 * scale).all(), where
            assert not ((got == 0) & (want.abs() > 1e-3 * scale)).any(), f"{where}: wrongly zero"


@backends
def test_strides_past_two_to_the_31(impl: str) -> None:
    """Samples that lie further apart than an int32 can count; the memory between them is never touched."""
    step = 2**31 + 8
    room = torch.from_numpy(np.zeros(step + 64, dtype=np.float16))
    labels = torch.from_numpy(np.zeros(step + 64, dtype=np.uint8)).as_strided((2, 4, 4), (step, 4, 1))
    far = room.as_strided((2, 3, 4, 4), (step, 16, 4, 1)).copy_(torch.randn(2, 3, 4, 4)).requires_grad_()
    near = far.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    labels.copy_(torch.randint(3, (2, 4, 4)))
    outcomes = []
    for logits, target in ((far, labels), (near, labels.clone())):
        stats, counts = map_stats([logits], target, MixPlan.create(1, ()), impl=impl)
        outcomes.append((stats, counts, *torch.autograd.grad(stats[:, :, 1:].sum(), logits)))
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@backends
def test_only_the_scales_in_use_get_a_gradient(impl: str) -> None:
    one = case("finest_only")
    got = run_backend(one, impl)
    assert set(got.gradients) == {"logits[2]"} and got.gradients["logits[2]"].abs().min() > 0


@backends
def test_the_finest_scale_alone_asks_for_its_gradient(impl: str) -> None:
    """Frozen coarse heads: the others need no gradient, and it is the same as when all ask."""
    one = SMALL
    inputs = make_inputs(one)
    inputs.logits[-1].requires_grad_()
    stats, _ = map_stats(inputs.logits, inputs.target, one.plan, **inputs.parameters, impl=impl)
    weight = torch.ones_like(stats)
    (alone,) = torch.autograd.grad(stats, inputs.logits[-1], weight)
    inputs = make_inputs(one).requires_grad_()
    stats, _ = map_stats(inputs.logits, inputs.target, one.plan, **inputs.parameters, impl=impl)
    (together,) = torch.autograd.grad(stats, inputs.logits[-1], weight)
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-4)


@backends
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_autograd(context: type, impl: str) -> None:
    inputs = make_inputs(SMALL)
    with context():
        stats, target_stats = map_stats(inputs.logits, inputs.target, SMALL.plan, **inputs.parameters, impl=impl)
    assert not stats.requires_grad and not target_stats.requires_grad
    torch.testing.assert_close(stats, run_backend(SMALL, impl).stats, rtol=1e-5, atol=1e-4)


@backends
def test_a_stride_zero_or_transposed_grad_of_stats(impl: str) -> None:
    """What autograd hands to the backward pass is often an expanded scalar."""
    one = SMALL
    inputs = make_inputs(one).requires_grad_()
    stats, _ = map_stats(inputs.logits, inputs.target, one.plan, **inputs.parameters, impl=impl)
    dense = torch.randn_like(stats)
    turned = dense.transpose(0, 2).contiguous().transpose(0, 2)
    for odd, plain in ((torch.ones(()).expand_as(stats), torch.ones_like(stats)), (turned, dense)):
        a = torch.autograd.grad(stats, inputs.logits, odd, retain_graph=True)
        b = torch.autograd.grad(stats, inputs.logits, plain, retain_graph=True)
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-4)


@backends
def test_gradients_of_an_empty_batch(impl: str) -> None:
    got = run_backend(case("empty_batch"), impl)
    assert got.stats.shape == (0, 6, 7) and got.target_stats.shape == (0, 4)
    for name in ("cat_weight", "cat_bias", "awf_weight", "awf_bias"):
        assert (got.gradients[name] == 0).all(), name


@backends
def test_one_class_has_nothing_to_learn(impl: str) -> None:
    """softmax over one class is 1: loss 0, and a gradient of 0 up to rounding."""
    got = run_backend(case("classes_1"), impl)
    assert (got.stats[:, :, 0] == 0).all() and (got.stats[:, :, 1:] == 42).all()
    assert all((g.abs() < 1e-5).all() for g in got.gradients.values())


@backends
def test_half_logits_of_16_stay_finite(impl: str) -> None:
    logits = [torch.full((1, 2, 3, 3), 16.0, dtype=torch.float16, requires_grad=True) for _ in range(4)]
    stats, _ = map_stats(logits, torch.zeros(1, 3, 3, dtype=torch.uint8), MixPlan.create(4, ("mul",)), impl=impl)
    stats[:, :, 1:].sum().backward()
    assert stats.isfinite().all() and stats.dtype == torch.float32
    assert all(z.grad is not None and z.grad.isfinite().all() for z in logits)


def exactly_saturated() -> tuple[list[Tensor], Tensor]:
    """Logits of +-1e4: class 0 wins everywhere, the label is class 1, and exp of anything would overflow."""
    logits = [torch.tensor([1e4, -1e4, -1e4]).view(1, 3, 1, 1).expand(1, 3, *n).contiguous() for n in ((2, 2), (4, 4))]
    return logits, torch.ones(1, 4, 4, dtype=torch.int64)


@backends
@pytest.mark.parametrize("size", [80.0, 1e4])
def test_saturated_logits(size: float, impl: str) -> None:
    logits, target = exactly_saturated()
    logits = [(z * (size / 1e4)).requires_grad_() for z in logits]
    stats, _ = map_stats(logits, target, small_plan(("add", "mul")), impl=impl)
    orig, add, mul = stats[0, 0], stats[0, 2], stats[0, 3]
    assert orig.tolist() == [pytest.approx(16 * 2 * size), 0, pytest.approx(0, abs=1e-6), 0, 16, 0, 0]
    assert add[0].item() == pytest.approx(16 * 4 * size) and add[4].item() == 16
    # Squares are equal, so the product cannot tell the classes apart.
    assert mul.tolist() == pytest.approx([16 * 1.0986123, 0, 16 / 3, 0, 16 / 9, 16 / 9, 16 / 9], rel=1e-5)
    (orig[0] + add[0]).backward()
    for z, pixels in zip(logits, (4, 16), strict=True):
        assert z.grad is not None
        expected = torch.tensor([2.0, -2.0, 0.0]) * 16 / pixels  # orig_0 and add; orig_1 is left out
        if pixels == 16:
            expected = expected / 2
        torch.testing.assert_close(z.grad, expected.view(1, 3, 1, 1).expand_as(z), rtol=1e-5, atol=1e-6)


@backends
def test_scales_that_contradict_each_other(impl: str) -> None:
    """Exponentials of the sum are products of those of the scales, which underflow here in all classes but together."""
    gap = torch.tensor([0.0, 40.0, 60.0, 80.0, 120.0, 1000.0]).view(1, 1, 1, 6)
    one = torch.cat([gap, torch.zeros_like(gap), gap - 30], dim=1)  # [1, 3, 1, 6]
    logits = [one, torch.cat([-gap, torch.zeros_like(gap), -gap - 30], dim=1)]
    logits = [z.clone().requires_grad_() for z in logits]
    exact = [z.detach().double().requires_grad_() for z in logits]
    target = torch.tensor([[[0, 1, 2, 0, 1, 2]]])
    plan, outcomes = small_plan(("add",)), []
    for values, which in ((logits, impl), (exact, "reference")):
        stats, _ = map_stats(values, target, plan, impl=which)
        weight = torch.linspace(-1, 1, 7, dtype=stats.dtype).expand_as(stats[:, 2:])
        outcomes.append((stats[:, 2:], *torch.autograd.grad(stats[:, 2:], values, weight)))
    for got, want in zip(*outcomes, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)


@backends
def test_labels_in_any_stride_and_type_count_the_same(impl: str) -> None:
    one = SMALL
    expected = run_backend(one, impl).target_stats
    assert torch.equal(expected[:, 0], torch.full((2,), 13.0 * 17)) and torch.equal(
        expected[:, 1:].sum(1), expected[:, 0]
    )
    for dtype in (
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.uint64,
        torch.float16,
        torch.float64,
    ):
        got = run_backend(replace(one, target_dtype=dtype, target_layout="transposed"), impl)
        assert torch.equal(got.target_stats, expected)
