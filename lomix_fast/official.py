"""Drop-in for the loss module of the authors' training script: same arguments, results and checkpoint keys.

    from lomix_fast.official import CombinatorialMutationsLossModule

in place of the authors' class is the one line to change; a fused kernel then does the work.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backends import BACKENDS
from .checkpoint import KEY, CheckedWhole, CheckpointError, check_keys, faulty_entries
from .checks import check_logits
from .constants import Configured, Constant, refuse_meta
from .mixing import awf_rows, drawn, new_generator
from .names import suggests_options
from .official_checks import (
    check_ce,
    check_counts,
    check_dice,
    check_factor,
    check_labels,
    check_operations,
)
from .official_names import OUR_NAME, told_in_their_names
from .ops import map_stats
from .options import check_choice
from .plan import MixPlan
from .recipe import map_losses
from .reference import compute_dtype, mixed_maps, upsample

_LOGGER = logging.getLogger(__name__)

WITH_MIXES = ("mutation", "lomix")
_SUPERVISION = (*WITH_MIXES, "deep_supervision")
# What the authors' Dice does.
RECIPE: dict[str, Any] = {"smooth_nr": 1e-5, "smooth_dr": 1e-5, "include_background": True, "batch": True}


def _raw_weights(count: int) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(count)])


class WeightedFusion(nn.Module):
    """Holder of the convolutions that score the members of subsets of one size; it computes nothing itself.

    Args:
        num_stages: members of a subset.
        num_classes: C.

    Attributes:
        weight_convs: `num_stages` modules Conv2d(C, 1, 1). They stay two-dimensional for maps with 1 or 3
            spatial axes, so that a checkpoint has one form.
    """

    def __init__(self, num_stages: int, num_classes: int) -> None:
        super().__init__()
        self.weight_convs = nn.ModuleList([nn.Conv2d(num_classes, 1, 1) for _ in range(num_stages)])


class CombinatorialMutationsLossModule(Configured, CheckedWhole):
    """The authors' LoMix loss module, computed by `lomix_fast.map_stats`.

    Every output map and every mixture of the first `selecetd_num_maps` of them is given the loss lc1 * CE +
    lc2 * Dice under the weight softplus(raw), raw = 0 at the start.

    What differs from the authors' module, and only this: maps may be smaller than the labels (they are
    enlarged linearly, align_corners=False); half-precision maps are mixed in float32, and the result is
    float32 (float64 for float64 maps); the random "concat" convolutions, drawn anew at every call from the
    distribution of torch.nn.Conv2d, come from a generator of this module's own, seeded from the global one at
    construction, so that a call leaves the global generator alone; arguments that theirs would misread are
    refused.

    Args:
        original_num_maps: number of output maps given to each call, at least `selecetd_num_maps`, at most 8.
        num_classes: C, at least 2.
        selecetd_num_maps: number of maps that are mixed, the first of the list: 2 to 8, with at most 512 maps in
            all. Spelt as the authors spell it.
        operations: list of "add", "sub", "mul", "concat", "weighted_fusion" (or its synonym "wf"), "avg" and
            "max", in any order; None means all seven in this one.
        use_learnable_weights: learn the weight of each map; otherwise all are 1.
        supervision: "mutation" or "lomix" (originals and mixtures) or "deep_supervision" (originals alone).
        lc1: weight of CE.
        lc2: weight of Dice.
        impl: backend, "auto" or a name of `lomix_fast.available_backends`.

    Attributes:
        original_weights: ParameterList of raw weights, each [1]; with learnable weights.
        synthesized_weights: operation -> ParameterList of raw weights, each [1]; with learnable weights.
            Subsets by size, then lexicographic.
        weighted_fusion_modules: "2" .. "L" -> `WeightedFusion`; present whether used or not.

    Raises:
        TypeError, ValueError: an argument that is unknown, unsupported or out of range, named in the message.

    Source: behaviour of the module released with Rahman and Marculescu, "LoMix", NeurIPS 2025.
    """

    @suggests_options
    def __init__(
        self,
        original_num_maps: int,
        num_classes: int,
        selecetd_num_maps: int,
        operations: Sequence[str] | None = None,
        use_learnable_weights: bool = True,
        supervision: str = "mutation",
        lc1: float = 0.3,
        lc2: float = 0.7,
        *,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check_counts(original_num_maps, num_classes, selecetd_num_maps)
        self.operations = check_operations(operations)
        check_choice("supervision", supervision, _SUPERVISION)
        check_choice("impl", impl, ("auto", *BACKENDS))
        check_factor("lc1", lc1)
        check_factor("lc2", lc2)
        self.original_num_maps = original_num_maps
        self.num_classes = num_classes
        self.num_maps = selecetd_num_maps
        if type(use_learnable_weights) not in (bool, int) or use_learnable_weights not in (0, 1):
            raise TypeError(f"use_learnable_weights: got {use_learnable_weights!r}, expected True or False")
        self.use_learnable_weights = bool(use_learnable_weights)
        self.supervision = supervision
        self.lc1, self.lc2 = lc1, lc2
        self.impl = impl
        our_names = tuple(OUR_NAME[name] for name in self.operations)
        with told_in_their_names():
            self._whole = MixPlan.create(selecetd_num_maps, our_names)
        self._originals = MixPlan.create(original_num_maps, ())
        self._mixes = MixPlan.create(selecetd_num_maps, our_names, originals=()) if our_names else None
        if self.use_learnable_weights:
            self.original_weights = _raw_weights(original_num_maps)
            self.synthesized_weights = nn.ModuleDict(
                {name: _raw_weights(self._whole.num_subsets) for name in self.operations}
            )
        self.weighted_fusion_modules = nn.ModuleDict(
            {str(size): WeightedFusion(size, num_classes) for size in range(2, selecetd_num_maps + 1)}
        )
        self._fusion_rows = Constant(awf_rows(self._whole, "size")[1], torch.int64)  # [K]
        self._place_constants()
        self._generator: torch.Generator | None = None
        if self._whole.uses_cat:
            # Last, and only if needed: under one seed the fusion convolutions start as the authors' do.
            self._generator = new_generator()
        self._is_made = True

    def forward(
        self,
        output_maps: Sequence[Tensor],
        label_batch: Tensor | None = None,
        ce_loss: nn.Module | None = None,
        dice_loss: nn.Module | None = None,
        *,
        cat_weight: Tensor | None = None,
        cat_bias: Tensor | None = None,
    ) -> Any:
        """Losses of a batch; with maps alone, the mixed maps themselves.

        Args:
            output_maps: `original_num_maps` tensors [B, C, *native], coarsest first, 1 to 3 spatial axes,
                float16, bfloat16, float32 or float64. All may have full size, as the authors' networks give
                them.
            label_batch: class numbers [B, *full] or [B, 1, *full] in [0, C), of any integer or whole-number
                float dtype.
            ce_loss: nn.CrossEntropyLoss() as constructed by default. It says what to compute and is not
                called.
            dice_loss: the authors' DiceLoss(num_classes). Likewise.
            cat_weight: W [K, C, C] (pair, out class, in class; see `MixPlan.pairs`) to use as the "concat"
                convolutions of this call instead of random ones; with `cat_bias`.
            cat_bias: b [S, C].

        Returns:
            (final, deep_supervision_loss, mutation_loss), each [1]: final = deep_supervision_loss +
            mutation_loss for supervision "mutation" and "lomix", deep_supervision_loss for
            "deep_supervision". If label_batch, ce_loss and dice_loss are all None: list of the mixed maps [B,
            C, *size of the last mixed map], operation by operation, subset by subset, in float32 (float64 for
            float64 maps).

        Raises:
            TypeError, ValueError: an argument that does not fit, named in the message, before any work
                starts. Also any other ce_loss or dice_loss: it could not be honoured. Labels out of range as
                in `map_stats`.
        """
        with told_in_their_names():
            maps = self._check_maps(output_maps)
            given = {"label_batch": label_batch, "ce_loss": ce_loss, "dice_loss": dice_loss}
            missing = [name for name, value in given.items() if value is None]
            if missing and len(missing) < 3:
                raise TypeError(
                    f"{missing[0]}: got None, expected a value because others of {tuple(given)} were given; "
                    "pass all three for the losses, or none of them for the mixed maps"
                )
            if not missing:
                check_ce(ce_loss)
                check_dice(dice_loss, self.num_classes)
                check_labels(label_batch, maps[0])
            if self._generator is None or cat_weight is not None or cat_bias is not None:
                made = self._computed(maps, label_batch, cat_weight, cat_bias)
            else:
                with drawn(self._generator, self._whole, self.num_classes) as (weight, bias):
                    made = self._computed(maps, label_batch, weight.to(maps[0].device), bias.to(maps[0].device))
        if missing:
            return made
        originals, mixes = made
        original_weights, mix_weights = self._weights(originals)
        deep_supervision = (original_weights * originals).sum().reshape(1)
        mutation = (mix_weights * mixes).sum().reshape(1)
        final = deep_supervision + mutation if self.supervision in WITH_MIXES else deep_supervision
        return final, deep_supervision, mutation

    def _computed(self, maps: list[Tensor], labels: Any, cat_weight: Tensor | None, cat_bias: Tensor | None) -> Any:
        """The mixed maps, or with labels the losses of originals and mixtures."""
        parameters = self._parameters_of_mixes(cat_weight, cat_bias)
        return self._mixed_maps(maps, parameters) if labels is None else self._losses(maps, labels, parameters)

    def _losses(self, maps: list[Tensor], labels: Any, parameters: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Losses of the originals [original_num_maps] and of the mixtures [operations * subsets]."""
        if self._mixes is None:
            originals = self._map_losses(maps, labels, self._originals, {})
            return originals, originals.new_zeros(0)
        if self.supervision in WITH_MIXES and self.original_num_maps == self.num_maps:
            both = self._map_losses(maps, labels, self._whole, parameters)
            return both[: self.num_maps], both[self.num_maps :]
        # Two calls where the originals stand apart: there are more of them than maps to mix, or they alone
        # are differentiated, and then the backward pass does nothing for the mixtures.
        return (
            self._map_losses(maps, labels, self._originals, {}),
            self._map_losses(maps[: self.num_maps], labels, self._mixes, parameters),
        )

    def _map_losses(self, maps: list[Tensor], labels: Any, plan: MixPlan, parameters: dict[str, Any]) -> Tensor:
        stats, target_stats = map_stats(maps, labels, plan, impl=self.impl, **parameters)
        return map_losses(stats, target_stats, lambda_ce=self.lc1, lambda_dice=self.lc2, **RECIPE)

    def _weights(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of the originals [original_num_maps] and of the mixtures [operations * subsets]."""
        if not self.use_learnable_weights:
            mixes = len(self.operations) * self._whole.num_subsets
            return like.new_ones(self.original_num_maps), like.new_ones(mixes)
        groups = [p for name in self.operations for p in self._synthesized(name)]
        # Apart from each other, so that the gradient of one total leaves the weights of the other alone.
        originals = F.softplus(torch.cat(list(self.original_weights))).to(like.dtype)
        return originals, F.softplus(torch.cat(groups)).to(like.dtype) if groups else like.new_zeros(0)

    def _synthesized(self, operation: str) -> list[Tensor]:
        # Not its parameters(), of which a replica of DataParallel has none.
        weights: Any = self.synthesized_weights[operation]
        return list(weights)

    def _parameters_of_mixes(self, cat_weight: Tensor | None, cat_bias: Tensor | None) -> dict[str, Any]:
        """W, b, u and v as `map_stats` takes them, as far as the operations need them."""
        parameters: dict[str, Any] = {}
        if (cat_weight is None) != (cat_bias is None):
            raise ValueError("cat_weight and cat_bias: got only one of the two, expected both or neither")
        if cat_weight is not None and cat_bias is not None:
            if not self._whole.uses_cat:
                raise ValueError(f"cat_weight: got a tensor, expected None because operations={self.operations}")
            parameters |= {"cat_weight": cat_weight, "cat_bias": cat_bias}
        if self._whole.uses_awf:
            holders: list[Any] = list(self.weighted_fusion_modules.values())
            convolutions = [one for holder in holders for one in holder.weight_convs]
            rows = torch.cat([one.weight.reshape(1, -1) for one in convolutions])  # [n, C]
            biases = torch.cat([one.bias for one in convolutions])  # [n]
            index = self._fusion_rows.on(rows.device)
            parameters |= {"awf_weight": rows[index], "awf_bias": biases[index]}
        return parameters

    def _mixed_maps(self, maps: list[Tensor], parameters: dict[str, Any]) -> list[Tensor]:
        """All mixed maps at the size of the last one mixed; made in plain PyTorch, for they are asked for."""
        if self._mixes is None:
            return []
        dtype, mixed = compute_dtype(maps[0].dtype), maps[: self.num_maps]
        scales = [upsample(z.to(dtype), mixed[-1].shape[2:]) for z in mixed]
        values = {name: value.to(dtype) for name, value in parameters.items()}
        return list(mixed_maps(scales, self._mixes, **values))

    def _check_maps(self, output_maps: Any) -> list[Tensor]:
        maps = check_logits(output_maps)
        if len(maps) != self.original_num_maps:
            raise ValueError(f"output_maps: got {len(maps)} maps, expected original_num_maps={self.original_num_maps}")
        if maps[0].shape[1] != self.num_classes:
            raise ValueError(
                f"output_maps: got shape {tuple(maps[0].shape)}, expected num_classes={self.num_classes} channels"
            )
        sizes = [tuple(z.shape[2:]) for z in maps]
        for coarse, fine in pairwise(sizes):
            if any(c > f for c, f in zip(coarse, fine, strict=True)):
                raise ValueError(f"output_maps: got sizes {sizes}, expected the coarsest map first; reverse the list")
        if maps[0].device.type != "meta":
            refuse_meta(type(self).__name__, list(self.named_parameters()))
        for own in self.parameters():
            if maps[0].device != own.device:
                raise ValueError(
                    f"output_maps: got device {maps[0].device}, expected {own.device}, where this module is; move it "
                    f"with .to({str(maps[0].device)!r})"
                )
        return maps

    def print_weights(self) -> None:
        """Log raw and softplus weights of the originals and of each operation, with sums, at level INFO."""
        if not self.use_learnable_weights:
            _LOGGER.info("Map weights are not learned: all are 1")
            return
        groups = {
            "original": list(self.original_weights),
            **{op: self._synthesized(op) for op in self.operations},
        }
        for name, weights in groups.items():
            raw = torch.cat([w.detach() for w in weights])
            positive = F.softplus(raw)
            for kind, values in (("raw", raw), ("softplus", positive)):
                _LOGGER.info("%s weights (%s): %s", name, kind, " ".join(f"{v:.4f}" for v in values.tolist()))
            _LOGGER.info("%s weights, sum of softplus: %.4f", name, float(positive.sum()))

    def save_weights(self, save_path: str | os.PathLike[str]) -> None:
        """Write the state dict to a file with torch.save; the authors' module reads it too."""
        torch.save(self.state_dict(), save_path)
        _LOGGER.info("Saved the weights of the loss to %s", save_path)

    def load_weights(self, load_path: str | os.PathLike[str]) -> None:
        """Read a state dict that `save_weights` has written, here or in the authors' module; tensors only.

        Raises:
            CheckpointError: keys or shapes differ from those of this module; nothing has been loaded.
            pickle.UnpicklingError: the file holds more than tensors.
        """
        self.load_state_dict(torch.load(load_path, map_location="cpu", weights_only=True))
        _LOGGER.info("Loaded the weights of the loss from %s", load_path)

    def _check_checkpoint(self, state_dict: Mapping[str, Any], prefix: str, strict: bool, assign: bool) -> None:
        check_keys(state_dict)
        if prefix + KEY in state_dict:
            raise CheckpointError(
                f"state_dict: got that of a LoMixLoss, with an entry {prefix + KEY!r}, expected that of this module; "
                "lomix_fast.convert.lomix_to_official(state_dict, num_classes=..., num_scales=...) makes one"
            )
        wrong = ", ".join(faulty_entries(self, state_dict, prefix, strict, assign))
        if wrong:
            raise CheckpointError(
                f"state_dict: got {wrong}, expected the entries of a module with original_num_maps="
                f"{self.original_num_maps}, num_classes={self.num_classes}, selecetd_num_maps={self.num_maps} and "
                f"operations={self.operations}; make this module as that of the checkpoint was"
            )

    def extra_repr(self) -> str:
        """Text shown by print(module)."""
        return (
            f"original_num_maps={self.original_num_maps}, num_classes={self.num_classes}, "
            f"selecetd_num_maps={self.num_maps}, operations={self.operations}, "
            f"use_learnable_weights={self.use_learnable_weights}, supervision={self.supervision!r}, "
            f"lc1={self.lc1}, lc2={self.lc2}, impl={self.impl!r}"
        )


CombinatorialMutationsLossModule._fixed = frozenset(
    {*inspect.signature(CombinatorialMutationsLossModule.__init__).parameters, "num_maps"} - {"self", "impl"}
)
