"""Parameters of the mixes: how many there are, how they start, and how shared rows spread over the pairs of a plan."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .plan import MixPlan

AWF_SHARING = ("size", "subset", "scale")


def awf_rows(plan: MixPlan, sharing: str) -> tuple[int, list[int]]:
    """How the K pairs of a plan share the rows of the attention weights.

    Args:
        plan: the plan.
        sharing: "size": one row per (subset size, position in the sorted subset), the authors' code;
            "subset": one row per pair; "scale": one row per scale.

    Returns:
        Number of rows, and for each of the K pairs the row it uses. Rows of "size" are ordered by subset size, then
        position: L(L+1)/2 - 1 of them where all subsets are mixed.
    """
    if sharing == "subset":
        return plan.num_pairs, list(range(plan.num_pairs))
    if sharing == "scale":
        return plan.num_scales, [member for _, member in plan.pairs]
    sizes = sorted({len(subset) for subset in plan.subsets})
    first_row = {size: sum(smaller for smaller in sizes if smaller < size) for size in sizes}
    rows = [first_row[len(subset)] + position for subset in plan.subsets for position in range(len(subset))]
    return max(rows, default=-1) + 1, rows


def new_generator() -> torch.Generator:
    """A generator on the CPU, seeded from the global one, so that torch.manual_seed before fixes what it draws."""
    with unset_fake_temporarily():  # inside a FakeTensorMode there would be no number
        seed = int(torch.randint(2**62, (), device="cpu"))
    return torch.Generator().manual_seed(seed)


def draw_cat(plan: MixPlan, num_classes: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Draw W [K, C, C] and b [S, C] as torch.nn.Conv2d(|S| * C, C, 1) draws them.

    Kaiming-uniform with a = sqrt(5) and its bias rule both come to U(-r, r) with r = 1 / sqrt(|S| * C).
    `generator` None means the global one and torch's default device, as for every module that torch constructs; a
    generator of one's own draws on its device.
    """
    device = None if generator is None else generator.device
    fan_in = torch.tensor([float(len(s) * num_classes) for s in plan.subsets], device=device)  # [S]
    per_pair = torch.tensor([float(len(plan.subsets[s]) * num_classes) for s, _ in plan.pairs], device=device)  # [K]
    weight = torch.rand(plan.num_pairs, num_classes, num_classes, generator=generator, device=device)
    bias = torch.rand(plan.num_subsets, num_classes, generator=generator, device=device)
    return (2 * weight - 1) * per_pair.rsqrt().view(-1, 1, 1), (2 * bias - 1) * fan_in.rsqrt().view(-1, 1)


def draw_awf(num_rows: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Draw u [rows, C] and v [rows] as torch.nn.Conv2d(C, 1, 1) draws them, from the global generator."""
    bound = num_classes**-0.5
    return (2 * torch.rand(num_rows, num_classes) - 1) * bound, (2 * torch.rand(num_rows) - 1) * bound
