"""Sweeps: the fused loss against size, scales, classes, threads and vector instructions, one setting varied in each.

All settings of a sweep take turns in one run, so that their ratios are as fair as those between contenders.
"""

from __future__ import annotations

from lomix_fast.testing.cases import Case
from lomix_fast.testing.environment import cores

from . import capability, recipes
from .cases import CASES, BenchmarkCase, benchmark_case, pyramid
from .subjects import COMPARISONS, QUICK, Entry, Subject

# Edge -> batch, chosen so that the total of pixels is as even as it can be.
PIXELS_2D = {64: 96, 128: 24, 256: 6, 512: 2, 1024: 1}
PIXELS_3D = {32: 16, 64: 2, 96: 1, 128: 1, 160: 1}
SCALES = (2, 3, 4, 5, 6)
CLASSES = (2, 3, 4, 5, 8, 9, 14, 16, 24, 32, 40, 64, 105)
_ROUNDS = 7
_QUARTER = (32, 16, 8, 4)


def thread_counts(available: int) -> tuple[int, ...]:
    """1, 2, 4 and so on up to all cores; always 1 and 2, so that what two would bring is not passed over in silence."""
    powers = [2**i for i in range(available.bit_length()) if 2**i <= available]
    return tuple(sorted({1, 2, *powers, available}))


def _problem(name: str, batch: int, classes: int, full: tuple[int, ...], ratios: tuple[int, ...]) -> BenchmarkCase:
    longest = 32 if len(full) == 2 else 16
    return benchmark_case(Case(name, batch, classes, full, pyramid(full, ratios)), name, longest)


def _pixels_2d() -> tuple[Entry, ...]:
    cases = (_problem(f"pixels2d_{edge}", batch, 9, (edge,) * 2, _QUARTER) for edge, batch in PIXELS_2D.items())
    return tuple(Entry(one, "fused") for one in cases)


def _pixels_3d() -> tuple[Entry, ...]:
    cases = (_problem(f"pixels3d_{edge}", batch, 9, (edge,) * 3, (8, 4, 2, 1)) for edge, batch in PIXELS_3D.items())
    return tuple(Entry(one, "fused") for one in cases)


def _scales() -> tuple[Entry, ...]:
    cases = [_problem(f"scales_{n}", 2, 9, (224, 224), tuple(4 * 2**i for i in reversed(range(n)))) for n in SCALES]
    return tuple(Entry(one, name) for name in ("fused", "exp_floor") for one in cases)


def _classes() -> tuple[Entry, ...]:
    cases = [_problem(f"classes_{n}", 1 if n >= 40 else 2, n, (224, 224), _QUARTER) for n in CLASSES]
    return tuple(Entry(one, name) for name in ("fused", "exp_floor") for one in cases)


def _threads() -> tuple[Entry, ...]:
    counts = thread_counts(cores())
    return tuple(Entry(CASES["synapse2d"], name, threads=n) for name in ("fused", "exp_floor") for n in counts)


def _isa() -> tuple[Entry, ...]:
    return tuple(Entry(CASES["synapse2d"], "fused", capability=name) for name in reversed(capability.ORDER))


SWEEPS: dict[str, Subject] = {
    subject.name: subject
    for subject in (
        Subject("pixels2d", "time against pixels in 2D", _pixels_2d(), _ROUNDS),
        Subject("pixels3d", "time against voxels in 3D", _pixels_3d(), _ROUNDS),
        Subject("scales", "time against the number of scales L", _scales(), _ROUNDS),
        Subject("classes", "time against the number of classes C", _classes(), _ROUNDS),
        Subject("threads", "time against threads", _threads(), 11),
        Subject("isa", "time against vector instructions", _isa(), _ROUNDS),
    )
}
SUBJECTS: dict[str, Subject] = COMPARISONS | SWEEPS | {recipes.SUBJECT.name: recipes.SUBJECT}
STANDARD = tuple(name for name in SUBJECTS if name not in QUICK)
