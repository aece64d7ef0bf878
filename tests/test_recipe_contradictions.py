"""Options out of range or contradicting each other: named, with what was given, what was expected, the way out."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from lomix_fast import LoMixLoss, MixPlan, lomix_loss

# Options besides (3 classes, 3 scales), error, words of the message in order.
BAD: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "softmax over one class": (
        {"num_classes": 1},
        ValueError,
        ("num_classes: got 1, expected at least 2", "sigmoid=True"),
    ),
    "no class": ({"num_classes": 0, "sigmoid": True}, ValueError, ("num_classes: got 0, expected at least 1",)),
    "one class that is background": (
        {"num_classes": 1, "sigmoid": True, "include_background": False},
        ValueError,
        ("include_background: got False with num_classes=1, expected True",),
    ),
    "smoothing under sigmoid": (
        {"sigmoid": True, "label_smoothing": 0.1},
        ValueError,
        ("label_smoothing: got 0.1 with sigmoid=True, expected 0", "smooth the target itself"),
    ),
    "smoothing above 1": ({"label_smoothing": 1.5}, ValueError, ("label_smoothing: got 1.5, expected",)),
    "ignored label": ({"ignore_index": 2.0}, TypeError, ("ignore_index: got 2.0, expected None or an int",)),
    "too few weights": (
        {"weight": [1.0, 2.0]},
        ValueError,
        ("weight: got shape (2,), expected [3], one weight a class",),
    ),
    "weight of the background": (
        {"weight": [1.0, 2.0, 3.0], "include_background": False},
        ValueError,
        ("weight: got shape (3,), expected [2]", "class 0, which include_background=False leaves out"),
    ),
    "weight of one class": (
        {"num_classes": 1, "sigmoid": True, "weight": [2.0]},
        ValueError,
        ("weight: got [2.0] with num_classes=1, expected None", "lambda_dice="),
    ),
    "negative weight": ({"weight": [1.0, -2.0, 3.0]}, ValueError, ("weight: got -2.0, expected", "at least 0")),
    "negative weight in a tensor": (
        {"weight": torch.tensor([1.0, -2.0, 3.0])},
        ValueError,
        ("weight: got [1.0, -2.0, 3.0], expected finite numbers of at least 0",),
    ),
    "negative weight of all": ({"weight": -1.0}, ValueError, ("weight: got -1.0, expected",)),
    "text as weight": ({"weight": "balanced"}, TypeError, ("weight: got 'balanced', expected",)),
    "text among weights": ({"weight": [1.0, "2", 3.0]}, TypeError, ("weight: got '2', expected a number",)),
    "too many weights of CE": ({"ce_weight": [1.0] * 4}, ValueError, ("ce_weight: got shape (4,), expected [3]",)),
    "one weight of CE": ({"ce_weight": 2.0}, TypeError, ("ce_weight: got 2.0, expected a sequence",)),
    "infinite weight of CE": (
        {"ce_weight": torch.tensor([1.0, torch.inf, 1.0])},
        ValueError,
        ("ce_weight: got [1.0, inf, 1.0], expected finite",),
    ),
    "complex weight of CE": (
        {"ce_weight": torch.ones(3).cfloat()},
        TypeError,
        ("ce_weight: got dtype torch.complex64",),
    ),
    "tversky with squares": (
        {"tversky": (0.3, 0.7)},
        ValueError,
        ("tversky: got (0.3, 0.7) with squared_pred=True, expected None", "pass squared_pred=False"),
    ),
    "tversky with jaccard": (
        {"tversky": (0.3, 0.7), "jaccard": True, "squared_pred": False},
        ValueError,
        ("tversky: got (0.3, 0.7) with jaccard=True, expected None", "leave one of them out"),
    ),
    "one number for tversky": (
        {"tversky": 0.3, "squared_pred": False},
        TypeError,
        ("tversky: got 0.3, expected None or two numbers",),
    ),
    "tversky of nothing": (
        {"tversky": (0, 0.0), "squared_pred": False},
        ValueError,
        ("tversky: got (0, 0.0), expected one of the two above 0", "lambda_dice=0"),
    ),
    "no term": (
        {"lambda_ce": 0, "lambda_dice": 0.0},
        ValueError,
        ("lambda_ce and lambda_dice: got 0 and 0.0, expected one of them above 0",),
    ),
    "negative tversky": (
        {"tversky": (0.3, -0.7), "squared_pred": False},
        ValueError,
        ("tversky[1]: got -0.7, expected",),
    ),
    "absent classes": (
        {"absent_classes": "drop"},
        ValueError,
        ("absent_classes: got 'drop', expected one of", "'exclude'"),
    ),
    "structure of softmax": (
        {"structure": True},
        ValueError,
        ("structure: got True with sigmoid=False, expected False", "num_classes=1", "weight_map="),
    ),
    "structure of many classes": (
        {"structure": True, "sigmoid": True},
        ValueError,
        ("structure: got True with num_classes=3, expected False", "weight_map="),
    ),
    "two choices of subsets": (
        {"subsets": "pairs", "max_subset_size": 2},
        ValueError,
        ("max_subset_size: got 2 together with subsets='pairs', expected one of the two",),
    ),
    "subsets of nothing": (
        {"subsets": "pairs", "operators": ()},
        ValueError,
        ("subsets: got 'pairs' with operators=(), which makes no mix", "expected None"),
    ),
    "no subset": (
        {"subsets": []},
        ValueError,
        ("subsets: got [], expected at least one subset, or None for all", "pass operators=()"),
    ),
    "subsets of one scale": (
        {"max_subset_size": 1},
        ValueError,
        ("max_subset_size: got 1, expected 2 to num_scales=3", "pass operators=()"),
    ),
    "more than there are": (
        {"max_subset_size": 4},
        ValueError,
        ("max_subset_size: got 4, expected 2 to num_scales=3",),
    ),
    **{
        f"{option}={value!r} with one scale{', ' + mode if mode else ''}": (
            {"num_scales": 1, option: value, **({"supervision": mode} if mode else {})},
            ValueError,
            (f"{option}: got {value!r} with num_scales=1, which mixes nothing; leave it out; expected", repr(default)),
        )
        for mode in ("", "mutation")
        for option, value, default in (
            ("mul", "bounded", "logits"),
            ("subsets", "pairs", None),
            ("subsets", [], None),
            ("max_subset_size", 2, None),
            ("max_subset_size", 3, None),
        )
        if not (mode and option == "mul")
    },
    "bounded without products": (
        {"mul": "bounded", "operators": ("add",)},
        ValueError,
        ("mul: got 'bounded' with operators=('add',), expected 'logits'", "add 'mul' to operators"),
    ),
    "pruning of fixed weights": (
        {"prune_below": 0.1, "weighting": "fixed"},
        ValueError,
        ("prune_below: got 0.1 with weighting='fixed', expected 0",),
    ),
    **{
        f"{option} in {mode}": (
            {"supervision": mode, option: value},
            ValueError,
            (f"{option}: got {value!r} with supervision='{mode}', which sets it itself", "expected", repr(default)),
        )
        for mode in ("mutation", "deep_supervision", "last_layer")
        for option, value, default in (
            ("weighting", "normalized", "softplus"),
            ("weighting", "uncertainty", "softplus"),
            ("mul", "bounded", "logits"),
            ("operators", ("sub",), "add"),
            ("subsets", "pairs", None),
            ("max_subset_size", 2, None),
        )
        if mode != "mutation" or option not in ("subsets", "max_subset_size")
    },
}


@pytest.mark.parametrize("name", BAD)
def test_contradictions(name: str) -> None:
    options, error, words = BAD[name]
    options = {"num_classes": 3, "num_scales": 3, **options}
    with pytest.raises(error) as caught:
        LoMixLoss(**options)
    message = str(caught.value)
    assert type(caught.value) is error and message.startswith(words[0]), message
    assert re.search(".*".join(re.escape(word).replace("'add'", ".*'add'") for word in words), message), message


# What the functional form takes, checked before any work starts.
FUNCTIONAL = {
    name: row
    for name, row in BAD.items()
    if not {"num_classes", "num_scales", "sigmoid", "supervision", "subsets", "max_subset_size", "mul", "prune_below"}
    & set(row[0])
    and name != "tversky with jaccard"
}


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_contradictions_of_the_function(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("map_stats ran before the options were checked")

    options, error, words = FUNCTIONAL[name]
    monkeypatch.setattr("lomix_fast.functional.map_stats", started)
    options = dict(options)
    plan = MixPlan.create(1, (), squared=options.pop("squared_pred", True))
    arguments = ([torch.randn(1, 3, 4, 4)], torch.zeros(1, 4, 4, dtype=torch.int64), torch.ones(1), plan)
    if isinstance(options.get("weight", options.get("ce_weight")), torch.Tensor) and "complex" not in name:
        # Values of tensors are not looked at in a call, which must not wait for a GPU.
        with pytest.raises(AssertionError, match="map_stats ran"):
            lomix_loss(*arguments, **options)
        return
    with pytest.raises(error) as caught:
        lomix_loss(*arguments, **options)
    assert str(caught.value).startswith(words[0])


CALLS: dict[str, tuple[dict[str, Any], Any, dict[str, Any], tuple[str, ...]]] = {
    "class numbers under sigmoid": (
        {"sigmoid": True},
        torch.zeros(2, 8, 8),
        {},
        ("target: got shape (2, 8, 8) with sigmoid=True and 3 classes", "(sigmoid=False)", "torch.stack"),
    ),
    "ignored label among regions": (
        {"sigmoid": True, "ignore_index": 255},
        torch.zeros(2, 3, 8, 8),
        {},
        ("ignore_index: got 255 with a target (2, 3, 8, 8)", "pass mask="),
    ),
    "ignored label among shares": (
        {"ignore_index": 255},
        torch.full((2, 3, 8, 8), 1 / 3),
        {},
        ("ignore_index: got 255 with a target (2, 3, 8, 8)", "pass mask="),
    ),
    "mask of another size": (
        {},
        torch.zeros(2, 8, 8),
        {"mask": torch.ones(2, 4, 4)},
        ("mask: got shape (2, 4, 4), expected (2, 8, 8)",),
    ),
    "weights of another size": (
        {},
        torch.zeros(2, 8, 8),
        {"weight_map": torch.ones(2, 3, 8, 8)},
        ("weight_map: got shape (2, 3, 8, 8), expected (2, 8, 8)",),
    ),
    "mask of regions that cross-entropy cannot see": (
        {"sigmoid": True, "weighted_ce": False},
        torch.zeros(2, 3, 8, 8),
        {"mask": torch.ones(2, 8, 8)},
        ("mask: got a mask with weighted_ce=False and a target (2, 3, 8, 8)", "pass weighted_ce=True"),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_contradictions_of_a_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, target, call, words = CALLS[name]
    logits = [torch.randn(2, 3, 4, 4), torch.randn(2, 3, 8, 8)]
    criterion = LoMixLoss(3, 2, impl="eager", **options)
    for given in (logits, logits[1]):
        with pytest.raises(ValueError, match=".*".join(map(re.escape, words))) as caught:
            criterion(given, target, **call)
        assert str(caught.value).startswith(words[0])


@pytest.mark.parametrize("bad", [[1.0], "all", torch.ones(2, 8, 8).cfloat()], ids=["list", "text", "complex"])
@pytest.mark.parametrize("name", ["mask", "weight_map"])
def test_masks_and_weights_are_tensors(name: str, bad: Any) -> None:
    with pytest.raises(TypeError, match=f"^{name}: got .*expected a"):
        LoMixLoss(3, 1, impl="eager")([torch.randn(2, 3, 8, 8)], torch.zeros(2, 8, 8), **{name: bad})


def test_mutation_takes_a_choice_of_subsets() -> None:
    """MERIT with sums of two scales only: fewer maps of the same kind."""
    names = LoMixLoss(3, 3, supervision="mutation", max_subset_size=2).map_names
    assert names == ("orig_0", "orig_1", "orig_2", "add_0_1", "add_0_2", "add_1_2")
    assert LoMixLoss(3, 3, supervision="mutation", subsets="pairs").map_names == names
    assert LoMixLoss(3, 3, supervision="mutation", subsets=[(0, 2)]).map_names == (*names[:3], "add_0_2")


# Presets: arguments, options, words.
PRESETS: dict[str, tuple[tuple[str, int], dict[str, Any], tuple[str, ...]]] = {
    "unknown": (("nnU-Net", 3), {}, ("name: got 'nnU-Net', expected one of", "'nnunet'")),
    "polyp of many": (("polyp", 3), {}, ("num_classes: got 3 with preset 'polyp', expected 1", "'monai'")),
    "polyp by softmax": (("polyp", 1), {"sigmoid": False}, ("sigmoid: got False with preset 'polyp', expected True",)),
    "polyp without jaccard": (("polyp", 1), {"jaccard": False}, ("jaccard: got False", "expected True", "LoMixLoss")),
    "polyp by hand": (("polyp", 1), {"weighted_ce": False}, ("weighted_ce: got False", "bce='weighted'")),
    "polyp, other bce": (("polyp", 1), {"bce": "none"}, ("bce: got 'none', expected one of", "as_released")),
    "bce of another": (("monai", 1), {"bce": "weighted"}, ("bce: got 'weighted' with preset 'monai'", "weighted_ce=")),
    "squared nnunet": (("nnunet", 3), {"squared_pred": True}, ("squared_pred: got True with preset 'nnunet'",)),
    **{
        f"{preset} with another {option}": (
            (preset, 1 if preset == "polyp" else 3),
            {option: value},
            (f"{option}: got {value!r} with preset '{preset}', expected", "which defines it"),
        )
        for preset, option, value in (
            ("polyp", "batch", True),
            ("polyp", "smooth_nr", 1.0),
            ("polyp", "smooth_dr", 1.0),
            ("polyp", "include_background", False),
            ("official", "batch", False),
            ("official", "include_background", False),
            ("official", "sigmoid", True),
        )
    },
    "probabilities": (
        ("monai", 3),
        {"softmax": False},
        ("softmax: got False with sigmoid=False, expected True or nothing", "pass one of the two"),
    ),
    "two activations": (("monai", 3), {"softmax": True, "sigmoid": True}, ("softmax: got True with sigmoid=True",)),
    "class numbers of regions": (
        ("monai", 3),
        {"to_onehot_y": True, "sigmoid": True},
        ("to_onehot_y: got True with sigmoid=True, expected nothing", "[B, C, *full]"),
    ),
    "sum": (("monai", 3), {"reduction": "sum"}, ("reduction: got 'sum', expected 'mean' or nothing", "map_losses()")),
    "none": (("monai", 3), {"reduction": "none"}, ("reduction: got 'none'",)),
    "weights without background": (
        ("monai", 3),
        {"include_background": False, "weight": [1.0, 2.0]},
        ("weight: got 2 numbers with preset 'monai', expected 3, one a class", "ce_weight=None"),
    ),
    "linear official": (("official", 3), {"squared_pred": False}, ("squared_pred: got False with preset 'official'",)),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    arguments, options, words = PRESETS[name]
    with pytest.raises(ValueError, match=".*".join(map(re.escape, words))) as caught:
        LoMixLoss.preset(*arguments, 2, **options)
    assert str(caught.value).startswith(words[0])


def test_presets_take_the_other_options() -> None:
    criterion = LoMixLoss.preset(
        "nnunet", 3, 2, batch=False, order="fine_to_coarse", ignore_index=3, squared_pred=False
    )
    assert criterion.recipe["batch"] is False and criterion.order == "fine_to_coarse"
    assert criterion.recipe["include_background"] is False
    assert LoMixLoss.preset("nnunet", 3, 2, sigmoid=True).recipe["include_background"] is True
    with pytest.raises(TypeError, match="colour"):
        LoMixLoss.preset("monai", 3, 2, colour="red")
