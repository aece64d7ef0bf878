"""Who is measured. A contender is one row: how it computes the loss of a problem, and what it needs to run at all."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lomix_fast import LoMixLoss
from lomix_fast.backends import why_not
from lomix_fast.testing.cases import Case
from lomix_fast.testing.official_style import OfficialStyleLoss, official_style_step

from . import floor
from .cases import map_bytes, official_style_bytes
from .plain import plain_loss
from .prepared import Prepared
from .problem import Problem


@dataclass(frozen=True)
class Contender:
    """One way to compute the loss.

    Attributes:
        summary: what it is, for people.
        prepare: problem -> what to run. The problem is the contender's own to keep.
        why_not: None when it can run here, otherwise the reason.
        estimate: case -> rough peak in bytes of one step; decides what is heavy, never reported as measured.
        compiles: whether the first step at a new size compiles code for it. That is no cost of a step, so its
            memory is measured from the second step on.
        own_errors: for what is not the loss and cannot be held against its definition: relative errors by name, of
            whatever it does compute. None for the loss, whose value and gradients `gate.errors` compares.
    """

    summary: str
    prepare: Callable[[Problem], Prepared]
    why_not: Callable[[], str | None]
    estimate: Callable[[Case], int]
    compiles: bool = False
    own_errors: Callable[[], dict[str, float]] | None = None


def _always() -> None:
    return None


def _module(impl: str) -> Callable[[Problem], Prepared]:
    """`LoMixLoss` on one backend."""

    def prepare(problem: Problem) -> Prepared:
        case = problem.case
        criterion = LoMixLoss(
            case.classes,
            len(case.native),
            order="coarse_to_fine",
            operators=case.operators,
            subsets=case.subsets,
            max_subset_size=case.max_subset_size,
            mul="bounded" if case.bounded else "logits",
            sigmoid=case.sigmoid,
            squared_pred=case.squared,
            ce_weight=problem.ce_weight,
            impl=impl,
            **case.rule,
        )
        criterion.to(problem.target.device, problem.alpha.dtype).load_state_dict(problem.parameters)
        logits = [z.requires_grad_() for z in problem.logits]
        leaves = {f"logits[{i}]": z for i, z in enumerate(logits)} | dict(criterion.named_parameters())
        return Prepared(lambda: criterion(logits, problem.target, weight_map=problem.weight_map), leaves)

    return prepare


def _official(problem: Problem) -> Prepared:
    case = problem.case
    loss = OfficialStyleLoss(case.classes, len(case.native), case.operators)
    loss.to(problem.target.device, problem.alpha.dtype)
    own = {name: problem.parameters.get(name) for name in ("alpha", "awf_weight", "awf_bias")}
    loss.load_state_dict({name: value for name, value in own.items() if value is not None}, strict=False)
    # W and b are given, not drawn in every call as the authors do: otherwise there would be no number to check.
    leaves = problem.requires_grad_().leaves | {n: p for n, p in loss.named_parameters() if own[n] is not None}
    logits, target, weight, bias = problem.logits, problem.target, problem.cat_weight, problem.cat_bias
    return Prepared(lambda: official_style_step(loss, _widened(logits), target, weight, bias), leaves)


def _widened(logits: Sequence[Tensor]) -> list[Tensor]:
    """float16 and bfloat16 logits as float32, as autocast hands them to a loss; others as they are."""
    return [z.float() if z.dtype.itemsize < 4 else z for z in logits]


def plain_with(problem: Problem, function: Callable[..., Tensor] = plain_loss) -> Prepared:
    """The loss of `plain.py`, by itself or by what something made of it."""
    leaves = problem.requires_grad_().leaves
    rest = (problem.alpha, problem.cat_weight, problem.cat_bias, problem.awf_weight, problem.awf_bias)
    plan, rows = problem.case.plan, problem.row_of_pair
    return Prepared(lambda: function(_widened(problem.logits), problem.target, plan, rows, *rest), leaves)


def _compiled(problem: Problem) -> Prepared:
    return plain_with(problem, torch.compile(plain_loss, fullgraph=True, dynamic=False))


def _no_compiler() -> str | None:
    if torch.cuda.is_available():  # where it is Triton's
        return None
    wanted = os.environ.get("CXX", "g++")
    return None if shutil.which(wanted) else f"torch.compile needs a C++ compiler on a CPU and {wanted} is not there"


def _official_bytes(case: Case) -> int:
    itemsize = 8 if case.dtype.itemsize == 8 else 4
    return official_style_bytes(len(case.native), case.classes, case.batch, case.pixels, itemsize)


def _plain_bytes(case: Case) -> int:
    plan = case.plan
    return (2 * plan.num_maps + plan.num_pairs + 3 * plan.num_scales + 8) * map_bytes(case)


def _eager_bytes(case: Case) -> int:
    return (3 * case.plan.num_scales + 8) * map_bytes(case)


def _floor(function: str, whose: str) -> Contender:
    return Contender(
        f"nothing but the exponentials that cannot be avoided, by {whose}",
        lambda problem: floor.prepare(problem, function),
        floor.why_not,
        lambda case: 0,
        own_errors=lambda: floor.errors(function),
    )


CONTENDERS: dict[str, Contender] = {
    "fused": Contender(
        'LoMixLoss(impl="cpu"), the fused C++ kernel',
        _module("cpu"),
        lambda: why_not("cpu"),
        lambda case: 2**27,
    ),
    **{
        name: Contender(
            f'LoMixLoss(impl="{name}"), {words}',
            _module(name),
            lambda name=name: why_not(name, "cuda"),  # type: ignore[misc]
            lambda case: 2**28,
        )
        for name, words in (("cuda", "the fused CUDA kernels"), ("triton", "the fused Triton kernels"))
    },
    "plain": Contender("clean PyTorch with autograd (benchmarks/plain.py)", plain_with, _always, _plain_bytes),
    "compile": Contender("torch.compile of plain", _compiled, _no_compiler, _plain_bytes, compiles=True),
    "eager": Contender(
        'LoMixLoss(impl="eager"), PyTorch recomputing one map at a time', _module("eager"), _always, _eager_bytes
    ),
    "official": Contender("as the authors' released code does it", _official, _always, _official_bytes),
    "exp_floor": _floor("exp_u20", "at::vec's exp_u20"),
    "exp_floor_accurate": _floor("exp", "at::vec's exp"),
    "exp_floor_own": _floor("own", "the fused kernel's own exp2"),
}


def contender(name: str) -> Contender:
    """The contender of this name: a row of `CONTENDERS`, or "module:attribute" for one of your own.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name in CONTENDERS:
        return CONTENDERS[name]
    module, colon, attribute = name.partition(":")
    if colon:
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"contenders: got {name!r}, which cannot be imported: {error}") from error
        if isinstance(found, Contender):
            return found
        raise ValueError(f"contenders: got {name!r}, a {type(found).__name__}; expected a benchmarks Contender")
    raise ValueError(f"contenders: got {name!r}, expected names out of {', '.join(CONTENDERS)}, or module:attribute")
