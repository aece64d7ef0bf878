"""LoMixLoss, the module a user holds: parameters, supervision modes, one scalar out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backends import BACKENDS
from .checks import check_logits, check_order, plain
from .mixing import AWF_SHARING, awf_rows, draw_awf, draw_cat
from .ops import map_stats
from .plan import OPERATORS, MixPlan
from .pruning import PrunedMaps, check_pruning, no_gradient_from
from .recipe import map_losses, total_loss

SUPERVISION = ("lomix", "mutation", "deep_supervision", "last_layer")
CONCAT = ("learned", "resampled")
WEIGHTING = ("softplus", "fixed")
ORDER = ("coarse_to_fine", "fine_to_coarse")


def lomix_loss(
    logits: Sequence[Tensor],
    target: Tensor,
    weights: Tensor,
    plan: MixPlan,
    *,
    cat_weight: Tensor | None = None,
    cat_bias: Tensor | None = None,
    awf_weight: Tensor | None = None,
    awf_bias: Tensor | None = None,
    lambda_ce: float = 0.3,
    lambda_dice: float = 0.7,
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    include_background: bool = True,
    batch: bool = True,
    impl: str = "auto",
) -> Tensor:
    """The LoMix loss as a function: sum over the maps of weights[m] * (lambda_ce * CE_m + lambda_dice * Dice_m).

    Args:
        logits: L tensors [B, C, *native], coarsest first.
        target: labels [B, *full] or [B, 1, *full].
        weights: [M], the final (for example softplus-ed) weight of each map, in `plan.map_names` order.
        plan: which maps; `MixPlan.create(L, ..., squared=...)` also says whether Dice squares the probabilities.
        cat_weight, cat_bias, awf_weight, awf_bias: parameters of the mixes, see `map_stats`.
        lambda_ce, lambda_dice, smooth_nr, smooth_dr, include_background, batch: see `LoMixLoss`.
        impl: backend, see `available_backends`.

    Returns:
        Scalar, float32 (float64 for float64 logits), differentiable in logits, weights and parameters.

    Raises:
        TypeError, ValueError, RuntimeError: as `map_stats`; TypeError or ValueError if `weights` is not a float [M].

    Source: Rahman and Marculescu, NeurIPS 2025, total loss; no division by M.
    """
    if not isinstance(plan, MixPlan):
        raise TypeError(
            f"plan: got {type(plan).__name__}, expected a MixPlan; make one with MixPlan.create(num_scales)"
        )
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        raise TypeError(f"weights: got {getattr(weights, 'dtype', type(weights).__name__)}, expected a float tensor")
    if tuple(weights.shape) != (plan.num_maps,):
        raise ValueError(f"weights: got shape {tuple(weights.shape)}, expected [{plan.num_maps}], one weight per map")
    stats, target_stats = map_stats(
        logits,
        target,
        plan,
        cat_weight=cat_weight,
        cat_bias=cat_bias,
        awf_weight=awf_weight,
        awf_bias=awf_bias,
        impl=impl,
    )
    losses = map_losses(
        stats,
        target_stats,
        lambda_ce=lambda_ce,
        lambda_dice=lambda_dice,
        smooth_nr=smooth_nr,
        smooth_dr=smooth_dr,
        include_background=include_background,
        batch=batch,
    )
    return total_loss(losses, weights)


class LoMixLoss(PrunedMaps):
    """LoMix: CE + Dice on every scale of a decoder and on every mixture of scales, under learned weights.

    Calling it with a list of logits and labels returns one scalar. Its parameters must be given to the optimizer, with
    weight_decay=0. The softplus weights can only fall during training (dTotal/dalpha = sigmoid(alpha) * loss > 0); that
    is the published method, and `weighting="fixed"` avoids it.

    Args:
        num_classes: C, at least 2, background included.
        num_scales: L, 1 to 6.
        supervision: "lomix" (the method); "mutation" (MERIT: every non-empty subset added, weight 1);
            "deep_supervision" (every scale, weight 1); "last_layer" (the finest scale alone, weight 1). The last three
            fix operators and weighting themselves.
        operators: mixes for "lomix", out of "add", "mul", "cat", "awf"; () gives deep supervision with learned weights.
        concat: "learned" (one 1x1 convolution per subset, trained) or "resampled" (the authors' code: drawn anew at
            every call, from a generator of this module's own, never trained).
        awf_sharing: which pairs share attention weights: "size" (the authors' code), "subset" or "scale".
        weighting: "softplus" (alpha learned, weights softplus(alpha), 0.693 at the start) or "fixed" (all 1).
        order: "coarse_to_fine" or "fine_to_coarse", the order of the list of logits. Names and parameters always count
            from the coarsest scale, 0, so a checkpoint does not depend on it.
        lambda_ce, lambda_dice: weights of the two terms of every map loss.
        smooth_nr, smooth_dr: smoothing of Dice, numerator and denominator.
        squared_pred: Dice denominator sums s^2 (True, the authors) or s.
        include_background: whether class 0 enters Dice.
        batch: Dice sums over the whole batch (True, the authors) or per sample.
        impl: "auto" or a backend of `available_backends`.
        prune_below: maps whose weight is under it are left out of forward and backward; 0 (default) is off. See
            `update_pruning` for what is dropped, when, and how it is reported.
        prune_every: calls in training from one choice of the maps to the next, or None: only in `update_pruning`.

    Attributes:
        alpha: Parameter [M], with weighting="softplus".
        cat_weight, cat_bias: Parameters [K, C, C] and [S, C], with "cat" learned.
        awf_weight, awf_bias: Parameters [rows, C] and [rows], with "awf"; see `lomix_fast.mixing.awf_rows`.
        plan: the `MixPlan` of all maps. map_names: tuple of M names such as "orig_3" or "add_0_1".

    Raises:
        TypeError, ValueError: an argument out of range or a combination that contradicts itself, named in the message.

    Source: Rahman and Marculescu, "LoMix", NeurIPS 2025 and the released code; argument names follow
    monai.losses.DiceCELoss.
    """

    alpha: nn.Parameter | None
    cat_weight: nn.Parameter | None
    cat_bias: nn.Parameter | None
    awf_weight: nn.Parameter | None
    awf_bias: nn.Parameter | None
    _awf_index: Tensor | None

    def __init__(
        self,
        num_classes: int,
        num_scales: int,
        *,
        supervision: str = "lomix",
        operators: Sequence[str] = OPERATORS,
        concat: str = "learned",
        awf_sharing: str = "size",
        weighting: str = "softplus",
        order: str = "coarse_to_fine",
        lambda_ce: float = 0.3,
        lambda_dice: float = 0.7,
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        squared_pred: bool = True,
        include_background: bool = True,
        batch: bool = True,
        impl: str = "auto",
        prune_below: float = 0.0,
        prune_every: int | None = 100,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("supervision", supervision, SUPERVISION),
            ("concat", concat, CONCAT),
            ("awf_sharing", awf_sharing, AWF_SHARING),
            ("weighting", weighting, WEIGHTING),
            ("order", order, ORDER),
            ("impl", impl, ("auto", *BACKENDS)),
        ):
            if value not in known:
                raise ValueError(f"{name}: got {value!r}, expected one of {tuple(known)}")
        _check_numbers(num_classes, lambda_ce, lambda_dice, smooth_nr, smooth_dr)
        flags = {"squared_pred": squared_pred, "include_background": include_background, "batch": batch}
        for name, flag in flags.items():
            if not isinstance(flag, bool):
                raise TypeError(f"{name}: got {flag!r}, expected True or False")
        if not isinstance(operators, (tuple, list)):
            raise TypeError(f"operators: got {operators!r}, expected a tuple or list out of {OPERATORS}")
        if supervision != "lomix":
            passed = {"operators": (tuple(operators), OPERATORS), "weighting": (weighting, "softplus")}
            for name, (given, default) in passed.items():
                if given != default:
                    raise ValueError(
                        f"{name}: got {given!r} with supervision={supervision!r}, which sets it itself; leave it out, "
                        "or pass supervision='lomix'"
                    )
            operators, weighting = (("add",) if supervision == "mutation" else ()), "fixed"
        check_pruning(prune_below, prune_every, weighting, supervision)
        originals = (num_scales - 1,) if supervision == "last_layer" and isinstance(num_scales, int) else None
        plan = MixPlan.create(num_scales, tuple(operators), originals, squared_pred)
        self._start_pruning(plan, prune_below, prune_every)
        self._single = MixPlan.create(1, (), squared=squared_pred)  # for a call with one tensor
        self.num_classes, self.num_scales = num_classes, num_scales
        self.supervision, self.concat, self.awf_sharing = supervision, concat, awf_sharing
        self.weighting, self.order, self.impl = weighting, order, impl
        self.recipe: dict[str, Any] = {
            "lambda_ce": lambda_ce,
            "lambda_dice": lambda_dice,
            "smooth_nr": smooth_nr,
            "smooth_dr": smooth_dr,
            "include_background": include_background,
            "batch": batch,
        }
        self._make_parameters()

    def _make_parameters(self) -> None:
        """Create exactly the parameters that this configuration trains, so that DDP finds none unused."""
        for name in ("alpha", "cat_weight", "cat_bias", "awf_weight", "awf_bias"):
            self.register_parameter(name, None)
        self._generator: torch.Generator | None = None
        rows, index = awf_rows(self.plan, self.awf_sharing)
        self.register_buffer("_awf_index", torch.tensor(index) if self.plan.uses_awf else None, persistent=False)
        if self.weighting == "softplus":
            self.alpha = nn.Parameter(torch.zeros(self.plan.num_maps))
        if self.plan.uses_cat and self.concat == "learned":
            weight, bias = draw_cat(self.plan, self.num_classes)
            self.cat_weight, self.cat_bias = nn.Parameter(weight), nn.Parameter(bias)
        elif self.plan.uses_cat:
            # From the global generator, so that torch.manual_seed before construction fixes the draws.
            seed = int(torch.randint(2**62, (), device="cpu"))
            self._generator = torch.Generator().manual_seed(seed)
        if self.plan.uses_awf:
            weight, bias = draw_awf(rows, self.num_classes)
            self.awf_weight, self.awf_bias = nn.Parameter(weight), nn.Parameter(bias)

    @property
    def map_names(self) -> tuple[str, ...]:
        """Names of the M maps in order; numbers are scales, 0 the coarsest."""
        return self.plan.map_names

    def map_weights(self) -> Tensor:
        """Current weight of each map, [M], detached."""
        return self._weights().detach()

    def _weights(self) -> Tensor:
        return torch.ones(self.plan.num_maps) if self.alpha is None else F.softplus(self.alpha)

    def map_losses(self, logits: Sequence[Tensor], target: Tensor) -> Tensor:
        """Loss of each map before its weight, [M], for logging, dropped maps included; differentiable.

        Args:
            logits: list or tuple of L tensors [B, C, *native] in `order`.
            target: labels [B, *full] or [B, 1, *full].

        Raises:
            TypeError, ValueError, RuntimeError: as `map_stats`, and ValueError for sizes that contradict `order`.
        """
        return self._map_losses(self._check(logits), target, self.plan)

    def _map_losses(self, maps: list[Tensor], target: Tensor, plan: MixPlan) -> Tensor:
        cat_weight = cat_bias = awf_weight = awf_bias = None
        if plan.uses_cat:
            cat_weight, cat_bias = self._cat_parameters(maps[0].device)
        if plan.uses_awf and self.awf_weight is not None and self.awf_bias is not None and self._awf_index is not None:
            awf_weight, awf_bias = self.awf_weight[self._awf_index], self.awf_bias[self._awf_index]
        stats, target_stats = map_stats(
            maps,
            target,
            plan,
            cat_weight=cat_weight,
            cat_bias=cat_bias,
            awf_weight=awf_weight,
            awf_bias=awf_bias,
            impl=self.impl,
        )
        return map_losses(stats, target_stats, **self.recipe)

    def forward(self, logits: Sequence[Tensor] | Tensor, target: Tensor) -> Tensor:
        """The total loss, a scalar in float32 (float64 for float64 logits).

        Args:
            logits: list or tuple of L tensors [B, C, *native] in `order`, or one tensor [B, C, *native], for which the
                result is its plain CE + Dice with weight 1 (what a network returns in evaluation).
            target: labels [B, *full] or [B, 1, *full].

        Raises:
            TypeError, ValueError, RuntimeError: as `map_losses`.
        """
        if isinstance(logits, Tensor):
            self._check_classes(plain(logits))
            _refuse_stack(logits, target)
            stats, target_stats = map_stats([logits], target, self._single, impl=self.impl)
            return map_losses(stats, target_stats, **self.recipe)[0]
        maps = self._check(logits)
        if self.alpha is None:
            return self._map_losses(maps, target, self.plan).sum()
        weights = self._weights()
        if self._counts_calls and self.training and torch.is_grad_enabled():
            self._count_training_call(weights)
        total = total_loss(self._map_losses(maps, target, self._active), self._active_of(weights))
        return total if self._active_index is None else total + self._idle(maps, total)

    def _idle(self, maps: list[Tensor], like: Tensor) -> Tensor:
        """Zero, with a gradient of zero for what only dropped maps would read."""
        active = self._active
        idle: list[Tensor | None] = [maps[i] for i in self.plan.used_scales if i not in active.used_scales]
        idle += [] if active.uses_cat else [self.cat_weight, self.cat_bias]
        idle += [] if active.uses_awf else [self.awf_weight, self.awf_bias]
        return no_gradient_from(idle, like)

    def _cat_parameters(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        if self._generator is None:
            return self.cat_weight, self.cat_bias
        weight, bias = draw_cat(self.plan, self.num_classes, self._generator)
        return weight.to(device), bias.to(device)

    def _check(self, logits: Sequence[Tensor]) -> list[Tensor]:
        """Check the list against this criterion and return it coarsest first."""
        maps = check_logits(logits)
        if len(maps) != self.num_scales:
            raise ValueError(f"logits: got {len(maps)} tensors, expected num_scales={self.num_scales}")
        self._check_classes(maps[0])
        check_order([tuple(z.shape[2:]) for z in maps], self.order)
        own = next(self.parameters(), None)
        if own is not None and own.device != maps[0].device:
            raise ValueError(
                f"logits: got device {maps[0].device}, expected {own.device} where this criterion lives; "
                f"move it with criterion.to({str(maps[0].device)!r})"
            )
        return maps if self.order == "coarse_to_fine" else maps[::-1]

    def _check_classes(self, logits: Tensor) -> None:
        if logits.dim() < 2 or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"logits: got shape {tuple(logits.shape)}, expected num_classes={self.num_classes} channels"
            )

    def extra_repr(self) -> str:
        """Text shown by print(criterion)."""
        pruned = f", prune_below={self.prune_below}, prune_every={self.prune_every}, dropped_maps={self.dropped_maps}"
        return (
            f"num_classes={self.num_classes}, num_scales={self.num_scales}, supervision={self.supervision!r}, "
            f"operators={self.plan.operators}, maps={self.plan.num_maps}, weighting={self.weighting!r}, "
            f"order={self.order!r}, impl={self.impl!r}{pruned if self.prune_below > 0 else ''}"
        )


def _refuse_stack(logits: Tensor, target: Tensor) -> None:
    """A stack [B, L, C, *full] of scales must not pass for one volume whose labels [B, 1, *full] are one slice deep."""
    if not isinstance(target, Tensor) or logits.dim() != 5 or target.dim() != 4:
        return
    if target.shape[1] == 1 and logits.shape[2] > 1:
        raise ValueError(
            f"logits: got one tensor {tuple(logits.shape)} with target {tuple(target.shape)}, expected a list of "
            "[B, C, *native]; for scales stacked along axis 1 (MONAI DynUNet) pass logits.unbind(1)"
        )


def _check_numbers(num_classes: int, lambda_ce: float, lambda_dice: float, smooth_nr: float, smooth_dr: float) -> None:
    if isinstance(num_classes, bool) or not isinstance(num_classes, int):
        raise TypeError(f"num_classes: got {num_classes!r}, expected an int of at least 2")
    if num_classes < 2:
        raise ValueError(
            f"num_classes: got {num_classes}, expected at least 2: softmax over one class is constant and teaches "
            "nothing; count the background as a class"
        )
    numbers = {
        "lambda_ce": lambda_ce,
        "lambda_dice": lambda_dice,
        "smooth_nr": smooth_nr,
        "smooth_dr": smooth_dr,
    }
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: got {value!r}, expected a number")
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"{name}: got {value!r}, expected a finite number of at least 0")
