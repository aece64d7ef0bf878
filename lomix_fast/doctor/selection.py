"""Which cases a selftest runs."""

from __future__ import annotations

from collections.abc import Sequence

from ..testing.cases import CASES, Case

# Each axis count, dtype, stride and operator, the extremes, and sizes past one tile, at the least cost: for Triton's
# interpreter, which takes seconds where a kernel takes microseconds.
QUICK = (
    *("base", "paper", "volume", "line", "non_integer", "native_larger", "one_pixel", "many_tiles", "empty_batch"),
    *("classes_1", "classes_17", "classes_105", "scales_1", "scales_5", "finest_only", "linear_dice", "kept_a_few"),
    *("base_float16", "volume_bfloat16", "finest_larger_float64", "base_expanded", "base_sliced", "volume_mixed"),
    *("labels_transposed", "labels_with_channel", "labels_uint8", "labels_bool", "large_80", "half_16"),
)


def choose_cases(names: Sequence[str] | None, quick: bool) -> list[Case]:
    """The cases to run, in the order of the list.

    Args:
        names: of cases; None for all of them.
        quick: those of `QUICK` instead.

    Raises:
        ValueError: a name that is in no case, or both names and quick.
    """
    if names is not None and quick:
        raise ValueError("--cases and --quick: got both, expected one of the two, for each chooses the cases")
    wanted = QUICK if quick else names
    if wanted is None:
        return list(CASES)
    known = {one.name for one in CASES}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(
            f"--cases: got {', '.join(map(repr, unknown))}, expected names out of {', '.join(sorted(known))}"
        )
    return [one for one in CASES if one.name in wanted]
