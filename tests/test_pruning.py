"""Maps left out because their weight is small: what is computed, when it is decided, how it is reported."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import pytest
import torch
from common import NATIVE
from hypothesis import given
from hypothesis import strategies as st
from pruned import DROPPED, NAMES, draw, lower, make
from torch import Tensor

from lomix_fast import LoMixLoss, lomix_loss, map_stats
from lomix_fast.convert import lomix_to_module
from lomix_fast.recipe import map_losses

backends = pytest.mark.parametrize("impl", NATIVE)


def check_against_the_whole(criterion: LoMixLoss, dropped: Sequence[str], logits: list[Tensor], target: Tensor) -> None:
    """Loss and all gradients are those of the unpruned loss under weights that are zero for the dropped maps."""
    leaves = [*logits, *criterion.parameters()]
    loss = criterion(logits, target)
    assert criterion.dropped_maps == tuple(dropped)
    found = torch.autograd.grad(loss, leaves)  # raises if one of them took no part
    mask = torch.tensor([name not in dropped for name in criterion.map_names])
    weights = torch.nn.functional.softplus(criterion.alpha) * mask
    whole = (weights * criterion.map_losses(logits, target)).sum()
    torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)
    for got, want in zip(found, torch.autograd.grad(whole, leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)
        assert ((got == 0) == (want == 0)).all()
    alpha_grad = found[len(logits)]
    assert alpha_grad.shape == criterion.alpha.shape
    assert (alpha_grad[~mask] == 0).all() and (alpha_grad[mask] > 0).all()


@backends
@pytest.mark.parametrize("name", DROPPED)
def test_pruned_is_the_whole_with_zero_weights(name: str, impl: str) -> None:
    logits, target = draw(torch.float64)
    check_against_the_whole(make(DROPPED[name], impl=impl).double(), DROPPED[name], logits, target)


@backends
@given(dropped=st.sets(st.sampled_from(NAMES), max_size=len(NAMES) - 1), sharing=st.sampled_from(("size", "subset")))
def test_any_selection_is_the_whole_with_zero_weights(impl: str, dropped: set[str], sharing: str) -> None:
    logits, target = draw(torch.float64)
    ordered = [name for name in NAMES if name in dropped]
    criterion = make(ordered, impl=impl, awf_sharing=sharing).double()
    check_against_the_whole(criterion, ordered, logits, target)


@backends
def test_pruned_in_the_other_order(impl: str) -> None:
    """The scale without a map is the coarsest, which is last in this list."""
    dropped = DROPPED["all of scale 0"]
    logits, target = draw(torch.float64)
    criterion = make(dropped, impl=impl, order="fine_to_coarse").double()
    check_against_the_whole(criterion, dropped, logits[::-1], target)
    grads = torch.autograd.grad(criterion(logits[::-1], target), logits)
    assert [bool((g == 0).all()) for g in grads] == [True, False, False]


@backends
def test_dropped_maps_are_not_computed(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("lomix_fast.loss.map_stats", lambda z, y, plan, **rest: seen.append((plan, rest)) or 1 / 0)
    criterion = make(DROPPED["all cat"], impl=impl)
    criterion.update_pruning()
    with pytest.raises(ZeroDivisionError):
        criterion(*draw())
    ((plan, given_parameters),) = seen
    assert plan.map_names == criterion.active_maps and len(plan.maps) == 15
    assert given_parameters["cat_weight"] is None and given_parameters["awf_weight"] is not None


@backends
def test_the_functional_form_takes_a_selected_plan(impl: str) -> None:
    criterion = LoMixLoss(3, 3, impl=impl, awf_sharing="subset").double()
    logits, target = draw(torch.float64)
    kept = (1, 4, 12, 18)
    parameters = {n: p for n, p in criterion.named_parameters() if n != "alpha"}
    weights = torch.rand(4, dtype=torch.float64)
    loss = lomix_loss(logits, target, weights, criterion.plan.select(kept), impl=impl, **parameters)
    whole = criterion.map_losses(logits, target)[list(kept)]
    torch.testing.assert_close(loss, (weights * whole).sum(), rtol=1e-12, atol=0)


def test_map_losses_of_the_recipe_follow_a_selected_plan() -> None:
    """The same numbers whether a map stands alone or among the others."""
    logits, target = draw(torch.float64)
    criterion = LoMixLoss(3, 3, operators=("add", "mul")).double()
    whole = criterion.map_losses(logits, target)
    for m in range(criterion.plan.num_maps):
        alone = map_losses(*map_stats(logits, target, criterion.plan.select([m])))
        torch.testing.assert_close(alone, whole[m : m + 1], rtol=1e-12, atol=0)


# Off, and options -----------------------------------------------------------------------------------------------------


def test_off_by_default() -> None:
    criterion = LoMixLoss(3, 3)
    lower(criterion, NAMES[:5], -4.0)
    logits, target = draw()
    weights = criterion.map_weights()
    torch.testing.assert_close(criterion(logits, target), (weights * criterion.map_losses(logits, target)).sum())
    assert criterion.update_pruning() == criterion.dropped_maps == ()
    assert criterion.active_maps == NAMES and "prune" not in repr(criterion)
    assert LoMixLoss(3, 3, prune_below=0).prune_below == LoMixLoss(3, 3, prune_below=0.0, weighting="fixed").prune_below


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"prune_below": -0.1}, ValueError, ("prune_below: got -0.1", "at least 0")),
        ({"prune_below": float("nan")}, ValueError, ("prune_below: got nan", "finite")),
        ({"prune_below": float("inf")}, ValueError, ("prune_below: got inf", "finite")),
        ({"prune_below": None}, TypeError, ("prune_below: got None", "0 leaves pruning off")),
        ({"prune_below": True}, TypeError, ("prune_below: got True", "number")),
        ({"prune_below": 0.1, "prune_every": 0}, ValueError, ("prune_every: got 0", "at least 1", "update_pruning()")),
        ({"prune_below": 0.1, "prune_every": 2.0}, TypeError, ("prune_every: got 2.0", "int", "None")),
        ({"prune_below": 0.1, "prune_every": True}, TypeError, ("prune_every: got True", "int", "None")),
        (
            {"prune_below": 0.1, "weighting": "fixed"},
            ValueError,
            ("prune_below: got 0.1 with weighting='fixed'", "expected 0", "weighting='softplus'"),
        ),
        (
            {"prune_below": 0.1, "supervision": "mutation"},
            ValueError,
            ("prune_below: got 0.1 with supervision='mutation'", "expected 0", "supervision='lomix'"),
        ),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, object], error: type[Exception], words: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        LoMixLoss(3, 2, **options)
    message = str(caught.value)
    assert message.startswith(words[0]) and all(word in message for word in (*words, "expected")), message


def test_a_pruned_criterion_is_no_module_of_the_authors() -> None:
    criterion = LoMixLoss(3, 2, concat="resampled", prune_below=0.01)
    with pytest.raises(ValueError, match=r"criterion: got prune_below=0.01, expected 0"):
        lomix_to_module(criterion)


# When -----------------------------------------------------------------------------------------------------------------


def count_host_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows by one for each tensor read on the host, which is where a GPU would be waited for."""
    reads: list[str] = []
    for name in ("tolist", "item", "__bool__", "__float__", "__int__"):
        original = getattr(Tensor, name)

        def reading(self: Tensor, original: Callable = original, name: str = name) -> object:
            reads.append(name)
            return original(self)

        monkeypatch.setattr(Tensor, name, reading)
    return reads


