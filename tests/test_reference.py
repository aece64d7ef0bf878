"""The reference against the literal writing-out of SPEC.md: operators, order, modes, in float64."""

from __future__ import annotations

import literal
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lomix_fast import LoMixLoss, MixPlan, map_stats
from lomix_fast.recipe import map_losses
from lomix_fast.reference import map_stats_reference, mixed_maps, upsample
from lomix_fast.target import Target

ALL = ("add", "mul", "cat", "awf")
FULL = {1: (7,), 2: (5, 6), 3: (3, 2, 4)}
NATIVE = {1: [(2,), (3,), (7,)], 2: [(2, 3), (3, 6), (5, 6)], 3: [(1, 2, 3), (2, 1, 3), (3, 2, 4)]}


def draw(axes: int, classes: int = 3, batch: int = 2, scales: int = 3) -> tuple[list[Tensor], Tensor]:
    logits = [torch.randn(batch, classes, *n, dtype=torch.float64) for n in NATIVE[axes][-scales:]]
    return logits, torch.randint(classes, (batch, *FULL[axes]))


def arrays(tensors: list[Tensor]) -> list[np.ndarray]:
    return [t.detach().numpy() for t in tensors]


def draw_parameters(plan: MixPlan, classes: int) -> list[Tensor]:
    shapes = (
        (plan.num_pairs, classes, classes),
        (plan.num_subsets, classes),
        (plan.num_pairs, classes),
        (plan.num_pairs,),
    )
    return [torch.randn(s, dtype=torch.float64) for s in shapes]


def by_subset(scales: int, w: Tensor, b: Tensor, u: Tensor, v: Tensor) -> tuple[dict, dict]:
    """W, b, u, v handed out in the order SPEC.md lists pairs: subset by subset, members in increasing order."""
    cat, awf, k = {}, {}, 0
    for s, subset in enumerate(literal.subsets_of(scales)):
        rows = range(k, k + len(subset))
        cat[subset] = ([w[r].detach().numpy() for r in rows], b[s].detach().numpy())
        awf[subset] = [(u[r].detach().numpy(), v[r].item()) for r in rows]
        k += len(subset)
    return cat, awf


@pytest.mark.parametrize(
    ("native", "full"),
    [
        ((4,), (4,)),
        ((3,), (7,)),
        ((7,), (3,)),
        ((1,), (5,)),
        ((5,), (1,)),
        ((2, 5), (7, 6)),
        ((2, 3, 4), (5, 2, 9)),
    ],
)
def test_upsample(native: tuple[int, ...], full: tuple[int, ...]) -> None:
    z = torch.randn(2, 3, *native, dtype=torch.float64)
    np.testing.assert_allclose(upsample(z, full).numpy(), literal.enlarge(z.numpy(), full), rtol=1e-12, atol=1e-12)


def test_upsample_is_the_identity_at_full_size() -> None:
    z = torch.randn(1, 2, 3, 4)
    assert upsample(z, (3, 4)) is z


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_every_map_in_order(axes: int) -> None:
    logits, _ = draw(axes)
    plan = MixPlan.create(3)
    parameters = draw_parameters(plan, 3)
    expected = literal.map_list(arrays(logits), FULL[axes], ALL, *by_subset(3, *parameters))
    found = list(mixed_maps([upsample(z, FULL[axes]) for z in logits], plan, *parameters))
    assert plan.map_names == tuple(name for name, _ in expected)
    for one, (name, array) in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.numpy(), array, rtol=1e-11, atol=1e-11, err_msg=name)


@pytest.mark.parametrize("squared", [True, False])
def test_stats_are_the_sums_they_say(squared: bool) -> None:
    logits, target = draw(2, scales=1)
    stats, target_stats = map_stats_reference(logits, Target(target), MixPlan.create(1, (), squared=squared))
    s = logits[0].softmax(1)
    for b in range(2):
        ce, i, q, n = 0.0, np.zeros(3), np.zeros(3), np.zeros(3)
        for y in range(5):
            for x in range(6):
                p, label = s[b, :, y, x].numpy(), int(target[b, y, x])
                ce -= np.log(p[label])
                i[label] += p[label]
                q += p**2 if squared else p
                n[label] += 1
        np.testing.assert_allclose(stats[b, 0].numpy(), np.concatenate([[ce], i, q]), rtol=1e-12)
        np.testing.assert_array_equal(target_stats[b].numpy(), np.concatenate([[30], n]))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_loss_of_every_map(axes: int) -> None:
    logits, target = draw(axes)
    plan = MixPlan.create(3)
    parameters = draw_parameters(plan, 3)
    maps = literal.map_list(arrays(logits), FULL[axes], ALL, *by_subset(3, *parameters))
    found = map_losses(*map_stats_reference(logits, Target(target), plan, *parameters))
    np.testing.assert_allclose(found.numpy(), [literal.base_loss(m, target.numpy()) for _, m in maps], rtol=1e-11)


MODES = {
    "last_layer": literal.last_layer,
    "deep_supervision": literal.deep_supervision,
    "mutation": literal.mutation,
}


