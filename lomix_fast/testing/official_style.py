"""The loss the literal way: every map made in full and kept by autograd, as the authors' released code does.

Nobody should train with this. It exists to be compared with: the numbers must agree, the time and the memory
should not. In units of one full-size map it keeps, for float32 maps and int64 labels and S = 2^L - 1 - L
subsets,

    3 (L + 4 S)     per map: log-softmax for CE, softmax and one-hot labels for Dice
    + 2 K           the concatenated inputs of "cat" and the stacked inputs of "awf"
    + K - 2 S       partial products of "mul"
    + K / C         attention weights of "awf"

maps for the backward pass, and the 4 S mixed maps themselves until the total is known.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..mixing import awf_rows, draw_awf
from ..plan import OPERATORS, MapSpec, MixPlan

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_MODULE: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}


class DiceLoss(nn.Module):
    """Soft Dice in the style of the authors' helper, costs included: one-hot labels, one `.item()` a class.

    Args:
        n_classes: C, number of classes.

    Attributes:
        n_classes: as given; `lomix_fast.official` recognises the authors' loss by class name and this
            attribute.

    Source: SPEC of LoMix; squared denominator, smoothing 1e-5, sums over the whole batch, background
    included.
    """

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.n_classes = n_classes

    def forward(
        self, inputs: Tensor, target: Tensor, weight: Sequence[float] | None = None, softmax: bool = False
    ) -> Tensor:
        """Mean over the classes of weight_c * (1 - (2 I_c + 1e-5) / (Z_c + Y_c + 1e-5)), a scalar.

        Args:
            inputs: [B, C, *full], logits if `softmax`, otherwise probabilities.
            target: class numbers [B, *full], any dtype.
            weight: factor of each class; 1 when None.
            softmax: apply softmax over the classes first.

        Raises:
            ValueError: the channels of `inputs` are not `n_classes`.
        """
        if inputs.shape[1] != self.n_classes:
            raise ValueError(f"inputs: got {inputs.shape[1]} channels, expected n_classes={self.n_classes}")
        if softmax:
            inputs = inputs.softmax(dim=1)
        layers = [(target == c).unsqueeze(1) for c in range(self.n_classes)]
        one_hot = torch.cat(layers, dim=1).to(inputs.dtype)  # [B, C, *full], made anew for every map
        self.class_scores = []
        total = inputs.new_zeros(())
        for c in range(self.n_classes):
            s, y = inputs[:, c], one_hot[:, c]  # each [B, *full]
            loss = 1 - (2 * (s * y).sum() + 1e-5) / ((s * s).sum() + (y * y).sum() + 1e-5)
            self.class_scores.append(1.0 - loss.item())  # a wait for the device, once per class and map
            total = total + loss * (1.0 if weight is None else weight[c])
        return total / self.n_classes


class OfficialStyleLoss(nn.Module):
    """LoMix the literal way: sum over the M maps of softplus(alpha_m) * (lambda_ce CE + lambda_dice Dice).

    Args:
        num_classes: C.
        num_scales: L.
        operators: mixes, out of "add", "mul", "cat", "awf", in map order.
        lambda_ce, lambda_dice: weights of the two terms, 0.3 and 0.7 in the paper.

    Attributes:
        alpha: Parameter [M], zeros at the start.
        awf_weight, awf_bias: Parameters [L(L+1)/2 - 1, C] and [L(L+1)/2 - 1], one row per (subset size,
            position) by size then position; they exist whether or not "awf" is used, as in the authors'
            module.
        plan: the `MixPlan` whose map order is followed.

    Raises:
        TypeError, ValueError: as `MixPlan.create`.

    Source: SPEC of LoMix, including the memory and host synchronisations it lists.
    """

    def __init__(
        self,
        num_classes: int,
        num_scales: int,
        operators: Sequence[str] = OPERATORS,
        lambda_ce: float = 0.3,
        lambda_dice: float = 0.7,
    ) -> None:
        super().__init__()
        self.plan = MixPlan.create(num_scales, tuple(operators))
        self.num_classes = num_classes
        self.lambda_ce, self.lambda_dice = lambda_ce, lambda_dice
        rows, self._row_of_pair = awf_rows(self.plan, "size")
        awf_weight, awf_bias = draw_awf(rows, num_classes)
        self.alpha = nn.Parameter(torch.zeros(self.plan.num_maps))
        self.awf_weight, self.awf_bias = nn.Parameter(awf_weight), nn.Parameter(awf_bias)
        self.ce, self.dice = nn.CrossEntropyLoss(), DiceLoss(num_classes)

    def forward(
        self,
        maps: Sequence[Tensor],
        target: Tensor,
        cat_weight: Tensor | None = None,
        cat_bias: Tensor | None = None,
    ) -> Tensor:
        """The total loss, a scalar.

        Args:
            maps: L tensors [B, C, *full], coarsest first, 1 to 3 spatial axes.
            target: class numbers [B, *full].
            cat_weight: W [K, C, C] (pair, out class, in class); None draws a new convolution per subset and
                call from the global generator, as the authors do.
            cat_bias: b [S, C], with `cat_weight`.

        Raises:
            ValueError: the number of maps is not L, a map is not as large as the target, or only one of
                `cat_weight` and `cat_bias` is given.
        """
        if len(maps) != self.plan.num_scales:
            raise ValueError(f"maps: got {len(maps)} tensors, expected {self.plan.num_scales}")
        for i, full in enumerate(maps):
            if full.shape[2:] != target.shape[1:]:
                raise ValueError(
                    f"maps[{i}]: got size {tuple(full.shape[2:])}, expected {tuple(target.shape[1:])} as the "
                    "target has; use official_style_step for native sizes"
                )
        if (cat_weight is None) != (cat_bias is None):
            raise ValueError("cat_weight and cat_bias: got only one of the two, expected both or neither")
        weights = F.softplus(self.alpha)
        total = maps[0].new_zeros(())
        kept = []  # the mixed maps stay alive until the total is known
        for m, spec in enumerate(self.plan.maps):
            members = [maps[i] for i in spec.members]
            if spec.operator == "orig":
                one = members[0]
            else:
                one = self._mix(spec, members, cat_weight, cat_bias)
                kept.append(one)
            ce, dice = self.ce(one, target.long()), self.dice(one, target, softmax=True)
            total = total + weights[m] * (self.lambda_ce * ce + self.lambda_dice * dice)
        return total

    def _mix(self, spec: MapSpec, members: list[Tensor], cat_weight: Tensor | None, cat_bias: Tensor | None) -> Tensor:
        if spec.operator == "add":
            return sum(members[1:], start=members[0])
        if spec.operator == "mul":
            product = members[0]
            for member in members[1:]:
                product = product * member
            return product
        if spec.operator == "cat":
            return self._concat(spec, members, cat_weight, cat_bias)
        return self._fuse(spec, members)

    def _concat(
        self, spec: MapSpec, members: list[Tensor], cat_weight: Tensor | None, cat_bias: Tensor | None
    ) -> Tensor:
        axes = members[0].dim() - 2
        joined = torch.cat(members, dim=1)  # [B, |S| C, *full]
        if cat_weight is None or cat_bias is None:
            fresh = _CONV_MODULE[axes](joined.shape[1], self.num_classes, 1).to(joined)
            return fresh(joined)
        rows = cat_weight[spec.first_pair : spec.first_pair + len(members)]  # [|S|, C out, C in]
        kernel = torch.cat(list(rows), dim=1)  # [C, |S| C]
        return _CONV[axes](joined, kernel.reshape(*kernel.shape, *[1] * axes), cat_bias[spec.subset])

    def _fuse(self, spec: MapSpec, members: list[Tensor]) -> Tensor:
        axes = members[0].dim() - 2
        scores = []
        for position, member in enumerate(members):
            row = self._row_of_pair[spec.first_pair + position]
            kernel = self.awf_weight[row].view(1, -1, *[1] * axes)
            scores.append(_CONV[axes](member, kernel, self.awf_bias[row : row + 1]))  # [B, 1, *full]
        attention = torch.stack(scores, dim=1).softmax(dim=1)  # [B, |S|, 1, *full]
        return (attention * torch.stack(members, dim=1)).sum(dim=1)


def official_style_step(
    loss: OfficialStyleLoss,
    native_logits: Sequence[Tensor],
    target: Tensor,
    cat_weight: Tensor | None = None,
    cat_bias: Tensor | None = None,
) -> Tensor:
    """Loss of native-resolution logits: first enlarge every scale to the target's size, as their networks do.

    Args:
        loss: an `OfficialStyleLoss`.
        native_logits: L tensors [B, C, *native_l], coarsest first, 1 to 3 spatial axes.
        target: class numbers [B, *full].
        cat_weight: as in `OfficialStyleLoss.forward`.
        cat_bias: as in `OfficialStyleLoss.forward`.

    Returns:
        The total, a scalar with its graph: call `.backward()` on it for the other half of the step. Enlarging
        is linear in every axis with align_corners=False (torch.nn.functional.interpolate).

    Raises:
        ValueError: as `OfficialStyleLoss.forward`.
    """
    full = tuple(target.shape[1:])
    maps = [F.interpolate(z, size=full, mode=_INTERPOLATION[z.dim() - 2], align_corners=False) for z in native_logits]
    return loss(maps, target, cat_weight, cat_bias)
