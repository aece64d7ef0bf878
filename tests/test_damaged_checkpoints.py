"""State dicts that are damaged: each is refused by name, and criterion and network stay as they were, bit for bit."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lomix_fast import LoMixLoss, transfer, with_loss
from lomix_fast.checkpoint import KEY, CheckpointError
from lomix_fast.convert import lomix_to_official, official_to_lomix
from lomix_fast.official import CombinatorialMutationsLossModule

# With everything that a description can hold: 3 scales, so 19 maps.
OPTIONS: dict[str, Any] = {"concat": "resampled", "prune_below": 0.5, "prune_every": 700}


def described(criterion: LoMixLoss) -> dict[str, Any]:
    return json.loads(bytes(criterion.state_dict()[KEY].tolist()))


def entry(text: str | bytes) -> Tensor:
    return torch.tensor(list(text.encode() if isinstance(text, str) else text), dtype=torch.uint8)


def everything(module: nn.Module) -> list[Tensor]:
    """Copies of all that a load may change, with what only the description tells."""
    return [value.clone() for value in module.state_dict().values()]


def changed(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda found: found | fields


def pruning(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda found: found | {"pruning": found["pruning"] | fields}


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda found: {key: value for key, value in found.items() if key != name}


FIELDS = {
    "active too short": (pruning(active="1"), "active='1', expected 19 digits"),
    "active too long": (pruning(active="1" * 20), "expected 19 digits"),
    "active of other letters": (pruning(active="1" * 18 + "2"), "expected 19 digits"),
    "active of none": (pruning(active="0" * 19), "not all 0"),
    "active no text": (pruning(active=[1] * 19), "active=[1, 1"),
    "negative count": (pruning(calls_left="-5"), "calls_left='-5', expected digits of a number from 0 to 700"),
    "huge count": (pruning(calls_left="701"), "calls_left='701'"),
    "count past what Python reads": (pruning(calls_left="9" * 5000), "integer string"),
    "count no text": (pruning(calls_left=5), "calls_left=5"),
    "count of other digits": (pruning(calls_left="٣"), "calls_left='٣'"),
    "below no number": (pruning(below="x"), "prune_below: got 'x'"),
    "below infinite": (pruning(below=float("inf")), "prune_below: got inf"),
    "below zero": (pruning(below=0), "below=0"),
    "every true": (pruning(every=True), "prune_every: got True"),
    "pruning lacks": (lambda f: f | {"pruning": {"below": 0.5}}, "pruning: got {'below': 0.5}"),
    "pruning no object": (changed(pruning=[1]), "pruning: got [1]"),
    "generator not base64": (changed(generator="not base64!"), "describes no LoMixLoss"),
    "generator of another length": (changed(generator=base64.b64encode(b"abc").decode()), "describes no LoMixLoss"),
    "generator of garbage": (changed(generator=base64.b64encode(bytes([255]) * 5056).decode()), "describes no"),
    "generator a number": (changed(generator=7), "describes no LoMixLoss"),
    "generator missing": (changed(generator=None), "generator: got None with concat='resampled'"),
    "format -5": (changed(format=-5), "format -5, expected an int of at least 2"),
    "format 0": (changed(format=0), "format 0"),
    "format 1": (changed(format=1), "format 1, expected"),
    "format 1.5": (changed(format=1.5), "format 1.5"),
    "format true": (changed(format=True), "format True"),
    "format text": (changed(format="2"), "format '2'"),
    "format missing": (without("format"), "format None"),
    "classes": (changed(num_classes="5"), "num_classes: got '5'"),
    "scales": (changed(num_scales=99), "num_scales: got 99"),
    "operators": (changed(operators=["add", 3]), "operators: got the unknown name 3"),
    "operators no list": (changed(operators=None), "not iterable"),
    "subsets": (changed(subsets=[[0, 1], [0, 7]]), "subsets: got (0, 7)"),
    "originals": (changed(originals=[2, 1]), "originals: got (2, 1)"),
    "weighting": (changed(weighting=["softplus"]), "weighting: got ['softplus'], expected 'softplus' or"),
    "concat": (changed(concat=None), "concat: got None, expected 'learned' or 'resampled'"),
    "no object": (lambda f: [f], "a JSON list"),
    **{f"no {name}": (without(name), f"it lacks {name}") for name in ("weighting", "pruning", "generator", "subsets")},
}


@pytest.mark.parametrize("name", FIELDS)
def test_damaged_fields_of_a_description(name: str) -> None:
    change, words = FIELDS[name]
    criterion = LoMixLoss(5, 3, **OPTIONS)
    state = {**LoMixLoss(5, 3, **OPTIONS).state_dict()}
    state[KEY] = entry(json.dumps(change(described(criterion))))
    refused(state, words)


def refused(state: dict[str, Any], words: str) -> None:
    """By the criterion, inside a module, by its own setter, and by the two that convert."""
    criterion = LoMixLoss(5, 3, **OPTIONS)
    module = with_loss(nn.Conv2d(1, 1, 1), criterion)
    nested = nn.ModuleDict({"inner": module})
    inside = {f"criterion.{name}": value for name, value in state.items()}
    inside |= {"network.weight": torch.ones(1, 1, 1, 1), "network.bias": torch.ones(1)}
    before = everything(module)
    match = "(?s)" + re.escape(KEY) + ".*" + re.escape(words)
    for call in (
        lambda: criterion.load_state_dict(state),
        lambda: criterion.load_state_dict(state, strict=False),
        lambda: module.load_state_dict(inside),
        lambda: nested.load_state_dict({f"inner.{name}": value for name, value in inside.items()}),
        lambda: criterion.set_extra_state(state[KEY]),
        lambda: transfer(state, criterion),
        lambda: lomix_to_official(state, num_classes=5, num_scales=3),
    ):
        with pytest.raises(CheckpointError, match=match):
            call()
        assert all(torch.equal(a, b) for a, b in zip(before, everything(module), strict=True))


TEXTS = {
    "deep nesting": (entry("[" * 100_000), "recursion"),
    "no JSON": (entry("{"), "describes no LoMixLoss"),
    "no UTF-8": (entry(b"\xff\xfe\xff"), "describes no LoMixLoss"),
    "empty": (entry(""), "describes no LoMixLoss"),
    "two axes": (torch.zeros(2, 2), "got [2, 2], expected a tensor [bytes]"),
    "no bytes": (torch.tensor([0.5, 1.0]), "numbers that are no bytes"),
    "infinite": (torch.tensor([torch.inf]), "infinity"),
    "not a number": (torch.tensor([torch.nan]), "NaN"),
    "None": (None, "got NoneType"),
    "bytes": (b"{}", "got bytes"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_description_that_is_no_text(name: str) -> None:
    value, words = TEXTS[name]
    refused({**LoMixLoss(5, 3, **OPTIONS).state_dict(), KEY: value}, words)


def test_the_setter_refuses_the_description_of_another_criterion() -> None:
    criterion = LoMixLoss(5, 3, prune_below=0.5)
    before = everything(criterion)
    with pytest.raises(CheckpointError, match="num_scales=2, expected num_scales=3"):
        criterion.set_extra_state(LoMixLoss(5, 2, prune_below=0.5).get_extra_state())
    assert all(torch.equal(a, b) for a, b in zip(before, everything(criterion), strict=True))


# Parameters ------------------------------------------------------------------------------------------------------

ENTRIES = {
    "text": ("text", "str (expected a float tensor"),
    "None": (None, "NoneType (expected"),
    "integers": (lambda v: v.long(), "torch.int64 (expected a float tensor"),
    "complex": (lambda v: v.cfloat(), "torch.complex64 (expected"),
    "shape": (lambda v: v[:-1], "(expected ["),
    "sparse": (lambda v: v.to_sparse(), "layout torch.sparse_coo"),
    "meta": (lambda v: v.to("meta"), "meta"),
}


def damaged(state: dict[str, Any], key: str, name: str) -> tuple[dict[str, Any], str]:
    value, words = ENTRIES[name]
    return {**state, key: value(state[key]) if callable(value) else value}, words


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("form", [1, 2])
@pytest.mark.parametrize("key", ["alpha", "awf_bias"])
def test_damaged_parameters(key: str, form: int, name: str) -> None:
    """The last in the order of loading, too: those before it must not have been loaded."""
    source, criterion = LoMixLoss(5, 3), LoMixLoss(5, 3)
    module = with_loss(nn.Conv2d(1, 1, 1), criterion)
    whole = {n: v for n, v in source.state_dict().items() if form == 2 or n != KEY}
    state, words = damaged(whole, key, name)
    before = everything(module)
    match = f"(?=.*{key}).*{re.escape(words)}"  # in either order
    for call in (
        lambda: criterion.load_state_dict(state),
        lambda: criterion.load_state_dict(state, strict=False),
        lambda: module.load_state_dict({f"criterion.{n}": v for n, v in state.items()}, strict=False),
        lambda: transfer(state, criterion, source=source if form == 1 else None),
        lambda: lomix_to_official(state, num_classes=5, num_scales=3, drop_cat=True),
    ):
        with pytest.raises(CheckpointError, match=match):
            call()
    assert all(torch.equal(a, b) for a, b in zip(before, everything(module), strict=True))


@pytest.mark.parametrize("form", [1, 2])
@pytest.mark.parametrize(("change", "words"), [("less", "no awf_bias (expected [5])"), ("more", "the unknown beta")])
def test_missing_and_unknown_entries_leave_all_as_it_was(form: int, change: str, words: str) -> None:
    criterion = LoMixLoss(5, 3)
    module = with_loss(nn.Conv2d(1, 1, 1), criterion)
    state = {n: v for n, v in LoMixLoss(5, 3).state_dict().items() if form == 2 or n != KEY}
    if change == "less":
        del state["awf_bias"]
    else:
        state["beta"] = torch.zeros(1)
    inside = {f"criterion.{n}": v for n, v in state.items()}
    inside |= {f"network.{n}": v + 1 for n, v in module.network.state_dict().items()}
    before = everything(module)
    with pytest.raises(CheckpointError, match=re.escape(words)):
        criterion.load_state_dict(state)
    with pytest.raises(CheckpointError, match=re.escape(words)):
        module.load_state_dict(inside)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(module), strict=True))
    criterion.load_state_dict(state, strict=False)


def test_a_meta_state_dict_may_be_assigned() -> None:
    with torch.device("meta"):
        state = LoMixLoss(5, 3).state_dict()
    criterion = LoMixLoss(5, 3)
    criterion.load_state_dict(state, assign=True)
    assert criterion.alpha.is_meta


@pytest.mark.parametrize("state", [{1: torch.zeros(1)}, [1], None], ids=repr)
def test_what_is_no_state_dict(state: Any) -> None:
    criterion, module = LoMixLoss(5, 3), CombinatorialMutationsLossModule(3, 5, 3)
    for call in (
        lambda: criterion.load_state_dict(state),
        lambda: with_loss(nn.Conv2d(1, 1, 1), criterion).load_state_dict(state),
        lambda: module.load_state_dict(state),
        lambda: transfer(state, criterion),
        lambda: lomix_to_official(state, num_classes=5, num_scales=3),
        lambda: official_to_lomix(state, num_classes=5, num_scales=3),
    ):
        with pytest.raises(CheckpointError, match=r"state_dict: got (the key 1 of type int|list|NoneType), expected"):
            call()


# The drop-in -----------------------------------------------------------------------------------------------------

LAST = "weighted_fusion_modules.3.weight_convs.2.bias"


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("key", ["original_weights.0", LAST])
def test_damaged_parameters_of_the_drop_in(key: str, name: str) -> None:
    operations, ours = ["add", "wf"], ("add", "awf")
    module = CombinatorialMutationsLossModule(3, 5, 3, operations)
    state, words = damaged(CombinatorialMutationsLossModule(3, 5, 3, operations).state_dict(), key, name)
    joined = with_loss(nn.Conv2d(1, 1, 1), module)
    before = everything(joined)
    for call in (
        lambda: module.load_state_dict(state),
        lambda: module.load_state_dict(state, strict=False),
        lambda: joined.load_state_dict({f"criterion.{n}": v for n, v in state.items()}, strict=False),
        lambda: official_to_lomix(state, num_classes=5, num_scales=3, operators=ours),
    ):
        with pytest.raises(CheckpointError, match=f"(?=.*{re.escape(key)}).*{re.escape(words)}"):
            call()
    assert all(torch.equal(a, b) for a, b in zip(before, everything(joined), strict=True))


@pytest.mark.parametrize("change", ["less", "more", "lomix"])
def test_missing_and_unknown_entries_of_the_drop_in(change: str) -> None:
    module = CombinatorialMutationsLossModule(3, 5, 3)
    state = {name: value + 1 for name, value in module.state_dict().items()}
    if change == "less":
        del state[LAST]
        words = f"no {LAST} (expected [1])"
    elif change == "more":
        state["beta"] = torch.zeros(1)
        words = "the unknown beta"
    else:
        state, words = dict(LoMixLoss(5, 3).state_dict()), "lomix_to_official"
    before = everything(module)
    with pytest.raises(CheckpointError, match=re.escape(words)):
        module.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(module), strict=True))


def test_a_criterion_of_one_scale_is_transferred() -> None:
    """Its description names operators but no subset."""
    source, criterion = LoMixLoss(5, 1), LoMixLoss(5, 1)
    with torch.no_grad():
        source.alpha.fill_(3.0)
    criterion.load_state_dict(transfer(source.state_dict(), criterion))
    assert criterion.alpha.tolist() == [3.0]
