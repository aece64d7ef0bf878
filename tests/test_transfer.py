"""What one criterion takes over from the checkpoint of another: maps, subsets and rows that both have."""

from __future__ import annotations

import logging
from itertools import count
from typing import Any

import pytest
import torch

from lomix_fast import LoMixLoss, transfer, with_loss
from lomix_fast.checkpoint import KEY, CheckpointError

_THOUSANDS = count(1000, 1000)


def numbered(*arguments: Any, **options: Any) -> LoMixLoss:
    """A criterion in which no two numbers are equal, nor equal to those of any other."""
    criterion = LoMixLoss(*arguments, **options)
    with torch.no_grad():
        for parameter in criterion.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) + next(_THOUSANDS))
    return criterion


def alpha_of(state: dict[str, Any], criterion: LoMixLoss) -> dict[str, float]:
    return dict(zip(criterion.map_names, state["alpha"].tolist(), strict=True))


def test_to_itself_it_is_a_copy() -> None:
    criterion, other = numbered(3, 3), LoMixLoss(3, 3)
    other.load_state_dict(transfer(criterion.state_dict(), other))
    assert all(torch.equal(a, b) for a, b in zip(criterion.parameters(), other.parameters(), strict=True))


def test_other_operators_keep_the_weights_of_common_maps() -> None:
    source, target = numbered(3, 3, operators=("add", "cat")), numbered(3, 3, operators=("awf", "cat", "mul"))
    before = {name: value.clone() for name, value in target.state_dict().items()}
    state = transfer(source.state_dict(), target)
    theirs, found = alpha_of(source.state_dict(), source), alpha_of(state, target)
    own = alpha_of(before, target)
    for name in target.map_names:
        assert found[name] == (theirs[name] if name[:4] in ("orig", "cat_") else own[name]), name
    assert torch.equal(state["cat_weight"], source.cat_weight) and torch.equal(state["cat_bias"], source.cat_bias)
    assert torch.equal(state["awf_weight"], before["awf_weight"])
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())  # not changed
    target.load_state_dict(state)


def test_one_coarser_scale_more() -> None:
    source, target = numbered(3, 2), numbered(3, 3, awf_sharing="size")
    state = transfer(source.state_dict(), target, scales=(1, 2))
    theirs, found, own = (
        alpha_of(s, c) for s, c in ((source.state_dict(), source), (state, target), (target.state_dict(), target))
    )
    renamed = {
        "orig_1": "orig_0",
        "orig_2": "orig_1",
        **{f"{op}_1_2": f"{op}_0_1" for op in ("add", "mul", "cat", "awf")},
    }
    for name in target.map_names:
        assert found[name] == (theirs[renamed[name]] if name in renamed else own[name]), name
    subset = target.plan.subsets.index((1, 2))
    assert torch.equal(state["cat_bias"][subset], source.cat_bias[0])
    pairs = [row for row, (s, _) in enumerate(target.plan.pairs) if s == subset]
    assert torch.equal(state["cat_weight"][pairs], source.cat_weight)
    kept = [row for row in range(len(target.plan.pairs)) if row not in pairs]
    assert torch.equal(state["cat_weight"][kept], target.cat_weight[kept])
    assert torch.equal(state["awf_weight"][:2], source.awf_weight) and torch.equal(
        state["awf_weight"][2:], target.awf_weight[2:]
    )


def test_scales_that_the_criterion_lacks_are_left_behind() -> None:
    source, target = numbered(3, 3), numbered(3, 2)
    state = transfer(source.state_dict(), target, scales=(0, 1, 2))
    theirs, found = alpha_of(source.state_dict(), source), alpha_of(state, target)
    assert found == {name: theirs[name] for name in target.map_names}


def test_other_classes_keep_the_map_weights_alone() -> None:
    source, target = numbered(3, 3), numbered(4, 3)
    state = transfer(source.state_dict(), target)
    assert torch.equal(state["alpha"], source.alpha)
    for name in ("cat_weight", "cat_bias", "awf_weight", "awf_bias"):
        assert torch.equal(state[name], target.state_dict()[name])


