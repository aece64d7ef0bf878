"""What is measured: problems of the shared list (`lomix_fast.testing.cases`) under the names the promises use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lomix_fast.testing.cases import Case, case

# What the official-style loss may take by estimate where its problem is as large as possible: 20 GiB, so that the
# temporaries of its backward pass and everything else fit into 24.
OFFICIAL_BUDGET = 20 * 2**30


@dataclass(frozen=True)
class BenchmarkCase:
    """One problem to time, and the small one of the same kind on which the numbers are checked first.

    Attributes:
        case: the full-size problem; its name is that of the benchmark.
        small: same C, L, dtype and operators, so few pixels that float64 truth is cheap.
    """

    case: Case
    small: Case

    @property
    def name(self) -> str:
        return self.case.name


def shrunk(problem: Case, longest: int, batch: int = 2) -> Case:
    """The same problem with at most `batch` samples and labels of about `longest` pixels along the longest axis.

    Every size is divided by the same number and rounded up, but no axis of more than one pixel falls to one: there
    would be nothing to interpolate, and torch.compile fails on its adjoint (inductor of torch 2.13, a scatter whose
    index does not vary).
    """
    factor = max(1, -(-max(problem.full) // longest))

    def divided(size: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(max(min(n, 2), -(-n // factor)) for n in size)

    full, native = divided(problem.full), tuple(divided(size) for size in problem.native)
    return replace(problem, name=f"{problem.name}_small", batch=min(batch, problem.batch), full=full, native=native)


def benchmark_case(problem: Case, name: str, longest: int = 64) -> BenchmarkCase:
    """A benchmark of `problem` called `name`; its small version has labels of about `longest` pixels an axis."""
    named = replace(problem, name=name)
    return BenchmarkCase(named, shrunk(named, longest))


def pyramid(full: Sequence[int], ratios: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Native sizes that are `full` divided by each ratio, rounded up; coarsest first when the ratios fall."""
    return tuple(tuple(-(-n // ratio) for n in full) for ratio in ratios)


def official_style_maps(num_scales: int, classes: int) -> float:
    """Peak of the official-style loss with all four operators, in full-size float32 maps [B, C, *full].

    3 (L + 4 S) + 2 K + (K - 2 S) + K / C kept for the backward pass, and the 4 S mixed maps alive until the total is
    known; S = 2^L - 1 - L subsets, K = L 2^(L-1) - L pairs. Temporaries of the backward pass come on top.

    Source: SPEC of LoMix, "What is known to go wrong".
    """
    subsets = 2**num_scales - 1 - num_scales
    pairs = num_scales * 2 ** (num_scales - 1) - num_scales
    kept = 3 * (num_scales + 4 * subsets) + 2 * pairs + (pairs - 2 * subsets) + pairs / classes
    return kept + 4 * subsets


def official_style_bytes(num_scales: int, classes: int, batch: int, pixels: int, itemsize: int = 4) -> int:
    """`official_style_maps` in bytes, for maps [B, C, pixels] of `itemsize` bytes a number."""
    return round(official_style_maps(num_scales, classes) * batch * classes * pixels * itemsize)


def map_bytes(problem: Case) -> int:
    """Bytes of one full-size map [B, C, *full] in the dtype of the sums, float32 or float64."""
    return problem.batch * problem.classes * problem.pixels * (8 if problem.dtype.itemsize == 8 else 4)


def patch14(edge: int) -> Case:
    """A cube of volume with 14 classes and five scales, native 1/16, 1/8, 1/4, 1/2 and full size, batch 1."""
    full = (edge,) * 3
    return Case("patch14", 1, 14, full, pyramid(full, (16, 8, 4, 2, 1)))


def largest_official_edge(budget: int = OFFICIAL_BUDGET) -> int:
    """Longest edge, a multiple of 16, of a `patch14` on which the official-style loss needs at most `budget` bytes."""
    edge = 16
    while official_style_bytes(5, 14, 1, (edge + 16) ** 3) <= budget:
        edge += 16
    return edge


# synapse2d: slices as the paper's Synapse experiments have them, native scales 1/32, 1/16, 1/8, 1/4.
# patch3d: a patch of volume as 3D networks train on, native scales 1/8, 1/4, 1/2 and full size.
# patch3d14: the same with 14 classes and a fifth scale, too large for the official-style loss.
# official3d14: the largest such patch that the official-style loss can take.
# tiny2d, tiny3d: seconds in all, to try the harness itself (--quick); their times mean nothing.
CASES: dict[str, BenchmarkCase] = {
    one.name: one
    for one in (
        benchmark_case(case("slices_224"), "synapse2d"),
        benchmark_case(case("volume_96"), "patch3d", longest=16),
        benchmark_case(patch14(96), "patch3d14", longest=16),
        benchmark_case(patch14(largest_official_edge()), "official3d14", longest=16),
        benchmark_case(case("paper"), "tiny2d", longest=16),
        benchmark_case(case("volume"), "tiny3d", longest=4),
    )
}
