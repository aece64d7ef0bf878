"""Checkpoints of the authors' loss module turned into checkpoints of `LoMixLoss`, and back.

Their state dict holds one raw weight per tensor (`original_weights.{i}`,
`synthesized_weights.{operator}.{subset}`) and one small convolution per subset size and position
(`weighted_fusion_modules.{size}.weight_convs.{position}`). Ours holds the same numbers as `alpha` [M],
`awf_weight` [n, C] and `awf_bias` [n], n = L(L+1)/2 - 1. What exists on one side only:

- learned "cat" convolutions are ours alone: the authors draw theirs anew at every call and never store them;
- fusion convolutions of a module that makes no fused map are theirs alone: nothing reads or trains them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.random import fork_rng

from .checkpoint import KEY, CheckpointError, check_keys, describe, fault_of, maps_of, refuse_wrapped
from .loss import LoMixLoss
from .names import did_you_mean
from .official import WITH_MIXES, CombinatorialMutationsLossModule
from .official_names import FUSION_NAMES, OUR_NAME, fusion_key, fusion_positions, their_names
from .plan import KNOWN_OPERATORS, OPERATORS, MixPlan


def official_to_lomix(
    state_dict: Mapping[str, Tensor],
    *,
    num_classes: int,
    num_scales: int,
    operators: Sequence[str] = OPERATORS,
    cat_weight: Tensor | None = None,
    cat_bias: Tensor | None = None,
) -> dict[str, Tensor]:
    """State dict of the authors' loss module -> state dict of `LoMixLoss(..., awf_sharing="size")`.

    The result fits `LoMixLoss(num_classes, num_scales, operators=operators, concat="resampled")`. For
    concat="learned" pass `cat_weight` and `cat_bias`, for example those a new criterion starts with: the
    authors' checkpoint has none. A checkpoint without learned map weights fits weighting="fixed".

    Args:
        state_dict: theirs; tensors of any floating-point dtype and device, which the result keeps.
        num_classes: C.
        num_scales: L, with as many original weights as scales mixed.
        operators: our names ("add", "mul", "cat", "awf", "sub", "avg", "max") in the order of the criterion to be
            loaded. The order in which the authors' module listed its operations does not matter: its weights are stored
            by name.
        cat_weight: W [K, C, C] to include, with `cat_bias`; None leaves both keys out.
        cat_bias: b [S, C].

    Returns:
        "alpha" [M] if theirs were learned, "cat_weight" and "cat_bias" if given, "awf_weight" [n, C] and
        "awf_bias" [n] if `operators` has "awf"; all copies.

    Raises:
        CheckpointError: a key that is missing, unknown, of the wrong type or shape; operators in the
            checkpoint and in the argument that differ. Nothing is dropped silently, except the fusion
            convolutions of a module whose `operators` lack "awf", which no map ever used.
        TypeError, ValueError: another argument out of range.

    Source: keys as the authors' released module makes them (SPEC of LoMix).
    """
    plan = _plan(num_classes, num_scales, operators)
    rest = _entries(state_dict)
    out: dict[str, Tensor] = {}
    stored = _stored_operators(rest)
    learned = bool(stored) or any(key.startswith("original_weights.") for key in rest)
    if learned:
        out["alpha"] = torch.cat(_take_alpha(rest, plan, stored))
    if (cat_weight is None) != (cat_bias is None):
        raise ValueError("cat_weight and cat_bias: got only one of the two, expected both or neither")
    if cat_weight is not None and cat_bias is not None:
        if not plan.uses_cat:
            raise ValueError(f"cat_weight: got a tensor, expected None because operators={plan.operators} lacks 'cat'")
        _check_shape("cat_weight", cat_weight, (plan.num_pairs, num_classes, num_classes))
        _check_shape("cat_bias", cat_bias, (plan.num_subsets, num_classes))
        out["cat_weight"], out["cat_bias"] = cat_weight.detach().clone(), cat_bias.detach().clone()
    weights, biases = [], []
    for size, position in fusion_positions(num_scales):
        prefix = fusion_key(size, position)
        weights.append(_take(rest, prefix + "weight", (1, num_classes, 1, 1)).reshape(1, num_classes))
        biases.append(_take(rest, prefix + "bias", (1,)))
    if plan.uses_awf:
        out["awf_weight"], out["awf_bias"] = torch.cat(weights), torch.cat(biases)
    if rest:
        raise CheckpointError(
            f"state_dict: got the unknown keys {sorted(rest)[:4]}, expected only those of the authors' "
            f"module with num_scales={num_scales}; check num_scales, and strip prefixes such as 'module.'"
        )
    return out


def lomix_to_official(
    state_dict: Mapping[str, Tensor],
    *,
    num_classes: int,
    num_scales: int,
    operators: Sequence[str] = OPERATORS,
    fusion_name: str = "wf",
    drop_cat: bool = False,
) -> dict[str, Tensor]:
    """State dict of `LoMixLoss` -> state dict of the authors' loss module.

    Args:
        state_dict: ours, with all scales as originals and awf_sharing="size" (for L = 2 the three sharings
            are one).
        num_classes: C.
        num_scales: L.
        operators: those of the criterion, in its order, which becomes the order of the keys.
        fusion_name: what the authors' module calls our "awf": "wf" (their training script) or
            "weighted_fusion".
        drop_cat: must be True if `state_dict` holds learned "cat" convolutions: theirs has no place for them
            and would go on with random ones, so the loss changes.

    Returns:
        Their keys in their order, all copies. Without "alpha" (weighting="fixed") only the fusion
        convolutions. These are zeros when `operators` lacks "awf": their module always has them, and then
        never reads them.

    Raises:
        CheckpointError: learned "cat" convolutions without `drop_cat`; attention weights of another
            sharing; a weighting other than "softplus" and "fixed"; maps that pruning has dropped; a missing,
            unknown or misshapen entry.
        TypeError, ValueError: another argument out of range, such as an unknown `fusion_name`.

    Source: keys as the authors' released module makes them (SPEC of LoMix).
    """
    if fusion_name not in FUSION_NAMES:
        near = did_you_mean(fusion_name, FUSION_NAMES)
        raise ValueError(f"fusion_name: got {fusion_name!r}, expected one of {FUSION_NAMES}{near}")
    plan = _plan(num_classes, num_scales, operators)
    rest = _entries(state_dict)
    _check_description(rest, plan, num_classes)
    if not drop_cat and ("cat_weight" in rest or "cat_bias" in rest):
        raise CheckpointError(
            "state_dict: got learned 'cat' convolutions, for which the authors' checkpoint has no place "
            "(they draw random ones at every call); pass drop_cat=True to leave them behind and accept that "
            "the loss changes"
        )
    rest.pop("cat_weight", None)
    rest.pop("cat_bias", None)
    out: dict[str, Tensor] = {}
    if "alpha" in rest:
        alpha = _take(rest, "alpha", (plan.num_maps,))
        names = their_names(fusion_name)
        for m, spec in enumerate(plan.maps):
            where = f"synthesized_weights.{names[spec.operator]}.{spec.subset}" if spec.subset >= 0 else None
            out[where or f"original_weights.{spec.members[0]}"] = alpha[m : m + 1].clone()
    positions = fusion_positions(num_scales)
    if plan.uses_awf:
        rows = rest.get("awf_weight")
        if isinstance(rows, Tensor) and rows.dim() == 2 and rows.shape[0] != len(positions):
            raise CheckpointError(
                f"awf_weight: got {rows.shape[0]} rows, expected {len(positions)}; the authors' module "
                "shares attention by subset size and position, so only awf_sharing='size' can be converted"
            )
        weight = _take(rest, "awf_weight", (len(positions), num_classes))
        bias = _take(rest, "awf_bias", (len(positions),))
    else:
        like = next(iter(out.values()), torch.empty(0))
        weight, bias = like.new_zeros(len(positions), num_classes), like.new_zeros(len(positions))
    for row, (size, position) in enumerate(positions):
        prefix = fusion_key(size, position)
        out[prefix + "weight"] = weight[row].reshape(1, num_classes, 1, 1).clone()
        out[prefix + "bias"] = bias[row : row + 1].clone()
    if rest:
        raise CheckpointError(
            f"state_dict: got the unknown keys {sorted(rest)[:4]}, expected only those of LoMixLoss with "
            f"operators={plan.operators}; check operators, and strip prefixes such as 'module.'"
        )
    return out


def _plan(num_classes: Any, num_scales: Any, operators: Any) -> MixPlan:
    """The maps that the arguments speak of."""
    if type(num_classes) is not int or num_classes < 2:
        raise (ValueError if type(num_classes) is int else TypeError)(
            f"num_classes: got {num_classes!r}, expected an int of at least 2, as the authors' module has it"
        )
    if isinstance(operators, str) or not isinstance(operators, Sequence):
        raise TypeError(f"operators: got {operators!r}, expected a tuple or list out of {KNOWN_OPERATORS}")
    return MixPlan.create(num_scales, tuple(operators))


def _check_description(state_dict: dict[str, Tensor], plan: MixPlan, num_classes: int) -> None:
    """Take the description out, and refuse one of a criterion that the arguments do not speak of."""
    found = describe(state_dict)
    if state_dict.pop(KEY, None) is None:
        return
    for name, value in maps_of(num_classes, plan).items():
        if found[name] != value:
            raise CheckpointError(
                f"state_dict: got the checkpoint of a LoMixLoss with {name}={found[name]!r}, expected {value!r}; pass "
                "num_classes, num_scales and operators of that criterion, which must mix every subset of its scales"
            )
    if found["weighting"] not in ("softplus", "fixed"):
        raise CheckpointError(
            f"state_dict: got the checkpoint of a LoMixLoss with weighting={found['weighting']!r}, expected 'softplus' "
            "or 'fixed'; the authors' module has no other, so keep LoMixLoss for this checkpoint"
        )
    if ("alpha" in state_dict) != (found["weighting"] == "softplus"):
        raise CheckpointError(
            f"state_dict: got {'an' if 'alpha' in state_dict else 'no'} alpha in the checkpoint of a LoMixLoss with "
            f"weighting={found['weighting']!r}, so it is damaged; take it from the criterion's state_dict() anew"
        )
    if found["pruning"] is not None and "0" in found["pruning"]["active"]:
        raise CheckpointError(
            "state_dict: got the checkpoint of a LoMixLoss that has dropped maps, expected one with all of them; the "
            "authors' module has no pruning, so take it from a criterion with prune_below=0 that has loaded this one"
        )
    if found["awf_sharing"] not in (None, "size") and plan.num_scales > 2:
        raise CheckpointError(
            f"state_dict: got the checkpoint of a LoMixLoss with awf_sharing={found['awf_sharing']!r}, expected "
            "'size': the authors' module shares attention by subset size and position"
        )


def module_to_lomix(module: CombinatorialMutationsLossModule) -> LoMixLoss:
    """A `LoMixLoss` with the loss, weights, device, dtype and mode of a module, and its parameters frozen alike.

    The generator of the random "concat" convolutions is copied too, so that both draw the same ones next.

    Args:
        module: with as many original maps as mixed ones; of supervision "deep_supervision" only without
            operations.

    Raises:
        TypeError: not such a module.
        ValueError: a module with weights of something that LoMixLoss would not supervise; one of which a part is
            frozen that is a part of one parameter in LoMixLoss.
    """
    if not isinstance(module, CombinatorialMutationsLossModule):
        raise TypeError(f"module: got {type(module).__name__}, expected a CombinatorialMutationsLossModule")
    if module.original_num_maps != module.num_maps:
        raise ValueError(
            f"module: got original_num_maps={module.original_num_maps} with "
            f"selecetd_num_maps={module.num_maps}, expected the same number twice; LoMixLoss mixes every "
            "scale it supervises"
        )
    if module.supervision not in WITH_MIXES and module.operations:
        raise ValueError(
            f"module: got supervision={module.supervision!r} with operations={module.operations}, whose "
            "weights LoMixLoss would have no place for; construct LoMixLoss(..., operators=()) for deep "
            "supervision with learned weights"
        )
    operators = tuple(OUR_NAME[name] for name in module.operations)
    held = _held_by(module)
    with fork_rng(devices=[]):
        criterion = LoMixLoss(
            module.num_classes,
            module.num_maps,
            operators=operators,
            concat="resampled",
            weighting="softplus" if module.use_learnable_weights else "fixed",
            lambda_ce=module.lc1,
            lambda_dice=module.lc2,
            order="coarse_to_fine",
            impl=module.impl,
        )
    state = official_to_lomix(
        module.state_dict(), num_classes=module.num_classes, num_scales=module.num_maps, operators=operators
    )
    like = next(module.parameters())
    criterion.to(like.device, like.dtype).load_state_dict(state)
    _copy_generator(module._generator, criterion._generator)
    for name, parameter in criterion.named_parameters():
        frozen = [theirs for theirs, own in held[name].items() if not own.requires_grad]
        if 0 < len(frozen) < len(held[name]):
            raise ValueError(
                f"module: got {len(frozen)} of {len(held[name])} parameters frozen ({', '.join(frozen[:2])}, ...) that "
                f"are one parameter {name} of LoMixLoss, expected all or none; call requires_grad_() alike on all of "
                "them"
            )
        parameter.requires_grad_(not frozen)
    return criterion.train(module.training)


def lomix_to_module(
    criterion: LoMixLoss, *, fusion_name: str = "wf", drop_cat: bool = False
) -> CombinatorialMutationsLossModule:
    """The drop-in module with the loss, weights, device, dtype and mode of a `LoMixLoss`, its parameters frozen alike.

    Feed it maps coarsest first, whatever the `order` of the criterion. The generator of the random "concat"
    convolutions is copied too, if there is one. Fusion convolutions that no map uses are frozen if all of the criterion
    is.

    Args:
        criterion: with all scales supervised, awf_sharing="size", the authors' Dice and no pruning (the defaults).
        fusion_name: what to call "awf": "wf" or "weighted_fusion".
        drop_cat: accept that learned "cat" convolutions are left behind and random ones drawn instead.

    Raises:
        TypeError: not a LoMixLoss.
        ValueError: a criterion whose loss the module cannot compute, or as `lomix_to_official`.
    """
    if not isinstance(criterion, LoMixLoss):
        raise TypeError(f"criterion: got {type(criterion).__name__}, expected a LoMixLoss")
    plan = criterion.plan
    # Everything but the two factors has to be what a criterion has by default.
    held, wanted = ({**c.recipe, **c.reading, "structure": c.structure} for c in (criterion, LoMixLoss(2, 1)))
    held |= {"weight": criterion.weight, "ce_weight": criterion.ce_weight, "prune_below": criterion.prune_below}
    held |= {"process_group": criterion.process_group}
    held |= {"squared_pred": plan.squared, "originals": plan.originals, "subsets": plan.chosen, "mul": plan.bounded}
    wanted |= {"weight": None, "ce_weight": None, "prune_below": 0, "squared_pred": True, "subsets": None, "mul": False}
    wanted |= {"process_group": None, "originals": tuple(range(plan.num_scales))}
    for name in ("lambda_ce", "lambda_dice"):
        del held[name], wanted[name]
    if criterion.weighting in ("normalized", "uncertainty"):
        raise ValueError(
            f"criterion: got weighting={criterion.weighting!r}, expected 'softplus' or 'fixed'; the authors' module "
            "has no other"
        )
    for name, value in wanted.items():
        if held[name] is not value and (isinstance(held[name], Tensor) or held[name] != value):
            raise ValueError(
                f"criterion: got {name}={held[name]!r}, expected {value!r}; the authors' module has no other"
            )
    state = lomix_to_official(
        criterion.state_dict(),
        num_classes=criterion.num_classes,
        num_scales=plan.num_scales,
        operators=plan.operators,
        fusion_name=fusion_name,
        drop_cat=drop_cat,
    )
    names = their_names(fusion_name)
    with fork_rng(devices=[]):
        module = CombinatorialMutationsLossModule(
            plan.num_scales,
            criterion.num_classes,
            plan.num_scales,
            [names[operator] for operator in plan.operators],
            use_learnable_weights=criterion.alpha is not None,
            supervision="lomix",
            lc1=criterion.recipe["lambda_ce"],
            lc2=criterion.recipe["lambda_dice"],
            impl=criterion.impl,
        )
    like = next(criterion.parameters(), torch.empty(0))
    module.to(like.device, like.dtype).load_state_dict(state)
    _copy_generator(criterion._generator, module._generator)
    trains = {name: parameter.requires_grad for name, parameter in criterion.named_parameters()}
    for name, parameters in _held_by(module).items():
        for parameter in parameters.values():
            parameter.requires_grad_(trains.get(name, any(trains.values())))
    return module.train(criterion.training)


def _held_by(module: CombinatorialMutationsLossModule) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters of a module, under the one of `LoMixLoss` that holds the same numbers."""
    held: dict[str, dict[str, nn.Parameter]] = {"alpha": {}, "awf_weight": {}, "awf_bias": {}}
    for name, parameter in module.named_parameters():
        is_fusion = name.startswith("weighted_fusion_modules.")
        held[f"awf_{name.rpartition('.')[2]}" if is_fusion else "alpha"][name] = parameter
    return held