def test_shared_rows_of_attention() -> None:
    """From "size" to "subset" every row is known; back, pairs that now share a row had different ones."""
    shared, apart = numbered(3, 3, awf_sharing="size"), numbered(3, 3, awf_sharing="subset")
    state = transfer(shared.state_dict(), apart)
    assert torch.equal(state["awf_weight"], shared.awf_weight[[0, 1, 0, 1, 0, 1, 2, 3, 4]])
    back = transfer(apart.state_dict(), shared)
    assert torch.equal(back["awf_bias"][2:], apart.awf_bias[6:]) and torch.equal(
        back["awf_bias"][:2], shared.awf_bias[:2]
    )


def test_other_weighting_and_no_weights() -> None:
    source, target = numbered(3, 2), LoMixLoss(3, 2, weighting="normalized")
    target.load_state_dict(transfer(source.state_dict(), target))
    assert torch.equal(target.alpha, source.alpha)
    fixed = numbered(3, 2, weighting="fixed")
    state = transfer(fixed.state_dict(), source)
    assert torch.equal(state["alpha"], source.alpha) and torch.equal(state["cat_weight"], fixed.cat_weight)


def test_from_a_module_that_holds_it() -> None:
    source, target = numbered(3, 2), LoMixLoss(3, 3)
    state = with_loss(torch.nn.Identity(), source).state_dict()
    found = alpha_of(transfer(state, target, prefix="criterion.", scales=(1, 2)), target)
    assert found["mul_1_2"] == alpha_of(source.state_dict(), source)["mul_0_1"]


@pytest.mark.parametrize(
    "change", [{"alpha": None}, {"beta": torch.zeros(1)}, {"alpha": None, "module.alpha": 1}], ids=repr
)
@pytest.mark.parametrize("is_described", [True, False])
def test_what_is_not_there_or_unknown_is_refused(is_described: bool, change: dict[str, Any]) -> None:
    state = {**LoMixLoss(3, 2).state_dict(), **change}
    state = {name: value for name, value in state.items() if value is not None and (is_described or name != KEY)}
    with pytest.raises(CheckpointError, match=r"state_dict: got the parameters .* expected \['alpha', 'awf_bias'"):
        transfer(state, LoMixLoss(3, 2), source=None if is_described else LoMixLoss(3, 2))


def test_what_was_taken_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lomix_fast"):
        transfer(LoMixLoss(3, 2, operators=("add",)).state_dict(), LoMixLoss(3, 2))
    assert "alpha: 3 of 6 rows taken" in caplog.text and "cat_weight: 0 of 2 rows taken" in caplog.text


def test_format_1_needs_a_source() -> None:
    source, target = numbered(3, 2, operators=("add",)), LoMixLoss(3, 2)
    state = {name: value for name, value in source.state_dict().items() if name != KEY}
    with pytest.raises(ValueError, match="source: got None with a checkpoint of format 1"):
        transfer(state, target)
    found = alpha_of(transfer(state, target, source=LoMixLoss(3, 2, operators=("add",))), target)
    assert found["add_0_1"] == source.alpha[2] and found["mul_0_1"] == 0
    with pytest.raises(CheckpointError, match=r"alpha \[3\] \(expected \[4\]\)"):
        transfer(state, target, source=LoMixLoss(3, 2, operators=("add", "mul")))
    with pytest.raises(ValueError, match="source: got a criterion, expected None"):
        transfer(source.state_dict(), target, source=source)


@pytest.mark.parametrize("scales", [(1,), (2, 1), (0, 0), (-1, 1), (0.0, 1.0), (0, 1, 2)], ids=str)
def test_scales_that_do_not_fit_are_refused(scales: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=r"scales: got .* expected 2 increasing numbers"):
        transfer(LoMixLoss(3, 2).state_dict(), LoMixLoss(3, 3), scales=scales)


def test_other_numbers_of_scales_need_a_numbering() -> None:
    with pytest.raises(ValueError, match="scales: got None with 2 scales in the checkpoint and 3 in the criterion"):
        transfer(LoMixLoss(3, 2).state_dict(), LoMixLoss(3, 3))


def test_some_subsets_to_all_of_them() -> None:
    source, target = numbered(3, 3, subsets="pairs"), numbered(3, 3)
    theirs = alpha_of(source.state_dict(), source)
    found, own = alpha_of(transfer(source.state_dict(), target), target), alpha_of(target.state_dict(), target)
    assert found == {name: theirs.get(name, own[name]) for name in target.map_names}
    assert len(theirs) == len(found) - 4
