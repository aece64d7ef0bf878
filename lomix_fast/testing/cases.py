"""The one list of cases: correctness, gradients, opcheck and benchmarks all take their inputs from here."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..plan import EXTRA_OPERATORS, OPERATORS
from .case import LAYOUTS, Case, Inputs, lay_out, make_inputs

__all__ = ["BENCHMARK_CASES", "CASES", "LAYOUTS", "Case", "Inputs", "case", "lay_out", "make_inputs"]


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

_SIGMOID = replace(_THREE, sigmoid=True, dense=True, target_dtype=torch.bool)
_REGIONS = (
    replace(_SIGMOID, name="sigmoid_bool"),
    replace(_SIGMOID, name="sigmoid_uint8_sliced", target_dtype=torch.uint8, target_layout="sliced"),
    replace(_SIGMOID, name="sigmoid_uint16", target_dtype=torch.uint16),
    replace(_SIGMOID, name="sigmoid_int64_linear", target_dtype=torch.int64, squared=False),
    replace(_SIGMOID, name="sigmoid_soft_half", target_dtype=torch.float16, target_layout="transposed"),
    replace(_SIGMOID, name="sigmoid_one_class", classes=1, target_dtype=torch.uint8),
    replace(_SIGMOID, name="sigmoid_one_class_ignore", classes=1, target_dtype=torch.uint8, ignore_index=255),
    replace(_SIGMOID, name="sigmoid_structure", classes=1, target_dtype=torch.float32, squared=False,
            ignore_index=255,
            weight_map=torch.float32, weighted_ce=False),
    replace(_SIGMOID, name="sigmoid_masked", weight_map=torch.bool, ce_weight=True),
    replace(_SIGMOID, name="sigmoid_weighted_double", dtype=torch.float64, target_dtype=torch.float32,
            weight_map=torch.float32, ce_weight=True),
    replace(_SIGMOID, name="sigmoid_half_logits", dtype=torch.float16, weight_map=torch.float16),
    replace(_SIGMOID, name="sigmoid_large", magnitude=80.0, operators=("add", "cat", "awf")),
    replace(_SIGMOID, name="sigmoid_extra", operators=("sub", "avg", "max", "mul"), bounded=True),
    replace(_VOLUME, name="sigmoid_volume", sigmoid=True, dense=True, target_dtype=torch.bool,
            weight_map=torch.float32),
    replace(_BASE, name="sigmoid_base", classes=9, sigmoid=True, dense=True, target_dtype=torch.uint8),
    Case("sigmoid_classes_17", 1, 17, (7, 9), ((2, 3), (7, 9)), sigmoid=True, dense=True, target_dtype=torch.bool,
         weight_map=torch.float32, ce_weight=True),
    Case("sigmoid_many_tiles", 2, 4, (67, 130), ((9, 17), (34, 65)), sigmoid=True, dense=True, target_dtype=torch.bool),
)  # fmt: skip
_WEIGHTS = (
    replace(_THREE, name="ignore_255", ignore_index=255, target_dtype=torch.uint8),
    replace(_THREE, name="ignore_inside", ignore_index=1),
    replace(_BASE, name="ignore_minus_one_float", ignore_index=-1, target_dtype=torch.float32),
    replace(_THREE, name="mask", weight_map=torch.bool),
    replace(_BASE, name="weight_map", weight_map=torch.float32, target_layout="transposed"),
    replace(_THREE, name="weight_map_half", weight_map=torch.float16, target_layout="sliced", ignore_index=2),
    replace(_THREE, name="weight_map_double", weight_map=torch.float64, dtype=torch.float64, ce_weight=True),
    replace(_THREE, name="weighted_dice_only", weight_map=torch.float32, weighted_ce=False, ignore_index=7),
    replace(
        _THREE,
        name="weighted_dice_smoothing",
        weight_map=torch.float32,
        weighted_ce=False,
        ignore_index=7,
        label_smoothing=0.1,
    ),
    replace(_VOLUME, name="volume_weight_map", weight_map=torch.bfloat16, squared=False),
    Case("weights_many_tiles", 3, 4, (67, 130), ((9, 17), (34, 65)), weight_map=torch.float32, ce_weight=True),
    Case("weights_classes_17", 1, 17, (7, 9), ((2, 3), (7, 9)), weight_map=torch.float32, ce_weight=True),
)
_SOFT = (
    replace(_THREE, name="ce_weight", ce_weight=True),
    replace(_THREE, name="label_smoothing", label_smoothing=0.1),
    replace(_BASE, name="label_smoothing_weights", label_smoothing=0.2, ce_weight=True, weight_map=torch.float32),
    replace(_THREE, name="label_smoothing_ignore", label_smoothing=0.1, ignore_index=9, target_dtype=torch.int16),
    replace(_THREE, name="soft_labels", dense=True, target_dtype=torch.float32),
    replace(_BASE, name="soft_labels_all", dense=True, target_dtype=torch.float16, label_smoothing=0.1, ce_weight=True,
            weight_map=torch.float32, target_layout="transposed"),
    replace(_VOLUME, name="soft_labels_volume_linear", dense=True, target_dtype=torch.float32, squared=False),
    replace(_THREE, name="soft_labels_double", dense=True, target_dtype=torch.float64, dtype=torch.float64),
    replace(_THREE, name="soft_labels_large", dense=True, target_dtype=torch.float32, magnitude=80.0,
            operators=("add", "awf")),
    replace(_THREE, name="hard_one_hot", dense=True, target_dtype=torch.bool),
    Case("soft_classes_17", 1, 17, (7, 9), ((2, 3), (7, 9)), dense=True, target_dtype=torch.float32),
    Case("soft_many_tiles", 2, 4, (67, 130), ((9, 17), (34, 65)), dense=True, target_dtype=torch.float32),
)  # fmt: skip
_EXTRAS = (
    *(replace(_THREE, name=f"only_{name}", operators=(name,), originals=()) for name in EXTRA_OPERATORS),
    replace(_THREE, name="only_bounded_mul", operators=("mul",), originals=(), bounded=True),
    replace(_BASE, name="all_operators", operators=(*OPERATORS, *EXTRA_OPERATORS), bounded=True),
    replace(_VOLUME, name="volume_extra_half", operators=("max", "sub", "mul"), bounded=True, dtype=torch.float16),
    replace(_THREE, name="bounded_large", operators=("mul",), bounded=True, magnitude=80.0),
    replace(_THREE, name="bounded_double", operators=("mul", "max"), bounded=True, dtype=torch.float64),
    Case("extra_classes_17", 1, 17, (7, 9), ((2, 3), (7, 9)), operators=EXTRA_OPERATORS, bounded=True),
    replace(_BASE, name="max_subset_size", max_subset_size=2),
    replace(_BASE, name="listed_subsets", subsets=((0, 3), (1, 2, 3)), operators=("cat", "awf", "avg")),
    Case("scales_7", 1, 3, (8, 8), tuple((n, n) for n in (1, 2, 3, 4, 5, 6, 8)), max_subset_size=2),
    Case("scales_8", 1, 3, (8, 8), tuple((n, n) for n in (1, 2, 3, 4, 5, 6, 7, 8)), subsets="pairs",
         operators=("add", "mul", "cat", "awf", "max")),
    Case("scales_8_all", 1, 2, (5, 6), tuple((n, n) for n in (1, 1, 2, 2, 3, 4, 5, 6)), operators=("awf",),
         originals=()),
)  # fmt: skip

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
    *_REGIONS,
    *_WEIGHTS,
    *_SOFT,
    *_EXTRAS,
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
