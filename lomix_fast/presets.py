"""Recipes under the names of the projects they come from."""

from __future__ import annotations

from typing import Any

from .options import check_choice

PRESETS = ("official", "monai", "nnunet", "polyp")
BCE = ("weighted", "as_released")

_LINEAR = {"squared_pred": False, "lambda_ce": 1.0, "lambda_dice": 1.0}
_NNUNET = {**_LINEAR, "batch": True, "smooth_nr": 1e-5, "smooth_dr": 1e-5}
_POLYP = {
    **_LINEAR,
    "sigmoid": True,
    "structure": True,
    "jaccard": True,
    "batch": False,
    # (2 I + 2) / (2 (P + G - I) + 2) is their (I + 1) / (P + G - I + 1).
    "smooth_nr": 2.0,
    "smooth_dr": 2.0,
}

# What makes each preset what it is; with another value it would be another loss under its name.
_DEFINING = {
    "official": ("squared_pred", "jaccard", "tversky", "sigmoid", "structure", "batch", "include_background"),
    "monai": ("structure",),
    "nnunet": ("squared_pred", "jaccard", "tversky", "structure"),
    "polyp": (
        *("sigmoid", "structure", "jaccard", "tversky", "squared_pred", "ce_per_sample", "weighted_ce"),
        *("batch", "include_background", "smooth_nr", "smooth_dr"),
    ),
}
_DEFAULTS: dict[str, Any] = {
    "squared_pred": True,
    "jaccard": False,
    "tversky": None,
    "sigmoid": False,
    "structure": False,
    "batch": True,
    "include_background": True,
}


def preset_options(name: str, num_classes: int, **overrides: Any) -> dict[str, Any]:
    """Options of `LoMixLoss` for a preset.

    Args:
        name: "official": the authors', which are the defaults. "monai": the defaults of monai.losses.DiceCELoss.
            "nnunet": nnU-Net's CE + Dice, written with 1 - dice in place of its -dice; regions with sigmoid=True.
            "polyp": PraNet's structure loss.
        num_classes: C.
        overrides: options of `LoMixLoss` that replace or join those of the preset, except the ones that define it; and
            bce="weighted" (default) or "as_released" for "polyp": whether PraNet's weights weigh cross-entropy too, as
            its paper says, or not, as its released code has it (the deprecated reduce="none" means the mean). With
            "monai", weight goes to both terms as in DiceCELoss, unless ce_weight is given too or it is one number for
            all classes; and softmax, to_onehot_y and reduction are taken where they say what we do.

    Returns:
        Keyword arguments of `LoMixLoss`.

    Raises:
        TypeError: num_classes is not an int.
        ValueError: an unknown name, or an override that contradicts the preset, with the way out.
    """
    check_choice("name", name, PRESETS)
    if type(num_classes) is not int:
        raise TypeError(f"num_classes: got {num_classes!r}, expected an int")
    bce = overrides.pop("bce", None)
    if bce is not None and name != "polyp":
        raise ValueError(
            f"bce: got {bce!r} with preset {name!r}, expected it left out: it chooses between the two variants of "
            "preset 'polyp'; weighted_ce= says whether weight_map weighs cross-entropy"
        )
    options: dict[str, Any] = {}
    if name == "monai":
        options = {**_LINEAR, "batch": False}
        overrides = _as_monai_means(num_classes, overrides)
    elif name == "nnunet":
        # Its region-based training has no background among the regions.
        options = {**_NNUNET, "include_background": overrides.get("sigmoid") is True}
    elif name == "polyp":
        bce = "weighted" if bce is None else bce
        check_choice("bce", bce, BCE)
        if num_classes != 1:
            raise ValueError(
                f"num_classes: got {num_classes!r} with preset 'polyp', expected 1, the logit of the polyp; for more "
                "classes take preset 'monai' or 'nnunet'"
            )
        options = {**_POLYP, "weighted_ce": bce == "weighted", "ce_per_sample": bce == "weighted"}
    for option in _DEFINING[name]:
        wanted = options.get(option, _DEFAULTS.get(option))
        if option in overrides and overrides[option] != wanted:
            way_out = "pass bce='weighted' or 'as_released'" if option == "weighted_ce" else "leave it out"
            raise ValueError(
                f"{option}: got {overrides[option]!r} with preset {name!r}, expected {wanted!r}, which defines it; "
                f"{way_out}, or give all options to LoMixLoss yourself"
            )
    return {**options, **overrides}


def _as_monai_means(num_classes: int, overrides: dict[str, Any]) -> dict[str, Any]:
    """The arguments of DiceCELoss as options of `LoMixLoss`: its weight is one of both terms, three say nothing new.

    Raises:
        ValueError: an argument that asks for something else, or a weight that is not one a class.
    """
    given = dict(overrides)
    sigmoid = given.get("sigmoid", False)
    softmax = given.pop("softmax", None)
    if softmax is not None and softmax is not (not sigmoid):
        raise ValueError(
            f"softmax: got {softmax!r} with sigmoid={sigmoid!r}, expected {not sigmoid!r} or nothing: the input is "
            "always logits, of softmax unless sigmoid=True; pass one of the two, and no probabilities"
        )
    one_hot = given.pop("to_onehot_y", None)
    if one_hot not in (None, True, False) or (one_hot and sigmoid and num_classes > 1):
        raise ValueError(
            f"to_onehot_y: got {one_hot!r} with sigmoid={sigmoid!r}, expected nothing: the shape of the target says "
            "whether it holds class numbers, [B, 1, *full], or one value a class, [B, C, *full], as sigmoid needs"
        )
    reduction = given.pop("reduction", "mean")
    if reduction != "mean":
        raise ValueError(
            f"reduction: got {reduction!r}, expected 'mean' or nothing: the loss of a map has to be one number to be "
            "weighed; scale it with lambda_ce= and lambda_dice=, or take map_losses() and sum them yourself"
        )
    weight = given.get("weight")
    if weight is None or "ce_weight" in given or not hasattr(weight, "__len__") or getattr(weight, "ndim", 1) == 0:
        return given
    if len(weight) != num_classes:
        raise ValueError(
            f"weight: got {len(weight)} numbers with preset 'monai', expected {num_classes}, one a class, as "
            "DiceCELoss takes them for both terms; for Dice alone pass ce_weight=None too"
        )
    given["ce_weight"] = weight
    if num_classes == 1:
        del given["weight"]  # there DiceLoss leaves it out
    elif given.get("include_background") is False:
        given["weight"] = weight[1:]
    return given
