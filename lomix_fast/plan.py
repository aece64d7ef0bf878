"""Which maps are supervised: subsets of scales, operators, order and names. Pure Python, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations

from .names import did_you_mean

OPERATORS = ("add", "mul", "cat", "awf")  # the paper's, what "all operators" means by default
EXTRA_OPERATORS = ("sub", "avg", "max")  # what the authors' code offers besides
KNOWN_OPERATORS = OPERATORS + EXTRA_OPERATORS
MAX_SCALES = 8
MAX_MAPS = 512  # what every backend has room for

# The integer that stands for each kind of map in `MixPlan.encoded`; csrc/plan.h holds the same list.
OPERATOR_CODES = {"orig": 0, "add": 1, "mul": 2, "cat": 3, "awf": 4, "sub": 5, "avg": 6, "max": 7}

ONE_SCALE = "mixes nothing; leave it out"  # why a choice of mixes is refused

# With `MixPlan.bounded`, "mul" multiplies P / sqrt(1 + (P / MUL_BOUND)^2) instead of P; csrc/plan.h holds it too.
MUL_BOUND = 2.0


@dataclass(frozen=True)
class MapSpec:
    """One supervised map.

    Attributes:
        operator: "orig" for the interpolated logits of one scale, otherwise one of `OPERATORS`.
        members: scales that enter the map, increasing; scale 0 is the coarsest.
        subset: index of `members` in `MixPlan.subsets`, -1 for "orig".
        first_pair: index of (subset, members[0]) in `MixPlan.pairs`, -1 for "orig"; the pairs of one subset
            follow each other, so member number i of the map owns row `first_pair + i` of W and u.
    """

    operator: str
    members: tuple[int, ...]
    subset: int
    first_pair: int

    @property
    def name(self) -> str:
        """Readable name, for example "orig_3" or "add_0_1"."""
        return "_".join([self.operator, *map(str, self.members)])


@dataclass(frozen=True)
class MixPlan:
    """The list of supervised maps, in the order every table, vector and checkpoint uses.

    Order (SPEC: Rahman and Marculescu, NeurIPS 2025, and the authors' released code): the originals, then operator
    by operator, then subset by subset, subsets by size and lexicographic within a size. Scale 0 is the coarsest.

    Build one with `MixPlan.create`, which checks its arguments; equal arguments give the same object. `select` leaves
    some of its maps out.

    Attributes:
        num_scales, operators, originals, squared, sigmoid, bounded: the arguments of `create`.
        chosen: None when every subset of two or more scales is mixed, otherwise those that are, in order.
        kept: None, or in a plan that `select` made the numbers of its maps in the plan of all maps, increasing.
        key: text that identifies the plan, for example "L=2;orig=0,1;ops=add,cat;q=2", with ";kept=0,2" when selected.
        subsets: the subsets that are mixed, by size, then lexicographic.
        pairs: (subset index, member) for every member of every subset: the rows of W [K, C, C] and u [K, C].
        maps, map_names: the supervised maps in order, and their names ("orig_0", ..., "awf_0_1_2_3").
        encoded: four integers a map for compiled backends: operator code, bit mask of members, subset, first pair.
        used_scales: scales that enter at least one map.
        uses_cat, uses_awf: whether a map needs W and b, and u and v.

    A selection shortens maps, map_names, encoded and used_scales, and uses_cat and uses_awf follow the maps left.
    Subsets and pairs stay whole, so the parameters of the mixes keep their shapes and every map its rows in them.
    """

    num_scales: int
    operators: tuple[str, ...]
    originals: tuple[int, ...]
    squared: bool
    kept: tuple[int, ...] | None = None
    chosen: tuple[tuple[int, ...], ...] | None = None
    sigmoid: bool = False
    bounded: bool = False
    key: str = field(init=False, compare=False)
    subsets: tuple[tuple[int, ...], ...] = field(init=False, compare=False, repr=False)
    pairs: tuple[tuple[int, int], ...] = field(init=False, compare=False, repr=False)
    maps: tuple[MapSpec, ...] = field(init=False, compare=False, repr=False)
    map_names: tuple[str, ...] = field(init=False, compare=False, repr=False)
    encoded: tuple[int, ...] = field(init=False, compare=False, repr=False)
    used_scales: tuple[int, ...] = field(init=False, compare=False, repr=False)
    uses_cat: bool = field(init=False, compare=False, repr=False)
    uses_awf: bool = field(init=False, compare=False, repr=False)

    @staticmethod
    def create(
        num_scales: int,
        operators: tuple[str, ...] | list[str] = OPERATORS,
        originals: tuple[int, ...] | list[int] | None = None,
        squared: bool = True,
        *,
        subsets: Sequence[Sequence[int]] | str | None = None,
        max_subset_size: int | None = None,
        sigmoid: bool = False,
        bounded: bool = False,
    ) -> MixPlan:
        """Check the arguments and return the plan for them.

        Args:
            num_scales: L, 1 to 8.
            operators: mixes to make of every subset, from "add", "mul", "cat", "awf" (the paper's) and "sub" (the
                coarsest member minus the others), "avg" (their mean), "max" (their largest, class by class), in the
                order wanted; empty for none.
            originals: scales supervised on their own, increasing; None for all of them.
            squared: whether the third group of statistics sums s^2 (True, Dice with squared denominator) or s.
            subsets: which sets of two or more scales are mixed: None for all, "pairs", or a list of increasing tuples
                of scale numbers in any order; tables keep them by size, then lexicographic.
            max_subset_size: None, or the most members of a subset, 2 to L; not together with `subsets`.
            sigmoid: probabilities are sigmoids of each class's logit (multi-label) rather than a softmax over classes.
            bounded: "mul" multiplies P / sqrt(1 + (P / 2)^2) instead of the logits P: the same to first order where P
                is small, odd in each factor, never above 2 to the number of members, smooth everywhere.

        Raises:
            TypeError: an argument of the wrong type.
            ValueError: an unknown or repeated operator, a scale or subset that does not exist, no map at all, or more
                than 8 scales or 512 maps (the message says how many maps that would be).
        """
        if isinstance(num_scales, bool) or not isinstance(num_scales, int):
            raise TypeError(f"num_scales: got {num_scales!r}, expected an int from 1 to {MAX_SCALES}")
        if not isinstance(operators, (tuple, list)):
            raise TypeError(f"operators: got {operators!r}, expected a tuple or list out of {KNOWN_OPERATORS}")
        for name in operators:
            if name not in KNOWN_OPERATORS:
                near = did_you_mean(name, KNOWN_OPERATORS)
                raise ValueError(
                    f"operators: got the unknown name {name!r}, expected names out of {KNOWN_OPERATORS}{near}"
                )
        if len(set(operators)) != len(operators):
            raise ValueError(f"operators: got {tuple(operators)}, expected each name at most once")
        if num_scales < 1:
            raise ValueError(f"num_scales: got {num_scales}, expected at least 1")
        if num_scales > MAX_SCALES:
            raise ValueError(
                f"num_scales: got {num_scales}, expected at most {MAX_SCALES}. Pass fewer scales (the finest ones "
                "matter most)"
            )
        for flag, value in (("squared", squared), ("sigmoid", sigmoid), ("bounded", bounded)):
            if not isinstance(value, bool):
                raise TypeError(f"{flag}: got {value!r}, expected True or False")
        if originals is not None and not (
            isinstance(originals, (tuple, list)) and all(type(i) is int for i in originals)
        ):
            raise TypeError(f"originals: got {originals!r}, expected None or a tuple of scale numbers")
        own = tuple(range(num_scales)) if originals is None else tuple(originals)
        if list(own) != sorted(set(own)) or any(not 0 <= i < num_scales for i in own):
            raise ValueError(f"originals: got {own}, expected increasing scale numbers in [0, {num_scales})")
        chosen = choose_subsets(num_scales, subsets, max_subset_size)
        count = len(own) + len(operators) * (2**num_scales - 1 - num_scales if chosen is None else len(chosen))
        if count > MAX_MAPS:
            raise ValueError(
                f"num_scales: got {num_scales} with operators {tuple(operators)}, which would be {count} supervised "
                f"maps, expected at most {MAX_MAPS}; pass max_subset_size=2 or 3, subsets=, fewer operators or scales"
            )
        plan = _cached_plan(num_scales, tuple(operators), own, squared, None, chosen, sigmoid, bounded)
        if plan.num_maps == 0:
            raise ValueError(
                f"originals and operators: got originals={own}, operators={tuple(operators)} with num_scales="
                f"{num_scales}, which leaves no map to supervise, expected at least one original or operator"
            )
        return plan

    def select(self, kept: Sequence[int]) -> MixPlan:
        """The plan of some of these maps; the others are neither computed nor differentiated.

        Args:
            kept: numbers of the maps to keep, increasing, in [0, num_maps) of this plan, at least one.

        Returns:
            A plan with those maps, in the same order, and the subsets and pairs of this one; this very plan when all
            are kept.

        Raises:
            TypeError: not a tuple or list of ints.
            ValueError: none kept, not increasing, or a number that no map has.
        """
        if not isinstance(kept, (tuple, list)) or not all(type(m) is int for m in kept):
            raise TypeError(f"kept: got {kept!r}, expected a tuple or list of map numbers in [0, {self.num_maps})")
        chosen = tuple(kept)
        if not chosen:
            raise ValueError("kept: got no map, expected at least one; there would be nothing to supervise")
        if list(chosen) != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= self.num_maps:
            raise ValueError(
                f"kept: got {chosen}, expected increasing map numbers in [0, {self.num_maps}), as places in map_names"
            )
        if len(chosen) == self.num_maps:
            return self
        numbers = chosen if self.kept is None else tuple(self.kept[m] for m in chosen)
        return _cached_plan(
            self.num_scales,
            self.operators,
            self.originals,
            self.squared,
            numbers,
            self.chosen,
            self.sigmoid,
            self.bounded,
        )

    @staticmethod
    def from_key(key: str) -> MixPlan:
        """Return the plan whose `key` this is (the string form that passes through torch.library schemas).

        Raises:
            ValueError: the text is not such a key.
        """
        return _plan_from_key(key)

    def __post_init__(self) -> None:
        # Filled in once, as plain attributes: torch.compile reads them as constants (it cannot trace cached_property).
        subsets = _subsets_up_to(self.num_scales, self.num_scales) if self.chosen is None else self.chosen
        specs = [MapSpec("orig", (scale,), -1, -1) for scale in self.originals]
        for operator in self.operators:
            first_pair = 0
            for index, subset in enumerate(subsets):
                specs.append(MapSpec(operator, subset, index, first_pair))
                first_pair += len(subset)
        if self.kept is not None:
            specs = [specs[m] for m in self.kept]
        rows = ((OPERATOR_CODES[s.operator], sum(1 << i for i in s.members), s.subset, s.first_pair) for s in specs)
        originals = ",".join(map(str, self.originals))
        whole = f"L={self.num_scales};orig={originals};ops={','.join(self.operators)};q={2 if self.squared else 1}"
        for name, is_on in (("sigmoid", self.sigmoid), ("bounded", self.bounded)):
            whole += f";{name}=1" if is_on else ""
        if self.chosen is not None:
            whole += f";sets={','.join(''.join(map(str, subset)) for subset in self.chosen)}"
        if self.kept is not None:
            whole += f";kept={','.join(map(str, self.kept))}"
        values = {
            "key": whole,
            "subsets": subsets,
            "pairs": tuple((index, member) for index, subset in enumerate(subsets) for member in subset),
            "maps": tuple(specs),
            "map_names": tuple(spec.name for spec in specs),
            "encoded": tuple(value for row in rows for value in row),
            "used_scales": tuple(sorted({i for spec in specs for i in spec.members})),
            "uses_cat": any(spec.operator == "cat" for spec in specs),
            "uses_awf": any(spec.operator == "awf" for spec in specs),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def num_subsets(self) -> int:
        """S, number of subsets that are mixed: 2^L - 1 - L unless some were chosen."""
        return len(self.subsets)

    @property
    def num_pairs(self) -> int:
        """K, number of (subset, member) pairs: L * 2^(L-1) - L unless some subsets were chosen."""
        return len(self.pairs)

    @property
    def num_maps(self) -> int:
        """M, number of supervised maps."""
        return len(self.maps)


def choose_subsets(
    num_scales: int, subsets: Sequence[Sequence[int]] | str | None, max_subset_size: int | None
) -> tuple[tuple[int, ...], ...] | None:
    """The subsets that `MixPlan.create` was asked for, by size, then lexicographic; None for all of them.

    Raises:
        TypeError, ValueError: as `MixPlan.create`.
    """
    if num_scales == 1:
        for name, value in (("subsets", subsets), ("max_subset_size", max_subset_size)):
            if value is not None:
                raise ValueError(f"{name}: got {value!r} with num_scales=1, which {ONE_SCALE}; expected None")
    if max_subset_size is not None:
        if type(max_subset_size) is not int:
            raise TypeError(f"max_subset_size: got {max_subset_size!r}, expected None or an int of at least 2")
        if not 2 <= max_subset_size <= num_scales:
            raise ValueError(
                f"max_subset_size: got {max_subset_size}, expected 2 to num_scales={num_scales}, or None for all; pass "
                "operators=() to mix nothing"
            )
        if subsets is not None:
            raise ValueError(
                f"max_subset_size: got {max_subset_size} together with subsets={subsets!r}, expected one of the two"
            )
        wanted = _subsets_up_to(num_scales, max_subset_size)
    elif subsets is None:
        return None
    elif isinstance(subsets, str):
        if subsets != "pairs":
            raise ValueError(f"subsets: got {subsets!r}, expected None, 'pairs' or a list of tuples of scale numbers")
        wanted = _subsets_up_to(num_scales, 2)
    else:
        wanted = _listed_subsets(num_scales, subsets)
    return None if wanted == _subsets_up_to(num_scales, num_scales) else wanted


def _listed_subsets(num_scales: int, subsets: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    is_list = isinstance(subsets, (tuple, list)) and all(isinstance(one, (tuple, list)) for one in subsets)
    if not is_list or any(type(i) is not int for one in subsets for i in one):
        raise TypeError(f"subsets: got {subsets!r}, expected None, 'pairs' or a list of tuples of scale numbers")
    if not subsets:
        raise ValueError(
            f"subsets: got {subsets!r}, expected at least one subset, or None for all; pass operators=() to mix nothing"
        )
    listed = [tuple(one) for one in subsets]
    for one in listed:
        if len(one) < 2 or list(one) != sorted(set(one)) or one[0] < 0 or one[-1] >= num_scales:
            raise ValueError(
                f"subsets: got {one}, expected two or more increasing scale numbers in [0, {num_scales}); scales by "
                "themselves are `originals`"
            )
    if len(set(listed)) != len(listed):
        raise ValueError(f"subsets: got {listed}, expected each subset once")
    return tuple(sorted(listed, key=lambda one: (len(one), one)))


@lru_cache(maxsize=64)
def _subsets_up_to(num_scales: int, size: int) -> tuple[tuple[int, ...], ...]:
    return tuple(one for count in range(2, size + 1) for one in combinations(range(num_scales), count))


@lru_cache(maxsize=256)
def _cached_plan(
    num_scales: int,
    operators: tuple[str, ...],
    originals: tuple[int, ...],
    squared: bool,
    kept: tuple[int, ...] | None,
    chosen: tuple[tuple[int, ...], ...] | None,
    sigmoid: bool,
    bounded: bool,
) -> MixPlan:
    return MixPlan(num_scales, operators, originals, squared, kept, chosen, sigmoid, bounded)


@lru_cache(maxsize=256)
def _plan_from_key(key: str) -> MixPlan:
    try:
        fields = dict(part.split("=") for part in key.split(";"))
        originals = tuple(int(i) for i in fields["orig"].split(",") if i)
        operators = tuple(name for name in fields["ops"].split(",") if name)
        num_scales, squared = int(fields["L"]), {"1": False, "2": True}[fields["q"]]
        sigmoid, bounded = ({"0": False, "1": True}[fields.get(name, "0")] for name in ("sigmoid", "bounded"))
        kept = [int(m) for m in fields["kept"].split(",")] if "kept" in fields else None
        subsets = None
        if "sets" in fields:
            subsets = [tuple(int(i) for i in one) for one in fields["sets"].split(",") if one]
    except (KeyError, ValueError) as error:
        raise ValueError(f"key: got {key!r}, expected the text of MixPlan.key") from error
    plan = MixPlan.create(num_scales, operators, originals, squared, subsets=subsets, sigmoid=sigmoid, bounded=bounded)
    return plan if kept is None else plan.select(kept)
