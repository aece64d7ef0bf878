"""Arguments swapped, misspelt or of another kind, in what stands around the loss: converters, the drop-in, joins."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lomix_fast import LoMixLoss, transfer, with_loss
from lomix_fast.checkpoint import CheckpointError
from lomix_fast.convert import lomix_to_module, lomix_to_official, module_to_lomix, official_to_lomix
from lomix_fast.official import CombinatorialMutationsLossModule


class DiceLoss(nn.Module):
    """Stands for the authors'."""

    n_classes = 3


def draw() -> tuple[list[Tensor], Tensor]:
    return [torch.randn(2, 3, n, n) for n in (4, 8)], torch.randint(3, (2, 8, 8))


def drop_in(**options: Any) -> CombinatorialMutationsLossModule:
    return CombinatorialMutationsLossModule(2, 3, 2, ["add", "concat"], supervision="lomix", **options)


# Converters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["normalized", "uncertainty"])
def test_a_weighting_that_the_authors_do_not_have_is_not_converted(weighting: str) -> None:
    state = LoMixLoss(3, 2, operators=("add",), weighting=weighting).state_dict()
    with pytest.raises(CheckpointError, match=f"weighting='{weighting}', expected 'softplus' or 'fixed'"):
        lomix_to_official(state, num_classes=3, num_scales=2, operators=("add",))


def test_dropped_maps_are_not_converted() -> None:
    criterion = LoMixLoss(3, 2, operators=("add",), prune_below=0.5)
    arguments: dict[str, Any] = {"num_classes": 3, "num_scales": 2, "operators": ("add",)}
    assert "original_weights.0" in lomix_to_official(criterion.state_dict(), **arguments)
    with torch.no_grad():
        criterion.alpha[0] = -9.0
    criterion.update_pruning()
    with pytest.raises(CheckpointError, match="that has dropped maps, expected one with all of them"):
        lomix_to_official(criterion.state_dict(), **arguments)


def test_conversion_keeps_the_mode_and_leaves_the_global_generator_alone() -> None:
    criterion = LoMixLoss(3, 2, concat="resampled").requires_grad_(False).eval()
    before = torch.get_rng_state()
    module = lomix_to_module(criterion)
    again = module_to_lomix(module)
    assert torch.equal(torch.get_rng_state(), before)
    for one in (module, again):
        assert not one.training and not any(p.requires_grad for p in one.parameters())
    for one in (lomix_to_module(LoMixLoss(3, 2, concat="resampled")), module_to_lomix(drop_in())):
        assert one.training and all(p.requires_grad for p in one.parameters())


@pytest.mark.parametrize("frozen", ["alpha", "awf_weight", "awf_bias"])
def test_conversion_keeps_which_parameters_are_frozen(frozen: str) -> None:
    criterion = LoMixLoss(3, 3, operators=("add", "awf"))
    criterion.get_parameter(frozen).requires_grad_(False)
    module = lomix_to_module(criterion)
    where = {"alpha": ("original_weights.2", "synthesized_weights.wf.3")}
    where |= {f"awf_{of}": (f"weighted_fusion_modules.3.weight_convs.2.{of}",) for of in ("weight", "bias")}
    for name, theirs in where.items():
        assert all(module.get_parameter(one).requires_grad == (name != frozen) for one in theirs)
    assert {name: p.requires_grad for name, p in module_to_lomix(module).named_parameters()} == {
        name: p.requires_grad for name, p in criterion.named_parameters()
    }


def test_a_module_with_a_part_of_one_parameter_frozen_is_not_converted() -> None:
    module = drop_in()
    module.weighted_fusion_modules["2"].weight_convs[0].requires_grad_(False)  # no map uses it
    assert module_to_lomix(module).alpha.requires_grad
    module.original_weights.requires_grad_(False)
    words = "module: got 2 of 4 parameters frozen (original_weights.0, original_weights.1, ...) that are one parameter"
    with pytest.raises(ValueError, match=re.escape(words + " alpha of LoMixLoss, expected all or none")):
        module_to_lomix(module)