@pytest.mark.parametrize("every", [1, 3])
def test_decided_at_the_first_call_and_then_every_so_many(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    criterion = make(["orig_0"], prune_every=every, impl=NATIVE[-1])
    logits, target = draw()
    reads = count_host_reads(monkeypatch)
    for call in range(7):
        before, dropped = len(reads), criterion.dropped_maps
        criterion(logits, target).backward()
        decided = call % every == 0
        assert reads[before:] == (["tolist"] if decided else []), call
        expected = ("orig_0", *(f"add_{i}" for i in ("0_1", "0_2", "1_2", "0_1_2")[:call]))[:5]
        assert criterion.dropped_maps == (expected if decided else dropped), call
        lower(criterion, [f"add_{i}" for i in ("0_1", "0_2", "1_2", "0_1_2")[: call + 1]])


def test_off_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    criterion = LoMixLoss(3, 3, impl=NATIVE[-1], prune_every=1)
    logits, target = draw()
    reads = count_host_reads(monkeypatch)
    criterion(logits, target).backward()
    assert reads == []


def test_only_when_asked_to() -> None:
    criterion = make(["orig_0"], prune_every=None)
    logits, target = draw()
    for _ in range(3):
        criterion(logits, target)
        assert criterion.dropped_maps == ()
    assert criterion.update_pruning() == criterion.dropped_maps == ("orig_0",)
    lower(criterion, ["orig_0"], 0.0)
    criterion(logits, target)
    assert criterion.dropped_maps == ("orig_0",)
    assert criterion.update_pruning() == ()


def test_evaluation_uses_the_last_choice_and_does_not_count() -> None:
    criterion = make(["orig_0"], prune_every=2)
    logits, target = draw()

    def others() -> list[Tensor]:
        with torch.no_grad():
            values = [criterion(logits, target)]
        values.append(criterion.eval()(logits, target))
        criterion.train()(logits[0], target)  # a single tensor has nothing to prune
        return values

    whole = others()
    assert criterion.dropped_maps == ()
    first = criterion(logits, target)
    assert criterion.dropped_maps == ("orig_0",)
    lower(criterion, ["orig_1"])
    for _ in range(2):
        assert all(value < before for value, before in zip(others(), whole, strict=True))
        assert criterion.dropped_maps == ("orig_0",)
    assert criterion(logits, target) < first and criterion.dropped_maps == ("orig_0",)
    criterion(logits, target)
    assert criterion.dropped_maps == ("orig_0", "orig_1")


def test_a_weight_at_the_threshold_stays() -> None:
    criterion = LoMixLoss(3, 2, prune_below=0.25)
    values = torch.tensor([0.25, 0.2499, 0.2501, 1.0, 0.0, 3.0])
    criterion._take(criterion._chosen_by(values))
    assert criterion.dropped_maps == ("orig_1", "cat_0_1")


def test_a_change_between_forward_and_backward() -> None:
    """The backward pass belongs to the maps that its forward pass was made of."""
    dropped = ("add_0_1", "cat_0_1")
    criterion = make(dropped)
    logits, target = draw()
    expected = torch.autograd.grad(criterion(logits, target), logits)
    loss = criterion(logits, target)
    lower(criterion, dropped, 0.0)
    assert criterion.update_pruning() == ()
    for got, want in zip(torch.autograd.grad(loss, logits), expected, strict=True):
        assert torch.equal(got, want)


# Reported -------------------------------------------------------------------------------------------------------------


def test_a_change_is_logged_and_nothing_else_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lomix_fast")
    criterion = LoMixLoss(3, 2, prune_below=0.01)
    criterion.update_pruning()
    assert caplog.messages == []
    lower(criterion, ["add_0_1", "orig_1"], -5.0)
    criterion.update_pruning()
    criterion.update_pruning()
    lower(criterion, ["add_0_1"], 0.0)
    lower(criterion, ["mul_0_1"], -6.0)
    criterion.update_pruning()
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    assert caplog.messages == [
        "pruning: 4 of 6 maps active at prune_below=0.01; dropped: orig_1 (0.00672), add_0_1 (0.00672); restored: none",
        "pruning: 4 of 6 maps active at prune_below=0.01; dropped: mul_0_1 (0.00248); restored: add_0_1 (0.693)",
    ]
    assert criterion.dropped_maps == ("orig_1", "mul_0_1")
    assert criterion.active_maps == ("orig_0", "add_0_1", "cat_0_1", "awf_0_1")
    text = repr(criterion)
    assert "prune_below=0.01, prune_every=100, dropped_maps=('orig_1', 'mul_0_1')" in text


def test_all_weights_under_the_threshold_drop_nothing_and_warn_once(caplog: pytest.LogCaptureFixture) -> None:
    criterion = LoMixLoss(3, 2, prune_below=0.01, prune_every=1)
    logits, target = [z.detach() for z in draw()[0][1:]], draw()[1]
    lower(criterion, criterion.map_names[1:])
    criterion(logits, target)
    assert criterion.active_maps == ("orig_0",)
    lower(criterion, ["orig_0"], -6.0)
    for _ in range(3):
        loss = criterion(logits, target)
        assert criterion.dropped_maps == ()
    torch.testing.assert_close(loss, (criterion.map_weights() * criterion.map_losses(logits, target)).sum())
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    for part in ("all 6 weights", "prune_below=0.01", "largest is 0.00248", "no map is dropped", "lower prune_below"):
        assert part in record.getMessage()


def test_map_losses_and_weights_stay_whole() -> None:
    criterion = make(DROPPED["all cat"])
    logits, target = draw()
    before = criterion.map_losses(logits, target)
    criterion(logits, target)
    assert criterion.dropped_maps == DROPPED["all cat"]
    assert torch.equal(criterion.map_losses(logits, target), before)
    assert criterion.map_weights().shape == (19,) and criterion.map_names == NAMES
