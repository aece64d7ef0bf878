"""One problem of the list of cases, and how its inputs are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..plan import OPERATORS, MixPlan
from ..reference import compute_dtype
from ..target import Target, TargetRule

LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded", "transposed")
PARAMETERS = ("cat_weight", "cat_bias", "awf_weight", "awf_bias")


@dataclass(frozen=True)
class Case:
    """One problem: everything that decides shapes, dtypes, strides and the rough size of the numbers.

    Attributes:
        name: unique, readable.
        batch, classes: B, C.
        full: spatial shape of the labels, 1 to 3 axes.
        native: spatial shape of each scale, coarsest first; its length is L.
        dtype: of the logits. Parameters of the mixes are float32, or float64 with float64 logits.
        operators, originals, squared: see `MixPlan.create`.
        kept: maps of that plan to keep, see `MixPlan.select`; None for all.
        target_dtype: of the labels.
        layout: strides of the logits, one of `LAYOUTS`, or "mixed" for another one at each scale.
        target_layout: "contiguous", "transposed", "sliced" or "channel" ([B, 1, *full]).
        magnitude: the logits are drawn from a normal distribution with this standard deviation.
        subsets, max_subset_size, sigmoid, bounded: see `MixPlan.create`.
        dense: the target is one value a class, [B, C, *full]: several classes at once where `target_dtype` is not a
            float, otherwise shares, which add up to 1 without `sigmoid`.
        weight_map: None, or the dtype of weights of pixels, a third of which are 0.
        weighted_ce, label_smoothing: see `map_stats`.
        ignore_index: None, or the label that a fifth of the pixels get.
        ce_weight: whether classes have weights in cross-entropy.
    """

    name: str
    batch: int
    classes: int
    full: tuple[int, ...]
    native: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float32
    operators: tuple[str, ...] = OPERATORS
    originals: tuple[int, ...] | None = None
    squared: bool = True
    kept: tuple[int, ...] | None = None
    target_dtype: torch.dtype = torch.int64
    layout: str = "contiguous"
    target_layout: str = "contiguous"
    magnitude: float = 1.0
    subsets: tuple[tuple[int, ...], ...] | str | None = None
    max_subset_size: int | None = None
    sigmoid: bool = False
    bounded: bool = False
    dense: bool = False
    weight_map: torch.dtype | None = None
    weighted_ce: bool = True
    label_smoothing: float = 0.0
    ignore_index: int | None = None
    ce_weight: bool = False

    @property
    def plan(self) -> MixPlan:
        """The plan of this case."""
        plan = MixPlan.create(
            len(self.native),
            self.operators,
            self.originals,
            self.squared,
            subsets=self.subsets,
            max_subset_size=self.max_subset_size,
            sigmoid=self.sigmoid,
            bounded=self.bounded,
        )
        return plan if self.kept is None else plan.select(self.kept)

    @property
    def rule(self) -> dict[str, Any]:
        """How the target is read, as arguments of `map_stats`."""
        return {
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
            "weighted_ce": self.weighted_ce,
        }

    @property
    def pixels(self) -> int:
        """Pixels of one sample at full size."""
        return int(torch.Size(self.full).numel())


@dataclass
class Inputs:
    """Arguments of `map_stats`: logits [B, C, *native] each, the target, W, b, u, v or None, and weights or None."""

    logits: list[Tensor]
    target: Tensor
    cat_weight: Tensor | None
    cat_bias: Tensor | None
    awf_weight: Tensor | None
    awf_bias: Tensor | None
    weight_map: Tensor | None = None
    ce_weight: Tensor | None = None

    @property
    def parameters(self) -> dict[str, Tensor | None]:
        """W, b, u, v by the names of their arguments, to be passed on as keywords."""
        return {name: getattr(self, name) for name in PARAMETERS}

    def arguments(self, case: Case) -> dict[str, Any]:
        """All keywords of `map_stats` but `impl`: parameters, weights and the rule of the case."""
        return self.parameters | {"weight_map": self.weight_map, "ce_weight": self.ce_weight} | case.rule

    def target_for(self, case: Case) -> Target:
        """The target as backends take it."""
        labels = self.target
        if case.sigmoid and labels.dim() == self.logits[0].dim() - 1:
            labels = labels.unsqueeze(1)
        elif labels.dim() == self.logits[0].dim() and not case.dense:
            labels = labels.squeeze(1)
        dense = labels.dim() == self.logits[0].dim()
        rule = TargetRule(**case.rule)
        return Target(labels, dense, self.weight_map, self.ce_weight, rule, not case.sigmoid)

    @property
    def differentiable(self) -> dict[str, Tensor]:
        """Every tensor that has a gradient, by a readable name."""
        named = {f"logits[{i}]": z for i, z in enumerate(self.logits)}
        return named | {name: p for name, p in self.parameters.items() if p is not None}

    def requires_grad_(self) -> Inputs:
        """Ask for the gradient of every differentiable tensor, in place; returns self."""
        for tensor in self.differentiable.values():
            tensor.requires_grad_()
        return self

    def to(self, dtype: torch.dtype) -> Inputs:
        """A detached copy with logits and parameters in `dtype`, holding the same numbers if it is wider."""
        logits = [z.detach().to(dtype, copy=True) for z in self.logits]
        w, b, u, v = (None if p is None else p.detach().to(dtype, copy=True) for p in self.parameters.values())
        return Inputs(logits, self.target, w, b, u, v, self.weight_map, self.ce_weight)


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Draw the inputs of a case; the same case and seed give the same numbers. Nothing requires a gradient yet."""
    generator = torch.Generator().manual_seed(seed)
    plan, classes = case.plan, case.classes
    logits = []
    for scale, native in enumerate(case.native):
        values = case.magnitude * torch.randn(case.batch, classes, *native, generator=generator, dtype=torch.float64)
        layout = LAYOUTS[scale % len(LAYOUTS)] if case.layout == "mixed" else case.layout
        logits.append(lay_out(values.to(case.dtype), layout))
    target = torch.randint(classes, (case.batch, *case.full), generator=generator).to(case.target_dtype)
    weight_map, ce_weight = None, None
    if case.sigmoid or case.dense:
        target = _draw_shares(case, generator)
    if case.ignore_index is not None:
        ignored = torch.rand(target.shape, generator=generator) < 0.2
        target = target.masked_fill(ignored, case.ignore_index)
    if case.weight_map is not None:
        weights = torch.rand((case.batch, *case.full), generator=generator)
        weight_map = (3 * weights - 1).clamp(min=0).to(case.weight_map)
    if case.ce_weight:
        ce_weight = 0.25 + torch.rand(classes, generator=generator)

    def draw(needed: bool, *shape: int) -> Tensor | None:
        if not needed:
            return None
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(compute_dtype(case.dtype))

    weight = draw(plan.uses_cat, plan.num_pairs, classes, classes)
    return Inputs(
        logits,
        _lay_out_target(target, case.target_layout),
        None if weight is None else weight / classes**0.5,
        draw(plan.uses_cat, plan.num_subsets, classes),
        draw(plan.uses_awf, plan.num_pairs, classes),
        draw(plan.uses_awf, plan.num_pairs),
        None if weight_map is None else _lay_out_target(weight_map, case.target_layout),
        ce_weight,
    )