@pytest.mark.parametrize("convert", [lomix_to_official, official_to_lomix])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_classes": 3.0}, "num_classes: got 3.0, expected an int of at least 2"),
        ({"num_classes": "3"}, "num_classes: got '3', expected an int of at least 2"),
        ({"operators": "add"}, "operators: got 'add', expected a tuple or list"),
    ],
    ids=str,
)
def test_arguments_of_another_kind(convert: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=re.escape(words)):
        convert({}, **{"num_classes": 3, "num_scales": 2, **arguments})


@pytest.mark.parametrize("convert", [lomix_to_official, official_to_lomix])
def test_too_few_classes(convert: Any) -> None:
    state = LoMixLoss(1, 2, operators=("add",), sigmoid=True).state_dict()
    for number in (1, 0, -3):
        with pytest.raises(ValueError, match=f"num_classes: got {number}, expected an int of at least 2"):
            convert(state, num_classes=number, num_scales=2, operators=("add",))


@pytest.mark.parametrize(("weighting", "word"), [("softplus", "no"), ("fixed", "an")])
def test_weights_that_contradict_the_description_are_not_converted(weighting: str, word: str) -> None:
    learned, fixed = (LoMixLoss(3, 2, operators=("add",), weighting=w).state_dict() for w in ("softplus", "fixed"))
    described, other = (learned, fixed) if weighting == "softplus" else (fixed, learned)
    state = {**other, "_extra_state": described["_extra_state"]}
    with pytest.raises(CheckpointError, match=f"got {word} alpha in the .* weighting='{weighting}', so it is damaged"):
        lomix_to_official(state, num_classes=3, num_scales=2, operators=("add",))


def test_transfer_of_what_is_no_criterion() -> None:
    criterion = LoMixLoss(3, 2)
    for other in (criterion.state_dict(), with_loss(nn.Identity(), criterion)):
        with pytest.raises(
            TypeError, match=r"criterion: got .* expected a LoMixLoss; pass the state dict first .* module\.criterion"
        ):
            transfer(criterion.state_dict(), other)


# The drop-in ----------------------------------------------------------------------------------------------------------


def test_options_of_the_drop_in_are_fixed() -> None:
    module = drop_in()
    for name, value in (("operations", ["mul"]), ("lc1", 1.0), ("num_maps", 3), ("supervision", "mutation")):
        with pytest.raises(
            AttributeError, match=f"{name}: got .* make a new one with CombinatorialMutationsLossModule"
        ):
            setattr(module, name, value)
    module.impl = "reference"


def test_copies_of_the_drop_in_work_and_are_fixed_too() -> None:
    module = drop_in()
    maps, labels = draw()
    originals = module.eval()(maps, labels, nn.CrossEntropyLoss(), DiceLoss())[1]
    copies = (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), drop_in()._replicate_for_data_parallel())
    for one in copies:
        with pytest.raises(AttributeError, match=r"operations: got .* make a new one"):
            one.operations = ["mul"]
        assert one.train().training
        assert torch.equal(one(maps, labels, nn.CrossEntropyLoss(), DiceLoss())[1], originals)
    module.original_weights = nn.ParameterList([nn.Parameter(torch.ones(1)) for _ in range(2)])
    heavier = nn.functional.softplus(torch.ones(1)) / nn.functional.softplus(torch.zeros(1))
    assert torch.allclose(module(maps, labels, nn.CrossEntropyLoss(), DiceLoss())[1], heavier * originals)


@pytest.mark.parametrize("value", ["False", None, 2, 1.0, torch.tensor(1), torch.ones(2), []], ids=str)
def test_flags_of_the_drop_in_that_are_none(value: Any) -> None:
    with pytest.raises(TypeError, match=re.escape(f"use_learnable_weights: got {value!r}, expected True or False")):
        drop_in(use_learnable_weights=value)


def test_flags_of_the_drop_in() -> None:
    for value in (False, True, 0, 1):
        assert drop_in(use_learnable_weights=value).use_learnable_weights is bool(value)


