"""How the authors' module names things, and what we call them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

# Their operators and ours.
OUR_NAME = {
    "add": "add",
    "sub": "sub",
    "mul": "mul",
    "concat": "cat",
    "weighted_fusion": "awf",
    "wf": "awf",
    "avg": "avg",
    "max": "max",
}
# Two names for one operator: the constructor's default and the one their training script passes.
FUSION_NAMES = ("weighted_fusion", "wf")


def their_names(fusion_name: str) -> dict[str, str]:
    """Our operator names -> theirs, "awf" under the given one of its two names."""
    return {ours: theirs for theirs, ours in OUR_NAME.items()} | {"awf": fusion_name}


def fusion_positions(num_scales: int) -> list[tuple[int, int]]:
    """(subset size, position) of every fusion convolution, in the order of the rows of `awf_weight`."""
    return [(size, position) for size in range(2, num_scales + 1) for position in range(size)]


def fusion_key(size: int, position: int) -> str:
    """Key of one fusion convolution in their state dict, up to "weight" or "bias"."""
    return f"weighted_fusion_modules.{size}.weight_convs.{position}."


# What errors say of arguments that are called otherwise here, or are not there.
_TOLD = (
    (r"pass max_subset_size=.*", "pass fewer operations, or a smaller selecetd_num_maps"),
    (r"\blogits\b", "output_maps"),
    (r"\btarget\b", "label_batch"),
    (
        r", raise num_classes, or pass ignore_index=.*",
        " or raise num_classes; the ignore_index of ce_loss is not honoured here, that of "
        "lomix_fast.LoMixLoss(ignore_index=...) leaves pixels with such a label out",
    ),
    (r"\bnum_scales\b", "selecetd_num_maps"),
    (r"\boperators\b", "operations"),
    ("'cat'", "'concat'"),
    ("'awf'", "'weighted_fusion'"),
)


@contextmanager
def told_in_their_names() -> Iterator[None]:
    """Errors of the checks shared with `map_stats`, told with the argument names of the authors' module."""
    try:
        yield
    except (TypeError, ValueError) as error:
        told = str(error)
        for ours, theirs in _TOLD:
            told = re.sub(ours, theirs, told)
        raise (TypeError if isinstance(error, TypeError) else ValueError)(told) from error
