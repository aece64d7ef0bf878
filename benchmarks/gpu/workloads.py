"""The training steps that the model speaks of, and the operations of their tiles."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

from .counts import Executed, count


@dataclass(frozen=True)
class Problem:
    """What decides a tile's operations: C, axes, and full over native size of each scale, coarsest first."""

    classes: int
    dims: int
    ratios: tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    """One training step: a problem with a size and a batch."""

    problem: str
    full: tuple[int, ...]
    batch: int

    @property
    def pixels(self) -> int:
        """Of the batch."""
        return self.batch * math.prod(self.full)


PROBLEMS = {
    "2D, C=9, L=4": Problem(9, 2, (32, 16, 8, 4)),
    "3D, C=9, L=5": Problem(9, 3, (16, 8, 4, 2, 1)),
    "3D, C=14, L=5": Problem(14, 3, (16, 8, 4, 2, 1)),
}
WORKLOADS = (
    Workload("2D, C=9, L=4", (224, 224), 6),
    Workload("2D, C=9, L=4", (224, 224), 24),
    Workload("2D, C=9, L=4", (512, 512), 8),
    Workload("3D, C=9, L=5", (96, 96, 96), 1),
    Workload("3D, C=14, L=5", (96, 96, 96), 1),
    Workload("3D, C=14, L=5", (128, 128, 128), 2),
)


def count_problems() -> dict[str, dict[str, Executed]]:
    """Count every problem's operations, with a line on stderr for each; minutes."""
    found = {}
    for name, problem in PROBLEMS.items():
        print(f"counting {name} in the interpreter", file=sys.stderr, flush=True)
        found[name] = count(problem.classes, problem.dims, problem.ratios)
    return found
