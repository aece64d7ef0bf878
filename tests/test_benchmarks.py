"""The benchmark harness: what it writes, and that it refuses to write for wrong results. No time is judged here."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_up import build_figure, contender_figures, sweep_figures

import benchmarks.__main__ as command
from benchmarks import gate
from benchmarks.__main__ import main
from benchmarks.cases import CASES, official_style_bytes, official_style_maps, shrunk
from benchmarks.contenders import CONTENDERS, contender
from benchmarks.measure import percentiles
from benchmarks.plain import plain_loss
from benchmarks.problem import make_problem
from benchmarks.results import COLUMNS
from benchmarks.sweeps import STANDARD, SUBJECTS
from benchmarks.table import table
from benchmarks.worker import Worker
from lomix_fast.testing.process import Ended

SYNAPSE, PATCH = CASES["synapse2d"].case, CASES["patch3d"].case
TINY = CASES["tiny3d"]
NEEDS_FUSED = pytest.mark.skipif(CONTENDERS["fused"].why_not() is not None, reason="the fused kernel is not built")

OTHERS = """
import os
from dataclasses import replace

import torch

from benchmarks.contenders import CONTENDERS, Prepared

plain = CONTENDERS["plain"]

def off_by_a_permille(problem):
    right = plain.prepare(problem)
    return Prepared(lambda: right.loss() * 1.001, right.leaves)

def needs_64_mib(problem):
    held = torch.ones(2**25)
    right = plain.prepare(problem)
    torch.ones(2**25).sum()
    return Prepared(lambda: right.loss() + 0 * torch.ones(2**24).sum() * held[0], right.leaves)

def dies(problem):
    os._exit(3)

