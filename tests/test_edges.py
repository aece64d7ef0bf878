"""The ends of ranges: numbers beside a limit, very many classes, sizes past what kernels count, infinite logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from common import BACKENDS, NATIVE
from literal import enlarge, softmax
from torch import Tensor

from lomix_fast import LoMixLoss, MixPlan, available_backends, map_stats

INF = math.inf
backends = pytest.mark.parametrize("impl", BACKENDS)
native = pytest.mark.parametrize("impl", NATIVE)
needs_cpu = pytest.mark.skipif(available_backends()["cpu"] != "usable", reason="the cpu backend cannot run")
ONE = MixPlan.create(1, ())


# ---- sigmoid cross-entropy ----


@native
@pytest.mark.parametrize("y", [0.0, 1.0, 0.25])
def test_sigmoid_cross_entropy_is_exact_far_out(y: float, impl: str) -> None:
    """log(1 + e^-25) is 1.3888e-11, not 0: softplus(x) - x loses it, and so does a softplus that is x above 20.

    The C++ kernel takes logarithms of products, which do not see what is below an ulp of 1.
    """
    x = np.array([-300.0, -60.0, -25.0, -20.5, -1.0, 0.0, 1.0, 20.5, 25.0, 60.0, 300.0])
    want = y * np.logaddexp(0, -x) + (1 - y) * np.logaddexp(0, x)
    far = np.exp(-np.abs(x))  # at the right end the loss is log1p of it, which logaddexp gives to the last digits too
    assert np.allclose(want[np.abs(x) >= 20], (np.log1p(far) + np.abs(x) * np.where(x < 0, y, 1 - y))[np.abs(x) >= 20])
    slope = np.where(x >= 0, 1 / (1 + far), far / (1 + far)) - y
    z = torch.tensor(x).view(-1, 1, 1).requires_grad_()
    plan = MixPlan.create(1, (), sigmoid=True)
    stats, _ = map_stats([z], torch.full((len(x), 1, 1), y), plan, impl=impl)
    np.testing.assert_allclose(stats[:, 0, 0].detach().numpy(), want, rtol=1e-13, atol=1e-15 if impl == "cpu" else 0)
    (grad,) = torch.autograd.grad(stats[:, 0, 0].sum(), z)
    np.testing.assert_allclose(grad.flatten().numpy(), slope, rtol=1e-7, atol=1e-12)


# ---- which pixels count ----

ODD = {
    torch.float64: [1 - 2**-53, 1 - 1e-9, 1 + 2**-52, 5e-324, 1e-310, 1e-40],
    torch.float32: [1 - 2**-24, 1 + 2**-23, 1e-45, 1e-38],
    torch.float16: [1 - 2**-11, 1 + 2**-10 - 2**-10, 6e-8],
    torch.bfloat16: [1 - 2**-8, 9.2e-41],
}


@backends
@pytest.mark.parametrize("ignored", [0, 1])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", ODD)
def test_ignored_is_what_equals_the_label_in_its_own_type(
    dtype: torch.dtype, kind: torch.dtype, ignored: int, impl: str
) -> None:
    """One ulp beside it counts, and so does a subnormal number beside 0, whatever the type of the sums."""
    # Triton's interpreter turns subnormal numbers of bfloat16 into 0 when it reads them.
    odd = ODD[dtype][:1] if impl == "triton" and dtype == torch.bfloat16 else ODD[dtype]
    target = torch.tensor([*odd, 0.0, -0.0, 1.0], dtype=torch.float64).to(dtype).view(1, 1, -1)
    counting = sum(float(v) != ignored for v in target.flatten().tolist())
    assert 0 < counting < target.numel()
    plan = MixPlan.create(1, (), sigmoid=True)
    logits = torch.zeros(target.shape, dtype=kind, requires_grad=True)
    stats, counts = map_stats([logits], target, plan, ignore_index=ignored, impl=impl)
    assert counts[0, 0].item() == counting
    assert stats[0, 0, 2].item() == pytest.approx(counting / 4)  # Q: s^2 of every pixel that counts
    (grad,) = torch.autograd.grad(stats[0, 0, 2], logits)
    assert torch.equal(grad.flatten() != 0, target.flatten().double() != ignored)


@native
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("side", [-1e-3, 1 + 1e-3])
def test_the_slack_of_shares_ends_at_the_same_number(side: float, dtype: torch.dtype, impl: str) -> None:
    limit = torch.tensor(side, dtype=torch.float64).to(dtype)
    outwards = torch.tensor(-9.0 if side < 0 else 9.0, dtype=dtype)
    beyond = torch.nextafter(limit, outwards) if dtype != torch.float16 else limit * 1.01
    plan = MixPlan.create(1, (), sigmoid=True)
    z = torch.zeros(1, 1, 2)
    stats, _ = map_stats([z], limit.expand(1, 1, 2), plan, impl=impl)
    assert stats.isfinite().all()
    with pytest.raises(ValueError, match=r"^target: got the value"):
        map_stats([z], beyond.expand(1, 1, 2), plan, impl=impl)


@native
def test_a_negative_weight_raises_beside_one_that_is_no_number(impl: str) -> None:
    weights = torch.tensor([[1.0, math.nan, -1.0]])
    with pytest.raises(ValueError, match=r"^weight_map: got the weight -1 at index \(0, 2\)"):
        map_stats([torch.zeros(1, 2, 3)], torch.zeros(1, 3, dtype=torch.long), ONE, weight_map=weights, impl=impl)


# ---- sizes ----


@native
@pytest.mark.parametrize("classes", [32768, 32769, 65000])
def test_tens_of_thousands_of_classes(classes: int, impl: str) -> None:
    """Equal logits: every pixel loses log C, whatever is multiplied before a logarithm is taken."""
    z = torch.zeros(1, classes, 1, 1).expand(1, classes, 4, 32)
    stats, _ = map_stats([z], torch.zeros(1, 4, 32, dtype=torch.long), ONE, impl=impl)
    torch.testing.assert_close(stats[0, 0, 0].item(), 128 * math.log(classes), rtol=1e-5, atol=0)


@backends
def test_more_classes_than_floats_can_number(impl: str) -> None:
    z = torch.zeros(1, 1, 1).expand(1, 2**24 + 1, 1)
    with pytest.raises(ValueError, match=r"^logits\[0\]: got 16777217 classes, expected at most 16777216$"):
        map_stats([z], torch.zeros(1, 1, dtype=torch.long), ONE, impl=impl)


@pytest.mark.parametrize("impl", [name for name in BACKENDS if name in ("cpu", "triton")])
@pytest.mark.parametrize("axis", [2, 3])
def test_an_axis_longer_than_kernels_count(axis: int, impl: str) -> None:
    """Expanded, so that it takes no memory; a label image likewise."""
    size = [1, 2, 2, 2]
    size[axis] = 2**32
    few = torch.zeros(1, 2, 2, dtype=torch.long)
    words = r"expected less than 536870912( pixels along an axis)?; cut it into parts, or use impl='eager'"
    with pytest.raises(ValueError, match=words):
        map_stats([torch.zeros(1, 2, 1, 1).expand(size)], few, ONE, impl=impl)
    if impl == "triton":  # on a CPU all labels are looked at first
        return
    with pytest.raises(ValueError, match=words):
        map_stats([torch.zeros(1, 2, 2, 2)], few[:, :1, :1].expand(1, *size[2:]), ONE, impl=impl)


@needs_cpu
@pytest.mark.parametrize("native_size", [(2**28,), (3, 2**28), (2**28, 3)])
def test_pixels_that_nothing_reads_cost_nothing(native_size: tuple[int, ...]) -> None:
    """Of 2^28 native pixels four are read at most: no memory in proportion to them, nor time."""
    full = torch.zeros(1, *[2] * len(native_size), dtype=torch.long)
    z = torch.zeros(1, 2, *[1] * len(native_size)).expand(1, 2, *native_size)
    stats, _ = map_stats([z], full, ONE, impl="cpu")
    torch.testing.assert_close(stats[0, 0, 0].item(), full.numel() * math.log(2))


SHRINKING = [((40,), (3,)), ((40, 7), (3, 5)), ((7, 40), (5, 3)), ((64, 40), (4, 40)), ((9, 33, 21), (2, 4, 7))]


@native
@pytest.mark.parametrize(("size", "full"), SHRINKING)
def test_logits_larger_than_the_target(size: tuple[int, ...], full: tuple[int, ...], impl: str) -> None:
    """Values and gradients where most native pixels are read by none: those get a gradient of 0."""
    z = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    y = torch.randint(3, (2, *full))
    stats, _ = map_stats([z], y, ONE, impl=impl)
    p = enlarge(z.detach().numpy(), full)
    want = np.zeros((2, 3, *full))
    for at in np.ndindex(2, *full):
        want[(at[0], slice(None), *at[1:])] = softmax(p[(at[0], slice(None), *at[1:])])
    own = np.take_along_axis(want, y.unsqueeze(1).numpy(), 1)
    np.testing.assert_allclose(stats[:, 0, 0].detach().numpy(), -np.log(own).reshape(2, -1).sum(1), rtol=1e-6)
    (grad,) = torch.autograd.grad(stats[:, 0, 0].sum(), z)
    at_full = want.copy()
    np.put_along_axis(at_full, y.unsqueeze(1).numpy(), own - 1, 1)
    # The adjoint by the definition: <adjoint(g), e> = <g, enlarge(e)>, for a direction that touches every pixel.
    direction = np.random.default_rng(0).standard_normal(z.shape)
    np.testing.assert_allclose((grad.numpy() * direction).sum(), (at_full * enlarge(direction, full)).sum(), rtol=1e-6)
    read = enlarge(np.eye(math.prod(size)).reshape(1, -1, *size), full).reshape(math.prod(size), -1).any(1)
    assert np.array_equal((grad != 0).any(0).any(0).flatten().numpy(), read)


@native
def test_many_samples_of_one_pixel(impl: str) -> None:
    """Samples do not mix, though many are worked on one after the other: a NaN stays where it is."""
    logits = [torch.randn(3000, 3, 1, 1, requires_grad=True) for _ in range(2)]
    with torch.no_grad():
        logits[1][1000] = math.nan
    y = torch.randint(3, (3000, 1, 1))
    stats, _ = map_stats(logits, y, MixPlan.create(2, ("add", "mul")), impl=impl)
    bad = torch.arange(3000) == 1000
    assert torch.equal(~stats.isfinite().flatten(1).all(1), bad)
    want = torch.nn.functional.cross_entropy(logits[0], y, reduction="none").flatten()
    torch.testing.assert_close(stats[:, 0, 0], want, rtol=1e-5, atol=1e-5)
    for grad in torch.autograd.grad(stats.sum(), logits):
        assert torch.equal(~grad.isfinite().flatten(1).all(1), bad) or grad is not logits[1]
        assert grad[~bad].isfinite().all()


# ---- minus infinity ----


def small(axes: int, full: int, ratio: float) -> tuple[list[Tensor], Tensor]:
    native_size = max(1, round(full / ratio))
    logits = [torch.randn(1, 3, *[n] * axes) for n in (native_size, full)]
    return [z.requires_grad_() for z in logits], torch.randint(1, 3, (1, *[full] * axes))


@pytest.mark.parametrize(
    ("axes", "ratio", "impl"),
    [(a, r, i) for a in (1, 2, 3) for r in (1, 2, 3, 1.5, 0.5) for i in (BACKENDS if a == 1 else NATIVE)],
)
def test_a_class_ruled_out_everywhere_is_as_if_it_were_not_there(axes: int, ratio: float, impl: str) -> None:
    """Minus infinity in every scale, enlarged or not: the loss and the gradients of the other classes alone."""
    logits, y = small(axes, 6, ratio)
    ruled_out = [z.detach().clone().index_fill_(1, torch.tensor(0), -INF).requires_grad_() for z in logits]
    others = [z.detach()[:, 1:].clone().requires_grad_() for z in logits]
    plan = MixPlan.create(2, ("add", "avg", "max"))
    stats, _ = map_stats(ruled_out, y, plan, impl=impl)
    want, _ = map_stats(others, y - 1, plan, impl="reference")
    torch.testing.assert_close(stats[..., [0, 2, 3, 5, 6]], want, rtol=1e-5, atol=1e-5)
    assert (stats[..., [1, 4]].abs() < 1e-30).all()  # the exponential may be 2^-126
    for got, right in zip(
        torch.autograd.grad(stats.sum(), ruled_out), torch.autograd.grad(want.sum(), others), strict=True
    ):
        torch.testing.assert_close(got[:, 1:], right, rtol=1e-4, atol=1e-5)
        assert (got[:, 0].abs() < 1e-30).all()


@backends
@pytest.mark.parametrize("native_size", [2, 3, 4, 6, 9, 18])
def test_one_infinite_logit_reaches_the_pixels_that_give_it_weight(native_size: int, impl: str) -> None:
    """Of six pixels those whose interpolation weight of it is above 0, by the formula; the label is another class."""
    for place in range(native_size):
        z = torch.zeros(1, 2, native_size)
        z[0, 0, place] = -INF
        stats, _ = map_stats([z], torch.ones(1, 6, dtype=torch.long), ONE, impl=impl)
        reached = 0
        for i in range(6):
            at = max((2 * i + 1) * native_size - 6, 0)  # in units of 1 / 12
            low, rest = min(at // 12, native_size - 1), at % 12
            reached += place == low or (rest > 0 and place == low + 1 and low < native_size - 1)
        # A pixel loses log 2, or nothing where the other class is ruled out.
        torch.testing.assert_close(stats[0, 0, 0].item(), (6 - reached) * math.log(2), rtol=1e-5, atol=1e-6)


@native
@pytest.mark.parametrize("operator", ["mul", "cat", "awf", "sub"])
def test_mixes_that_multiply_or_subtract_infinities_show_it(operator: str, impl: str) -> None:
    logits = [torch.randn(1, 3, n, n).index_fill_(1, torch.tensor(0), -INF) for n in (2, 4)]
    loss = LoMixLoss(3, 2, operators=(operator,), impl=impl)(logits, torch.randint(1, 3, (1, 4, 4)))
    assert not loss.isfinite()
