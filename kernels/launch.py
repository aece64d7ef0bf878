"""Forward and backward of the Triton kernels as PyTorch functions: buffers, launches, and sums over programs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import triton.language as tl
from torch import Tensor

from . import autotune, tables
from .adjoint import gather_kernel
from .backward import gradients_kernel
from .config import (
    MOST_BACKWARD,
    MOST_FORWARD,
    PARTIAL_BYTES,
    SCRATCH_BYTES,
    Config,
    Target,
    axes,
    backward_config,
    candidates,
    dot_precision,
    forward_config,
    options,
    target_of,
    vector,
)
from .forward import statistics_kernel
from .labels import bad_labels_kernel
from .maps import MAX_SCALES

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


def share_out(batch: int, tiles: int, config: Config, target: Target, scratch: int, partial: int) -> Shares:
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


@dataclass
class _Problem:
    """Everything both passes need, in the form that kernels take."""

    logits: Sequence[Tensor]
    target: Tensor
    parameters: tuple[Tensor, Tensor, Tensor, Tensor]
    accumulator: torch.dtype
    full: tables.Size
    native: tuple[tables.Size, ...]
    used: tuple[bool, ...]
    on: Target

    @property
    def batch(self) -> int:
        return self.logits[0].shape[0]

    @property
    def classes(self) -> int:
        return self.logits[0].shape[1]

    @property
    def key(self) -> tuple[object, ...]:
        """What the best configuration depends on."""
        return self.device, self.classes, len(self.logits), axes(self.full), self.accumulator

    @property
    def device(self) -> torch.device:
        return self.logits[0].device

    def geometry(self, tile: tables.Size, grads: Sequence[Tensor]) -> tables.Geometry:
        return tables.geometry(
            self.full,
            self.native,
            tile,
            tuple(_strides(z.stride(), 2) for z in self.logits),
            tuple(_strides(g.stride(), 2) for g in grads),
            _strides(self.target.stride(), 1),
            self.used,
            self.batch,
            self.classes,
            self.device,
        )

    def constants(self, config: Config, most: int, wide: bool) -> dict[str, object]:
        """Arguments that the kernels are compiled for, apart from those of one pass."""
        few = vector(self.classes, most)
        return {
            "CT": few,
            "MANY": self.classes > few,
            "DIMS": 3 if self.full[0] > 1 or any(n[0] > 1 for n in self.native) else 2,
            "TZ": config.tile[0],
            "TY": config.tile[1],
            "TX": config.tile[2],
            "BLOCK": min(config.block, config.size),
            "SPAN": min(config.span, config.size),
            "DOT": dot_precision(self.on),
            "ACC": tl.float64 if self.accumulator == torch.float64 else tl.float32,
            "WIDE": wide,
        }


def _empty_gradients(problem: _Problem) -> list[Tensor]:
    """Room for the gradients of the logits; zeros for scales that no map uses, which no kernel writes."""
    both = zip(problem.logits, problem.used, strict=True)
    return [torch.empty_like(z) if used else torch.zeros_like(z) for z, used in both]


def _strides(strides: Sequence[int], leading: int) -> tuple[int, ...]:
    """Strides over the leading axes and z, y, x; 0 along an axis that is not there."""
    return (*strides[:leading], *[0] * (3 - len(strides) + leading), *strides[leading:])


def _size(shape: Sequence[int]) -> tables.Size:
    z, y, x = (*[1] * (3 - len(shape)), *shape)
    return z, y, x


def _prepare(
    logits: Sequence[Tensor], target: Tensor, parameters: Sequence[Tensor | None], encoded: Sequence[int]
) -> _Problem:
    accumulator = torch.float64 if logits[0].dtype == torch.float64 else torch.float32
    nothing = torch.empty(1, dtype=accumulator, device=target.device)  # for a parameter that the plan does not need
    masks = [encoded[at + 1] for at in range(0, len(encoded), 4)]
    filled = [nothing if p is None else p.to(accumulator).contiguous() for p in parameters]
    return _Problem(
        logits,
        target.view(torch.uint8) if target.dtype == torch.bool else target,
        (filled[0], filled[1], filled[2], filled[3]),
        accumulator,
        _size(target.shape[1:]),
        tuple(_size(z.shape[2:]) for z in logits),
        tuple(any(mask >> i & 1 for mask in masks) for i in range(len(logits))),
        target_of(target.device),
    )


def _six(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (*tensors, *[tensors[0]] * (MAX_SCALES - len(tensors)))


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _configured(name: str, problem: _Problem, usual: Config, run: Callable[[Config], _Result]) -> _Result:
    """Run one pass under its usual configuration, or under the quickest where autotuning is asked for."""
    if autotune.wanted() and problem.on.kind != "interpreter":
        usual = autotune.best((name, problem.key), candidates(usual), run, problem.device)
    return run(usual)


def forward(
    logits: Sequence[Tensor],
    target: Tensor,
    parameters: Sequence[Tensor | None],
    encoded: tuple[int, ...],
    squared: bool,
) -> tuple[Tensor, Tensor]:
    """Statistics of all maps.

    Args:
        logits: L tensors [B, C, *native], any strides, float16, bfloat16, float32 or float64.
        target: labels [B, *full], any strides, any integer type, bool or floats.
        parameters: W [K, C, C], b [S, C], u [K, C], v [K], or None where no map needs them.
        encoded: the maps, four integers each: see `tables.decode`.
        squared: sum s^2 rather than s in the last group of statistics.

    Returns:
        stats [B, M, 1 + 2C] and label counts [B, 1 + C], float32 (float64 for float64 logits). A sample with a label
        that is no class has NaN in all its statistics; nothing waits for the device.
    """
    problem = _prepare(logits, target, parameters, encoded)
    batch, classes, num_maps = problem.batch, problem.classes, len(encoded) // 4
    width = 1 + 2 * classes
    if batch == 0:
        empty = target.new_empty((0, num_maps, width), dtype=problem.accumulator)
        return empty, target.new_empty((0, 1 + classes), dtype=problem.accumulator)
    usual = forward_config(problem.on, problem.full, classes)
    return _configured("forward", problem, usual, lambda config: _statistics(problem, config, encoded, squared))


def _statistics(problem: _Problem, config: Config, encoded: tuple[int, ...], squared: bool) -> tuple[Tensor, Tensor]:
    """Launch the statistics under one configuration; see `forward`."""
    logits, target = problem.logits, problem.target
    batch, classes, num_maps = problem.batch, problem.classes, len(encoded) // 4
    width = 1 + 2 * classes
    lists = tables.forward_tables(encoded, config.warps, problem.device)
    shape = problem.geometry(config.tile, logits)
    constants = problem.constants(config, MOST_FORWARD, shape.wide)
    pixels = config.size
    rows = len(logits) * classes + 1 + config.warps * MAX_SCALES
    rows += config.warps * (classes + 2) if constants["MANY"] else 0
    item = problem.accumulator.itemsize
    shares = share_out(batch, shape.tiles, config, problem.on, rows * pixels * item, num_maps * width * item)
    partial = target.new_zeros((shares.items, num_maps, width), dtype=problem.accumulator)
    counts = target.new_zeros((shares.items, 1 + classes), dtype=torch.int32)
    scratch = target.new_empty((shares.programs, rows, pixels), dtype=problem.accumulator)
    with _current(problem.device):
        statistics_kernel[(shares.programs,)](
            _six(logits),
            problem.target,
            *problem.parameters,
            shape.table,
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
            SQUARED=squared,
            **options(problem.on, config.warps),
        )
    stats = partial.view(batch, shares.chunks, num_maps, width).sum(1)
    # A probability that is no number spoils I_c also where class c is not the label, as in plain PyTorch: 0 * NaN. The
    # kernel selects instead of multiplying; Q_c has seen every probability.
    stats[:, :, 1 : 1 + classes] += 0 * stats[:, :, 1 + classes :]
    found = counts.view(batch, shares.chunks, 1 + classes).sum(1)  # int64
    stats.masked_fill_(found[:, :1, None] > 0, float("nan"))
    found[:, 0] = target[0].numel()
    return stats, found.to(problem.accumulator)


def backward(
    grad_stats: Tensor,
    logits: Sequence[Tensor],
    target: Tensor,
    parameters: Sequence[Tensor | None],
    encoded: tuple[int, ...],
    squared: bool,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Gradients of logits and parameters from dLoss/dstats [B, M, 1 + 2C]; the other arguments as for `forward`.

    Returns:
        gradients of the logits in their dtype, laid out as torch.empty_like does, and of W, b, u, v in the
        accumulator's dtype or None. NaN for a sample with a label that is no class.
    """
    problem = _prepare(logits, target, parameters, encoded)
    if problem.batch == 0:
        zeros = [None if p is None else torch.zeros_like(p, dtype=problem.accumulator) for p in parameters]
        return _empty_gradients(problem), zeros
    usual = backward_config(problem.on, problem.full, problem.classes)
    return _configured(
        "backward",
        problem,
        usual,
        lambda config: _gradients(problem, config, grad_stats, parameters, encoded, squared),
    )