@pytest.mark.parametrize("scales", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_supervision_mode(mode: str, scales: int) -> None:
    logits, target = draw(2, scales=scales)
    criterion = LoMixLoss(3, scales, supervision=mode, impl="reference")
    expected = MODES[mode](arrays(logits), target.numpy())
    assert criterion(logits, target).item() == pytest.approx(expected, rel=1e-11)


def lomix_total(criterion: LoMixLoss, logits: list[Tensor], target: Tensor, operators: tuple[str, ...]) -> float:
    """The total of SPEC.md from the parameters a criterion holds; awf rows shared by (size, position)."""
    rows = [(len(s), i) for s in literal.subsets_of(3) for i in range(len(s))]
    order = sorted(set(rows))
    cat = awf = None
    if "cat" in operators:
        cat, _ = by_subset(3, criterion.cat_weight, criterion.cat_bias, torch.zeros(9, 1), torch.zeros(9))
    if "awf" in operators:
        u = torch.stack([criterion.awf_weight[order.index(r)] for r in rows])
        v = torch.stack([criterion.awf_bias[order.index(r)] for r in rows])
        _, awf = by_subset(3, torch.zeros(9, 1), torch.zeros(4, 1), u, v)
    maps = literal.map_list(arrays(logits), tuple(target.shape[1:]), operators, cat, awf)
    alpha = None if criterion.alpha is None else criterion.alpha.detach().numpy()
    return literal.total(maps, target.numpy(), alpha)


@pytest.mark.parametrize("weighting", ["softplus", "fixed"])
@pytest.mark.parametrize("operators", [ALL, (), ("add",), ("mul",), ("cat",), ("awf",), ("awf", "mul")])
def test_lomix_and_the_variants_of_table_s7(operators: tuple[str, ...], weighting: str) -> None:
    """operators=() with softplus is "DS learned"; all four with fixed weights is "LoMix fixed"."""
    logits, target = draw(2)
    criterion = LoMixLoss(3, 3, operators=operators, weighting=weighting, impl="reference").double()
    if criterion.alpha is not None:
        torch.nn.init.normal_(criterion.alpha)
    expected = lomix_total(criterion, logits, target, operators)
    assert criterion(logits, target).item() == pytest.approx(expected, rel=1e-11)


def test_weights_start_at_softplus_of_zero() -> None:
    logits, target = draw(2)
    criterion = LoMixLoss(3, 3, impl="reference").double()
    assert torch.allclose(criterion.map_weights(), torch.full((19,), np.log(2.0), dtype=torch.float64))
    expected = lomix_total(criterion, logits, target, ALL)
    assert criterion(logits, target).item() == pytest.approx(expected, rel=1e-11)


def test_mutation_is_lomix_with_sums_and_fixed_weights() -> None:
    logits, target = draw(2)
    merit = LoMixLoss(3, 3, supervision="mutation")
    same = LoMixLoss(3, 3, operators=("add",), weighting="fixed")
    assert len(merit.map_names) == 2**3 - 1
    assert torch.equal(merit(logits, target), same(logits, target))


def test_awf_sharing_by_scale_and_by_subset() -> None:
    logits, target = draw(2)
    for sharing, row_of in (("scale", lambda k, member: member), ("subset", lambda k, member: k)):
        criterion = LoMixLoss(3, 3, operators=("awf",), awf_sharing=sharing, impl="reference").double()
        pairs = [member for s in literal.subsets_of(3) for member in s]
        u = torch.stack([criterion.awf_weight[row_of(k, m)] for k, m in enumerate(pairs)])
        v = torch.stack([criterion.awf_bias[row_of(k, m)] for k, m in enumerate(pairs)])
        _, awf = by_subset(3, torch.zeros(9, 1), torch.zeros(4, 1), u, v)
        maps = literal.map_list(arrays(logits), FULL[2], ("awf",), None, awf)
        expected = literal.total(maps, target.numpy(), np.zeros(len(maps)))
        assert criterion(logits, target).item() == pytest.approx(expected, rel=1e-11)


def test_products_of_half_logits_do_not_overflow() -> None:
    """Four factors of 16 make 65536, past float16."""
    logits = [torch.full((1, 2, 2, 2), 16.0, dtype=torch.float16) for _ in range(4)]
    labels = torch.zeros(1, 2, 2, dtype=torch.int64)
    stats, _ = map_stats_reference(logits, Target(labels), MixPlan.create(4, ("mul",)))
    assert stats.dtype == torch.float32
    assert torch.allclose(stats[:, :, 0], torch.full((1, 15), 4 * F.softplus(torch.zeros(())).item()))


def test_full_size_sums_share_no_gradient() -> None:
    """Autograd gives both members of an `add` the same tensor; the registered op may not return it twice."""
    logits = [torch.randn(1, 3, 4, 4, requires_grad=True) for _ in range(2)]
    plan = MixPlan.create(2, ("add",), originals=())
    stats, _ = map_stats(logits, torch.randint(3, (1, 4, 4)), plan, impl="reference")
    stats.sum().backward()
    assert logits[0].grad is not None and torch.equal(logits[0].grad, logits[1].grad)
