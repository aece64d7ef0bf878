"""What is timed on a GPU day, and for which floors are computed: the steps of 2D and 3D networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lomix_fast.testing.cases import Case

from ..cases import BenchmarkCase, benchmark_case, pyramid, shrunk


def _slices(name: str, batch: int, side: int = 224, classes: int = 9, dtype: torch.dtype = torch.float32) -> Case:
    full = (side, side)
    return Case(name, batch, classes, full, pyramid(full, (32, 16, 8, 4)), dtype)


def _volume(
    name: str, side: int, classes: int, scales: int, batch: int = 1, dtype: torch.dtype = torch.float32
) -> Case:
    full = (side,) * 3
    return Case(name, batch, classes, full, pyramid(full, [2**n for n in reversed(range(scales))]), dtype)


# What is promised about comes first: slices as in the paper's experiments, a patch of a 3D network, the large ones.
FIRST = (
    _slices("slices_b6", 6),
    _volume("volume_96_l4", 96, 9, 4),
    _volume("volume_96_c14_l5", 96, 14, 5),
)
REST = (
    _slices("slices_b24", 24),
    _volume("volume_128_c14_l5_b2", 128, 14, 5, 2),
    _slices("slices_512_b8", 8, 512),
    _slices("slices_b6_bfloat16", 6, dtype=torch.bfloat16),
    _volume("volume_96_l4_float16", 96, 9, 4, dtype=torch.float16),
    _volume("volume_96_l5", 96, 9, 5),
    _volume("volume_96_c14_l4", 96, 14, 4),
    _slices("slices_c40", 6, classes=40),
    _slices("slices_c105", 2, classes=105),
)


# One of each number of axes and dtype; of their sizes nothing is left in a rehearsal.
REHEARSED = ("slices_b6", "volume_96_l4", "slices_b6_bfloat16", "volume_96_l4_float16")


def problems(cases: Sequence[Case], rehearse: bool) -> list[BenchmarkCase]:
    """Benchmark cases, with the small ones on which numbers are checked; in a rehearsal few of them, and tiny."""
    if not rehearse:
        return [benchmark_case(one, one.name, longest=16) for one in cases]
    return [benchmark_case(_tiny(one), one.name, longest=8) for one in cases if one.name in REHEARSED]


def _tiny(one: Case) -> Case:
    few = replace(one, classes=min(one.classes, 5), native=one.native[-2:])
    return replace(shrunk(few, longest=8, batch=1), name=one.name)