def _gradients(
    problem: _Problem,
    config: Config,
    grad_stats: Tensor,
    parameters: Sequence[Tensor | None],
    encoded: tuple[int, ...],
    squared: bool,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Launch the gradients under one configuration; see `backward`."""
    logits, target = problem.logits, problem.target
    batch, classes, num_maps = problem.batch, problem.classes, len(encoded) // 4
    grads = _empty_gradients(problem)
    pairs = next((p.shape[0] for p in (parameters[0], parameters[2]) if p is not None), 0)
    side = classes + 1
    table = tables.backward_table(encoded, problem.device)
    shape = problem.geometry(config.tile, grads)
    constants = problem.constants(config, MOST_BACKWARD, shape.wide)
    pixels = config.size
    between = max(4 * classes, -(-shape.room * classes // pixels))
    rows = 2 * len(logits) * classes + 1 + 2 * MAX_SCALES + between
    item = problem.accumulator.itemsize
    shares = share_out(batch, shape.tiles, config, problem.on, rows * pixels * item, max(1, pairs * side * side * item))
    partial = target.new_empty(max(1, shape.partial), dtype=problem.accumulator)
    products = target.new_zeros((shares.items, max(1, pairs), side, side), dtype=problem.accumulator)
    scratch = target.new_empty((shares.programs, rows, pixels), dtype=problem.accumulator)
    bad = target.new_zeros(batch, dtype=torch.int32)
    size = target[0].numel()
    with _current(problem.device):
        bad_labels_kernel[(-(-size // _LABELS), batch)](
            problem.target, shape.table, bad, classes, size, BLOCK=_LABELS, **options(problem.on, 4)
        )
        pull = grad_stats.to(problem.accumulator).masked_fill(bad.view(-1, 1, 1) > 0, float("nan"))
        gradients_kernel[(shares.programs,)](
            pull.contiguous(),
            _six(logits),
            _six(grads),
            problem.target,
            *problem.parameters,
            shape.table,
            table,
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
            len(table),
            rows,
            **constants,
            SQUARED=squared,
            LEARNED=pairs > 0,
            **options(problem.on, config.warps),
        )
        if shape.most:
            gather_kernel[(-(-shape.most // _GATHER), len(logits))](
                partial,
                _six(grads),
                shape.table,
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
        subsets, first = tables.cat_pairs(encoded, problem.device)
        bias[subsets] = sums[first, :classes, classes]
    parts = (
        sums[:, :classes, :classes],
        bias,
        sums[:, classes, :classes],
        sums[:, classes, classes],
    )
    return grads, [None if p is None else part.contiguous() for p, part in zip(parameters, parts, strict=True)]
