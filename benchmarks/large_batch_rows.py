"""Who is in the table of the largest batch: a row is one loss, written in one way, and all solve the same problem."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lomix_fast import LoMixLoss
from lomix_fast.testing.cases import Case

from . import gate, plain_modes
from .cases import pyramid, shrunk
from .contenders import CONTENDERS
from .prepared import Prepared
from .problem import Problem, make_problem

FUSED, PLAIN, COMPILED, OFFICIAL = "fused", "plain PyTorch", "torch.compile", "official-style"
_CPU = torch.device("cpu")
# Labels along an axis of the small problem on which numbers are checked.
_SMALL = 16
# softplus of it is 1, the weight of every map in the losses without learned weights.
_ALPHA_OF_ONE = math.log(math.expm1(1))


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        loss: name of the loss, a key of `LOSSES`.
        written: how, for people; `FUSED` is what the others are compared with.
        prepare: problem -> what to run. The problem is the row's own to keep.
        why_not: None when it can run here, otherwise the reason.
        compiles: whether the first step at a new size compiles code for it.
    """

    loss: str
    written: str
    prepare: Callable[[Problem], Prepared]
    why_not: Callable[[], str | None]
    compiles: bool = False


@dataclass(frozen=True)
class Patch:
    """A cube of volume and its outputs, finest at full size, each coarser one half as long.

    Attributes:
        edge: labels along each of the three axes.
        classes, scales: C, L.
    """

    edge: int
    classes: int
    scales: int

    def case(self, loss: str, batch: int) -> Case:
        """The problem of a loss for `batch` samples, float32 logits and int64 labels."""
        full = (self.edge,) * 3
        native = pyramid(full, [2**step for step in reversed(range(self.scales))])
        case = Case(f"{loss}_{self.edge}", batch, self.classes, full, native, operators=LOSSES[loss])
        return replace(case, originals=(self.scales - 1,)) if loss == "last_layer" else case


# Loss -> the mixes whose maps it supervises besides the scales.
LOSSES: dict[str, tuple[str, ...]] = {
    "lomix": ("add", "mul", "cat", "awf"),
    "mutation": ("add",),
    "deep_supervision": (),
    "last_layer": (),
}


def draw(case: Case, where: torch.device = _CPU) -> Problem:
    """The problem of a case, drawn on a device sample by sample, so that no more is held than inputs and one sample.

    A sample's numbers do not depend on the batch, those of the parameters on neither batch nor size.
    """
    problem = make_problem(shrunk(case, _SMALL)).to(where)
    logits = [torch.empty(case.batch, case.classes, *native, device=where) for native in case.native]
    target = torch.empty(case.batch, *case.full, dtype=torch.int64, device=where)
    for sample in range(case.batch):
        generator = torch.Generator(where).manual_seed(sample)
        for z in logits:
            torch.randn(z.shape[1:], generator=generator, out=z[sample])
        torch.randint(case.classes, case.full, generator=generator, out=target[sample])
    return replace(problem, case=case, logits=logits, target=target)


def truth(problem: Problem, loss: str) -> dict[str, Tensor]:
    """Loss and all gradients in float64 by the definition, `lomix_fast.reference` under autograd, by name."""
    if loss == "lomix":
        return gate.truth(problem)
    ones = torch.full((problem.case.plan.num_maps,), _ALPHA_OF_ONE, dtype=torch.float64)
    exact = gate.truth(replace(problem, alpha=ones))
    return {name: value for name, value in exact.items() if name != "alpha"}


def small_case(row: Row, patch: Patch) -> Case:
    """Two samples of a patch so small that the truth in float64 is cheap."""
    return shrunk(patch.case(row.loss, 2), _SMALL)


def errors(row: Row, patch: Patch) -> dict[str, float]:
    """Error of the loss and largest of every gradient on `small_case`, relative to the largest value.

    A gradient that is missing, of another shape or not finite has an infinite error; so has one that is not 0 where the
    definition has none.
    """
    problem = make_problem(small_case(row, patch))
    expected = truth(problem, row.loss)  # first: it takes a copy, and the problem then belongs to the row
    prepared = row.prepare(problem)
    loss = prepared.loss()
    loss.backward()
    got = gate.results(loss, prepared)
    found = {name: _relative(got.get(name), value) for name, value in expected.items()}
    return found | {name: math.inf for name, value in got.items() if name not in expected and value.any()}


def _relative(got: Tensor | None, expected: Tensor) -> float:
    if got is None or got.shape != expected.shape:
        return math.inf
    error = float((got.double() - expected).abs().max() / expected.abs().max())
    return error if math.isfinite(error) else math.inf


def _fused(loss: str, impl: str) -> Row:
    def prepare(problem: Problem) -> Prepared:
        case = problem.case
        criterion = LoMixLoss(case.classes, len(case.native), supervision=loss, impl=impl, order="coarse_to_fine")
        criterion.to(problem.target.device)
        if loss == "lomix":
            criterion.load_state_dict(problem.parameters)
        logits = [z.requires_grad_() for z in problem.logits]
        leaves = {f"logits[{i}]": z for i, z in enumerate(logits)} | dict(criterion.named_parameters())
        return Prepared(lambda: criterion(logits, problem.target), leaves)

    return Row(loss, FUSED, prepare, CONTENDERS["fused" if impl == "cpu" else impl].why_not)


def _written(loss: str, function: Callable[[Sequence[Tensor], Tensor], Tensor], written: str) -> Row:
    compiles = written == COMPILED

    def prepare(problem: Problem) -> Prepared:
        run: Any = torch.compile(function, fullgraph=True, dynamic=False) if compiles else function
        logits = [z.requires_grad_() for z in problem.logits]
        return Prepared(lambda: run(logits, problem.target), {f"logits[{i}]": z for i, z in enumerate(logits)})

    return Row(loss, written, prepare, CONTENDERS["compile" if compiles else "plain"].why_not, compiles)


def _contender(name: str, written: str) -> Row:
    one = CONTENDERS[name]
    return Row("lomix", written, one.prepare, one.why_not, one.compiles)


_WRITTEN = {
    "mutation": plain_modes.mutation,
    "deep_supervision": plain_modes.deep_supervision,
    "last_layer": plain_modes.last_layer,
}
ROWS: dict[str, Row] = {
    **{f"{loss}_fused": _fused(loss, "cpu") for loss in LOSSES},
    **{f"lomix_{impl}": _fused("lomix", impl) for impl in ("cuda", "triton")},
    "lomix_compile": _contender("compile", COMPILED),
    "lomix_plain": _contender("plain", PLAIN),
    "lomix_official": _contender("official", OFFICIAL),
    **{f"{loss}_plain": _written(loss, function, PLAIN) for loss, function in _WRITTEN.items()},
    **{f"{loss}_compile": _written(loss, function, COMPILED) for loss, function in _WRITTEN.items()},
}


def row(name: str) -> Row:
    """The row of this name: one of `ROWS`, or "module:attribute" for one of your own.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name in ROWS:
        return ROWS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"--rows: got {name!r}, expected names out of {', '.join(ROWS)}, or module:attribute")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--rows: got {name!r}, which cannot be imported: {error}") from error
    if not isinstance(found, Row):
        raise ValueError(f"--rows: got {name!r}, a {type(found).__name__}; expected a benchmarks.large_batch_rows.Row")
    return found
