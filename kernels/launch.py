"""Forward and backward of the Triton kernels as PyTorch functions: buffers, launches, and sums over programs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ..plan import MAX_SCALES, MixPlan
from ..target import Target
from . import autotune, tables
from .adjoint import gather_kernel
from .backward import gradients_kernel
from .config import (
    MOST_BACKWARD,
    MOST_FORWARD,
    PARTIAL_BYTES,
    SCRATCH_BYTES,
    Config,
    backward_config,
    candidates,
    forward_config,
    options,
)
from .config import Target as Device
from .forward import statistics_kernel
from .labels import bad_labels_kernel
from .maps import OPERATORS, USUAL
from .problem import Problem, empty_gradients, prepare

_Result = TypeVar("_Result")

_GATHER = 256  # native elements a program
_LABELS = 2048  # pixels a program


@dataclass(frozen=True)
class Shares:
    """How the tiles of a batch are shared out: `items` parts of samples, `programs` of them at a time."""

    items: int
    chunks: int
    chunk_tiles: int
    programs: int


def share_out(batch: int, tiles: int, config: Config, target: Device, scratch: int, partial: int) -> Shares:
    """Split samples into items, as many as programs run at once unless their buffers would be too large.

    Args:
        batch, tiles: samples, and tiles of each.
        scratch: bytes a program needs for itself.
        partial: bytes that the sums of an item take.
    """
    programs = max(1, min(target.cores * config.per_core, SCRATCH_BYTES // scratch))
    # Rounded down: one item more than programs, and a core works twice as long as the others.
    chunks = max(1, min(tiles, programs // batch, PARTIAL_BYTES // (partial * batch)))
    chunk_tiles = -(-tiles // chunks)
    chunks = -(-tiles // chunk_tiles)
    return Shares(batch * chunks, chunks, chunk_tiles, min(programs, batch * chunks))


def _pointers(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """MAX_SCALES tensors, as kernels take them: those there are, then the first again and again."""
    return (*tensors, *[tensors[0]] * (MAX_SCALES - len(tensors)))


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _configured(name: str, problem: Problem, usual: Config, run: Callable[[Config], _Result]) -> _Result:
    """Run one pass under its usual configuration, or under the quickest where autotuning is asked for."""
    if autotune.wanted(problem.device) and problem.on.kind != "interpreter":
        usual = autotune.best((name, problem.key), candidates(usual), run, problem.device)
    return run(usual)


def forward(
    logits: Sequence[Tensor], target: Target, parameters: Sequence[Tensor | None], plan: MixPlan
) -> tuple[Tensor, Tensor]:
    """Statistics of all maps.

    Args:
        logits: L tensors [B, C, *native], any strides, float16, bfloat16, float32 or float64.
        target: labels and weights, any strides; labels of any integer type, bool or floats.
        parameters: W [K, C, C], b [S, C], u [K, C], v [K], or None where no map needs them.
        plan: which maps, and what their probabilities are.

    Returns:
        stats [B, M, 1 + 2C] and label counts [B, 1 + C], float32 (float64 for float64 logits). A sample with a label
        that is no class has NaN in all its statistics; nothing waits for the device. The counts are of use for a plain
        target only, and values outside 0 to 1 of a dense one are not looked for.
    """
    problem = prepare(logits, target, parameters, plan)
    batch, classes, num_maps = problem.batch, problem.classes, plan.num_maps
    width = 1 + 2 * classes
    if batch == 0:
        empty = logits[0].new_empty((0, num_maps, width), dtype=problem.accumulator)
        return empty, logits[0].new_empty((0, 1 + classes), dtype=problem.accumulator)
    usual = forward_config(problem.on, problem.full, classes)
    return _configured("forward", problem, usual, lambda config: _statistics(problem, config))


def _statistics(problem: Problem, config: Config) -> tuple[Tensor, Tensor]:
    """Launch the statistics under one configuration; see `forward`."""
    logits, target, encoded = problem.logits, problem.target, problem.plan.encoded
    batch, classes, num_maps = problem.batch, problem.classes, problem.plan.num_maps
    width = 1 + 2 * classes
    shape = problem.geometry(config.tile, logits)
    lists = tables.forward_tables(encoded, config.warps, shape, problem.device)
    constants = problem.constants(config, MOST_FORWARD, shape.wide)
    pixels = config.size
    rows = len(logits) * classes + problem.target_rows + config.warps * MAX_SCALES
    rows += config.warps * (classes + 2) if constants["MANY"] else 0
    item = problem.accumulator.itemsize
    shares = share_out(batch, shape.tiles, config, problem.on, rows * pixels * item, num_maps * width * item)
    partial = target.new_zeros((shares.items, num_maps, width), dtype=problem.accumulator)
    counts = target.new_zeros((shares.items, 1 + classes), dtype=torch.int32)
    scratch = target.new_empty((shares.programs, rows, pixels), dtype=problem.accumulator)
    with _current(problem.device):
        statistics_kernel[(shares.programs,)](
            _pointers(logits),
            problem.target,
            problem.weight,
            problem.factors,
            *problem.parameters,
            lists.geometry,
            lists.groups,
            lists.maps,
            partial,
            counts,
            scratch,
            classes,
            len(logits),
            num_maps,
            shares.items,
            shares.chunks,
            shares.chunk_tiles,
            shape.tiles,
            len(lists.groups),
            rows,
            **constants,
            ROWS=config.warps,
            PX=min(config.pixels, pixels),
            **options(problem.on, config.warps),
        )
    stats = partial.view(batch, shares.chunks, num_maps, width).sum(1)
    # A probability that is no number spoils I_c also where class c is not the label, as in plain PyTorch: 0 * NaN. The
    # kernel selects instead of multiplying; Q_c has seen every probability.
    stats[:, :, 1 : 1 + classes] += 0 * stats[:, :, 1 + classes :]
    found = counts.view(batch, shares.chunks, 1 + classes).sum(1)  # int64
    stats.masked_fill_(found[:, :1, None] > 0, float("nan"))
    found[:, 0] = target[0].numel()  # only read where the target is plain: one label a pixel
    return stats, found.to(problem.accumulator)


def backward(
    grad_stats: Tensor,
    logits: Sequence[Tensor],
    target: Target,
    parameters: Sequence[Tensor | None],
    plan: MixPlan,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Gradients of logits and parameters from dLoss/dstats [B, M, 1 + 2C]; the other arguments as for `forward`.

    Returns:
        gradients of the logits in their dtype, laid out as torch.empty_like does, and of W, b, u, v in the
        accumulator's dtype or None. NaN for a sample with a label that is no class.
    """
    problem = prepare(logits, target, parameters, plan)
    if problem.batch == 0:
        zeros = [None if p is None else torch.zeros_like(p, dtype=problem.accumulator) for p in parameters]
        return empty_gradients(problem), zeros
    usual = backward_config(problem.on, problem.full, problem.classes)
    return _configured("backward", problem, usual, lambda config: _gradients(problem, config, grad_stats, parameters))


