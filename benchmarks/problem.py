"""The numbers every contender is given: inputs of a case and values of all parameters of the loss."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lomix_fast.mixing import awf_rows
from lomix_fast.reference import compute_dtype
from lomix_fast.target import Target, TargetRule
from lomix_fast.testing.cases import Case, make_inputs


@dataclass
class Problem:
    """One case with values.

    Attributes:
        case: what it was made from.
        logits: L tensors [B, C, *native], coarsest first.
        target: class numbers [B, *full], or one value a class [B, C, *full].
        weight_map, ce_weight: weights of pixels [B, *full] and classes [C], or None.
        alpha: [M].
        cat_weight, cat_bias: W [K, C, C], b [S, C], or None.
        awf_weight, awf_bias: [rows, C], [rows], shared by subset size and position as in the authors' code, or None.
    """

    case: Case
    logits: list[Tensor]
    target: Tensor
    alpha: Tensor
    cat_weight: Tensor | None
    cat_bias: Tensor | None
    awf_weight: Tensor | None
    awf_bias: Tensor | None
    weight_map: Tensor | None = None
    ce_weight: Tensor | None = None

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters there are, by the names of `LoMixLoss`'s state dict."""
        names = ("alpha", "cat_weight", "cat_bias", "awf_weight", "awf_bias")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def whole_target(self) -> Target:
        """The target with its weights, as backends take it."""
        dense = self.target.dim() == self.logits[0].dim()
        return Target(
            self.target, dense, self.weight_map, self.ce_weight, TargetRule(**self.case.rule), not self.case.sigmoid
        )

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Every tensor whose gradient a training step needs, by name."""
        return {f"logits[{i}]": z for i, z in enumerate(self.logits)} | self.parameters

    @property
    def row_of_pair(self) -> list[int]:
        """For each (subset, member) pair its row of `awf_weight`."""
        return awf_rows(self.case.plan, "size")[1]

    def requires_grad_(self) -> Problem:
        """Ask for all gradients, in place; returns self."""
        for leaf in self.leaves.values():
            leaf.requires_grad_()
        return self

    def to(self, where: torch.device) -> Problem:
        """The same numbers on a device, dense there; nothing requires a gradient yet. Itself if it is there already."""
        if where == self.target.device:
            return self
        names = ("target", "weight_map", "ce_weight")
        moved = {name: value.to(where) for name in names if (value := getattr(self, name)) is not None}
        moved |= {name: value.to(where) for name, value in self.parameters.items()}
        return replace(self, logits=[z.to(where) for z in self.logits], **moved)  # type: ignore[arg-type]

    def double(self) -> Problem:
        """A detached copy in float64."""
        exact = {name: value.detach().double() for name, value in self.parameters.items()}
        return replace(self, logits=[z.detach().double() for z in self.logits], **exact)  # type: ignore[arg-type]


def make_problem(case: Case, seed: int = 0) -> Problem:
    """Draw the problem of a case; the same case and seed give the same numbers in every process."""
    inputs = make_inputs(case, seed)
    plan = case.plan
    generator = torch.Generator().manual_seed(seed + 1)
    alpha = torch.randn(plan.num_maps, generator=generator, dtype=torch.float64).to(compute_dtype(case.dtype))
    rows = awf_rows(plan, "size")[0]  # never more than the K pairs that make_inputs draws for
    awf_weight = None if inputs.awf_weight is None else inputs.awf_weight[:rows].clone()
    awf_bias = None if inputs.awf_bias is None else inputs.awf_bias[:rows].clone()
    return Problem(
        case,
        inputs.logits,
        inputs.target,
        alpha,
        inputs.cat_weight,
        inputs.cat_bias,
        awf_weight,
        awf_bias,
        inputs.weight_map,
        inputs.ce_weight,
    )
