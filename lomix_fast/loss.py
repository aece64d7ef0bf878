"""LoMixLoss, the module a user holds: parameters, supervision modes, one scalar out."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .backends import BACKENDS
from .checkpoint import Checkpointed
from .checks import check_logits, check_order, full_target, scales_or_map, warn_of_order
from .constants import Constant, refuse_meta
from .distributed import SharedByRanks, map_losses_over_ranks, whole
from .mixing import AWF_SHARING, awf_rows, draw_awf, draw_cat, drawn, new_generator
from .names import suggests_options
from .ops import map_stats
from .options import (
    CONCAT,
    MUL,
    ORDER,
    SUPERVISION,
    WIDEST,
    ce_class_weights,
    check_choice,
    check_mode,
    check_recipe,
    check_stacked_dim,
    dice_class_weights,
    is_weighted_mean,
    without_common_factor,
)
from .pixels import weigh_pixels
from .plan import OPERATORS, MixPlan
from .presets import preset_options
from .pruning import PrunedMaps, check_pruning, no_gradient_from
from .recipe import counts_any, map_losses
from .trained import TrainedParameters
from .weighting import WEIGHTING, map_weights, weighted_total


class LoMixLoss(PrunedMaps, SharedByRanks, TrainedParameters, Checkpointed):
    """LoMix: CE + Dice on every scale of a decoder and on every mixture of scales, under learned weights.

    Calling it with a list of logits and labels returns one scalar. Its parameters must be given to the optimizer, with
    weight_decay=0. docs/recipes.md has the table of recipes, what each is equal to, and which weighting to take.

    Args:
        num_classes: C, background included: at least 2, or with `sigmoid` at least 1.
        num_scales: L, 1 to 8.
        supervision: "lomix" (the method); "mutation" (MERIT: every non-empty subset added, weight 1);
            "deep_supervision" (every scale, weight 1); "last_layer" (the finest scale alone, weight 1). The last three
            fix operators, weighting and `mul` themselves.
        operators: mixes for "lomix", out of "add", "mul", "cat", "awf" (the default) and "sub", "avg", "max"; () gives
            deep supervision with learned weights.
        subsets: which sets of scales are mixed: None (all), "pairs", or a list of increasing tuples of scale numbers, 0
            the coarsest. For "lomix" and "mutation".
        max_subset_size: None, or the most scales in a mix; not together with `subsets`.
        mul: "logits" (the product of the logits, as published) or "bounded" (of P / sqrt(1 + (P / 2)^2), which cannot
            overflow for finite logits), see `MixPlan.create`.
        concat: "learned" (one 1x1 convolution per subset, trained) or "resampled" (the authors' code: drawn anew at
            every call in training mode, from a generator of this module's own, never trained; evaluation and
            `map_losses` use what the next such call will).
        awf_sharing: which pairs share attention weights: "size" (the authors' code), "subset" or "scale".
        weighting: of the maps. "softplus" (as published: softplus(alpha), which can only fall), "fixed" (all 1),
            "normalized" (M softplus(alpha) / sum: constant total), "uncertainty" (softplus(alpha), and minus the sum of
            their logarithms: 1 / loss at rest).
        order: "coarse_to_fine" or "fine_to_coarse", the order of the list of logits. None takes the first and warns,
            once, of maps of one size, which do not tell. Names and parameters always count from the coarsest scale,
            0, so a checkpoint does not depend on it.
        stacked_dim: 1 if all scales come in one tensor [B, L, C, *native] (MONAI DynUNet), 0 for [L, B, C, *native],
            None for a list.
        sigmoid: every class is a question of its own (multi-label, regions, or C = 1): sigmoid and binary CE in place
            of softmax and CE. The target is one value a class.
        lambda_ce, lambda_dice: weights of the two terms of every map loss.
        smooth_nr, smooth_dr: smoothing of Dice, numerator and denominator.
        squared_pred: Dice denominator sums s^2 (True, the authors) or s.
        include_background: whether class 0 enters Dice.
        batch: Dice sums over the whole batch (True, the authors) or per sample.
        jaccard: 1 - IoU in place of Dice, as MONAI has it.
        tversky: None, or (alpha, beta) of false positives and negatives: the Tversky loss in place of Dice. Needs
            squared_pred=False.
        absent_classes: "include", or "exclude": classes without a target in the batch (the sample, with batch=False)
            leave the mean of Dice.
        weight: factor of each class's Dice before the mean: C numbers, C - 1 with include_background=False, or one.
        ce_weight: C numbers, weight of each class in CE; under sigmoid of its positives (pos_weight).
        ce_per_sample: normalise CE in each sample, then mean over samples, instead of over the batch at once.
        weighted_ce: whether weight maps weigh CE too, or Dice alone.
        ignore_index: label of pixels that do not count, in CE and in Dice; may lie outside [0, C).
        label_smoothing: 0 to 1, of CE, as torch.nn.CrossEntropyLoss has it; not with sigmoid.
        structure: weigh pixels by PraNet's 1 + 5 |mean of their surroundings - target|; for sigmoid and C = 1.
        process_group: None, "world" or a torch.distributed.ProcessGroup: the batch is that of all its ranks together.
            In training mode (not after `eval()`) their statistics are added up, so each rank has the loss of the whole
            batch, and gradients averaged over ranks are those of one process with all of it.
        impl: "auto" or a backend of `available_backends`.
        prune_below: maps whose weight is under it are left out of forward and backward; 0 (default) is off. See
            `update_pruning` for what is dropped, when, and how it is reported.
        prune_every: calls in training from one choice of the maps to the next, or None: only in `update_pruning`.

    Attributes:
        alpha: Parameter [M], unless the weights are fixed.
        cat_weight, cat_bias: Parameters [K, C, C] and [S, C], with "cat" learned.
        awf_weight, awf_bias: Parameters [rows, C] and [rows], with "awf"; see `lomix_fast.mixing.awf_rows`.
        weight, ce_weight: the class weights as given, float64 on the CPU, or None. They belong to the configuration: no
            checkpoint holds them, no cast of the criterion rounds them, and writing to these copies changes nothing.
        plan: the `MixPlan` of all maps. map_names: tuple of M names such as "orig_3" or "add_0_1".

    Raises:
        TypeError, ValueError: an argument out of range or a combination that contradicts itself, named in the message.

    Source: Rahman and Marculescu, "LoMix", NeurIPS 2025 and the released code; argument names follow
    monai.losses.DiceCELoss and TverskyLoss.
    """

    alpha: nn.Parameter | None
    cat_weight: nn.Parameter | None
    cat_bias: nn.Parameter | None
    awf_weight: nn.Parameter | None
    awf_bias: nn.Parameter | None
    _weight: Constant | None
    _ce_weight: Constant | None
    _ce_factors: Constant | None
    _awf_index: Constant | None

    @suggests_options
    def __init__(
        self,
        num_classes: int,
        num_scales: int,
        *,
        supervision: str = "lomix",
        operators: Sequence[str] = OPERATORS,
        subsets: Sequence[Sequence[int]] | str | None = None,
        max_subset_size: int | None = None,
        mul: str = "logits",
        concat: str = "learned",
        awf_sharing: str = "size",
        weighting: str = "softplus",
        order: str | None = None,
        stacked_dim: int | None = None,
        sigmoid: bool = False,
        lambda_ce: float = 0.3,
        lambda_dice: float = 0.7,
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        squared_pred: bool = True,
        include_background: bool = True,
        batch: bool = True,
        jaccard: bool = False,
        tversky: tuple[float, float] | None = None,
        absent_classes: str = "include",
        weight: Sequence[float] | Tensor | float | None = None,
        ce_weight: Sequence[float] | Tensor | None = None,
        ce_per_sample: bool = False,
        weighted_ce: bool = True,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        structure: bool = False,
        process_group: Any = None,
        impl: str = "auto",
        prune_below: float = 0.0,
        prune_every: int | None = 100,
    ) -> None:
        super().__init__()
        # Not an attribute of its own, so that replicas, which live for one call, share it.
        self._said = {"order": order is not None}
        order = ORDER[0] if order is None else order
        for name, value, known in (
            ("supervision", supervision, SUPERVISION),
            ("concat", concat, CONCAT),
            ("awf_sharing", awf_sharing, AWF_SHARING),
            ("weighting", weighting, WEIGHTING),
            ("order", order, ORDER),
            ("mul", mul, MUL),
            ("impl", impl, ("auto", *BACKENDS)),
        ):
            check_choice(name, value, known)
        check_stacked_dim(stacked_dim)
        # What `map_losses` of the recipe takes, and what `map_stats` takes of how a target is read.
        self.recipe: dict[str, Any] = {
            "lambda_ce": lambda_ce,
            "lambda_dice": lambda_dice,
            "smooth_nr": smooth_nr,
            "smooth_dr": smooth_dr,
            "include_background": include_background,
            "batch": batch,
            "sigmoid": sigmoid,
            "jaccard": jaccard,
            "tversky": tversky,
            "absent_classes": absent_classes,
            "ce_per_sample": ce_per_sample,
        }
        self.reading: dict[str, Any] = {
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "weighted_ce": weighted_ce,
        }
        check_recipe(num_classes, squared_pred=squared_pred, structure=structure, **self.recipe, **self.reading)
        # torch.compile(dynamic=True) compiles twice over a float that becomes part of a key, but not over the int 0.
        self.reading["label_smoothing"] = label_smoothing or 0
        operators, weighting = check_mode(num_scales, supervision, operators, weighting, mul, subsets, max_subset_size)
        check_pruning(prune_below, prune_every, weighting, supervision)
        self._start_sharing(process_group, concat if "cat" in operators else "learned")
        with unset_fake_temporarily():  # inside a FakeTensorMode there would be no numbers
            of_ce = ce_class_weights(ce_weight, num_classes)
            self._ce_weight = _constant(of_ce)
            self._ce_factors = None if of_ce is None else _constant(without_common_factor(of_ce))
            self._weight = _constant(dice_class_weights(weight, num_classes, include_background))
        originals = (num_scales - 1,) if supervision == "last_layer" and type(num_scales) is int else None
        options: dict[str, Any] = {"squared": squared_pred, "sigmoid": sigmoid}
        self._chosen: dict[str, Any] = {"subsets": subsets, "max_subset_size": max_subset_size}
        mixes = {"bounded": mul == "bounded", **self._chosen}
        plan = MixPlan.create(num_scales, tuple(operators), originals, **options, **mixes)
        self._start_pruning(plan, prune_below, prune_every)
        self._single = MixPlan.create(1, (), **options)  # for a call with one tensor
        self.num_classes, self.num_scales = num_classes, num_scales
        self.supervision, self.concat, self.awf_sharing = supervision, concat, awf_sharing
        self.weighting, self.order, self.impl, self.structure = weighting, order, impl, structure
        self.stacked_dim = stacked_dim
        self._make_parameters()
        self._place_constants()
        self._start_watching()
        self._is_made = True

    def __setattr__(self, name: str, value: Any) -> None:
        """As torch.nn.Module has it, but options stay what they were made with.

        Raises:
            AttributeError: an option of the constructor other than `impl`.
            ValueError: an unknown backend.
        """
        if name == "impl":
            check_choice(name, value, ("auto", *BACKENDS))
        super().__setattr__(name, value)

    @classmethod
    def preset(cls, name: str, num_classes: int, num_scales: int, **overrides: Any) -> LoMixLoss:
        """A criterion with a recipe that is known by name.

        Args:
            name: "official", "monai", "nnunet" or "polyp", see `lomix_fast.presets.preset_options`.
            num_classes, num_scales: as for the constructor; "polyp" has one class.
            overrides: other options of the constructor, and bce="weighted" or "as_released" for "polyp".

        Raises:
            TypeError, ValueError: as the constructor, and ValueError for an unknown name or an override that
                contradicts the preset.
        """
        return cls(num_classes, num_scales, **preset_options(name, num_classes, **overrides))

    def _make_parameters(self) -> None:
        """Create exactly the parameters that this configuration trains, so that DDP finds none unused."""
        for name in ("alpha", "cat_weight", "cat_bias", "awf_weight", "awf_bias"):
            self.register_parameter(name, None)
        self._generator: torch.Generator | None = None
        rows, index = awf_rows(self.plan, self.awf_sharing)
        self._awf_index = Constant(index, torch.int64) if self.plan.uses_awf else None
        if self.weighting != "fixed":
            self.alpha = nn.Parameter(torch.zeros(self.plan.num_maps))
        if self.plan.uses_cat and self.concat == "learned":
            weight, bias = draw_cat(self.plan, self.num_classes)
            self.cat_weight, self.cat_bias = nn.Parameter(weight), nn.Parameter(bias)
        elif self.plan.uses_cat:
            self._generator = new_generator()
        if self.plan.uses_awf:
            weight, bias = draw_awf(rows, self.num_classes)
            self.awf_weight, self.awf_bias = nn.Parameter(weight), nn.Parameter(bias)
        self._shapes = {name: tuple(parameter.shape) for name, parameter in self.named_parameters()}

    @property
    def weight(self) -> Tensor | None:
        """Factors of each class's Dice, [C], [C - 1] or a scalar, float64 on the CPU; None without."""
        return None if self._weight is None else self._weight.on(torch.device("cpu")).clone()

    @property
    def ce_weight(self) -> Tensor | None:
        """Weights of the classes in cross-entropy, [C], float64 on the CPU; None without."""
        return None if self._ce_weight is None else self._ce_weight.on(torch.device("cpu")).clone()

    @property
    def map_names(self) -> tuple[str, ...]:
        """Names of the M maps in order; numbers are scales, 0 the coarsest."""
        return self.plan.map_names

    def map_weights(self) -> Tensor:
        """Current weight of each map, [M], detached: the one in use, or for a dropped map the one it would have.

        Under FSDP they are gathered, so every rank has to ask.
        """
        return self._weights().detach()

    def _weights(self) -> Tensor:
        if self.alpha is not None:
            return map_weights(whole(self.alpha), self.weighting)
        device = next((own.device for own in self.parameters()), "cpu")
        return torch.ones(self.plan.num_maps, device=device)

    def map_losses(
        self,
        logits: Sequence[Tensor] | Tensor,
        target: Tensor | Sequence[Tensor],
        mask: Tensor | None = None,
        weight_map: Tensor | None = None,
    ) -> Tensor:
        """Loss of each map before its weight, [M], for logging, dropped maps included; differentiable.

        With a `process_group`, in training mode, it is that of the whole batch, and every rank has to ask.

        Args:
            logits: list or tuple of L tensors [B, C, *native] in `order`, or a stack of them.
            target, mask, weight_map: as for `forward`.

        Raises:
            TypeError, ValueError, RuntimeError: as `map_stats`, and ValueError for sizes that contradict `order`.
        """
        maps = self._check(self._scales_or_map(logits, target))
        return self._map_losses(maps, full_target(target, maps, self.order), mask, weight_map, self.plan)[0]

    def _map_losses(
        self,
        maps: list[Tensor],
        target: Any,
        mask: Tensor | None,
        weight_map: Tensor | None,
        plan: MixPlan,
        advances: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Losses of the maps of the plan, and whether any pixel counts."""
        if not plan.uses_cat:
            return self._map_losses_of(maps, target, mask, weight_map, plan, None, None)
        if self._generator is None:
            return self._map_losses_of(maps, target, mask, weight_map, plan, self.cat_weight, self.cat_bias)
        with drawn(self._generator, self.plan, self.num_classes, advances) as (weight, bias):
            device = maps[0].device
            return self._map_losses_of(maps, target, mask, weight_map, plan, weight.to(device), bias.to(device))

    def _map_losses_of(
        self,
        maps: list[Tensor],
        target: Any,
        mask: Tensor | None,
        weight_map: Tensor | None,
        plan: MixPlan,
        cat_weight: Tensor | None,
        cat_bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The same with these parameters of the concatenations."""
        group = self._ranks.group() if self._ranks is not None and self.training else None
        awf_weight = awf_bias = None
        device = maps[0].device
        of_ce = self._ce_factors if is_weighted_mean(target, maps[0].dim(), plan.sigmoid) else self._ce_weight
        ce_weight = None if of_ce is None else of_ce.on(device)
        weight = None if self._weight is None else self._weight.on(device)
        if plan.uses_awf and self.awf_weight is not None and self.awf_bias is not None and self._awf_index is not None:
            index = self._awf_index.on(self.awf_weight.device)
            awf_weight, awf_bias = self.awf_weight[index], self.awf_bias[index]
        reading = dict(self.reading)
        target, weight_map, reading["ignore_index"] = weigh_pixels(
            target,
            maps[0],
            mask=mask,
            weight_map=weight_map,
            structure=self.structure,
            sigmoid=plan.sigmoid,
            ignore_index=reading["ignore_index"],
            weighted_ce=reading["weighted_ce"],
        )
        stats, target_stats = map_stats(
            maps,
            target,
            plan,
            weight_map=weight_map,
            ce_weight=ce_weight,
            cat_weight=cat_weight,
            cat_bias=cat_bias,
            awf_weight=awf_weight,
            awf_bias=awf_bias,
            impl=self.impl,
            **reading,
        )
        if group is not None:
            return map_losses_over_ranks(stats, target_stats, group, weight=weight, **self.recipe)
        return map_losses(stats, target_stats, weight=weight, **self.recipe), counts_any(target_stats)

    def forward(
        self,
        logits: Sequence[Tensor] | Tensor,
        target: Tensor | Sequence[Tensor],
        mask: Tensor | None = None,
        weight_map: Tensor | None = None,
    ) -> Tensor:
        """The total loss, a scalar in float32 (float64 for float64 logits).

        Where no pixel counts it is exactly 0, with gradients of exactly 0.

        Args:
            logits: list or tuple of L tensors [B, C, *native] in `order`, or with `stacked_dim` one tensor of them all;
                or one tensor [B, C, *native], for which the result is its plain loss with weight 1 (what a network
                returns in evaluation).
            target: labels [B, *full] or [B, 1, *full], or one value from 0 to 1 a class, [B, C, *full]: soft or one-hot
                labels, regions with `sigmoid`; see `map_stats`. Of a list, one a scale as nnU-Net makes them, that of
                the finest scale is used; the sizes of the others have to be those of their logits.
            mask: [B, *full] or [B, 1, *full], bool or any other dtype; where it is 0 a pixel does not count.
            weight_map: weights of pixels of those shapes, float or bool, at least 0; together with `mask` their
                product, with `structure` times that.

        Raises:
            TypeError, ValueError, RuntimeError: as `map_losses`.
        """
        logits = self._scales_or_map(logits, target)
        if isinstance(logits, Tensor):
            self._check_classes(logits)
            self._check_device(logits.device)
            return self._map_losses(check_logits([logits]), target, mask, weight_map, self._single)[0][0]
        maps = self._check(logits)
        target = full_target(target, maps, self.order)
        if self.alpha is None:
            return self._map_losses(maps, target, mask, weight_map, self.plan, self.training)[0].sum()
        choice, is_counted_call = self._choice, self._counts_calls and self.training and torch.is_grad_enabled()
        if is_counted_call:
            choice = self._next_choice(self._weights())
        losses, is_counted = self._map_losses(maps, target, mask, weight_map, choice.active, self.training)
        if is_counted_call:
            self._take(choice)  # a call that raises has counted nothing
        index = choice.index_on(self.alpha.device)
        total = weighted_total(losses, self.alpha, self.weighting, is_counted, index)
        return total if index is None else total + self._idle(choice.active, maps, total)

    def _idle(self, active: MixPlan, maps: list[Tensor], like: Tensor) -> Tensor:
        """Zero, with a gradient of zero for what only maps that are not active would read."""
        idle: list[Tensor | None] = [maps[i] for i in self.plan.used_scales if i not in active.used_scales]
        idle += [] if active.uses_cat else [self.cat_weight, self.cat_bias]
        idle += [] if active.uses_awf else [self.awf_weight, self.awf_bias]
        return no_gradient_from(idle, like)

    def _scales_or_map(self, logits: Any, target: Any) -> Any:
        return scales_or_map(logits, target, self.num_classes, self.num_scales, self.stacked_dim)

    def _check(self, logits: Sequence[Tensor]) -> list[Tensor]:
        """Check the list against this criterion and return it coarsest first."""
        maps = check_logits(logits)
        if len(maps) != self.num_scales:
            raise ValueError(f"logits: got {len(maps)} tensors, expected num_scales={self.num_scales}")
        self._check_classes(maps[0])
        sizes = [tuple(z.shape[2:]) for z in maps]
        check_order(sizes, self.order)
        if not self._said["order"] and len(sizes) > 1 and sizes[0] == sizes[-1]:  # and so all of them
            warn_of_order(self.order)
            if not torch.compiler.is_compiling():  # compiled code would be compiled once more for it
                self._said["order"] = True
        self._check_device(maps[0].device)
        return maps if self.order == "coarse_to_fine" else maps[::-1]

    def _check_device(self, device: torch.device) -> None:
        for own in self.parameters():  # a loop, as torch.compile of 2.8 cannot trace next()
            if own.is_meta and device.type != "meta":
                refuse_meta(type(self).__name__, list(self.named_parameters()))
            if own.device != device:
                raise ValueError(
                    f"logits: got device {device}, expected {own.device} where this criterion lives; move it with "
                    f"criterion.to({str(device)!r})"
                )
        for name, shape in self._shapes.items():
            parameter = getattr(self, name)
            if parameter.shape != shape:
                raise ValueError(f"{name}: got shape {tuple(parameter.shape)}, expected {shape} as it was made with")

    def _check_classes(self, logits: Tensor) -> None:
        if logits.dim() < 2 or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"logits: got shape {tuple(logits.shape)}, expected num_classes={self.num_classes} channels"
            )

    def extra_repr(self) -> str:
        """Text shown by print(criterion)."""
        pruned = f", prune_below={self.prune_below}, prune_every={self.prune_every}, dropped_maps={self.dropped_maps}"
        shared = "" if self.process_group is None else f", process_group={self.process_group!r}"
        options = {**self.recipe, **self.reading, "squared_pred": self.plan.squared, "structure": self.structure}
        options["stacked_dim"] = self.stacked_dim
        options |= {"mul": "bounded" if self.plan.bounded else "logits", **self._chosen}
        for name, value in (("weight", self._weight), ("ce_weight", self._ce_weight)):
            options[name] = None if value is None else value.values
        defaults = inspect.signature(LoMixLoss).parameters
        changed = "".join(f", {name}={v!r}" for name, v in options.items() if v != defaults[name].default)
        return (
            f"num_classes={self.num_classes}, num_scales={self.num_scales}, supervision={self.supervision!r}, "
            f"operators={self.plan.operators}, maps={self.plan.num_maps}, weighting={self.weighting!r}, "
            f"order={self.order!r}, impl={self.impl!r}{changed}{shared}{pruned if self.prune_below > 0 else ''}"
        )


LoMixLoss._fixed = frozenset(inspect.signature(LoMixLoss.__init__).parameters) - {"self", "impl"}


def _constant(weights: Tensor | None) -> Constant | None:
    """Class weights as numbers, on no device and of no dtype that the criterion may be moved to."""
    return None if weights is None else Constant(weights.tolist(), WIDEST)