def _draw_shares(case: Case, generator: torch.Generator) -> Tensor:
    """A target of one value a class: [B, C, *full]."""
    values = torch.rand(case.batch, case.classes, *case.full, generator=generator, dtype=torch.float64)
    if not case.target_dtype.is_floating_point:
        if not case.sigmoid:
            return (values == values.amax(1, keepdim=True)).to(case.target_dtype)
        return (values < 0.3).to(case.target_dtype)
    if not case.sigmoid:
        values = values / values.sum(1, keepdim=True)
    return values.to(case.target_dtype)


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same shape in other strides, and the same values except for "expanded", which repeats the first sample.

    Args:
        values: [B, C, *native], contiguous.
        layout: one of `LAYOUTS`. "channels_last" has the classes innermost (with one spatial axis too), "sliced" is
            every other element of a larger tensor whose rest is NaN, "expanded" has stride 0 along the batch,
            "transposed" has its axes in reverse order.
    """
    if layout == "channels_last":
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        room = values.new_full(
            (values.shape[0], values.shape[1] + 2, *[2 * n + 1 for n in values.shape[2:]]), torch.nan
        )
        view = room[(slice(None), slice(1, -1), *[slice(1, None, 2)] * (values.dim() - 2))]
        return view.copy_(values)
    if layout == "expanded":
        return values[:1].expand_as(values) if values.shape[0] else values
    if layout == "transposed":
        axes = tuple(reversed(range(values.dim())))
        return values.permute(axes).contiguous().permute(axes)
    return values


def _lay_out_target(target: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        axes = tuple(reversed(range(target.dim())))
        return target.permute(axes).contiguous().permute(axes)
    if layout == "sliced":
        return torch.stack([target, torch.zeros_like(target)], dim=-1)[..., 0]
    return target.unsqueeze(1) if layout == "channel" else target
