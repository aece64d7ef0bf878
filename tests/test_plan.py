"""MixPlan: which maps, in which order, under which names."""

from __future__ import annotations

import copy
import pickle
from itertools import combinations

import pytest

from lomix_fast import MixPlan
from lomix_fast.plan import OPERATOR_CODES

ALL = ("add", "mul", "cat", "awf")


@pytest.mark.parametrize(
    ("scales", "subsets", "pairs", "maps"),
    [(1, 0, 0, 1), (2, 1, 2, 6), (3, 4, 9, 19), (4, 11, 28, 48), (5, 26, 75, 109), (6, 57, 186, 234)],
)
def test_counts(scales: int, subsets: int, pairs: int, maps: int) -> None:
    plan = MixPlan.create(scales)
    assert (plan.num_subsets, plan.num_pairs, plan.num_maps) == (subsets, pairs, maps)
    assert len(plan.subsets) == subsets and len(plan.pairs) == pairs and len(plan.maps) == len(plan.map_names) == maps


def test_order_of_everything_written_out_for_three_scales() -> None:
    plan = MixPlan.create(3)
    assert plan.subsets == ((0, 1), (0, 2), (1, 2), (0, 1, 2))
    assert plan.pairs == ((0, 0), (0, 1), (1, 0), (1, 2), (2, 1), (2, 2), (3, 0), (3, 1), (3, 2))
    subsets = ("0_1", "0_2", "1_2", "0_1_2")
    synthetic = [f"{operator}_{subset}" for operator in ALL for subset in subsets]
    assert plan.map_names == ("orig_0", "orig_1", "orig_2", *synthetic)
    assert [m.first_pair for m in plan.maps] == [-1] * 3 + [0, 2, 4, 6] * 4
    assert [m.subset for m in plan.maps] == [-1] * 3 + [0, 1, 2, 3] * 4


@pytest.mark.parametrize("scales", range(1, 7))
def test_subsets_follow_itertools_and_pairs_follow_subsets(scales: int) -> None:
    plan = MixPlan.create(scales)
    expected = [s for size in range(2, scales + 1) for s in combinations(range(scales), size)]
    assert list(plan.subsets) == expected
    assert list(plan.pairs) == [(index, member) for index, s in enumerate(expected) for member in s]
    for spec in plan.maps:
        if spec.operator != "orig":
            rows = range(spec.first_pair, spec.first_pair + len(spec.members))
            assert [plan.pairs[k] for k in rows] == [(spec.subset, i) for i in spec.members]


def test_operators_keep_the_order_they_are_given_in() -> None:
    plan = MixPlan.create(2, ["awf", "add"])
    assert plan.map_names == ("orig_0", "orig_1", "awf_0_1", "add_0_1")
    assert plan.operators == ("awf", "add")


def test_originals_can_be_chosen() -> None:
    assert MixPlan.create(3, (), originals=[2]).map_names == ("orig_2",)
    assert MixPlan.create(2, ("mul",), originals=()).map_names == ("mul_0_1",)


def test_used_scales() -> None:
    assert MixPlan.create(3, (), originals=(2,)).used_scales == (2,)
    assert MixPlan.create(3, ("add",), originals=()).used_scales == (0, 1, 2)


def test_uses_cat_and_awf_only_when_there_is_a_subset() -> None:
    assert MixPlan.create(2).uses_cat and MixPlan.create(2).uses_awf
    assert not MixPlan.create(1).uses_cat and not MixPlan.create(1).uses_awf
    assert not MixPlan.create(3, ("add", "mul")).uses_cat and not MixPlan.create(3, ("cat",)).uses_awf


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("originals", [None, (1,), ()])
@pytest.mark.parametrize("operators", [ALL, ("cat", "add")])
def test_key_round_trips(operators: tuple[str, ...], originals: tuple[int, ...] | None, squared: bool) -> None:
    plan = MixPlan.create(3, operators, originals, squared)
    assert MixPlan.from_key(plan.key) is plan
    other = MixPlan.create(3, operators, originals, not squared)
    assert other != plan and other.key != plan.key


def test_key_of_a_plan_without_operators_round_trips() -> None:
    plan = MixPlan.create(4, ())
    assert MixPlan.from_key(plan.key) is plan


@pytest.mark.parametrize("key", ["", "L=3", "L=x;orig=0;ops=add;q=2", "L=2;orig=0,1;ops=add;q=3", "nonsense"])
def test_a_text_that_is_no_key_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="key: got"):
        MixPlan.from_key(key)


def test_equal_arguments_give_the_same_object() -> None:
    assert MixPlan.create(3, ("add",)) is MixPlan.create(3, ["add"], (0, 1, 2), True)
    assert MixPlan.create(3, ("add",)) is not MixPlan.create(3, ("mul",))


def test_frozen_hashable_copied_and_pickled() -> None:
    plan = MixPlan.create(3)
    with pytest.raises(AttributeError):
        plan.num_scales = 4  # type: ignore[misc]
    for twin in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert twin == plan and hash(twin) == hash(plan)
        assert twin.map_names == plan.map_names and twin.key == plan.key


