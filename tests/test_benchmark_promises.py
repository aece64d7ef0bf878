"""What the benchmark promises and how it is judged, on figures nobody measured; the sweeps and the floor behind it."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from made_up import build_figure, contender_figures, figures, sweep_figures

import benchmarks.__main__ as command
from benchmarks import build_time, capability, floor, gate, recipes, subjects, sweeps
from benchmarks.cases import CASES, OFFICIAL_BUDGET, largest_official_edge, official_style_bytes
from benchmarks.contenders import CONTENDERS, contender
from benchmarks.measure import takes_part
from benchmarks.problem import make_problem
from benchmarks.promises import (
    PROMISES,
    BuiltWithin,
    Even,
    Faster,
    NotSlower,
    PeakAtMost,
    PeakNotAbove,
    Who,
    is_needed,
    subjects_needed,
)
from benchmarks.results import read_csv
from benchmarks.sweeps import SUBJECTS
from benchmarks.worker import Worker
from lomix_fast import MixPlan

NEEDS_FUSED = pytest.mark.skipif(CONTENDERS["fused"].why_not() is not None, reason="the fused kernel is not built")
NEEDS_FLOOR = pytest.mark.skipif(floor.why_not() is not None, reason="there is no C++ compiler")


# ---- every class of promise: kept at its limit, broken beyond it, not measured ----


@pytest.mark.parametrize("official, plain, compiled, kept", [(200, 100, 150, True), (199, 500, 99, False)])
def test_faster_is_judged_against_the_best_opponent(official: float, plain: float, compiled: float, kept: bool) -> None:
    rows = contender_figures("synapse2d", fused=10.0, official=official, plain=plain, compile=compiled)
    assert Faster("synapse2d", (Who("official"),), 20).judge(rows).kept is kept
    verdict = Faster("synapse2d", (Who("plain"), Who("compile")), 10, goal=15).judge(rows)
    assert verdict.kept is kept
    best = "plain" if plain < compiled else "compile"
    assert f"at least 10x faster than plain and compile (goal 15x): {min(plain, compiled) / 10:.2f}x" in verdict.text
    assert f"{best} {min(plain, compiled):.2f} ms" in verdict.text


def test_faster_is_not_judged_without_all_its_opponents() -> None:
    rows = contender_figures("synapse2d", fused=10.0, plain=1000.0)
    assert Faster("synapse2d", (Who("plain"), Who("compile")), 10).judge(rows).kept is None
    assert Faster("synapse2d", (Who("fused"),), 1, who=Who("compile")).judge(rows).kept is None
    assert Faster("patch3d", (Who("plain"),), 10).judge(rows).kept is None, "of another subject"


def test_faster_compares_sizes_by_the_pixel() -> None:
    large, _, official = SUBJECTS["patch3d14"].entries
    promise = Faster("patch3d14", (Who("official", "official3d14"),), 20, who=Who(case="patch3d14"))
    voxels = large.one.case.pixels / official.one.case.pixels
    for factor, kept in ((20.01, True), (19.99, False)):
        rows = figures("patch3d14", large, 100.0) + figures("patch3d14", official, 100.0 * factor / voxels)
        assert promise.judge(rows).kept is kept


@pytest.mark.parametrize("alone, kept", [(185.1, True), (184.9, False)])
def test_threads_are_told_apart(alone: float, kept: bool) -> None:
    one, two = (next(e for e in SUBJECTS["threads"].entries if e.threads == n) for n in (1, 2))
    rows = figures("threads", one, alone) + figures("threads", two, 100.0)
    assert Faster("threads", (Who(threads=1),), 1.85, who=Who(threads=2)).judge(rows).kept is kept


@pytest.mark.parametrize("fused, kept", [(25.0, True), (25.1, False)])
def test_not_slower(fused: float, kept: bool) -> None:
    promise = NotSlower("synapse2d", Who("exp_floor"), 2.5)
    assert promise.judge(contender_figures("synapse2d", fused=fused, exp_floor=10.0)).kept is kept
    assert promise.judge(contender_figures("synapse2d", fused=1.0, exp_floor_accurate=10.0)).kept is None
    assert promise.judge(contender_figures("synapse2d", exp_floor=10.0)).kept is None


@pytest.mark.parametrize("avx2, kept", [(219.0, True), (221.0, False)])
def test_capabilities_are_told_apart(avx2: float, kept: bool) -> None:
    ms = {"AVX512": 100.0, "AVX2": avx2, "DEFAULT": 5000.0}
    rows = [m for e in SUBJECTS["isa"].entries for m in figures("isa", e, ms[e.capability])]
    promise = NotSlower("isa", Who(capability="AVX512"), 2.2, who=Who(capability="AVX2"))
    assert promise.judge(rows).kept is kept
    assert promise.judge([m for m in rows if m.capability != "AVX512"]).kept is None


@pytest.mark.parametrize("subject", ["pixels2d", "pixels3d"])
def test_even_by_the_pixel(subject: str) -> None:
    promise = next(p for p in PROMISES if isinstance(p, Even) and p.subject == subject)
    cases = [e.case for e in SUBJECTS[subject].entries]
    assert promise.judge(sweep_figures(subject, 100.0, **{cases[0]: 124.9})).kept is True
    broken = promise.judge(sweep_figures(subject, 100.0, **{cases[-1]: 80.0, cases[1]: 100.1}))
    assert broken.kept is False
    assert f"1.25x (100.10 ns for {cases[1]}, 80.00 ns for {cases[-1]})" in broken.text
    missing = [m for m in sweep_figures(subject) if m.case != cases[2]]
    assert promise.judge(missing).kept is None


def test_even_by_pixel_map_and_class() -> None:
    promise = next(p for p in PROMISES if p.subject == "classes")
    fair = {f"classes_{n}": 48.0 * n for n in sweeps.CLASSES}  # ns a pixel: the same for each map and class
    assert "1.00x" in promise.judge(sweep_figures("classes", **fair)).text
    assert promise.judge(sweep_figures("classes", **fair | {"classes_4": 1.59 * 48 * 4})).kept is True
    assert promise.judge(sweep_figures("classes", **fair | {"classes_24": 1.61 * 48 * 24})).kept is False
    beyond = fair | {"classes_2": 1e4, "classes_105": 1e6}
    assert promise.judge(sweep_figures("classes", **beyond)).kept is True, "promised for 4 to 32"
    assert promise.judge([m for m in sweep_figures("classes", **fair) if m.case != "classes_16"]).kept is None


@pytest.mark.parametrize(
    "mib, gradients, kept", [(32, 0, (True, True)), (33, 1, (False, True)), (40, 7, (False, False))]
)
def test_peaks_with_and_without_gradients(mib: float, gradients: float, kept: tuple[bool, bool]) -> None:
    rows = figures("synapse2d", SUBJECTS["synapse2d"].entries[0], 1.0, mib, gradients)
    promises = [PeakAtMost("synapse2d", 32), PeakAtMost("synapse2d", 32, over_gradients=True)]
    assert tuple(p.judge(rows).kept for p in promises) == kept
    unknown = [replace(m, gradients_mib=None) for m in rows]
    assert [p.judge(unknown).kept for p in promises] == [kept[0], None]
    assert [p.judge([m for m in rows if m.direction != "memory"]).kept for p in promises] == [None, None]


def test_built_within() -> None:
    assert BuiltWithin(240).judge([build_figure(240.0)]).kept is True
    assert BuiltWithin(240).judge([build_figure(240.1)]).kept is False
    assert BuiltWithin(240).judge(contender_figures("synapse2d", fused=1.0)).kept is None


# ---- the list of promises ----


def test_the_promises_are_those_of_the_project() -> None:
    limits = [getattr(p, "times", None) or getattr(p, "mib", None) or p.seconds for p in PROMISES]
    assert limits[:12] == [20, 10, 2.5, 32, 1.85, 1.25, 1.25, 1.6, 2.2, 240, 64, 20]
    assert limits[12:] == [1.5] * 22 + [1.3] * 22, "of every recipe: its time, its memory"
    assert [p.goal for p in PROMISES if getattr(p, "goal", None)] == [30, 15, 2]
    assert not any(p.judge([]).kept for p in PROMISES), "what was not measured is not kept"


def test_every_promise_finds_what_it_needs_in_its_subject() -> None:
    everything = [m for name in SUBJECTS for m in sweep_figures(name)] + [build_figure(100.0)]
    for promise in PROMISES:
        assert promise.judge(everything).kept is not None, promise
        if promise.subject != "build":
            needed = SUBJECTS[promise.subject].keeping(promise.wants)
            rows = [m for e in needed.entries for m in figures(promise.subject, e, 10.0)]
            assert promise.judge(rows).kept is not None, f"{promise} wants too little"


def test_check_measures_what_is_compared_and_little_more() -> None:
    assert subjects_needed() == (
        "synapse2d",
        "threads",
        "pixels2d",
        "pixels3d",
        "classes",
        "isa",
        "build",
        "patch3d14",
        "recipes",
    )
    taken = {name: SUBJECTS[name].keeping(lambda e, n=name: is_needed(n, e)).entries for name in SUBJECTS}
    contenders = [e.contender for e in taken["synapse2d"]]
    assert contenders == ["fused", "compile", "plain", "official", "exp_floor", "exp_floor_accurate", "exp_floor_own"]
    assert [e.one.case.classes for e in taken["classes"]] == [4, 5, 8, 9, 14, 16, 24, 32]
    assert len(taken["pixels2d"]) == len(taken["pixels3d"]) == 5 and len(taken["patch3d14"]) == 3
    assert {e.threads for e in taken["threads"] if e.contender == "fused"} == {1, 2}
    assert not taken["patch3d"] and not taken["scales"]
    assert len(taken["recipes"]) == 23 and all(len(e.one.case.plan.map_names) == 48 for e in taken["recipes"])


@pytest.mark.parametrize("mib, kept", [(12.9, True), (13.1, False)])
def test_memory_is_compared_with_that_of_another_case(mib: float, kept: bool) -> None:
    plain, mask = (recipes.CASES[name] for name in ("plain", "mask"))
    promise = PeakNotAbove("recipes", Who(case=plain.name), 1.3, who=Who(case=mask.name))
    found = [m for one in (plain, mask) for m in figures("recipes", subjects.Entry(one, "fused"), 10.0)]
    found = [replace(m, extra_peak_mib=mib) if m.case == mask.name and m.extra_peak_mib else m for m in found]
    assert promise.judge(found).kept is kept


@pytest.mark.parametrize("fused, status, line", [(9.0, 0, "pass"), (51.0, 1, "FAIL")])
def test_check_judges_and_its_exit_status_says_so(
    fused: float, status: int, line: str, tmp_path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    others = {"plain": 100.0, "compile": 500.0, "official": 1000.0, "exp_floor": 5.0, "exp_floor_accurate": 7.0}
    monkeypatch.setattr(command, "measure", lambda *_, **__: contender_figures("synapse2d", fused=fused, **others))
    monkeypatch.setattr(subjects.Entry, "obstacle", lambda _: None)
    arguments = ["--check", "--subjects", "synapse2d", "--out", str(tmp_path / "figures.csv")]
    assert command.main([*arguments, "--contenders", "official"]) == status
    told = capsys.readouterr().out
    assert f"{line}  synapse2d: step of fused at least 20x" in told and told.count("synapse2d: step of fused") == 3
    assert "pass  synapse2d: extra peak memory of fused at most 32 MiB: 10.0 MiB" in told


def test_what_this_machine_cannot_tell_is_skipped_and_what_was_forgotten_fails(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def found(subject: subjects.Subject, **_: object) -> list:
        return [m for e in subject.entries if e.contender == "fused" for m in figures(subject.name, e, 10.0)]

    monkeypatch.setattr(command, "measure", found)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(subjects, "cores", lambda: 1)
    arguments = ["--check", "--contenders", "plain", "--out", str(tmp_path / "figures.csv")]
    monkeypatch.setattr(subjects.Subject, "by", lambda self, _: self.keeping(lambda e: e.contender == "fused"))
    monkeypatch.setattr(command, "contender", lambda _: CONTENDERS["plain"])
    assert command.main([*arguments, "--subjects", "isa,threads"]) == 0
    told = capsys.readouterr().out
    assert "skip  isa: step of fused AVX2" in told and "not measured: this CPU has no AVX-512" in told
    assert "isa: fused synapse2d AVX512 left out: this CPU has no AVX-512" in told
    assert "skip  threads: step of fused 2 threads" in told and "not measured: this machine has 1 core" in told
    assert command.main([*arguments, "--subjects", "synapse2d"]) == 1
    told = capsys.readouterr().out
    assert "FAIL  synapse2d: step of fused at most 2.5x that of exp_floor (goal 2x): not measured\n" in told


# ---- the floor ----


def test_the_floor_counts_what_cannot_be_avoided() -> None:
    plan = MixPlan.create(4)
    assert floor.exponentials(plan, 9) == 4 * 9 + 3 * 11 * 9 + 28 == 361
    assert floor.exponentials(MixPlan.create(5), 14) == 5 * 14 + 3 * 26 * 14 + 75
    assert floor.exponentials(MixPlan.create(4, ("add",)), 9) == 36, "add maps are products of the originals"
    assert floor.exponentials(MixPlan.create(4, ("add",), ()), 9) == 36, (
        "of which the exponentials are needed all the same"
    )
    assert floor.exponentials(MixPlan.create(4, ("add", "mul")), 9) == 36 + 99
    assert floor.exponentials(MixPlan.create(4, ("awf",), ()), 9) == 99 + 28
    assert floor.exponentials(MixPlan.create(4, (), (2,)), 9) == 9


@NEEDS_FLOOR
def test_the_floor_does_its_count_forward_and_again_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[int, str]] = []
    monkeypatch.setattr(floor, "_run", lambda count, function: done.append((count, function)) or 1.0)
    problem = make_problem(CASES["tiny2d"].case)
    prepared = CONTENDERS["exp_floor"].prepare(problem)
    loss = prepared.loss()
    assert done == [(361 * 2 * 32 * 32, "exp_u20")]
    loss.backward()
    assert done == [(361 * 2 * 32 * 32, "exp_u20")] * 2 and sum(n for n, _ in done) == 722 * 2 * 32 * 32
    for name, function in (("exp_floor_accurate", "exp"), ("exp_floor_own", "own")):
        CONTENDERS[name].prepare(problem).loss()
        assert done[-1][1] == function


@NEEDS_FLOOR
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("function", floor.FUNCTIONS)
def test_the_floor_computes_exponentials(function: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    of_each = (-8 * torch.arange(700, dtype=torch.float64) / 2048).exp()  # one of each buffer of 2048
    assert floor._run(700 * 2048 - 5, function) == pytest.approx(float(of_each.sum()), rel=1e-6)
    found = floor.errors(function)
    assert 0 < found["exponential"] < 1e-6
    small = CASES["tiny2d"].small
    gate.check("exp_floor", small, found)
    with pytest.raises(gate.GateError, match=r"exponential is off by 1.10e-06 .* allowed 1e-06"):
        gate.check("exp_floor", small, {"exponential": 1.1e-6})


@pytest.mark.slow
@NEEDS_FLOOR
def test_a_floor_takes_its_turn_in_a_process_of_its_own() -> None:
    with Worker("exp_floor", CASES["tiny2d"], 1) as worker:
        assert worker.errors()["exponential"] < 1e-6
        memory = worker.memory()
        assert memory.fingerprint == {} and memory.gradients_mib == 0
        assert all(forward > 0 and backward > 0 for forward, backward in worker.repetitions(2))


@pytest.mark.slow
@NEEDS_FLOOR
def test_a_floor_beside_a_loss_has_times_and_no_say_in_what_is_right(tmp_path) -> None:
    out = tmp_path / "figures.csv"
    arguments = ["--subjects", "tiny3d", "--contenders", "plain,exp_floor", "--rounds", "1", "--threads", "1"]
    assert command.main([*arguments, "--out", str(out)]) == 0
    found, _ = read_csv(out)
    steps = {m.contender: m.p50_ms for m in found if m.direction == "step"}
    assert 0 < steps["exp_floor"] < steps["plain"]


# ---- sweeps ----


def test_the_pixel_sweeps_keep_classes_scales_and_the_total() -> None:
    for name, ratios, edges in (
        ("pixels2d", (32, 16, 8, 4), (64, 128, 256, 512, 1024)),
        ("pixels3d", (8, 4, 2, 1), (32, 64, 96, 128, 160)),
    ):
        cases = [e.one.case for e in SUBJECTS[name].entries]
        assert tuple(c.full[0] for c in cases) == edges and {len(set(c.full)) for c in cases} == {1}
        for case in cases:
            assert (case.classes, len(case.native)) == (9, 4)
            assert [case.full[0] // n[0] for n in case.native] == list(ratios)
    totals = [e.one.case.batch * e.one.case.pixels for e in SUBJECTS["pixels2d"].entries]
    assert max(totals) / min(totals) < 3


def test_the_sweeps_over_scales_and_classes() -> None:
    fused = [e.one.case for e in SUBJECTS["scales"].entries if e.contender == "fused"]
    assert [len(c.native) for c in fused] == [2, 3, 4, 5, 6]
    assert fused[0].native == ((28, 28), (56, 56))
    assert [n[0] for n in fused[-1].native] == [2, 4, 7, 14, 28, 56]
    classes = [e.one.case for e in SUBJECTS["classes"].entries if e.contender == "fused"]
    assert [(c.classes, c.batch) for c in classes[:2]] == [(2, 2), (3, 2)]
    assert [(c.classes, c.batch) for c in classes[-4:]] == [(32, 2), (40, 1), (64, 1), (105, 1)]
    for entry in (*SUBJECTS["scales"].entries, *SUBJECTS["classes"].entries):
        small = entry.one.small
        assert (small.classes, len(small.native)) == (entry.one.case.classes, len(entry.one.case.native))
        assert small.batch * small.pixels * small.classes * small.plan.num_maps < 8e6, "float64 truth must be cheap"


@pytest.mark.parametrize("cores, counts", [(1, (1, 2)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8))])
def test_thread_counts(cores: int, counts: tuple[int, ...]) -> None:
    assert sweeps.thread_counts(cores) == counts


def test_names_and_labels_are_unique() -> None:
    assert all(name == one.name for name, one in SUBJECTS.items())
    for subject in SUBJECTS.values():
        labels = [e.label for e in subject.entries]
        assert len(set(labels)) == len(labels) > 0
        assert all(contender(e.contender) for e in subject.entries)


def test_officials_patch_is_the_largest_within_its_budget() -> None:
    edge = largest_official_edge()
    assert edge % 16 == 0 and CASES["official3d14"].case.full == (edge,) * 3
    assert official_style_bytes(5, 14, 1, edge**3) <= OFFICIAL_BUDGET < official_style_bytes(5, 14, 1, (edge + 16) ** 3)
    assert largest_official_edge(official_style_bytes(5, 14, 1, 32**3)) == 32
    assert CONTENDERS["official"].estimate(CASES["official3d14"].case) == official_style_bytes(5, 14, 1, edge**3)


def test_who_comes_rarely_skips_the_warm_up_and_other_rounds() -> None:
    often, rare = SUBJECTS["patch3d14"].entries[1:]
    assert [turn for turn in range(10) if takes_part(rare, turn)] == [1, 5, 9]
    assert [turn for turn in range(4) if takes_part(often, turn)] == [0, 1, 2, 3]


def test_too_little_memory_leaves_a_participant_out(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, _, official = SUBJECTS["patch3d14"].entries
    monkeypatch.setattr(subjects, "_available_bytes", lambda: 17 * 2.0**30)
    assert "18." in official.obstacle() and "GiB of memory and 17.0 are free" in official.obstacle()
    assert fused.obstacle() is None
    monkeypatch.setattr(subjects, "_available_bytes", lambda: math.inf)
    assert official.obstacle() is None


# ---- capabilities and the build ----


def test_capabilities_that_cannot_run_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(capability._build_info, "read", lambda: {"capabilities": "DEFAULT"})
    assert capability.why_not("AVX512") == "this CPU has no AVX-512"
    assert capability.why_not("AVX2") == "the extension was built without AVX2"
    assert capability.why_not("DEFAULT") is None
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SVE256")
    assert capability.why_not("AVX2") == "this CPU has no AVX2"


@pytest.mark.slow
@NEEDS_FUSED
def test_a_process_is_given_its_environment_and_ours_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(capability.VARIABLE, raising=False)
    with Worker("fused", CASES["tiny2d"], 1, {capability.VARIABLE: "AVX9"}) as worker:
        assert capability.VARIABLE not in os.environ
        with pytest.raises(RuntimeError, match="LOMIX_FAST_CPU_CAPABILITY: got 'AVX9'"):
            worker.errors()


def test_the_build_is_timed_from_nothing_with_two_jobs(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "build").mkdir()
    script = "import os, pathlib, time\nassert os.environ['MAX_JOBS'] == '2' and 'DEBUG' not in os.environ\n"
    script += "assert pathlib.Path('csrc').is_dir() and not pathlib.Path('build').exists()\ntime.sleep(0.2)\n"
    (tmp_path / "build_cpp.py").write_text(script)
    found = SimpleNamespace(capabilities=("DEFAULT", "AVX2"))
    monkeypatch.setattr(build_time.build_cpp, "find_toolchain", lambda: found)
    monkeypatch.setenv("DEBUG", "1")
    said: list[str] = []
    (row,) = build_time.measure_build(said.append, tmp_path)
    assert 200 <= row.p50_ms < 20_000 and (row.subject, row.threads, row.capability) == ("build", 2, "DEFAULT AVX2")
    assert said == ["  built in 0 s"]
    (tmp_path / "build_cpp.py").write_text("raise SystemExit('no such header')")
    with pytest.raises(build_time.BuildFailed, match="no such header"):
        build_time.measure_build(said.append, tmp_path)
