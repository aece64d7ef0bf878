"""Parameters of the mixes: how many there are, how they start, and how shared rows spread over the pairs of a plan."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .plan import MixPlan

AWF_SHARING = ("size", "subset", "scale")

_DRAWING = threading.Lock()


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


@contextmanager
def drawn(
    generator: torch.Generator, plan: MixPlan, num_classes: int, advances: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """W and b of one call, as `draw_cat` draws them; a call that raises inside has drawn nothing.

    Args:
        generator: to draw from; threads that share it draw one after the other.
        plan, num_classes: what to draw.
        advances: whether the next call is to draw others.

    Raises:
        RuntimeError: in a backward pass, where a forward pass is computed again that has drawn others.
    """
    if is_recomputation():
        raise RuntimeError(
            "concat: got 'resampled' where a backward pass computes the loss again (torch.utils.checkpoint), expected "
            "'learned', because another draw has the gradient of another loss; leave the loss out of what is "
            "checkpointed"
        )
    with _DRAWING:
        before = generator.get_state()
        parameters = draw_cat(plan, num_classes, generator)
        after = generator.get_state()
        if not advances:
            generator.set_state(before)
    try:
        yield parameters
    except BaseException:
        with _DRAWING:
            if advances and torch.equal(generator.get_state(), after):  # no other thread has drawn since
                generator.set_state(before)
        raise


def is_recomputation() -> bool:
    """Whether a backward pass is running in this thread, as where torch.utils.checkpoint computes forward once more."""
    return bool(torch._C._current_graph_task_id() != -1)


def draw_awf(num_rows: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Draw u [rows, C] and v [rows] as torch.nn.Conv2d(C, 1, 1) draws them, from the global generator."""
    bound = num_classes**-0.5
    return (2 * torch.rand(num_rows, num_classes) - 1) * bound, (2 * torch.rand(num_rows) - 1) * bound
