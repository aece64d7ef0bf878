"""Criteria that drop chosen maps, for the tests of pruning."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lomix_fast import LoMixLoss

SIZES = ((2, 3), (3, 5), (6, 7))
NAMES = LoMixLoss(3, 3).map_names
SMALL = -20.0  # softplus of it is 2e-9


def draw(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    logits = [torch.randn(2, 3, *n, dtype=dtype, requires_grad=True) for n in SIZES]
    return logits, torch.randint(3, (2, 6, 7))


def make(dropped: Sequence[str], **options: object) -> LoMixLoss:
    """A criterion whose first training call drops these maps."""
    criterion = LoMixLoss(3, 3, **{"prune_below": 0.01, **options})
    torch.nn.init.uniform_(criterion.alpha, -1.0, 1.0)
    lower(criterion, dropped)
    return criterion


def lower(criterion: LoMixLoss, names: Sequence[str], alpha: float = SMALL) -> None:
    with torch.no_grad():
        for name in names:
            criterion.alpha[criterion.map_names.index(name)] = alpha


def all_but(keep: Callable[[str], bool]) -> tuple[str, ...]:
    return tuple(name for name in NAMES if not keep(name))


DROPPED = {
    "one": ("mul_0_1_2",),
    "all but an original": all_but(lambda name: name == "orig_1"),
    "all but a cat": all_but(lambda name: name == "cat_0_2"),
    "all but an awf": all_but(lambda name: name == "awf_1_2"),
    "all of scale 0": tuple(name for name in NAMES if "0" in name),
    "all cat": tuple(name for name in NAMES if name.startswith("cat")),
    "all awf": tuple(name for name in NAMES if name.startswith("awf")),
    "all but add": all_but(lambda name: name.startswith("add")),
}
