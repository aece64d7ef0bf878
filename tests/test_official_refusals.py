"""What the drop-in cannot honour it refuses, naming the argument, what was given and what was expected."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from lomix_fast.official import CombinatorialMutationsLossModule


class DiceLoss(nn.Module):
    """Stands for the authors' class."""

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.n_classes = n_classes


class SubclassedCE(nn.CrossEntropyLoss):
    """Could compute anything."""


class OtherDice(nn.Module):
    """Not the authors', although it counts classes."""

    n_classes = 3


OtherDiceOfThatName = type("DiceLoss", (nn.Module,), {})


def maps(count: int = 2, channels: int = 3, size: int = 4) -> list[torch.Tensor]:
    return [torch.randn(2, channels, size, size) for _ in range(count)]


TARGET = torch.zeros(2, 4, 4, dtype=torch.long)
CE, DICE = nn.CrossEntropyLoss(), DiceLoss(3)


@pytest.mark.parametrize(
    "ce_loss,error,words",
    [
        (nn.NLLLoss(), TypeError, ["NLLLoss", "CrossEntropyLoss"]),
        (nn.BCEWithLogitsLoss(), TypeError, ["BCEWithLogitsLoss"]),
        (torch.nn.functional.cross_entropy, TypeError, ["function", "CrossEntropyLoss"]),
        (SubclassedCE(), TypeError, ["SubclassedCE"]),
        (nn.CrossEntropyLoss(weight=torch.ones(3)), ValueError, ["weight=[1.0, 1.0, 1.0]", "None"]),
        (nn.CrossEntropyLoss(ignore_index=255), ValueError, ["ignore_index=255", "-100"]),
        (nn.CrossEntropyLoss(label_smoothing=0.1), ValueError, ["label_smoothing=0.1", "0.0"]),
        (nn.CrossEntropyLoss(reduction="sum"), ValueError, ["reduction='sum'", "'mean'"]),
    ],
)
def test_other_cross_entropies(ce_loss, error, words):
    module = CombinatorialMutationsLossModule(2, 3, 2, ["add"])
    with pytest.raises(error, match=r"^ce_loss: got") as caught:
        module(maps(), TARGET, ce_loss, DICE)
    assert all(word in str(caught.value) for word in [*words, "pass nn.CrossEntropyLoss()"])


@pytest.mark.parametrize(
    "dice_loss,error,words",
    [
        (OtherDice(), TypeError, ["OtherDice"]),
        (OtherDiceOfThatName(), TypeError, ["n_classes"]),
        (DiceLoss(9), ValueError, ["n_classes=9", "num_classes=3"]),
    ],
)
def test_other_dice_losses(dice_loss, error, words):
    module = CombinatorialMutationsLossModule(2, 3, 2, ["add"])
    with pytest.raises(error, match=r"^dice_loss: got") as caught:
        module(maps(), TARGET, CE, dice_loss)
    assert all(word in str(caught.value) for word in [*words, "pass the authors' DiceLoss(3)"])


def test_one_value_a_class_is_refused():
    module = CombinatorialMutationsLossModule(2, 3, 2, ["add"])
    one_hot = torch.nn.functional.one_hot(TARGET, 3).movedim(-1, 1)
    with pytest.raises(ValueError, match=r"^label_batch: got shape .*argmax\(1\)"):
        module(maps(), one_hot, CE, DiceLoss(3))


