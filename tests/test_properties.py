"""What holds for every shape, ratio, dtype, stride and label, looked for by hypothesis."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from common import (
    NATIVE,
    check_gradients,
    check_stats,
    largest_relative_difference,
    plain_of,
    run_backend,
    truth_of,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lomix_fast import LoMixLoss, map_stats
from lomix_fast.plan import OPERATORS
from lomix_fast.testing.cases import LAYOUTS, Case, make_inputs

backends = pytest.mark.parametrize("impl", NATIVE)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LABEL_DTYPES = (torch.int64, torch.uint8, torch.int32, torch.float32)


@st.composite
def problems(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Case:
    """Any small problem of two classes or more: 1 to 3 axes, any ratio per axis, any plan, strides and label type."""
    axes = draw(st.integers(1, 3))
    longest = {1: 70, 2: 20, 3: 7}[axes]
    sizes = st.tuples(*[st.integers(1, longest)] * axes)
    operators = tuple(draw(st.lists(st.sampled_from(OPERATORS), unique=True)))
    scales = draw(st.integers(1 if not operators else 2, 4))
    originals = draw(st.none() | st.lists(st.integers(0, scales - 1), unique=True, min_size=1).map(sorted).map(tuple))
    return Case(
        name="",
        batch=draw(st.integers(0, 3)),
        classes=draw(st.integers(2, 20)),
        full=draw(sizes),
        native=tuple(draw(sizes) for _ in range(scales)),
        dtype=draw(st.sampled_from(dtypes)),
        operators=operators,
        originals=originals,
        squared=draw(st.booleans()),
        target_dtype=draw(st.sampled_from(LABEL_DTYPES)),
        layout=draw(st.sampled_from((*LAYOUTS, "mixed"))),
        target_layout=draw(st.sampled_from(("contiguous", "transposed", "sliced", "channel"))),
        magnitude=draw(st.sampled_from((1e-3, 1.0, 4.0))),
    )


@backends
@given(one=problems())
def test_every_backend_is_as_accurate_as_plain_pytorch(impl: str, one: Case) -> None:
    got = run_backend(one, impl)
    check_stats(one, got)
    check_gradients(one, got)
    truth_of.cache_clear()
    plain_of.cache_clear()


@backends
@given(one=problems())
def test_statistics_are_counts_and_probabilities(impl: str, one: Case) -> None:
    """0 <= CE; 0 <= I_c <= pixels of c; the Q_c of linear Dice add up to the number of pixels."""
    inputs = make_inputs(one)
    plan = replace(one, squared=False).plan
    stats, target_stats = map_stats(inputs.logits, inputs.target, plan, **inputs.parameters, impl=impl)
    ce, inter, denominator = stats.double().split([1, one.classes, one.classes], dim=2)
    slack = 1e-5 * one.pixels
    assert (ce >= -slack).all() and (inter >= 0).all() and (denominator >= 0).all()
    assert (inter <= target_stats[:, None, 1:] + slack).all() and (inter <= denominator + slack).all()
    assert torch.allclose(denominator.sum(2), torch.tensor(float(one.pixels), dtype=torch.float64), rtol=1e-5)
    assert (target_stats[:, 0] == one.pixels).all() and (target_stats[:, 1:].sum(1) == one.pixels).all()


@backends
@given(one=problems((torch.float64,)), seed=st.integers(0, 99))
def test_samples_do_not_see_each_other(impl: str, one: Case, seed: int) -> None:
    """Statistics of a batch are those of its samples, in the order of the batch."""
    inputs = make_inputs(one, seed)
    order = torch.randperm(one.batch, generator=torch.Generator().manual_seed(seed))
    whole, counts = map_stats(inputs.logits, inputs.target, one.plan, **inputs.parameters, impl=impl)
    picked = [z[order] for z in inputs.logits]
    other, other_counts = map_stats(picked, inputs.target[order], one.plan, **inputs.parameters, impl=impl)
    assert torch.equal(counts[order], other_counts)
    assert largest_relative_difference(other, whole[order]) < 1e-12


@backends
@given(one=problems((torch.float64,)))
def test_a_shift_of_all_classes_changes_no_sum(impl: str, one: Case) -> None:
    """softmax does not see a constant: orig and add stay as they are when one logit map is lifted."""
    one = replace(one, operators=tuple(o for o in one.operators if o == "add"), originals=None)
    inputs = make_inputs(one)
    before, _ = map_stats(inputs.logits, inputs.target, one.plan, impl=impl)
    inputs.logits[0] = inputs.logits[0] + 3.0
    after, _ = map_stats(inputs.logits, inputs.target, one.plan, impl=impl)
    assert largest_relative_difference(after, before) < 1e-11


@backends
@given(one=problems((torch.float64,)), seed=st.integers(0, 99))
def test_relabelling_the_classes_permutes_the_table(impl: str, one: Case, seed: int) -> None:
    one = replace(one, operators=tuple(o for o in one.operators if o in ("add", "mul")), originals=None)
    inputs = make_inputs(one)
    order = torch.randperm(one.classes, generator=torch.Generator().manual_seed(seed))
    before, counts = map_stats(inputs.logits, inputs.target, one.plan, impl=impl)
    renamed = order.argsort()[inputs.target.long()]
    after, new_counts = map_stats([z[:, order] for z in inputs.logits], renamed, one.plan, impl=impl)
    assert torch.equal(new_counts[:, 1:], counts[:, 1:][:, order])
    columns = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + order, 1 + one.classes + order])
    assert largest_relative_difference(after, before[:, :, columns]) < 1e-11


@backends
@given(one=problems((torch.float64,)), axis=st.integers(0, 2))
def test_mirrored_images_have_the_same_statistics(impl: str, one: Case, axis: int) -> None:
    """Interpolation has no left and no right."""
    axis = 2 + axis % len(one.full)
    inputs = make_inputs(replace(one, target_layout="contiguous"))
    before, _ = map_stats(inputs.logits, inputs.target, one.plan, **inputs.parameters, impl=impl)
    mirrored = [z.flip(axis) for z in inputs.logits]
    after, _ = map_stats(mirrored, inputs.target.flip(axis - 1), one.plan, **inputs.parameters, impl=impl)
    assert largest_relative_difference(after, before) < 1e-10


@backends
@given(one=problems((torch.float64,)), data=st.data())
def test_a_small_step_changes_the_loss_as_its_gradient_says(impl: str, one: Case, data: st.DataObject) -> None:
    """A directional derivative through LoMixLoss, on shapes nobody chose."""
    growing = tuple(accumulate(one.native, lambda a, b: tuple(map(max, a, b))))  # LoMixLoss wants the coarsest first
    one = replace(one, batch=max(one.batch, 1), native=growing, magnitude=1.0)
    options = {"operators": one.operators, "weighting": data.draw(st.sampled_from(("softplus", "fixed")))}
    criterion = LoMixLoss(
        one.classes, len(one.native), impl=impl, order="coarse_to_fine", batch=data.draw(st.booleans()), **options
    ).double()
    inputs = make_inputs(one)
    logits, target = [z.requires_grad_() for z in inputs.logits], inputs.target
    tensors = [*logits, *criterion.parameters()]
    direction = [torch.randn_like(t) for t in tensors]
    grads = torch.autograd.grad(criterion(logits, target), tensors)
    expected = sum((g * d).sum() for g, d in zip(grads, direction, strict=True)).item()

    def moved(step: float) -> Tensor:
        with torch.no_grad():
            values = [t + step * d for t, d in zip(tensors, direction, strict=True)]
        names = [name for name, _ in criterion.named_parameters()]
        parameters = dict(zip(names, values[len(logits) :], strict=True))
        return torch.func.functional_call(criterion, parameters, (values[: len(logits)], target))

    with torch.no_grad():
        slope = ((moved(1e-6) - moved(-1e-6)) / 2e-6).item()
    assert slope == pytest.approx(expected, rel=1e-4, abs=1e-5)
