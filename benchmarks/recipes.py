"""The recipes of docs/recipes.md on the problem that speed and memory are promised for, each against the plain one.

Those that kernels see are other problems for the same contender. What they do not see (Dice flavours, presets,
weightings, how masks and weights are combined) is another criterion on a problem: a contender of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lomix_fast import LoMixLoss
from lomix_fast.backends import why_not
from lomix_fast.plan import OPERATORS
from lomix_fast.testing.cases import Case, case

from .cases import BenchmarkCase, benchmark_case
from .contenders import Contender
from .prepared import Prepared
from .problem import Problem, make_problem
from .subjects import Entry, Subject

PLAIN = "plain"
_BASE = case("slices_224")
_SMALL = replace(_BASE, name="recipe_small", batch=2, full=(14, 14), native=((1, 1), (2, 2), (4, 4), (7, 7)))
_ONE_CLASS: dict[str, Any] = {"sigmoid": True, "dense": True, "target_dtype": torch.float32}
_REGIONS: dict[str, Any] = {"sigmoid": True, "dense": True}

# Name -> what it changes of the plain recipe. All make as many maps of as many classes as that, 48 of 9.
_CHANGES: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "ignore_index": {"ignore_index": 3},
    "mask": {"weight_map": torch.bool},
    "weight_map": {"weight_map": torch.float32},
    "ce_weight": {"ce_weight": True},
    "label_smoothing": {"label_smoothing": 0.1},
    "soft_labels": {"dense": True, "target_dtype": torch.float32},
    "weights_and_smoothing": {"weight_map": torch.float32, "ce_weight": True, "label_smoothing": 0.1},
    "linear_dice": {"squared": False},
    "regions": {**_REGIONS, "target_dtype": torch.bool},
    "regions_masked": {**_REGIONS, "target_dtype": torch.bool, "weight_map": torch.bool},
    "soft_regions_weighted": {**_REGIONS, "target_dtype": torch.float32, "weight_map": torch.float32},
    "regions_pos_weight": {**_REGIONS, "target_dtype": torch.bool, "ce_weight": True},
    "bounded_mul": {"bounded": True},
    "sub_for_add": {"operators": ("sub", *OPERATORS[1:])},
    "avg_for_add": {"operators": ("avg", *OPERATORS[1:])},
    "max_for_mul": {"operators": ("add", "max", "cat", "awf")},
}
# Other numbers of maps: these are compared by map.
_OTHERS: dict[str, Case] = {
    "one_class": replace(_BASE, classes=1, **_ONE_CLASS),
    "seven_operators": replace(_BASE, operators=(*OPERATORS, "sub", "avg", "max")),
    "pairs_only": replace(_BASE, max_subset_size=2),
    "eight_scales_pairs": replace(
        _BASE, native=tuple((n, n) for n in (4, 7, 14, 28, 56, 112, 168, 224)), subsets="pairs"
    ),
}


def _criterion(
    name: str, impl: str, problem: Problem, options: dict[str, Any], call: Callable[[Problem], dict[str, Any]]
) -> Prepared:
    case = problem.case
    criterion = LoMixLoss.preset(name, case.classes, len(case.native), impl=impl, order="coarse_to_fine", **options).to(
        problem.alpha.dtype
    )
    given = {key: value for key, value in problem.parameters.items() if key in criterion.state_dict()}
    criterion.load_state_dict(given)
    logits = [z.requires_grad_() for z in problem.logits]
    leaves = {f"logits[{i}]": z for i, z in enumerate(logits)} | dict(criterion.named_parameters())
    arguments = call(problem)
    return Prepared(lambda: criterion(logits, problem.target, **arguments), leaves)


def _results(prepared: Prepared) -> dict[str, Tensor]:
    loss = prepared.loss()
    loss.backward()
    return {"loss": loss.detach()} | {n: z.grad for n, z in prepared.leaves.items() if z.grad is not None}


def _nothing(problem: Problem) -> dict[str, Any]:
    return {}


def _mask_and_weights(problem: Problem) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(problem.target.shape, generator=generator)
    return {"mask": weights > 0.3, "weight_map": weights}


def _row(
    preset: str, call: Callable[[Problem], dict[str, Any]] = _nothing, small: Case = _SMALL, **options: Any
) -> Contender:
    """A criterion as a contender; its truth is the same criterion by the reference in float64."""

    def own_errors() -> dict[str, float]:
        exact = _criterion(preset, "reference", make_problem(small).double(), options, call)
        found = _criterion(preset, "cpu", make_problem(small), options, call)
        both = []
        for prepared in (exact, found):
            loss = prepared.loss()
            loss.backward()
            both.append({"loss": loss.detach()} | {n: z.grad for n, z in prepared.leaves.items() if z.grad is not None})
        expected, got = both
        return {
            n: float((got[n].double() - v).abs().max() / v.abs().max().clamp(min=1e-12)) for n, v in expected.items()
        }

    changed = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return Contender(
        f"preset {preset!r}{f' with {changed}' if changed else ''}",
        lambda problem: _criterion(preset, "cpu", problem, options, call),
        lambda: why_not("cpu"),
        lambda case: 2**27,
        own_errors=own_errors,
    )


MONAI = _row("monai")
NNUNET = _row("nnunet")
TVERSKY = _row("monai", tversky=(0.3, 0.7), absent_classes="exclude", weight=2.0)
NORMALIZED = _row("official", weighting="normalized")
UNCERTAINTY = _row("official", weighting="uncertainty")
MASK_AND_WEIGHTS = _row("official", _mask_and_weights)
POLYP = _row("polyp", small=replace(_SMALL, classes=1, **_ONE_CLASS))
CRITERIA = ("MONAI", "NNUNET", "TVERSKY", "NORMALIZED", "UNCERTAINTY", "MASK_AND_WEIGHTS")


def _recipe(name: str, changed: Case) -> BenchmarkCase:
    # The small problem that results are checked on has no label left out that the large one has.
    return benchmark_case(changed, f"recipe_{name}", longest=16)


CASES: dict[str, BenchmarkCase] = {name: _recipe(name, replace(_BASE, **changes)) for name, changes in _CHANGES.items()}
OTHERS: dict[str, BenchmarkCase] = {name: _recipe(name, changed) for name, changed in _OTHERS.items()}

SUBJECT = Subject(
    "recipes",
    "recipes against the plain one: the same problem with other targets, weights, operators and criteria",
    (
        *(Entry(one, "fused") for one in CASES.values()),
        *(Entry(CASES[PLAIN], f"{__name__}:{name}") for name in CRITERIA),
        Entry(OTHERS["one_class"], f"{__name__}:POLYP"),
        *(Entry(one, "fused") for one in OTHERS.values()),
    ),
    15,
)
