"""The one list of cases: correctness, gradients, opcheck and benchmarks all take their inputs from here."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..plan import OPERATORS, MixPlan
from ..reference import compute_dtype

LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded", "transposed")
PARAMETERS = ("cat_weight", "cat_bias", "awf_weight", "awf_bias")


@dataclass(frozen=True)
class Case:
    """One problem: everything that decides shapes, dtypes, strides and the rough size of the numbers.

    Attributes:
        name: unique, readable.
        batch, classes: B, C.
        full: spatial shape of the labels, 1 to 3 axes.
        native: spatial shape of each scale, coarsest first; its length is L.
        dtype: of the logits. Parameters of the mixes are float32, or float64 with float64 logits.
        operators, originals, squared: see `MixPlan.create`.
        kept: maps of that plan to keep, see `MixPlan.select`; None for all.
        target_dtype: of the labels.
        layout: strides of the logits, one of `LAYOUTS`, or "mixed" for another one at each scale.
        target_layout: "contiguous", "transposed", "sliced" or "channel" ([B, 1, *full]).
        magnitude: the logits are drawn from a normal distribution with this standard deviation.
    """

    name: str
    batch: int
    classes: int
    full: tuple[int, ...]
    native: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float32
    operators: tuple[str, ...] = OPERATORS
    originals: tuple[int, ...] | None = None
    squared: bool = True
    kept: tuple[int, ...] | None = None
    target_dtype: torch.dtype = torch.int64
    layout: str = "contiguous"
    target_layout: str = "contiguous"
    magnitude: float = 1.0

    @property
    def plan(self) -> MixPlan:
        """The plan of this case."""
        plan = MixPlan.create(len(self.native), self.operators, self.originals, self.squared)
        return plan if self.kept is None else plan.select(self.kept)

    @property
    def pixels(self) -> int:
        """Pixels of one sample at full size."""
        return int(torch.Size(self.full).numel())


@dataclass
class Inputs:
    """Arguments of `map_stats`: logits [B, C, *native] each, target [B, *full], and W, b, u, v or None."""

    logits: list[Tensor]
    target: Tensor
    cat_weight: Tensor | None
    cat_bias: Tensor | None
    awf_weight: Tensor | None
    awf_bias: Tensor | None

    @property
    def parameters(self) -> dict[str, Tensor | None]:
        """W, b, u, v by the names of their arguments, to be passed on as keywords."""
        return {name: getattr(self, name) for name in PARAMETERS}

    @property
    def differentiable(self) -> dict[str, Tensor]:
        """Every tensor that has a gradient, by a readable name."""
        named = {f"logits[{i}]": z for i, z in enumerate(self.logits)}
        return named | {name: p for name, p in self.parameters.items() if p is not None}

    def requires_grad_(self) -> Inputs:
        """Ask for the gradient of every differentiable tensor, in place; returns self."""
        for tensor in self.differentiable.values():
            tensor.requires_grad_()
        return self

    def to(self, dtype: torch.dtype) -> Inputs:
        """A detached copy with logits and parameters in `dtype`, holding the same numbers if it is wider."""
        logits = [z.detach().to(dtype, copy=True) for z in self.logits]
        cast = [None if p is None else p.detach().to(dtype, copy=True) for p in self.parameters.values()]
        return Inputs(logits, self.target, *cast)


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Draw the inputs of a case; the same case and seed give the same numbers. Nothing requires a gradient yet."""
    generator = torch.Generator().manual_seed(seed)
    plan, classes = case.plan, case.classes
    logits = []
    for scale, native in enumerate(case.native):
        values = case.magnitude * torch.randn(case.batch, classes, *native, generator=generator, dtype=torch.float64)
        layout = LAYOUTS[scale % len(LAYOUTS)] if case.layout == "mixed" else case.layout
        logits.append(lay_out(values.to(case.dtype), layout))
    target = torch.randint(classes, (case.batch, *case.full), generator=generator).to(case.target_dtype)

    def draw(needed: bool, *shape: int) -> Tensor | None:
        if not needed:
            return None
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(compute_dtype(case.dtype))

    weight = draw(plan.uses_cat, plan.num_pairs, classes, classes)
    return Inputs(
        logits,
        _lay_out_target(target, case.target_layout),
        None if weight is None else weight / classes**0.5,
        draw(plan.uses_cat, plan.num_subsets, classes),
        draw(plan.uses_awf, plan.num_pairs, classes),
        draw(plan.uses_awf, plan.num_pairs),
    )


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same shape in other strides, and the same values except for "expanded", which repeats the first sample.

    Args:
        values: [B, C, *native], contiguous.
        layout: one of `LAYOUTS`. "channels_last" has the classes innermost (with one spatial axis too), "sliced" is
            every other element of a larger tensor whose rest is NaN, "expanded" has stride 0 along the batch,
            "transposed" has its axes in reverse order.
    """
    if layout == "channels_last":
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        room = values.new_full(
            (values.shape[0], values.shape[1] + 2, *[2 * n + 1 for n in values.shape[2:]]), torch.nan
        )
        view = room[(slice(None), slice(1, -1), *[slice(1, None, 2)] * (values.dim() - 2))]
        return view.copy_(values)
    if layout == "expanded":
        return values[:1].expand_as(values) if values.shape[0] else values
    if layout == "transposed":
        axes = tuple(reversed(range(values.dim())))
        return values.permute(axes).contiguous().permute(axes)
    return values


def _lay_out_target(target: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        axes = tuple(reversed(range(target.dim())))
        return target.permute(axes).contiguous().permute(axes)
    if layout == "sliced":
        return torch.stack([target, torch.zeros_like(target)], dim=-1)[..., 0]
    return target.unsqueeze(1) if layout == "channel" else target


def _pyramid(full: tuple[int, ...], *ratios: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(-(-n // r) for n in full) for r in ratios)


_BASE = Case("base", 2, 4, (16, 16), _pyramid((16, 16), 8, 4, 2, 1))
_THREE = Case("three", 2, 3, (9, 10), ((3, 3), (5, 5), (9, 10)))
_VOLUME = Case("volume", 2, 3, (6, 7, 8), ((2, 3, 2), (3, 4, 4), (6, 7, 8)))

_SHAPES = (
    _BASE,
    Case("paper", 2, 9, (32, 32), _pyramid((32, 32), 32, 16, 8, 4)),
    Case("all_full_size", 2, 3, (7, 9), ((7, 9),) * 3),
    Case("anisotropic", 2, 3, (12, 18), ((3, 9), (3, 18), (12, 6))),
    Case("non_integer", 2, 3, (13, 17), ((3, 5), (5, 7), (9, 11))),
    Case("native_larger", 2, 3, (6, 5), ((3, 3), (13, 11), (6, 24))),
    Case("native_one_pixel", 2, 3, (5, 6), ((1, 1), (1, 6), (5, 1))),
    Case("one_pixel", 1, 3, (1, 1), ((1, 1), (1, 1))),
    Case("down_to_one_pixel", 2, 3, (1, 1), ((4, 3), (5, 1))),
    Case("one_column", 2, 3, (40, 1), ((7, 1), (40, 1))),
    Case("long_rows", 1, 3, (3, 300), ((2, 70), (3, 150))),
    Case("many_tiles", 3, 4, (67, 130), ((9, 17), (34, 65))),
    # So many rows of projections that the compiled kernel sweeps the image in several blocks of columns.
    Case("many_blocks", 1, 33, (21, 75), ((2, 3), (3, 5), (6, 10), (11, 38), (21, 75))),
    Case("volume_many_blocks", 1, 40, (3, 9, 70), ((1, 2, 9), (2, 5, 35), (3, 9, 70)), operators=("cat", "awf")),
    Case("larger_and_smaller_rows", 2, 3, (37, 45), ((90, 9), (5, 100), (37, 23))),
    Case("empty_batch", 0, 3, (6, 6), ((3, 3), (6, 6))),
    Case("line", 2, 3, (37,), ((5,), (11,), (37,))),
    Case("long_line", 1, 3, (5000,), ((313,), (2500,))),
    _VOLUME,
    Case("volume_thin", 1, 4, (4, 12, 10), ((4, 3, 5), (2, 6, 5), (4, 12, 10))),
    Case("volume_non_integer", 1, 2, (9, 11, 13), ((2, 3, 4), (4, 5, 7))),
    Case("volume_one_voxel", 1, 3, (3, 1, 2), ((1, 1, 1), (2, 2, 5))),
)
_COUNTS = (1, 2, 5, 6, 7, 8, 9, 13, 14, 15, 16, 17, 32, 33, 40)
_DEEPER = ((10, 4), (11, 3), (12, 4))  # number of classes, of scales
_CLASSES = (
    *(Case(f"classes_{count}", 2, count, (6, 7), ((3, 4), (6, 7))) for count in _COUNTS),
    *(
        Case(f"classes_{count}", 1, count, (7, 9), ((1, 2), (2, 3), (4, 5), (7, 9))[4 - scales :])
        for count, scales in _DEEPER
    ),
    # Several tiles a block for the kernels that take classes by parts.
    Case("classes_17_many_tiles", 2, 17, (33, 40), ((5, 7), (33, 40))),
    Case("classes_105", 1, 105, (5, 5), ((2, 3), (5, 5))),
    Case("classes_200", 1, 200, (5, 6), ((2, 3), (5, 6))),
)
_SCALES = tuple(
    Case(f"scales_{count}", 1, 3, (8, 8), tuple((n, n) for n in (1, 2, 3, 4, 6, 8)[-count:])) for count in (1, 2, 5, 6)
)
_PLANS = (
    *(replace(_THREE, name=f"only_{name}", operators=(name,), originals=()) for name in OPERATORS),
    replace(_THREE, name="originals_only", operators=()),
    replace(_THREE, name="finest_only", operators=(), originals=(2,)),
    replace(_THREE, name="other_order", operators=("awf", "add"), originals=(0, 2)),
    replace(_THREE, name="linear_dice", squared=False),
    replace(_VOLUME, name="volume_linear_dice", squared=False, operators=("mul", "awf")),
)
# Of the 19 maps of three scales: originals 0-2, then add 3-6, mul 7-10, cat 11-14, awf 15-18, each for the subsets
# 01, 02, 12, 012; of the 48 of four scales cat is 26-36 and awf 37-47.
_SELECTIONS = (
    replace(_THREE, name="kept_one_cat", kept=(13,)),
    replace(_THREE, name="kept_one_awf", kept=(16,)),
    replace(_THREE, name="kept_without_a_scale", kept=(0, 1, 3, 7, 11, 15)),
    replace(_BASE, name="kept_without_cat", kept=(*range(26), *range(37, 48))),
    replace(_VOLUME, name="kept_without_awf", kept=tuple(range(15)), dtype=torch.float16),
    replace(_THREE, name="kept_a_few", kept=(2, 4, 8, 10, 14, 17, 18), squared=False),
)
_DTYPES = tuple(
    replace(case, name=f"{case.name}_{str(dtype).removeprefix('torch.')}", dtype=dtype)
    for case in (_BASE, replace(_THREE, name="finest_larger", native=((3, 3), (5, 5), (18, 11))), _VOLUME)
    for dtype in (torch.float16, torch.bfloat16, torch.float64)
)
_STRIDES = (
    *(replace(_BASE, name=f"base_{layout}", layout=layout) for layout in (*LAYOUTS[1:], "mixed")),
    *(replace(_VOLUME, name=f"volume_{layout}", layout=layout) for layout in (*LAYOUTS[1:], "mixed")),
    replace(_THREE, name="line_channels_last", full=(19,), native=((4,), (7,), (19,)), layout="channels_last"),
    replace(_BASE, name="half_channels_last", dtype=torch.float16, layout="channels_last"),
    replace(_BASE, name="bfloat16_sliced", dtype=torch.bfloat16, layout="sliced"),
    replace(_BASE, name="double_mixed", dtype=torch.float64, layout="mixed"),
    replace(_BASE, name="labels_transposed", target_layout="transposed"),
    replace(_VOLUME, name="labels_sliced", target_layout="sliced"),
    replace(_BASE, name="labels_with_channel", target_layout="channel"),
)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32)
_LABELS = (
    *(
        replace(_THREE, name=f"labels_{str(dtype).removeprefix('torch.')}", target_dtype=dtype)
        for dtype in (*_INTEGERS, torch.float32)
    ),
    replace(_THREE, name="labels_bool", classes=2, target_dtype=torch.bool),
)
_EXTREMES = (
    replace(_THREE, name="large_80", magnitude=80.0),
    replace(_THREE, name="large_80_double", magnitude=80.0, dtype=torch.float64),
    replace(_THREE, name="large_80_sums", magnitude=80.0, operators=("add", "awf")),
    replace(_THREE, name="large_1e4", magnitude=1e4, native=((3, 3), (5, 5)), full=(9, 10)),
    replace(_THREE, name="large_1e4_sums", magnitude=1e4, operators=("add", "cat", "awf")),
    replace(_BASE, name="half_16", magnitude=16.0, dtype=torch.float16),
    replace(_THREE, name="tiny", magnitude=1e-6),
)

CASES: tuple[Case, ...] = (
    *_SHAPES,
    *_CLASSES,
    *_SCALES,
    *_PLANS,
    *_SELECTIONS,
    *_DTYPES,
    *_STRIDES,
    *_LABELS,
    *_EXTREMES,
)

# The two problems that the speed and memory promises are made about.
BENCHMARK_CASES: tuple[Case, ...] = (
    Case("slices_224", 6, 9, (224, 224), _pyramid((224, 224), 32, 16, 8, 4)),
    Case("volume_96", 1, 9, (96, 96, 96), _pyramid((96, 96, 96), 8, 4, 2, 1)),
)


def case(name: str) -> Case:
    """The case of this name, from `CASES` or `BENCHMARK_CASES`.

    Raises:
        KeyError: there is none.
    """
    return {c.name: c for c in (*CASES, *BENCHMARK_CASES)}[name]
