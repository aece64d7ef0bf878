"""Checkpoints of the authors' module become those of LoMixLoss and return; nothing is lost silently."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from lomix_fast import LoMixLoss
from lomix_fast.convert import lomix_to_module, lomix_to_official, module_to_lomix, official_to_lomix
from lomix_fast.official import CombinatorialMutationsLossModule

CLASSES = 3


class DiceLoss(nn.Module):
    """Stands for the authors' class."""

    n_classes = CLASSES


def randomise(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def make_official(scales: int, operations: list[str], **options) -> CombinatorialMutationsLossModule:
    return randomise(CombinatorialMutationsLossModule(scales, CLASSES, scales, operations, **options))


def batch(scales: int) -> tuple[list[Tensor], Tensor]:
    maps = [torch.randn(2, CLASSES, 3 + i, 4 + i, dtype=torch.float64) for i in range(scales)]
    return maps, torch.randint(0, CLASSES, (2, 8, 9))


def official_loss(module, maps, target, **options) -> Tensor:
    return module(maps, target, nn.CrossEntropyLoss(), DiceLoss(), **options)[0].squeeze(0)


def same_state(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("options", [{}, {"use_learnable_weights": False}, {"lc1": 1.0, "lc2": 0.5}], ids=str)
@pytest.mark.parametrize(
    "operations",
    [["add", "mul", "wf", "concat"], ["weighted_fusion", "add"], ["concat"], ["mul", "add"], []],
    ids="-".join,
)
@pytest.mark.parametrize("scales", [2, 3, 4])
def test_a_module_becomes_a_criterion_with_the_same_loss_and_comes_back(scales, operations, options):
    torch.manual_seed(0)
    module = make_official(scales, operations, **options).double()
    criterion = module_to_lomix(module)
    maps, target = batch(scales)
    assert criterion.concat == "resampled" and next(module.parameters()).dtype == torch.float64
    back = lomix_to_module(criterion, fusion_name="weighted_fusion" if "weighted_fusion" in operations else "wf")
    want = official_loss(module, maps, target)
    assert torch.allclose(criterion(maps, target), want, rtol=1e-12, atol=0)
    assert torch.equal(official_loss(back, maps, target), want)
    fused = {"wf", "weighted_fusion"} & set(operations)
    kept = {k: v for k, v in module.state_dict().items() if fused or not k.startswith("weighted_fusion_modules")}
    got = {k: v for k, v in back.state_dict().items() if k in kept}
    assert same_state(got, kept)
    assert list(back.state_dict()) == list(module.state_dict())


def undescribed(criterion):
    """Its state dict in format 1, the parameters alone."""
    return {name: value for name, value in criterion.state_dict().items() if name != "_extra_state"}


@pytest.mark.parametrize(
    "options,words",
    [
        ({"operators": ("add", "mul")}, "operators=['add', 'mul'], expected ['mul', 'add']"),
        ({"operators": ("mul", "add"), "subsets": "pairs"}, "subsets=[[0, 1], [0, 2], [1, 2]], expected [[0, 1],"),
    ],
)
def test_a_described_checkpoint_of_other_maps_is_refused(options, words):
    """The first has the same shapes, and its weights would land on other maps."""
    state = LoMixLoss(CLASSES, 3, **options).state_dict()
    with pytest.raises(ValueError, match=re.escape(words)):
        lomix_to_official(state, num_classes=CLASSES, num_scales=3, operators=("mul", "add"))


def test_learned_convolutions_are_not_lost_silently():
    torch.manual_seed(1)
    criterion = randomise(LoMixLoss(CLASSES, 3)).double()
    arguments = {"num_classes": CLASSES, "num_scales": 3}
    with pytest.raises(ValueError, match=r"learned 'cat' convolutions.*drop_cat=True"):
        lomix_to_official(criterion.state_dict(), **arguments)
    with pytest.raises(ValueError, match="drop_cat=True"):
        lomix_to_module(criterion)
    module = lomix_to_module(criterion, drop_cat=True)
    assert same_state(lomix_to_official(criterion.state_dict(), drop_cat=True, **arguments), module.state_dict())
    maps, target = batch(3)
    given = {"cat_weight": criterion.cat_weight, "cat_bias": criterion.cat_bias}
    assert torch.allclose(official_loss(module, maps, target, **given), criterion(maps, target), rtol=1e-12, atol=0)
    again = official_to_lomix(module.state_dict(), **arguments, **given)
    assert same_state(again, undescribed(criterion))
    LoMixLoss(CLASSES, 3).double().load_state_dict(again)
    without = official_to_lomix(module.state_dict(), **arguments)
    assert set(again) - set(without) == {"cat_weight", "cat_bias"}


def test_maps_keep_their_weights_whatever_the_order_of_operations():
    module = make_official(3, ["concat", "wf", "mul", "add"])
    state = official_to_lomix(module.state_dict(), num_classes=CLASSES, num_scales=3)
    alpha = dict(zip(LoMixLoss(CLASSES, 3).map_names, state["alpha"], strict=True))
    assert alpha["orig_2"] == module.original_weights[2].item()
    assert alpha["add_0_1"] == module.synthesized_weights["add"][0].item()
    assert alpha["mul_1_2"] == module.synthesized_weights["mul"][2].item()
    assert alpha["cat_0_2"] == module.synthesized_weights["concat"][1].item()
    assert alpha["awf_0_1_2"] == module.synthesized_weights["wf"][3].item()
    conv = module.weighted_fusion_modules["3"].weight_convs[1]
    assert torch.equal(state["awf_weight"][3], conv.weight.flatten()) and state["awf_bias"][3] == conv.bias


def test_results_are_copies():
    module = make_official(2, ["wf", "add"])
    arguments = {"num_classes": CLASSES, "num_scales": 2, "operators": ("awf", "add")}
    state = official_to_lomix(module.state_dict(), **arguments)
    back = lomix_to_official(state, **arguments)
    for value in back.values():
        value.fill_(55.0)
    assert all((value != 55).all() for value in state.values())
    for value in state.values():
        value.fill_(77.0)
    assert all((p != 77).all() for p in module.parameters())


@pytest.mark.parametrize("sharing", ["subset", "scale"])
def test_other_sharing_of_attention_has_no_official_form(sharing):
    criterion = LoMixLoss(CLASSES, 3, operators=("awf",), awf_sharing=sharing)
    arguments = {"num_classes": CLASSES, "num_scales": 3, "operators": ("awf",)}
    with pytest.raises(ValueError, match=f"awf_sharing='{sharing}', expected 'size'"):
        lomix_to_module(criterion)
    with pytest.raises(ValueError, match=r"^awf_weight: got . rows, expected 5; .*awf_sharing='size'"):
        lomix_to_official(undescribed(criterion), **arguments)
    assert lomix_to_module(LoMixLoss(CLASSES, 2, operators=("awf",), awf_sharing=sharing)) is not None


def test_the_extra_operators_there_and_back():
    # Both list the maps in another order, and softplus in float32 is one bit another in a vector than at its end.
    criterion = LoMixLoss(CLASSES, 3, operators=("sub", "awf", "max", "avg")).double()
    with torch.no_grad():
        criterion.alpha.normal_()
    module = lomix_to_module(criterion)
    maps, target = batch(3)
    assert torch.allclose(official_loss(module, maps, target), criterion(maps, target), rtol=1e-12, atol=0)
    back = module_to_lomix(module)
    assert back.plan is criterion.plan and torch.equal(back.alpha, criterion.alpha)


@pytest.mark.parametrize("mode", ["mutation", "deep_supervision"])
def test_fixed_modes(mode):
    criterion = LoMixLoss(CLASSES, 3, supervision=mode, order="fine_to_coarse")
    module = lomix_to_module(criterion)
    maps, target = batch(3)
    assert torch.allclose(official_loss(module, maps, target), criterion(maps[::-1], target), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "options,words",
    [
        ({"supervision": "last_layer"}, "originals=(2,)"),
        ({"squared_pred": False}, "squared_pred=False"),
        ({"process_group": "world"}, "process_group='world'"),
        ({"sigmoid": True}, "sigmoid=True"),
        ({"ignore_index": 255}, "ignore_index=255"),
        ({"ce_weight": [1.0, 2.0, 3.0]}, "ce_weight=tensor([1., 2., 3.], dtype=torch.float64)"),
        ({"weight": 2.0}, "weight=tensor(2., dtype=torch.float64)"),
        ({"label_smoothing": 0.1}, "label_smoothing=0.1"),
        ({"absent_classes": "exclude"}, "absent_classes='exclude'"),
        ({"mul": "bounded"}, "mul=True"),
        ({"max_subset_size": 2}, "subsets=((0, 1), (0, 2), (1, 2))"),
        ({"weighting": "normalized"}, "weighting='normalized'"),
        ({"weighting": "uncertainty"}, "weighting='uncertainty'"),
        ({"smooth_nr": 0.0}, "smooth_nr=0.0"),
        ({"smooth_dr": 1.0}, "smooth_dr=1.0"),
        ({"include_background": False}, "include_background=False"),
        ({"batch": False}, "batch=False"),
    ],
)
def test_criteria_the_module_cannot_be(options, words):
    with pytest.raises(ValueError, match="^" + re.escape(f"criterion: got {words}, expected")):
        lomix_to_module(LoMixLoss(CLASSES, 3, **options))


def test_modules_a_criterion_cannot_be():
    with pytest.raises(ValueError, match="module: got original_num_maps=4 with selecetd_num_maps=3"):
        module_to_lomix(CombinatorialMutationsLossModule(4, CLASSES, 3, ["add"]))
    with pytest.raises(ValueError, match="module: got supervision='deep_supervision' with operations"):
        module_to_lomix(make_official(3, ["add"], supervision="deep_supervision"))
    with pytest.raises(TypeError, match="module: got LoMixLoss"):
        module_to_lomix(LoMixLoss(CLASSES, 3))
    with pytest.raises(TypeError, match="criterion: got Linear"):
        lomix_to_module(nn.Linear(1, 1))


def damaged(change) -> dict[str, Tensor]:
    state = dict(make_official(3, ["add", "wf"]).state_dict())
    change(state)
    return state


@pytest.mark.parametrize(
    "change,arguments,words",
    [
        (lambda s: s.pop("original_weights.1"), {}, ["num_scales: got 3", "2 original weights"]),
        (
            lambda s: s.pop("synthesized_weights.add.3"),
            {},
            ["state_dict: got no 'synthesized_weights.add.3'"],
        ),
        (lambda s: s.pop("weighted_fusion_modules.3.weight_convs.2.bias"), {}, ["3.weight_convs.2.bias"]),
        (lambda s: s.update({"module.x": torch.zeros(1)}), {}, ["unknown keys ['module.x']", "prefixes"]),
        (lambda s: s.update({"synthesized_weights.add.4": torch.zeros(1)}), {}, ["unknown keys"]),
        (
            lambda s: s.update({"synthesized_weights.min.0": torch.zeros(1)}),
            {},
            ["'min'", "expected operators out of"],
        ),
        (
            lambda s: s.update({"synthesized_weights.weighted_fusion.0": torch.zeros(1)}),
            {},
            ["both 'wf' and"],
        ),
        (
            lambda s: s.update({"original_weights.0": torch.zeros(2)}),
            {},
            ["got original_weights.0 [2] (expected [1])"],
        ),
        (lambda s: None, {"operators": ("add",)}, ["operators: got ('add',)", "('add', 'awf')"]),
        (lambda s: None, {"operators": ("add", "awf", "mul")}, ["operators: got ('add', 'awf', 'mul')"]),
        (lambda s: None, {"num_scales": 4}, ["num_scales: got 4", "3 original weights"]),
        (
            lambda s: None,
            {"num_classes": 5},
            ["weight_convs.0.weight [1, 3, 1, 1] (expected [1, 5, 1, 1])", "num_classes"],
        ),
        (
            lambda s: None,
            {"cat_weight": torch.zeros(9, 3, 3)},
            ["cat_weight and cat_bias", "both or neither"],
        ),
        (
            lambda s: None,
            {"cat_weight": torch.zeros(9, 3, 3), "cat_bias": torch.zeros(4, 3)},
            ["cat_weight: got a tensor", "lacks 'cat'"],
        ),
    ],
)
def test_damaged_official_checkpoints(change, arguments, words):
    given = {"num_classes": CLASSES, "num_scales": 3, "operators": ("add", "awf"), **arguments}
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        official_to_lomix(damaged(change), **given)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    "change,arguments,words",
    [
        (lambda s: s.pop("awf_bias"), {}, ["state_dict: got no 'awf_bias'"]),
        (lambda s: s.update({"alpha": torch.zeros(3)}), {}, ["got alpha [3] (expected [11])"]),
        (lambda s: s.update({"module.alpha": torch.zeros(3)}), {}, ["unknown keys ['module.alpha']"]),
        (
            lambda s: s.update({"alpha": torch.zeros(7)}),
            {"operators": ("add",)},
            ["unknown keys", "awf_bias"],
        ),
        (lambda s: None, {"fusion_name": "awf"}, ["fusion_name: got 'awf'", "weighted_fusion"]),
    ],
)
def test_damaged_criterion_checkpoints(change, arguments, words):
    state = undescribed(LoMixLoss(CLASSES, 3, operators=("add", "awf")))
    change(state)
    given = {"num_classes": CLASSES, "num_scales": 3, "operators": ("add", "awf"), **arguments}
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        lomix_to_official(state, **given)
    assert all(word in str(caught.value) for word in words)
