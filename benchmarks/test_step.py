"""The same cases and contenders under pytest-benchmark: `python -m pytest benchmarks`.

For quick looks and for comparing two commits (--benchmark-autosave, --benchmark-compare). All contenders share one
process here and run one after the other, so fair ratios between them come from `python -m benchmarks`.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks import gate
from benchmarks.cases import CASES
from benchmarks.contenders import contender
from benchmarks.prepared import Prepared
from benchmarks.problem import make_problem
from benchmarks.results import machine

CASE = CASES["synapse2d"]
ROUNDS = 5


@lru_cache(maxsize=1)  # one at a time stays in memory; tests are ordered by contender
def prepared(name: str) -> Prepared:
    """The contender, checked on the small case first and set up on the full one."""
    obstacle = contender(name).why_not()
    if obstacle is not None:
        pytest.skip(obstacle)
    gate.check(name, CASE.small, gate.errors(contender(name), CASE.small))
    return contender(name).prepare(make_problem(CASE.case))


@pytest.fixture(params=["fused", "plain", "official", "eager"], scope="module")
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def timed(benchmark: BenchmarkFixture, name: str) -> BenchmarkFixture:
    benchmark.group = CASE.name
    benchmark.extra_info |= {"contender": name, "threads": torch.get_num_threads(), **machine()}
    return benchmark


def test_forward(timed: BenchmarkFixture, name: str) -> None:
    one = prepared(name)
    timed.pedantic(one.loss, rounds=ROUNDS, warmup_rounds=1)


def test_backward(timed: BenchmarkFixture, name: str) -> None:
    one = prepared(name)

    def forward() -> tuple[tuple[Tensor], dict[str, object]]:
        one.clear()
        return (one.loss(),), {}

    timed.pedantic(lambda loss: loss.backward(), setup=forward, rounds=ROUNDS, warmup_rounds=1)


def test_step(timed: BenchmarkFixture, name: str) -> None:
    one = prepared(name)
    timed.pedantic(lambda: one.loss().backward(), setup=one.clear, rounds=ROUNDS, warmup_rounds=1)
