"""The comparison the project measures itself against is right, and as costly as SPEC of LoMix says it is."""

from __future__ import annotations

import weakref
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from literal_torch import literal_loss, literal_map_losses
from torch import Tensor

from lomix_fast.testing.official_style import DiceLoss, OfficialStyleLoss, official_style_step


def setup(scales: int, axes: int, classes: int = 3, dtype=torch.float64):
    torch.manual_seed(scales * 10 + axes)
    loss = OfficialStyleLoss(classes, scales).to(dtype)
    with torch.no_grad():
        loss.alpha.normal_()
    full = (8, 6, 5)[:axes]
    subsets = [s for size in range(2, scales + 1) for s in combinations(range(scales), size)]
    weight = torch.randn(sum(map(len, subsets)), classes, classes, dtype=dtype).requires_grad_()
    bias = torch.randn(len(subsets), classes, dtype=dtype).requires_grad_()
    maps = [torch.randn(2, classes, *full, dtype=dtype).requires_grad_() for _ in range(scales)]
    return loss, maps, torch.randint(0, classes, (2, *full)), weight, bias


@pytest.mark.parametrize("scales,axes", [(2, 1), (2, 2), (3, 3), (4, 2)])
def test_loss_and_gradients_equal_the_definition(scales, axes):
    loss, maps, target, weight, bias = setup(scales, axes)
    got = loss(maps, target, weight, bias)
    losses = literal_map_losses(
        maps,
        target,
        ("add", "mul", "cat", "awf"),
        cat_weight=weight,
        cat_bias=bias,
        awf_weight=loss.awf_weight,
        awf_bias=loss.awf_bias,
    )
    assert tuple(losses) == loss.plan.map_names
    want = (F.softplus(loss.alpha) * torch.stack(list(losses.values()))).sum()
    inputs = [*maps, weight, bias, *loss.parameters()]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for g, w in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12)


def test_dice():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 4, 5, 5, dtype=torch.float64), torch.randint(0, 4, (2, 5, 5))
    dice = DiceLoss(4)
    want = literal_loss(logits, target, 0.0, 1.0)
    torch.testing.assert_close(dice(logits, target, softmax=True), want)
    torch.testing.assert_close(dice(logits.softmax(1), target.float()), want)
    torch.testing.assert_close(dice(logits, target, weight=[2.0] * 4, softmax=True), 2 * want)
    with pytest.raises(ValueError, match="got 4 channels, expected n_classes=3"):
        DiceLoss(3)(logits, target)


class Kept:
    """Counts the bytes autograd keeps, each storage once, without those that exist anyway."""

    def __init__(self, known: list[Tensor]) -> None:
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.sizes: dict[int, int] = {}
        self.alive: list[Tensor] = []

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.sizes[storage.data_ptr()] = storage.nbytes()
            self.alive.append(tensor)  # so that no address is used twice
        return tensor


@pytest.mark.parametrize("scales,classes", [(3, 4), (4, 9), (5, 9)])
def test_autograd_keeps_as_many_maps_as_the_specification_states(scales, classes):
    torch.manual_seed(0)
    loss = OfficialStyleLoss(classes, scales)
    maps = [torch.randn(1, classes, 40, 40).requires_grad_() for _ in range(scales)]
    target = torch.randint(0, classes, (1, 40, 40))
    kept = Kept([*maps, target, *loss.parameters()])
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda t: t):
        loss(maps, target)
    subsets = 2**scales - 1 - scales
    pairs = scales * 2 ** (scales - 1) - scales
    stated = 3 * (scales + 4 * subsets) + 2 * pairs + (pairs - 2 * subsets) + pairs / classes
    one_map = classes * 40 * 40 * 4
    assert sum(kept.sizes.values()) / one_map == pytest.approx(stated, rel=0.01)
    assert round(stated) == {3: 78, 4: 209, 5: 508}[scales]


def test_one_wait_per_class_and_map(monkeypatch):
    count = 0
    item = Tensor.item

    def counting(tensor):
        nonlocal count
        count += 1
        return item(tensor)

    monkeypatch.setattr(Tensor, "item", counting)
    loss = OfficialStyleLoss(9, 4)
    loss([torch.randn(1, 9, 4, 4) for _ in range(4)], torch.zeros(1, 4, 4, dtype=torch.long))
    assert count == 432


def test_mixed_maps_live_until_the_total_is_known(monkeypatch):
    loss, maps, target, weight, bias = setup(3, 2)
    made, alive = [], []
    mix, dice = loss._mix, loss.dice.forward

    def remember(*args):
        one = mix(*args)
        made.append(weakref.ref(one))
        return one

    def count(*args, **options):
        alive.append(sum(ref() is not None for ref in made))
        return dice(*args, **options)

    monkeypatch.setattr(loss, "_mix", remember)
    monkeypatch.setattr(loss.dice, "forward", count)
    with torch.no_grad():
        loss(maps, target, weight, bias)
    assert alive == [0, 0, 0, *range(1, 4 * 4 + 1)]


def test_new_convolutions_at_every_call_from_the_global_generator():
    loss, maps, target, _, _ = setup(3, 2)
    totals = []
    for _ in range(2):
        torch.manual_seed(4)
        totals.append((loss(maps, target).item(), loss(maps, target).item()))
    assert totals[0] == totals[1] and totals[0][0] != totals[0][1]


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_step_enlarges_native_logits(axes):
    loss, maps, target, weight, bias = setup(3, axes)
    native = [z.detach()[(..., *[slice(0, 2 + i)] * axes)].clone().requires_grad_() for i, z in enumerate(maps)]
    total = official_style_step(loss, native, target, weight, bias)
    losses = literal_map_losses(
        native,
        target,
        loss.plan.operators,
        cat_weight=weight,
        cat_bias=bias,
        awf_weight=loss.awf_weight,
        awf_bias=loss.awf_bias,
    )
    torch.testing.assert_close(total, (F.softplus(loss.alpha) * torch.stack(list(losses.values()))).sum())
    total.backward()
    assert all(z.grad is not None for z in native)


def test_refusals():
    loss, maps, target, weight, _ = setup(2, 2)
    with pytest.raises(ValueError, match="maps: got 1 tensors, expected 2"):
        loss(maps[:1], target)
    with pytest.raises(ValueError, match=r"maps\[1\]: got size \(4, 6\), expected \(8, 6\).*official_style_step"):
        loss([maps[0], maps[1][:, :, :4]], target)
    with pytest.raises(ValueError, match="both or neither"):
        loss(maps, target, weight)