def test_encoded_says_the_same_as_the_maps() -> None:
    plan = MixPlan.create(3, ("cat", "mul"), originals=(1, 2))
    assert len(plan.encoded) == 4 * plan.num_maps
    assert sorted(OPERATOR_CODES.values()) == list(range(8))
    names = {code: name for name, code in OPERATOR_CODES.items()}
    for m, spec in enumerate(plan.maps):
        code, mask, subset, first_pair = plan.encoded[4 * m : 4 * m + 4]
        members = tuple(i for i in range(3) if mask >> i & 1)
        assert (names[code], members, subset, first_pair) == (
            spec.operator,
            spec.members,
            spec.subset,
            spec.first_pair,
        )


@pytest.mark.parametrize(
    ("scales", "options", "message"),
    [
        (3, {"subsets": []}, r"subsets: got \[\], expected at least one subset.* pass operators=\(\)"),
        (3, {"subsets": ()}, r"subsets: got \(\), expected at least one subset"),
        (3, {"max_subset_size": 1}, r"max_subset_size: got 1, expected 2 to num_scales=3.* pass operators=\(\)"),
        (1, {"max_subset_size": 2}, "max_subset_size: got 2 with num_scales=1, which mixes nothing; leave it out"),
        (1, {"max_subset_size": 3}, "max_subset_size: got 3 with num_scales=1, which mixes nothing; leave it out"),
        (1, {"subsets": "pairs"}, "subsets: got 'pairs' with num_scales=1, which mixes nothing; leave it out"),
    ],
    ids=str,
)
def test_a_choice_of_no_subset_is_refused(scales: int, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        MixPlan.create(scales, **options)


# A selection of maps --------------------------------------------------------------------------------------------------


def test_a_selection_keeps_some_maps_and_all_rows_of_the_parameters() -> None:
    plan = MixPlan.create(3)
    some = plan.select([1, 5, 12, 16])
    assert some.map_names == ("orig_1", "add_1_2", "cat_0_2", "awf_0_2") and some.num_maps == 4
    assert some.maps == tuple(plan.maps[m] for m in (1, 5, 12, 16))
    assert some.encoded == tuple(v for m in (1, 5, 12, 16) for v in plan.encoded[4 * m : 4 * m + 4])
    assert (some.subsets, some.pairs, some.num_scales) == (plan.subsets, plan.pairs, 3)
    assert some.operators == plan.operators and some.originals == plan.originals and some.squared is plan.squared
    assert some.kept == (1, 5, 12, 16) and plan.kept is None


@pytest.mark.parametrize(
    ("kept", "scales", "cat", "awf"),
    [
        ((0,), (0,), False, False),
        ((13,), (1, 2), True, False),
        ((16,), (0, 2), False, True),
        ((2, 3), (0, 1, 2), False, False),
    ],
)
def test_what_a_selection_uses(kept: tuple[int, ...], scales: tuple[int, ...], cat: bool, awf: bool) -> None:
    some = MixPlan.create(3).select(kept)
    assert (some.used_scales, some.uses_cat, some.uses_awf) == (scales, cat, awf)


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("kept", [(0,), (2, 3, 9), tuple(range(10))])
def test_key_of_a_selection_round_trips(kept: tuple[int, ...], squared: bool) -> None:
    plan = MixPlan.create(3, ("cat", "add"), squared=squared)
    some = plan.select(kept)
    assert MixPlan.from_key(some.key) is some
    assert some.key != plan.key and some != plan and hash(some) != hash(plan)
    assert some.key == f"{plan.key};kept={','.join(map(str, kept))}"


def test_equal_selections_are_the_same_object() -> None:
    plan = MixPlan.create(3)
    assert plan.select([0, 4, 7]) is plan.select((0, 4, 7))
    assert plan.select(list(range(19))) is plan
    assert plan.select((0, 4, 7, 9)).select((1, 3)) is plan.select((4, 9))
    assert plan.select((4, 9)).select((0, 1)) is plan.select((4, 9))
    assert plan.select((4, 9)) != plan.select((4, 10))


def test_a_selection_is_copied_and_pickled() -> None:
    some = MixPlan.create(3).select((0, 4, 13))
    for twin in (copy.deepcopy(some), pickle.loads(pickle.dumps(some))):
        assert twin == some and hash(twin) == hash(some) and twin.encoded == some.encoded and twin.uses_cat


@pytest.mark.parametrize(
    ("kept", "error", "message"),
    [
        ((), ValueError, "kept: got no map, expected at least one"),
        ((3, 1), ValueError, r"kept: got \(3, 1\), expected increasing map numbers in \[0, 6\)"),
        ((1, 1), ValueError, r"kept: got \(1, 1\), expected increasing"),
        ((0, 6), ValueError, r"kept: got \(0, 6\), expected .* in \[0, 6\)"),
        ((-1, 2), ValueError, r"kept: got \(-1, 2\), expected"),
        ("01", TypeError, "kept: got '01', expected a tuple or list of map numbers"),
        ((0.0, 1), TypeError, r"kept: got \(0.0, 1\), expected"),
        ((True,), TypeError, r"kept: got \(True,\), expected"),
        (3, TypeError, "kept: got 3, expected"),
    ],
)
def test_a_bad_selection_is_refused(kept: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MixPlan.create(2).select(kept)  # type: ignore[arg-type]


@pytest.mark.parametrize("kept", ["", "x", "0,", "7", "2,1"])
def test_a_key_with_a_bad_selection_is_refused(kept: str) -> None:
    with pytest.raises(ValueError, match=r"(key|kept): got"):
        MixPlan.from_key(f"{MixPlan.create(2).key};kept={kept}")