def test_errors_of_the_drop_in_speak_of_its_arguments() -> None:
    words = (
        r"selecetd_num_maps: got 8 with operations \('add', .* pass fewer operations, or a smaller selecetd_num_maps"
    )
    with pytest.raises(ValueError, match=words) as caught:
        CombinatorialMutationsLossModule(8, 3, 8)
    assert "'concat', 'weighted_fusion', 'avg'" in str(caught.value)
    maps, labels = draw()
    labels[0, 0, 0] = -100
    words = (
        r"label_batch: got the label -100 .*; remap the labels or raise num_classes; the ignore_index of ce_loss is not"
    )
    with pytest.raises(ValueError, match=words + r" .* lomix_fast\.LoMixLoss\(ignore_index=\.\.\.\) leaves") as caught:
        drop_in()(maps, labels, nn.CrossEntropyLoss(), DiceLoss())
    assert "pass ignore_index" not in str(caught.value)


# What is joined, grouped and loaded -----------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [LoMixLoss(3, 2), drop_in()], ids=["ours", "drop-in"])
def test_network_and_loss_swapped(loss: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"network: got .* which is a loss, .* are the two swapped"):
        with_loss(loss, nn.Identity())


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("lr", "1e-3", "None, a number or a tensor"),
        ("lr", True, "None, a number or a tensor"),
        ("weight_decay", "0", "a number"),
        ("weight_decay", None, "a number"),
        ("weight_decay", torch.tensor(0.5), "a number"),
    ],
    ids=str,
)
def test_groups_with_what_is_no_number(name: str, value: Any, expected: str) -> None:
    with pytest.raises(TypeError, match=re.escape(f"{name}: got {value!r}, expected {expected}") + "$"):
        LoMixLoss(3, 2).param_groups(**{name: value})


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod."])
def test_the_prefix_of_a_wrapper_is_named(wrapper: str) -> None:
    for one in (LoMixLoss(3, 2), drop_in(), with_loss(nn.Linear(2, 2), LoMixLoss(3, 2))):
        state = {wrapper + key: value for key, value in one.state_dict().items()}
        with pytest.raises(
            CheckpointError, match=re.escape(f"consume_prefix_in_state_dict_if_present(state_dict, '{wrapper}')")
        ):
            one.load_state_dict(state)
        nn.modules.utils.consume_prefix_in_state_dict_if_present(state, wrapper)
        one.load_state_dict(state)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod."])
def test_the_prefix_of_a_wrapper_is_named_by_transfer_and_converters(wrapper: str) -> None:
    ours, theirs = (
        {wrapper + key: value for key, value in one.state_dict().items()}
        for one in (LoMixLoss(3, 2, operators=("add",)), drop_in())
    )
    sizes = {"num_classes": 3, "num_scales": 2}
    for take in (
        lambda: transfer(ours, LoMixLoss(3, 2)),
        lambda: lomix_to_official(ours, operators=("add",), **sizes),
        lambda: official_to_lomix(theirs, operators=("add", "cat"), **sizes),
    ):
        with pytest.raises(CheckpointError, match=re.escape(f"keys that all begin with '{wrapper}'")):
            take()
    assert "alpha" in transfer(ours, LoMixLoss(3, 2), prefix=wrapper)


def test_preset_with_classes_that_are_no_number() -> None:
    with pytest.raises(TypeError, match="num_classes: got '3', expected an int"):
        LoMixLoss.preset("monai", "3", 3, weight=[1, 2, 3])


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_drop_in_is_refused_where_it_would_draw_anew(reentrant: bool) -> None:
    maps, labels = draw()
    leaf = [z.requires_grad_() for z in maps]
    module = drop_in()

    def total(*z: Tensor) -> Tensor:
        return module(list(z), labels, nn.CrossEntropyLoss(), DiceLoss())[0]

    loss = torch.utils.checkpoint.checkpoint(total, *leaf, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="a backward pass computes the loss again"):
        loss.backward()