wrong = replace(plain, prepare=off_by_a_permille)
dying = replace(plain, prepare=dies)
hungry = replace(plain, prepare=needs_64_mib)
"""


@pytest.fixture
def others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to import contenders from."""
    (tmp_path / "others.py").write_text(OTHERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("others", None)


def test_a_run_writes_every_column_and_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "figures.csv"
    arguments = ["--subjects", "tiny3d", "--contenders", "plain,eager", "--rounds", "2", "--threads", "1"]
    assert main([*arguments, "--out", str(out)]) == 0
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    directions = ("forward", "backward", "step", "first_step", "memory")
    assert [(r["contender"], r["direction"]) for r in rows] == [(c, d) for c in ("plain", "eager") for d in directions]
    for r in rows:
        empty = {name for name, value in r.items() if value == ""} - {"triton", "commit", "compiler"}
        if r["direction"] == "memory":
            assert empty == {"p20_ms", "p50_ms", "p80_ms"}
        else:
            assert empty == {"extra_peak_mib", "gradients_mib"}
            assert 0 < float(r["p20_ms"]) <= float(r["p50_ms"]) <= float(r["p80_ms"])
        assert r["n"] == ("2" if r["direction"] in directions[:3] else "1")
    assert {r["spatial"] for r in rows} == {"6x7x8"} and {r["native_scales"] for r in rows} == {"2x3x2 3x4x4 6x7x8"}
    same = ("subject", "B", "C", "L", "maps", "dtype", "threads")
    assert {tuple(r[name] for name in same) for r in rows} == {("tiny3d", "2", "3", "3", "19", "float32", "1")}
    printed = capsys.readouterr().out
    assert "times as much as the first line" in printed and "gate  eager" in printed


@pytest.mark.slow
def test_a_wrong_contender_turns_the_gate_red(others: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = others / "figures.csv"
    arguments = ["--subjects", "tiny3d", "--contenders", "plain,others:wrong", "--rounds", "1", "--threads", "1"]
    assert main([*arguments, "--out", str(out)]) == 1
    told = capsys.readouterr()
    assert "RED GATE: others:wrong tiny3d on tiny3d_small: loss is off by 1.00e-03" in told.err
    assert not out.exists() and " ms" not in told.out and "round" not in told.out


def test_a_contender_that_dies_is_named(others: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = others / "figures.csv"
    assert main(["--subjects", "tiny3d", "--contenders", "others:dying", "--rounds", "1", "--out", str(out)]) == 1
    assert "others:dying: its process ended during 'errors' with exit code 3" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--subjects", "nobody"], "--subjects: got 'nobody', expected names out of synapse2d"),
        (["--subjects", "tiny2d", "--check", "--threads", "0"], "expected at least 1"),
        (["--contenders", "nobody"], "contenders: got 'nobody', expected names out of fused"),
        (["--contenders", "math:pi"], "a float; expected a benchmarks Contender"),
        (["--contenders", "no_such_module:x"], "cannot be imported"),
        (["--rounds", "0"], "expected at least 1"),
    ],
)
def test_wrong_usage_is_refused_before_anything_runs(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["plain", "eager", "official", pytest.param("fused", marks=NEEDS_FUSED)])
@pytest.mark.parametrize("case", [CASES["synapse2d"], CASES["patch3d"]], ids=lambda one: one.name)
def test_contenders_agree_with_the_definition(name: str, case) -> None:
    gate.check(name, case.small, gate.errors(contender(name), case.small))


def test_the_gate_sees_a_gradient_that_is_wrong_missing_or_not_finite() -> None:
    good = gate.errors(CONTENDERS["plain"], TINY.small)
    assert set(good) == {"loss", *make_problem(TINY.small).leaves}
    gate.check("one", TINY.small, good)
    for bad in (2e-4, float("inf")):
        with pytest.raises(gate.GateError, match=r"cat_weight is off by .* allowed 1e-04"):
            gate.check("one", TINY.small, good | {"cat_weight": bad})
    assert gate._error(None, torch.ones(2)) == float("inf")
    assert gate._error(torch.ones(3), torch.ones(2)) == float("inf")
    assert gate._error(torch.full((2,), float("nan")), torch.ones(2)) == float("inf")


def test_contenders_that_disagree_at_full_size_are_refused() -> None:
    one = {"loss": 10.0, "alpha": 1.0}
    gate.check_agreement(TINY.case, {"a": one, "b": {"loss": 10.0001, "alpha": 1.0001}})
    for other in ({"loss": 10.01, "alpha": 1.0}, {"loss": 10.0, "alpha": 1.01}, {"loss": 10.0}):
        with pytest.raises(gate.GateError, match="b on tiny3d"):
            gate.check_agreement(TINY.case, {"a": one, "b": other})


def test_plain_keeps_no_more_maps_than_a_careful_person_needs() -> None:
    """The opponent is honest: two full-size maps for each supervised one, and little else."""
    case = replace(shrunk(SYNAPSE, 56), native=((56, 56),) * 4)
    problem = make_problem(case).requires_grad_()
    known = {t.untyped_storage().data_ptr() for t in [*problem.leaves.values(), problem.target]}
    sizes: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    values = (problem.alpha, problem.cat_weight, problem.cat_bias, problem.awf_weight, problem.awf_bias)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        plain_loss(problem.logits, problem.target, case.plan, problem.row_of_pair, *values)
    maps = sum(sizes.values()) / (case.batch * case.classes * case.pixels * 4)
    assert maps < 2 * case.plan.num_maps + 24


def test_official_style_estimate_is_the_published_one() -> None:
    subsets = {4: 11, 5: 26}
    assert round(official_style_maps(4, 9) - 4 * subsets[4]) == 209
    assert round(official_style_maps(5, 9) - 4 * subsets[5]) == 508
    assert official_style_bytes(5, 14, 4, 96**3) / 2**30 == pytest.approx(112, abs=1)
    assert official_style_bytes(4, 9, 1, 96**3) / 2**30 == pytest.approx(7.5, abs=0.01)
    assert CONTENDERS["official"].estimate(PATCH) == official_style_bytes(4, 9, 1, 96**3)


def test_standard_cases_are_those_of_the_promises() -> None:
    assert (SYNAPSE.batch, SYNAPSE.classes, SYNAPSE.full) == (6, 9, (224, 224))
    assert SYNAPSE.native == ((7, 7), (14, 14), (28, 28), (56, 56))
    assert (PATCH.batch, PATCH.classes, PATCH.full) == (1, 9, (96, 96, 96))
    assert PATCH.native == ((12,) * 3, (24,) * 3, (48,) * 3, (96,) * 3)
    for one in CASES.values():
        assert (one.small.classes, len(one.small.native)) == (one.case.classes, len(one.case.native))
        assert one.small.batch * one.small.pixels < 10_000
    assert shrunk(SYNAPSE, 64).native == ((2, 2), (4, 4), (7, 7), (14, 14))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is exact on Linux alone")
def test_peak_memory_is_that_of_the_step(others: Path) -> None:
    """64 MiB held for a moment are seen; 128 MiB held since before the step, or used up before it, are not."""
    with Worker("others:hungry", TINY, 1) as worker:
        worker.errors()
        peak = worker.memory().extra_peak_mib
        assert len(worker.repetitions(2)) == 2
    assert 64 <= peak < 68


def test_percentiles() -> None:
    assert percentiles([float(i) for i in range(11)]) == (2.0, 5.0, 8.0)
    assert percentiles([3.0]) == (3.0, 3.0, 3.0)


# ---- the run as a whole, with measuring itself replaced ----


def test_everything_is_measured_by_default_and_written_after_each_subject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.csv"
    seen: dict[str, int] = {}

    def found(subject, *, rounds: int, threads: int, say: object) -> list:
        seen[subject.name] = rounds
        if subject.name == "classes":
            assert {r["subject"] for r in csv.DictReader(out.open(newline=""))} == set(seen) - {"classes"}
            raise Ended("fused classes_105: its process ended")
        return sweep_figures(subject.name)

    monkeypatch.setattr(command, "measure", found)
    monkeypatch.setattr(command.build_time, "measure_build", lambda say: [build_figure(93.0)])
    monkeypatch.setattr(command, "contender", lambda name: CONTENDERS["plain"])
    assert main(["--out", str(out)]) == 1, "a subject failed"
    assert seen == {name: SUBJECTS[name].rounds for name in STANDARD}
    told = capsys.readouterr()
    assert "classes: fused classes_105: its process ended" in told.err
    assert "build: building the extension from nothing: 93 s, 2 jobs" in told.out
    with out.open(newline="") as file:
        assert {r["subject"] for r in csv.DictReader(file)} == {*STANDARD, "build"} - {"classes"}


def test_a_red_gate_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "figures.csv"

    def found(subject, **_: object) -> list:
        if subject.name == "tiny3d":
            assert out.exists()
            raise gate.GateError("wrong")
        return sweep_figures(subject.name)

    monkeypatch.setattr(command, "measure", found)
    monkeypatch.setattr(command, "contender", lambda name: CONTENDERS["plain"])
    assert main(["--quick", "--out", str(out)]) == 1
    assert not out.exists()


def test_contenders_given_take_every_setting_of_a_sweep() -> None:
    entries = SUBJECTS["threads"].by(("plain", "eager")).entries
    assert {e.threads for e in entries} == {e.threads for e in SUBJECTS["threads"].entries}
    assert [e.contender for e in entries] == ["plain", "eager"] * (len(entries) // 2)
    assert [(e.case, e.contender) for e in SUBJECTS["patch3d14"].by(("fused",)).entries] == [
        ("patch3d14", "fused"),
        ("official3d14", "fused"),
    ]


# ---- the table ----


def test_table_compares_with_the_first_line() -> None:
    lines = table("title", contender_figures("synapse2d", fused=50.0, official=800.0)).splitlines()
    assert lines[0] == "title" and "size 224x224, B 6, C 9, L 4, maps 48" in lines[1] and len(lines) == 6
    assert "16.00" in lines[5].split() and "1.00" in lines[4].split()
    assert "166.1" in lines[4].split(), "50 ms for 6 x 224 x 224 pixels, in ns"


def test_table_has_columns_for_what_differs() -> None:
    lines = table("title", sweep_figures("classes")).splitlines()
    assert lines[3].split()[:3] == ["contender", "B", "C"] and "size 224x224" in lines[1]
    assert len(lines) == 4 + len(SUBJECTS["classes"].entries)
    assert table("title", sweep_figures("threads")).splitlines()[3].split()[1] == "threads"