@pytest.mark.parametrize(
    "arguments,error,words",
    [
        ({"operations": ["cat"]}, ValueError, ["operations", "unknown name 'cat'", "'concat'"]),
        ({"operations": "add"}, TypeError, ["operations", "'add'", "list"]),
        ({"operations": ["add", "add"]}, ValueError, ["operations", "['add', 'add']", "once"]),
        ({"operations": ["wf", "weighted_fusion"]}, ValueError, ["operations", "once", "'wf' is short for"]),
        ({"selecetd_num_maps": 1}, ValueError, ["selecetd_num_maps", "got 1", "2 to 8"]),
        ({"selecetd_num_maps": 9}, ValueError, ["selecetd_num_maps", "got 9", "2 to 8", "502 mixed maps"]),
        ({"selecetd_num_maps": 2.0}, TypeError, ["selecetd_num_maps", "2.0", "int"]),
        ({"original_num_maps": 1}, ValueError, ["original_num_maps", "got 1", "2 (selecetd_num_maps)"]),
        ({"original_num_maps": 9}, ValueError, ["original_num_maps", "got 9", "to 8"]),
        ({"num_classes": 1}, ValueError, ["num_classes", "got 1", "at least 2"]),
        ({"num_classes": True}, TypeError, ["num_classes", "True", "int"]),
        ({"supervision": "last_layer"}, ValueError, ["supervision", "'last_layer'", "deep_supervision"]),
        ({"lc1": "0.3"}, TypeError, ["lc1", "'0.3'", "number"]),
        ({"lc2": float("nan")}, ValueError, ["lc2", "nan", "finite"]),
        ({"impl": "gpu"}, ValueError, ["impl", "'gpu'", "auto"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_constructor(arguments, error, words):
    given = {
        "original_num_maps": 2,
        "num_classes": 3,
        "selecetd_num_maps": 2,
        "operations": ["add"],
        **arguments,
    }
    with pytest.raises(error) as caught:
        CombinatorialMutationsLossModule(**given)
    assert str(caught.value).startswith(f"{words[0]}: got")
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    "given,error,words",
    [
        ({"output_maps": maps(3)}, ValueError, ["output_maps", "got 3 maps", "original_num_maps=2"]),
        ({"output_maps": []}, ValueError, ["output_maps", "empty"]),
        ({"output_maps": maps()[0]}, TypeError, ["output_maps", "Tensor", "list or tuple"]),
        ({"output_maps": [maps()[0], None]}, TypeError, ["output_maps[1]", "NoneType"]),
        ({"output_maps": maps(channels=4)}, ValueError, ["output_maps", "num_classes=3"]),
        ({"output_maps": [maps()[0], maps()[0][:1]]}, ValueError, ["output_maps[1]", "batch size 1"]),
        (
            {"output_maps": [*maps(1, size=4), *maps(1, size=2)]},
            ValueError,
            ["output_maps", "coarsest", "reverse"],
        ),
        ({"label_batch": TARGET[:1]}, ValueError, ["label_batch", "batch size 1", "expected 2"]),
        ({"label_batch": TARGET[0]}, ValueError, ["label_batch", "(4, 4)"]),
        ({"label_batch": TARGET + 3}, ValueError, ["label_batch", "label 3", "[0, 3)"]),
        ({"label_batch": TARGET - 100}, ValueError, ["label_batch", "label -100", "[0, 3)"]),
        ({"label_batch": TARGET + 0.5}, ValueError, ["label_batch", "0.5", "whole"]),
        ({"label_batch": None}, TypeError, ["label_batch", "None", "all three"]),
        ({"ce_loss": None}, TypeError, ["ce_loss", "None", "all three"]),
        ({"dice_loss": None}, TypeError, ["dice_loss", "None", "all three"]),
        ({"cat_weight": torch.zeros(2, 3, 3)}, ValueError, ["cat_weight", "both or neither"]),
        (
            {"cat_weight": torch.zeros(3, 3, 3), "cat_bias": torch.zeros(1, 3)},
            ValueError,
            ["cat_weight", "(3, 3, 3)", "(2, 3, 3)"],
        ),
    ],
)
def test_call(given, error, words):
    module = CombinatorialMutationsLossModule(2, 3, 2, ["concat"])
    usual = {"output_maps": maps(), "label_batch": TARGET, "ce_loss": CE, "dice_loss": DICE}
    with pytest.raises(error) as caught:
        module(**{**usual, **given})
    message = str(caught.value)
    assert message.startswith(words[0]) and all(word in message for word in words)
    assert not re.search(r"\b(logits|target)\b", message)


def test_convolutions_for_an_operation_that_is_not_made():
    module = CombinatorialMutationsLossModule(2, 3, 2, ["add"])
    with pytest.raises(ValueError, match=r"^cat_weight: got a tensor.*operations=\['add'\]"):
        module(maps(), TARGET, CE, DICE, cat_weight=torch.zeros(2, 3, 3), cat_bias=torch.zeros(1, 3))


def test_another_device():
    module = CombinatorialMutationsLossModule(2, 3, 2, ["add"]).to("meta")
    with pytest.raises(ValueError, match=r"got parameters on the meta device.*load_state_dict"):
        module(maps(), TARGET, CE, DICE)