def _copy_generator(source: torch.Generator | None, to: torch.Generator | None) -> None:
    if source is not None and to is not None:
        to.set_state(source.get_state())


def _entries(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries, to be taken out one after the other; all tensors but the description on one device."""
    check_keys(state_dict)
    refuse_wrapped(state_dict)
    entries = dict(state_dict)
    places = {key: value.device for key, value in entries.items() if isinstance(value, Tensor) and key != KEY}
    for (before, expected), (key, device) in pairwise(places.items()):
        if device != expected:
            raise CheckpointError(
                f"state_dict: got {key} on device {device}, expected {expected} as {before} is; load the file with "
                "map_location='cpu'"
            )
    return entries


def _stored_operators(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """{our name: their name} of the operators whose weights an authors' state dict holds."""
    stored: dict[str, str] = {}
    for key in state_dict:
        if key.startswith("synthesized_weights."):
            theirs = key.split(".")[1]
            if theirs not in OUR_NAME:
                raise CheckpointError(
                    f"state_dict: got weights of the operator {theirs!r}, expected operators out of {tuple(OUR_NAME)}"
                )
            if stored.setdefault(OUR_NAME[theirs], theirs) != theirs:
                raise CheckpointError(
                    "state_dict: got weights of both 'wf' and 'weighted_fusion', expected one of the two"
                )
    return stored


def _take_alpha(rest: dict[str, Tensor], plan: MixPlan, stored: Mapping[str, str]) -> list[Tensor]:
    """Remove the raw weights from `rest` and return them in the map order of the plan, each [1]."""
    if set(stored) != set(plan.operators):
        raise CheckpointError(
            f"operators: got {plan.operators}, but the checkpoint holds weights of {tuple(stored)}; pass "
            "exactly those, in the order of the criterion to be loaded"
        )
    originals = sum(key.startswith("original_weights.") for key in rest)
    if originals != plan.num_scales:
        raise CheckpointError(
            f"num_scales: got {plan.num_scales}, but the checkpoint holds {originals} original weights; "
            "LoMixLoss mixes all the scales it supervises, so the two must agree"
        )
    keys = [
        f"synthesized_weights.{stored[s.operator]}.{s.subset}" if s.subset >= 0 else f"original_weights.{s.members[0]}"
        for s in plan.maps
    ]
    return [_take(rest, key, (1,)) for key in keys]


def _take(rest: dict[str, Tensor], key: str, shape: tuple[int, ...]) -> Tensor:
    """Remove one entry and return it detached, or raise if it is missing or misshapen."""
    if key not in rest:
        raise CheckpointError(
            f"state_dict: got no {key!r}, expected a tensor {list(shape)} there; check num_scales and operators"
        )
    value = rest.pop(key)
    fault = fault_of(value, shape, meta=True)
    if fault is not None:
        raise CheckpointError(f"state_dict: got {key} {fault}; check num_classes and num_scales")
    return value.detach()


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(
            f"{name}: got {getattr(value, 'dtype', type(value).__name__)}, expected a float tensor {list(shape)}"
        )
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {shape}; check num_classes and num_scales")
