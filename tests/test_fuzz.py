"""Any criterion on any input against the loss written out (written_out.py): options, shapes, strides, dtypes, backends.

`make fuzz` tries thousands with every width of vectors of the CPU kernel; `make test` always the same sixty.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from common import NATIVE
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import Tensor
from written_out import total

from lomix_fast import LoMixLoss
from lomix_fast.testing.cases import LAYOUTS, lay_out

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
TRIED = os.environ.get("FUZZ_BACKENDS", "").split() or NATIVE
# Relative rounding of gradients that are stored in the dtype of their logits.
_STORED = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
_LEAST = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}


@dataclass
class Problem:
    """A criterion and a call of it, but for the numbers, which come from the seed.

    Attributes:
        seed: of all numbers.
        classes, batch, full, native, dtype, layouts: of the logits, coarsest first.
        options: of LoMixLoss.
        target: "numbers", "shares" or "regions".
        target_dtype: of it.
        mask, weight_map: None or their dtype.
        magnitude: standard deviation of the logits.
    """

    seed: int
    classes: int
    batch: int
    full: tuple[int, ...]
    native: list[tuple[int, ...]]
    dtype: torch.dtype
    layouts: list[str]
    target: str
    target_dtype: torch.dtype
    mask: torch.dtype | None
    weight_map: torch.dtype | None
    magnitude: float
    options: dict[str, Any] = field(default_factory=dict)


_OPERATORS = ("add", "mul", "cat", "awf", "sub", "avg", "max")
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Any small problem that the library accepts."""

    def one_of(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    axes, scales = draw(st.integers(1, 3)), one_of(3, 2, 4, 1)
    sigmoid, supervision = (
        draw(st.booleans()),
        one_of("lomix", "lomix", "lomix", "mutation", "deep_supervision", "last_layer"),
    )
    classes = draw(st.integers(1 if sigmoid else 2, 18))
    longest = {1: 70, 2: 18, 3: 6}[axes]
    full = tuple(draw(st.lists(st.integers(1, longest), min_size=axes, max_size=axes)))
    ratios = sorted(draw(st.lists(st.sampled_from((0.1, 0.3, 0.5, 0.8, 1.0, 1.7)), min_size=scales, max_size=scales)))
    native = [tuple(max(1, round(n * r)) for n in full) for r in ratios]
    o: dict[str, Any] = {"supervision": supervision, "sigmoid": sigmoid}
    if supervision == "lomix":
        some = tuple(draw(st.lists(st.sampled_from(_OPERATORS), unique=True, max_size=4)))
        # Left to lists alone, few of sixty examples would have any one operator.
        o["operators"] = one_of(_OPERATORS[:4], _OPERATORS[2:], some) if scales > 1 else ()
        o["weighting"] = one_of("softplus", "fixed", "normalized", "uncertainty")
        o["awf_sharing"] = one_of("size", "subset", "scale")
        if "mul" in o["operators"]:
            o["mul"] = one_of("logits", "bounded")
    if scales > 2 and (supervision == "mutation" or o.get("operators")):
        o |= one_of({}, {}, {"subsets": "pairs"}, {"max_subset_size": 2}, {"subsets": ((0, 2), (0, 1, 2))})
    o["order"] = one_of("coarse_to_fine", "fine_to_coarse")
    o["lambda_ce"], o["lambda_dice"] = one_of((0.3, 0.7), (1.0, 1.0), (0.0, 1.0), (1.0, 0.0))
    o["smooth_nr"], o["smooth_dr"] = one_of((1e-5, 1e-5), (0.0, 1e-3), (1.0, 1.0))
    o["include_background"] = classes == 1 or draw(st.booleans())
    for name in ("squared_pred", "batch", "ce_per_sample"):
        o[name] = draw(st.booleans())
    ratio = one_of("dice", "dice", "jaccard", "tversky")
    if ratio == "jaccard":
        o["jaccard"] = True
    elif ratio == "tversky":
        o |= {"tversky": one_of((0.3, 0.7), (1.0, 0.0)), "squared_pred": False}
    o["absent_classes"] = one_of("include", "exclude")
    in_dice = classes - (not o["include_background"])
    if in_dice > 1:
        o["weight"] = one_of(None, None, 2.5, [0.5 + 0.25 * c for c in range(in_dice)])
    o["ce_weight"] = one_of(None, None, [1 + (c * 7 % 5) / 3 for c in range(classes)])
    o["structure"] = sigmoid and classes == 1 and draw(st.booleans())
    if sigmoid:
        target = one_of("regions", "numbers") if classes == 1 else "regions"
    else:
        target = one_of("numbers", "numbers", "shares")
        o["label_smoothing"] = one_of(0.0, 0.0, 0.1, 1.0)
    if target == "shares" or (target == "regions" and draw(st.booleans())):
        target_dtype = one_of(torch.float32, torch.float64, torch.float16)
    else:
        target_dtype = one_of(*_INTEGERS, torch.float32)
    if target == "numbers" or classes == 1:
        o["ignore_index"] = one_of(None, 0, 1, 100)
    weight_map = one_of(None, None, torch.float32, torch.float64, torch.bool)
    mask = one_of(None, None, torch.bool, torch.uint8, torch.float32)
    o["weighted_ce"] = draw(st.booleans()) if mask is None or target == "numbers" or classes == 1 else True
    return Problem(
        seed=draw(st.integers(0, 2**31)),
        classes=classes,
        batch=draw(st.integers(1, 3)),
        full=full,
        native=native,
        dtype=one_of(torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16),
        layouts=[one_of(*LAYOUTS) for _ in native],
        target=target,
        target_dtype=target_dtype,
        mask=mask,
        weight_map=weight_map,
        magnitude=one_of(0.1, 1.0, 3.0),
        options=o,
    )


@dataclass
class Call:
    """Tensors of one call."""

    logits: list[Tensor]
    target: Tensor
    mask: Tensor | None
    weight_map: Tensor | None


def make(problem: Problem) -> tuple[LoMixLoss, Call]:
    """The criterion, with parameters that are not where they start, and the tensors it is called with."""
    torch.manual_seed(problem.seed)
    criterion = LoMixLoss(problem.classes, len(problem.native), **problem.options)
    if problem.dtype == torch.float64:
        criterion.double()
    with torch.no_grad():
        for parameter in criterion.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    logits = [problem.magnitude * torch.randn(problem.batch, problem.classes, *n) for n in problem.native]
    logits = [lay_out(z.to(problem.dtype), a) for z, a in zip(logits, problem.layouts, strict=True)]
    pixels = (problem.batch, *problem.full)
    if problem.target == "numbers":
        target = torch.randint(max(problem.classes, 2), pixels)
    elif problem.target_dtype.is_floating_point:
        target = torch.rand(problem.batch, problem.classes, *problem.full)
        target = target.softmax(1) if problem.target == "shares" else target
    else:
        target = torch.randint(2, (problem.batch, problem.classes, *problem.full))
    ignore = problem.options.get("ignore_index")
    if ignore is not None:
        target = torch.where(torch.rand(target.shape) < 0.3, ignore, target)
    mask = None if problem.mask is None else (torch.rand(pixels) < 0.7).to(problem.mask)
    weight_map = None
    if problem.weight_map is not None:
        weight_map = (2 * torch.rand(pixels, dtype=torch.float64) - 0.4).clamp(min=0).to(problem.weight_map)
    if problem.options["order"] == "fine_to_coarse":
        logits.reverse()
    return criterion, Call(logits, target.to(problem.target_dtype), mask, weight_map)


Outcome = dict[str, Tensor]  # loss, and the gradient of each input and parameter, in float64


def written(
    problem: Problem, criterion: LoMixLoss, call: Call, dtype: torch.dtype, moved: Sequence[Tensor] | None = None
) -> Outcome:
    """What written_out.py says, computed in this dtype; of the logits of the call or of those given."""
    logits = [z.detach().to(dtype).requires_grad_() for z in moved or call.logits]
    parameters = {n: p.detach().to(dtype).requires_grad_() for n, p in criterion.named_parameters()}
    loss = total(logits, call.target, parameters, problem.options, call.mask, call.weight_map)
    return outcome(loss, logits, parameters)


def outcome(loss: Tensor, logits: list[Tensor], parameters: Mapping[str, Tensor]) -> Outcome:
    named = {f"logits[{i}]": z for i, z in enumerate(logits)} | dict(parameters)
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    zeros = (torch.zeros_like(t) if g is None else g for g, t in zip(found, named.values(), strict=True))
    return {"loss": loss.detach().double()} | {n: g.double() for n, g in zip(named, zeros, strict=True)}


def movement_of(problem: Problem, criterion: LoMixLoss, call: Call, truth: Outcome) -> dict[str, float]:
    """How far everything moves where logits do by a rounding error or two, which is what exponentials are exact to.

    Far where large terms cancel, and where two maps are equal and "max" hands its gradient over.
    """
    error = 1e-15 if problem.dtype == torch.float64 else 3e-7
    noise = [error * max(1.0, problem.magnitude) * torch.randn(z.shape, dtype=torch.float64) for z in call.logits]
    moved = [[z.double() + sign * n for z, n in zip(call.logits, noise, strict=True)] for sign in (-1, 1)]
    found = [written(problem, criterion, call, torch.float64, logits) for logits in moved]
    whole = {name: right for name, right in truth.items() if right.numel()}
    return {name: max(float((one[name] - right).abs().max()) for one in found) for name, right in whole.items()}


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(problem=problems())
def test_every_criterion_is_what_it_says(problem: Problem) -> None:
    criterion, call = make(problem)
    truth = written(problem, criterion, call, torch.float64)
    wide = torch.float64 if problem.dtype == torch.float64 else torch.float32
    plain = truth if wide == torch.float64 else written(problem, criterion, call, wide)
    movement = movement_of(problem, criterion, call, truth)
    for impl in TRIED:
        criterion.impl = impl
        logits = [z.detach().requires_grad_() for z in call.logits]
        loss = criterion(logits, call.target, mask=call.mask, weight_map=call.weight_map)
        found = outcome(loss, logits, dict(criterion.named_parameters()))
        for name, right in truth.items():
            # Gradients may be sums of large terms that cancel, so errors are measured against the largest of a tensor.
            scale = float(right.abs().max()) if right.numel() else 0.0
            if name == "alpha" and problem.options["weighting"] == "normalized":
                scale = max(scale, float(truth["loss"].abs()))  # there it is a difference of losses of maps
            limit = 4 * float((plain[name] - right).abs().max()) + _LEAST[problem.dtype] * (scale + 1e-3)
            limit += 2 * movement.get(name, 0.0)
            if name.startswith("logits"):
                limit += _STORED.get(problem.dtype, 0.0) * scale + 1e-7 * (problem.dtype == torch.float16)
            error = float((found[name] - right).abs().max())
            if not error <= limit:
                note(f"{impl}: {name}: error {error:.3g}, allowed {limit:.3g}, largest {scale:.3g}")
            assert error <= limit, f"{impl}: {name}"


def test_what_is_written_out_is_cross_entropy_and_dice_of_torch() -> None:
    """So that a mistake in both is no agreement: the paper's loss of one map, in two lines."""
    logits, target = torch.randn(2, 4, 6, 5, dtype=torch.float64), torch.randint(4, (2, 6, 5))
    s, y = logits.softmax(1), torch.nn.functional.one_hot(target, 4).movedim(-1, 1)
    ratio = (2 * (s * y).sum((0, 2, 3)) + 1e-5) / ((s * s).sum((0, 2, 3)) + y.sum((0, 2, 3)) + 1e-5)
    expected = 0.3 * torch.nn.functional.cross_entropy(logits, target) + 0.7 * (1 - ratio).mean()
    torch.testing.assert_close(total([logits], target, {}, {"operators": ()}), expected)
