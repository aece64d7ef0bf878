"""Parameters of one `LoMixLoss` taken over by another with other scales, operators, subsets or classes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .checkpoint import KEY, CheckpointError, check_keys, describe, fault_of, plan_of, refuse_wrapped
from .distributed import is_sharded
from .loss import LoMixLoss
from .mixing import awf_rows
from .plan import MixPlan

_log = logging.getLogger("lomix_fast")


def transfer(
    state_dict: Mapping[str, Tensor],
    criterion: LoMixLoss,
    *,
    scales: Sequence[int] | None = None,
    source: LoMixLoss | None = None,
    prefix: str = "",
) -> dict[str, Tensor]:
    """A state dict for `criterion` with what a checkpoint of another `LoMixLoss` has in common with it.

    A map keeps its weight `alpha` if both have a map of the same operator and scales; a 1x1 convolution and a row of
    attention weights is kept if both have the same number of classes and the same subset. All else stays as it is in
    `criterion`. What was taken is logged at level INFO by the logger "lomix_fast".

        criterion.load_state_dict(lomix_fast.transfer(checkpoint, criterion))

    Args:
        state_dict: of the other criterion, or of a module that holds it; it is not changed.
        criterion: what is to be loaded, before FSDP shards it. It is not changed.
        scales: for each scale of the checkpoint, coarsest first, its number in `criterion`, increasing. Must be given
            if the numbers of scales differ: (1, 2, 3, 4) says that `criterion` has one coarser scale more. A number
            past the last one is that of a scale which `criterion` lacks.
        source: a criterion made as the checkpoint's was, for checkpoints of format 1, which do not say so themselves.
        prefix: of the other criterion's keys, such as "criterion." for `lomix_fast.with_loss`.

    Returns:
        Copies of all entries of `criterion.state_dict()`, so without a prefix.

    Raises:
        TypeError: `criterion` is no LoMixLoss.
        CheckpointError: the checkpoint cannot be read, lacks a parameter, has an unknown one or one of the wrong shape.
        ValueError: `scales` or `source` missing, or not fitting; or `criterion` is sharded.
    """
    if not isinstance(criterion, LoMixLoss):
        raise TypeError(
            f"criterion: got {type(criterion).__name__}, expected a LoMixLoss; pass the state dict first and the "
            "criterion second, and of a module that holds a criterion module.criterion"
        )
    if any(is_sharded(parameter) for parameter in criterion.parameters()):
        raise ValueError(
            "criterion: got one that FSDP has sharded, expected whole parameters; transfer before fully_shard"
        )
    check_keys(state_dict)
    if not prefix:
        refuse_wrapped(state_dict)
    state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    plan, sharing, classes, expected = _origin(state_dict, source)
    if set(state_dict) - {KEY} != expected:
        raise CheckpointError(
            f"state_dict: got the parameters {sorted(set(state_dict) - {KEY})} under prefix={prefix!r}, expected "
            f"{sorted(expected)}"
        )
    number = _numbering(plan, criterion.plan, scales)
    own = {name: value.detach().clone() for name, value in criterion.state_dict().items()}
    rows, row_of = awf_rows(plan, sharing or "size")
    pairs, subsets = plan.num_pairs, plan.num_subsets
    shapes = {
        "alpha": (plan.num_maps,),
        "cat_weight": (pairs, classes, classes),
        "cat_bias": (subsets, classes),
        "awf_weight": (rows, classes),
        "awf_bias": (rows,),
    }
    for name, shape in shapes.items():
        fault = fault_of(state_dict[name], shape) if name in expected else None
        if fault is not None:
            raise CheckpointError(f"state_dict: got {name} {fault} as its description says")
    theirs = {name: value for name, value in state_dict.items() if name in shapes and name in own}
    if classes != criterion.num_classes:  # every mixing parameter has an axis of classes
        theirs = {name: value for name, value in theirs.items() if name == "alpha"}

    maps = {(m.operator, tuple(number[i] for i in m.members)): row for row, m in enumerate(plan.maps)}
    same_maps = [(row, maps.get((m.operator, m.members))) for row, m in enumerate(criterion.plan.maps)]
    _take("alpha", own, theirs, same_maps)
    subset_row = {tuple(number[i] for i in subset): row for row, subset in enumerate(plan.subsets)}
    same_subsets = [(row, subset_row.get(subset)) for row, subset in enumerate(criterion.plan.subsets)]
    _take("cat_bias", own, theirs, same_subsets)
    pair_row = {(subset, number[member]): row for row, (subset, member) in enumerate(plan.pairs)}
    same_pairs = [
        (row, pair_row.get((same_subsets[subset][1], member)))  # type: ignore[arg-type]
        for row, (subset, member) in enumerate(criterion.plan.pairs)
    ]
    _take("cat_weight", own, theirs, same_pairs)
    own_rows, own_row_of = awf_rows(criterion.plan, criterion.awf_sharing)
    sources: list[set[int | None]] = [set() for _ in range(own_rows)]
    for pair, same in same_pairs:
        sources[own_row_of[pair]].add(None if same is None else row_of[same])
    # A row that several pairs share is taken if the checkpoint has one row for all those it knows.
    known = [rows - {None} for rows in sources]
    same_rows = [(row, next(iter(found)) if len(found) == 1 else None) for row, found in enumerate(known)]
    for name in ("awf_weight", "awf_bias"):
        _take(name, own, theirs, same_rows)
    return own


def _origin(state_dict: Mapping[str, Tensor], source: LoMixLoss | None) -> tuple[MixPlan, str | None, int, set[str]]:
    """Plan, sharing of attention rows, classes and names of the parameters of the criterion a checkpoint came from."""
    found = describe(state_dict)
    if found["format"] == 1:
        if source is None:
            raise ValueError(
                "source: got None with a checkpoint of format 1, which does not say what it belongs to (or whose keys "
                f"have a prefix: the description is {KEY!r}), expected a LoMixLoss made as the checkpoint's was"
            )
        return source.plan, source.awf_sharing, source.num_classes, {name for name, _ in source.named_parameters()}
    if source is not None:
        raise ValueError("source: got a criterion, expected None because this checkpoint describes its own")
    plan = plan_of(found)
    names = {"alpha"} if found["weighting"] != "fixed" else set()
    names |= {"cat_weight", "cat_bias"} if found["concat"] == "learned" else set()
    names |= {"awf_weight", "awf_bias"} if found["awf_sharing"] is not None else set()
    return plan, found["awf_sharing"], found["num_classes"], names


def _numbering(theirs: MixPlan, ours: MixPlan, scales: Sequence[int] | None) -> list[int]:
    """For each scale of the checkpoint its number in the criterion."""
    if scales is None:
        if theirs.num_scales != ours.num_scales:
            raise ValueError(
                f"scales: got None with {theirs.num_scales} scales in the checkpoint and {ours.num_scales} in the "
                "criterion, expected for each scale of the checkpoint, coarsest first, its number in the criterion"
            )
        return list(range(theirs.num_scales))
    numbers = list(scales) if isinstance(scales, Sequence) else []
    # Numbers past the last one name scales that the criterion lacks.
    are_numbers = len(numbers) == theirs.num_scales and all(type(i) is int and i >= 0 for i in numbers)
    if not are_numbers or numbers != sorted(set(numbers)):
        raise ValueError(
            f"scales: got {scales!r}, expected {theirs.num_scales} increasing numbers of at least 0, one for each "
            "scale of the checkpoint"
        )
    return numbers


def _take(name: str, own: dict[str, Tensor], theirs: Mapping[str, Tensor], rows: list[tuple[int, int | None]]) -> None:
    """Copy rows of a parameter, as (own row, their row or None), and log how many."""
    if name not in own:
        return
    common = [(mine, found) for mine, found in rows if found is not None] if name in theirs else []
    if common:
        mine, found = (torch.tensor(column, device=own[name].device) for column in zip(*common, strict=True))
        own[name][mine] = theirs[name].detach().to(own[name])[found]
    _log.info("transfer: %s: %d of %d rows taken", name, len(common), len(own[name]))