def _find_bad_labels(problem: Problem, geometry: Tensor) -> Tensor:
    """int32 [B]: 1 for samples with a label that is no class, nor ignored. geometry: int64 [1 + L, FIELDS]."""
    bad = problem.target.new_zeros(problem.batch, dtype=torch.int32)
    size = problem.target[0].numel()
    blocks = -(-size // _LABELS)
    # One axis: a grid takes 2^31 - 1 programs along its first, 65,535 along the others.
    bad_labels_kernel[(problem.batch * blocks,)](
        problem.target,
        geometry,
        bad,
        problem.classes,
        size,
        blocks,
        GENERAL=problem.flags["GENERAL"],
        BLOCK=_LABELS,
        **options(problem.on, 4),
    )
    return bad


def _gradients(
    problem: Problem, config: Config, grad_stats: Tensor, parameters: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Launch the gradients under one configuration; see `backward`."""
    logits, target, encoded = problem.logits, problem.target, problem.plan.encoded
    batch, classes, num_maps = problem.batch, problem.classes, problem.plan.num_maps
    grads = empty_gradients(problem)
    pairs = next((p.shape[0] for p in (parameters[0], parameters[2]) if p is not None), 0)
    side = classes + 1
    shape = problem.geometry(config.tile, grads)
    lists = tables.backward_tables(encoded, shape, problem.device)
    constants = problem.constants(config, MOST_BACKWARD, shape.wide)
    pixels = config.size
    operators = len(OPERATORS) if problem.flags["EXTRA"] else USUAL.value
    between = max(operators * classes, -(-shape.room * classes // pixels))
    rows = 2 * len(logits) * classes + problem.target_rows + 2 * MAX_SCALES + between
    item = problem.accumulator.itemsize
    shares = share_out(batch, shape.tiles, config, problem.on, rows * pixels * item, max(1, pairs * side * side * item))
    partial = target.new_empty(max(1, shape.partial), dtype=problem.accumulator)
    products = target.new_zeros((shares.items, max(1, pairs), side, side), dtype=problem.accumulator)
    scratch = target.new_empty((shares.programs, rows, pixels), dtype=problem.accumulator)
    with _current(problem.device):
        pull = grad_stats.to(problem.accumulator)
        if not problem.flags["DENSE"]:
            pull = pull.masked_fill(_find_bad_labels(problem, lists.geometry).view(-1, 1, 1) > 0, float("nan"))
        gradients_kernel[(shares.programs,)](
            pull.contiguous(),
            _pointers(logits),
            _pointers(grads),
            problem.target,
            problem.weight,
            problem.factors,
            *problem.parameters,
            lists.geometry,
            lists.sets,
            partial,
            products,
            scratch,
            classes,
            len(logits),
            num_maps,
            max(1, pairs),
            shares.items,
            shares.chunks,
            shares.chunk_tiles,
            shape.tiles,
            len(lists.sets),
            rows,
            **constants,
            LEARNED=pairs > 0,
            **options(problem.on, config.warps),
        )
        if shape.most:
            gather_kernel[(-(-shape.most // _GATHER), len(logits))](
                partial,
                _pointers(grads),
                lists.geometry,
                classes,
                batch,
                shape.tiles,
                TZ=config.tile[0],
                TY=config.tile[1],
                TX=config.tile[2],
                BLOCK=_GATHER,
                ACC=constants["ACC"],
                WIDE=shape.wide,
                **options(problem.on, 4),
            )
    sums = products.sum(0)  # [K, C + 1, C + 1]
    bias = torch.zeros_like(parameters[1], dtype=sums.dtype) if parameters[1] is not None else sums
    if parameters[1] is not None:
        subsets, first = lists.cat
        bias[subsets] = sums[first, :classes, classes]
    parts = (
        sums[:, :classes, :classes],
        bias,
        sums[:, classes, :classes],
        sums[:, classes, classes],
    )
    return grads, [None if p is None else part.contiguous() for p, part in zip(parameters, parts, strict=True)]
