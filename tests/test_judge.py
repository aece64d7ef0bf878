"""The judge: right outcomes pass, each kind of wrong one is named; and inputs keep their strides on another device."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lomix_fast.testing import judge as judging
from lomix_fast.testing.cases import CASES, Case, case, make_inputs
from lomix_fast.testing.judge import (
    Outcome,
    WrongResultError,
    check_gradients,
    check_stats,
    judge,
    judge_gradients,
    judge_stats,
    plain_of,
    run_backend,
)
from lomix_fast.testing.placement import move, move_inputs
from lomix_fast.testing.precision import full_float32

META = torch.device("meta")
CPU = torch.device("cpu")


def spoilt(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    out = tensor.clone()
    out.view(-1)[-1:] = change(out.view(-1)[-1:])
    return out


@pytest.mark.parametrize("name", ["base", "empty_batch", "classes_1", "large_1e4", "base_float16", "finest_only"])
def test_a_right_outcome_is_within_its_limits(name: str) -> None:
    one = case(name)
    findings = judge(one, run_backend(one, "eager"))
    assert all(f.complaint is None and 0 <= f.ratio <= 1 for f in findings), findings
    assert [f.what for f in findings[:4]] == ["label counts", "stats group ce", "stats group I", "stats group Q"]
    assert {f.what for f in findings[4:]} == {f"gradient of {n}" for n in judging.truth_of(one).gradients}


@pytest.mark.parametrize(
    ("change", "ratio"),
    [(lambda x: x * 1.01 + 1, None), (lambda x: x * math.nan, math.inf), (lambda x: x + math.inf, math.inf)],
)
def test_a_wrong_number_is_named(change: Callable[[Tensor], Tensor], ratio: float | None) -> None:
    one = case("base")
    right = run_backend(one, "eager")
    wrong = replace(
        right,
        stats=spoilt(right.stats, change),
        gradients={**right.gradients, "awf_bias": spoilt(right.gradients["awf_bias"], change)},
    )
    bad = [f for f in judge(one, wrong) if f.complaint is not None]
    assert [f.what for f in bad] == ["stats group Q", "gradient of awf_bias"]
    assert "1 of " in bad[0].complaint and "first at (1, 47, 3)" in bad[0].complaint
    assert all(f.ratio == ratio if ratio is not None else 1 < f.ratio < math.inf for f in bad)
    with pytest.raises(WrongResultError, match="stats group Q"):
        check_stats(one, wrong)
    with pytest.raises(WrongResultError, match="gradient of awf_bias"):
        check_gradients(one, wrong)


def test_wrong_forms_are_named() -> None:
    one = case("base")
    right = run_backend(one, "eager")
    for wrong, what in (
        (replace(right, stats=right.stats[:, :-1]), "stats: got"),
        (replace(right, stats=right.stats.double()), "stats: got torch.float64"),
        (replace(right, target_stats=right.target_stats[:, :-1]), "label counts: got"),
        (replace(right, target_stats=spoilt(right.target_stats, lambda x: x + 1)), "label counts: 1 of 10 wrong"),
    ):
        with pytest.raises(WrongResultError, match=what):
            check_stats(one, wrong)
    without = {name: g for name, g in right.gradients.items() if name != "cat_bias"}
    flat = {**right.gradients, "cat_bias": right.gradients["cat_bias"].flatten()}
    for gradients, what in ((without, "gradients: got those of"), (flat, "gradient of cat_bias: got")):
        with pytest.raises(WrongResultError, match=what):
            check_gradients(one, replace(right, gradients=gradients))
    assert judge_stats(one, replace(right, stats=right.stats[:, :-1]))[0].ratio == math.inf
    assert judge_gradients(one, replace(right, gradients=without))[0].ratio == math.inf


@pytest.mark.slow
def test_checks_survive_python_o() -> None:
    code = (
        "from dataclasses import replace\n"
        "from lomix_fast.testing.cases import case\n"
        "from lomix_fast.testing.judge import *\n"
        "one = case('one_pixel')\n"
        "got = run_backend(one, 'eager')\n"
        "try:\n    check_stats(one, replace(got, stats=got.stats + 1))\n"
        "except WrongResultError:\n    print('caught')\n"
    )
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-O", "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.stdout == "caught\n", done.stderr


@pytest.mark.parametrize("one", CASES, ids=lambda c: c.name)
def test_moved_inputs_keep_strides_gaps_and_numbers(one: Case) -> None:
    inputs = make_inputs(one)
    moved, nowhere = move_inputs(inputs, CPU), move_inputs(inputs, META)
    pairs = [(inputs.target, moved.target, nowhere.target)]
    pairs += [(t, moved.differentiable[n], nowhere.differentiable[n]) for n, t in inputs.differentiable.items()]
    for before, after, meta in pairs:
        for other in (after, meta):
            assert other.shape == before.shape and other.stride() == before.stride()
            assert other.storage_offset() == before.storage_offset() or not before.numel()
            assert other.dtype == before.dtype and not other.requires_grad
        assert torch.equal(before, after) and meta.device == META
        assert before.untyped_storage().data_ptr() != after.untyped_storage().data_ptr() or not before.numel()


def test_moving_takes_the_gaps_along_and_shares_what_was_shared() -> None:
    sliced = make_inputs(case("base_sliced")).logits[0]
    gaps = move(sliced, CPU).as_strided((sliced.stride(0),), (1,), 0)
    assert gaps.isnan().sum() > 0
    expanded = move(make_inputs(case("base_expanded")).logits[0].requires_grad_(), CPU)
    assert expanded.stride(0) == 0 and expanded.data_ptr() == expanded[1].data_ptr() and not expanded.requires_grad


def test_tf32_is_off_for_the_yardstick_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    seen = []

    def look(*_: object, **__: object) -> tuple[Tensor, Tensor]:
        seen.append((matmul.allow_tf32, cudnn.allow_tf32))
        raise RuntimeError("seen")

    before = matmul.allow_tf32, cudnn.allow_tf32
    monkeypatch.setattr(judging, "map_stats_reference", look)
    try:
        matmul.allow_tf32, cudnn.allow_tf32 = True, True
        with pytest.raises(RuntimeError, match="seen"):
            plain_of(Case("of_nobody_else", 1, 2, (2, 2), ((1, 1), (2, 2))))
        assert seen == [(False, False)] and matmul.allow_tf32 and cudnn.allow_tf32
        matmul.allow_tf32, cudnn.allow_tf32 = False, True
        with full_float32():
            assert not cudnn.allow_tf32
        assert not matmul.allow_tf32 and cudnn.allow_tf32
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def test_outcomes_come_to_the_cpu() -> None:
    got = Outcome(torch.ones(1), torch.ones(1), {"a": torch.ones(1)})
    assert got.cpu().gradients.keys() == {"a"} and got.cpu().stats is got.stats
