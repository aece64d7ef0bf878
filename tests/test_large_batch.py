"""The table of the largest batch: the search, the watch over processes, and that wrong numbers are never measured."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

import benchmarks.large_batch as command
from benchmarks import gate, large_batch_measure
from benchmarks.large_batch import STANDARD, main
from benchmarks.large_batch_measure import Figures, Setting
from benchmarks.large_batch_report import COLUMNS, judge, table, write_csv
from benchmarks.large_batch_rows import FUSED, LOSSES, ROWS, Patch, draw, errors, row, truth
from benchmarks.large_batch_search import AT_MOST, EXACTLY, MORE_THAN, Bound, Found, Trial, largest_batch
from benchmarks.prepared import Prepared
from benchmarks.problem import make_problem
from lomix_fast.testing.peak import resident_mib
from lomix_fast.testing.process import Ended, Process, TooLarge

PATCH = Patch(8, 3, 3)
NEEDS_FUSED = pytest.mark.skipif(ROWS["lomix_fused"].why_not() is not None, reason="the fused kernel is not built")
BUDGET = 1000.0

OTHERS = """
import os
import time
from dataclasses import replace

import torch

from benchmarks.large_batch_rows import ROWS
from benchmarks.prepared import Prepared

plain = ROWS["last_layer_plain"]

def off_by_a_permille(problem):
    right = plain.prepare(problem)
    return Prepared(lambda: right.loss() * 1.001, right.leaves)

wrong = replace(plain, prepare=off_by_a_permille)
"""
PROCESSES = """
import os
import subprocess
import time

class Object:
    def __init__(self, factor):
        self.factor = factor

    def times(self, number):
        return self.factor * number, os.environ.get("OF_THE_PARENT", ""), os.getpid()

    def fails(self):
        raise KeyError("told to")

    def dies(self):
        os._exit(3)

    def grows(self, mib, seconds):
        held = bytearray(mib * 2**20)
        held[::4096] = bytes([1]) * len(held[::4096])
        time.sleep(seconds)
        return len(held) // 2**20

    def starts(self):
        return subprocess.Popen(["sleep", "300"]).pid
"""


@pytest.fixture
def others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to import rows and objects from."""
    (tmp_path / "other_rows.py").write_text(OTHERS)
    (tmp_path / "objects_to_watch.py").write_text(PROCESSES)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("other_rows", "objects_to_watch"):
        sys.modules.pop(name, None)


# --- the search ---


def searched(peak: Callable[[int], float], most: int = 4096, margin: float = 50.0) -> tuple[Found, list[int]]:
    """A search over made-up peaks, and the batches in the order they were tried."""
    tried: list[int] = []

    def run(batch: int) -> Trial:
        tried.append(batch)
        held = peak(batch)
        is_stopped = held > BUDGET + margin
        return Trial(batch, BUDGET + margin if is_stopped else held, is_stopped, 300.0, 300.0 + batch)

    found = largest_batch(run, BUDGET, most)
    assert len(tried) == len(set(tried)), "a batch was run twice"
    assert [trial.batch for trial in found.trials] == sorted(tried)
    return found, tried


def bumpy(batch: int) -> float:
    """A line with a jump that batches 1 and 2 do not tell of."""
    return 300 + 5 * batch + (350 if batch > 40 else 0)


@pytest.mark.parametrize(
    "peak, runs",
    [
        (lambda b: 300 + 5 * b, 5),  # a line: 1, 2, 20, the answer, one more
        (lambda b: 300 + 350 * b, 3),
        (lambda b: 650 + 350 * b, 2),  # one, exactly at the budget
        (lambda b: 300 + 5 * b + (3 if b == 1 else 0), 6),  # a first batch that leads astray
        (lambda b: 300 + 5 * b + 0.004 * b * b, 10),
        (lambda b: 300 + 40 * math.sqrt(b), 16),
        (bumpy, 11),
        (lambda b: 999.5 + 0.001 * b, 15),
        (lambda b: 300 if b < 300 else 1e6, 18),  # flat, then far too large
        (lambda b: 300 + (b % 2), 11),  # a line that falls and rises without end
    ],
)
def test_the_answer_fits_and_one_more_does_not(peak: Callable[[int], float], runs: int) -> None:
    most = 1000
    found, tried = searched(peak, most)
    fitting = [b for b in range(1, most + 1) if peak(b) <= BUDGET]
    assert found.largest == max(fitting)
    assert found.largest in tried and (found.open_ended or found.largest + 1 in tried)
    assert found.open_ended == (found.largest == most)
    assert len(tried) <= runs


def test_off_by_one_is_seen_on_either_side() -> None:
    """The budget counts as fitting, the smallest amount above it does not."""
    for largest in (1, 2, 3, 17, 100):
        a_sample = (BUDGET - 300) / largest
        assert searched(lambda b, a=a_sample: 300 + a * b)[0].largest == largest
        assert searched(lambda b, a=a_sample: 300.001 + a * b)[0].largest == largest - 1


def test_what_was_stopped_does_not_fit() -> None:
    assert Trial(1, BUDGET).fits(BUDGET) and not Trial(1, BUDGET, stopped=True).fits(BUDGET)


def test_nothing_fits() -> None:
    for peak, word in ((1040.0, AT_MOST), (5000.0, MORE_THAN)):  # within the margin, and stopped
        found, tried = searched(lambda b, p=peak: p * b)
        assert found.largest == 0 and tried == [1] and not found.open_ended
        assert found.a_sample == Bound(word, min(peak, 1050.0) - 300.0)
        assert found.extra_a_sample == Bound(word, min(peak, 1050.0) - 301.0)


def test_everything_fits_up_to_the_limit_of_the_search() -> None:
    found, tried = searched(lambda b: 300.0 + 0.01 * b, most=20)
    assert found.largest == 20 and found.open_ended and tried[-1] == 20
    assert searched(lambda b: 300.0, most=1)[0] == Found(1, (Trial(1, 300.0, False, 300.0, 301.0),), True)


def test_slopes_are_those_of_the_line() -> None:
    found, _ = searched(lambda b: 310 + 7 * b)
    assert found.a_sample == Bound(EXACTLY, pytest.approx(7)) and found.fixed == Bound(EXACTLY, pytest.approx(310))
    assert found.extra_a_sample == Bound(EXACTLY, pytest.approx(6))  # inputs take 1 of the 7
    one, _ = searched(lambda b: 310 + 500 * b)  # two samples are stopped, so one is all there is to go by
    assert one.largest == 1 and one.a_sample == Bound(AT_MOST, 510.0) and one.fixed == Bound(MORE_THAN, 300.0)


# --- the watch ---


def watched(others: Path, limit_mib: float = 1e6, environment: dict[str, str] | None = None) -> Process:
    import objects_to_watch

    return Process("one", objects_to_watch.Object, (3,), limit_mib, environment)


def test_a_process_answers_and_its_failures_are_told(others: Path) -> None:
    with watched(others, environment={"OF_THE_PARENT": "set"}) as process:
        product, variable, pid = process.ask("times", 14)
        assert (product, variable) == (42, "set")
        assert resident_mib(pid=pid) > 1
        assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "1000"  # Linux kills it before others
        with pytest.raises(Ended, match=r"(?s)one: failed during 'fails'.*told to"):
            process.ask("fails")
        assert process.ask("times", 1)[0] == 3  # still there
        with pytest.raises(Ended, match="one: its process ended during 'dies' with exit code 3"):
            process.ask("dies")
    assert not is_running(pid)


@pytest.mark.slow
def test_a_process_that_passes_its_limit_is_killed_with_what_it_started(others: Path) -> None:
    with watched(others, limit_mib=1200.0) as process:
        pid = process.ask("times", 1)[2]
        started = process.ask("starts")
        assert is_running(started)
        assert process.ask("grows", 350, 0.1) == 350
        with pytest.raises(
            TooLarge, match=r"one: held \d+ MiB during 'grows', was allowed 1200 and was stopped"
        ) as seen:
            process.ask("grows", 1250, 20)
        assert 1200 < seen.value.resident_mib < 1350
        assert not is_running(pid) and not is_running(started)
        with pytest.raises(Ended):
            process.ask("times", 1)


def is_running(pid: int) -> bool:
    """Whether a process is there and no corpse."""
    try:
        return resident_mib(pid=pid) > 0
    except FileNotFoundError:
        return False


# --- numbers first ---


@pytest.mark.parametrize("name", [name for name, one in ROWS.items() if not one.compiles])
def test_rows_agree_with_the_definition(name: str) -> None:
    if (reason := row(name).why_not()) is not None:
        pytest.skip(reason)
    case = PATCH.case(row(name).loss, 2)
    found = errors(row(name), PATCH)
    gate.check(name, case, found)
    finest = {f"logits[{i}]" for i in range(3)} if row(name).loss != "last_layer" else {"logits[2]"}
    assert {"loss", *finest} <= set(found)


def test_losses_are_those_of_their_formulas() -> None:
    """The truth itself, against sums over subsets written out here: plans and weights are what they should be."""

    def one_map(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        s, y = logits.softmax(1), F.one_hot(target, 3).movedim(-1, 1).double()
        dims = (0, 2, 3, 4)
        dice = 1 - (2 * (s * y).sum(dims) + 1e-5) / ((s * s).sum(dims) + y.sum(dims) + 1e-5)
        return 0.3 * F.cross_entropy(logits, target) + 0.7 * dice.mean()

    problem = make_problem(PATCH.case("mutation", 2))
    full = [F.interpolate(z.double(), size=(8, 8, 8), mode="trilinear") for z in problem.logits]
    sums = [sum(full[i] for i in range(3) if subset >> i & 1) for subset in range(1, 8)]
    expected = {"mutation": sums, "deep_supervision": full, "last_layer": full[-1:]}
    for loss, maps in expected.items():
        case = PATCH.case(loss, 2)
        assert case.plan.num_maps == len(maps)
        value = truth(replace(problem, case=case), loss)["loss"]
        torch.testing.assert_close(value, sum(one_map(m, problem.target) for m in maps), rtol=1e-12, atol=0)
    assert PATCH.case("lomix", 2).plan.num_maps == 19 and set(expected) | {"lomix"} == set(LOSSES)


def test_the_gate_sees_gradients_that_are_wrong_missing_or_too_many() -> None:
    plain = ROWS["last_layer_plain"]

    def changed(change: Callable[[Prepared], Prepared]) -> dict[str, float]:
        return errors(replace(plain, prepare=lambda problem: change(plain.prepare(problem))), PATCH)

    right = changed(lambda prepared: prepared)
    assert max(right.values()) < 1e-5
    short = changed(lambda p: Prepared(p.loss, {n: z for n, z in p.leaves.items() if n != "logits[2]"}))
    assert short["logits[2]"] == math.inf
    extra = changed(lambda p: Prepared(lambda: p.loss() + 1e-9 * p.leaves["logits[0]"].sum(), p.leaves))
    assert extra["logits[0]"] == math.inf
    double = changed(lambda p: Prepared(lambda: 1.001 * p.loss(), p.leaves))
    with pytest.raises(gate.GateError, match=r"loss is off by 1\.00e-03"):
        gate.check("one", PATCH.case("last_layer", 2), double)


@pytest.mark.slow
def test_a_wrong_row_is_never_measured(others: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = others / "figures.csv"
    small = ["--patch", "8", "--classes", "3", "--scales", "2", "--time-patch", "8", "--budget", "0.7"]
    assert main([*small, "--rows", "other_rows:wrong", "--out", str(out)]) == 1
    told = capsys.readouterr()
    assert "RED GATE: other_rows:wrong on last_layer_8_small: loss is off by 1.00e-03" in told.err
    assert not out.exists() and "peak" not in told.err and told.out == ""


def test_rows_of_a_loss_that_disagree_at_full_size_are_refused() -> None:
    one = Figures("last_layer_fused", fingerprints={8: {"loss": 1.0}})
    large_batch_measure.check_agreement([one, Figures("last_layer_plain", fingerprints={8: {"loss": 1.00005}})], PATCH)
    # Of another loss, or of another size, there is nothing to compare.
    large_batch_measure.check_agreement([one, Figures("mutation_plain", fingerprints={8: {"loss": 2.0}})], PATCH)
    large_batch_measure.check_agreement([one, Figures("last_layer_plain", fingerprints={9: {"loss": 2.0}})], PATCH)
    with pytest.raises(gate.GateError, match="last_layer_plain on last_layer_8: loss at full size"):
        large_batch_measure.check_agreement([one, Figures("last_layer_plain", fingerprints={8: {"loss": 1.1}})], PATCH)


def test_samples_do_not_depend_on_the_batch() -> None:
    two, three = (draw(PATCH.case("mutation", batch)) for batch in (2, 3))
    for a, b in zip([*two.logits, two.target], [*three.logits, three.target], strict=True):
        assert torch.equal(a, b[:2]) and not torch.equal(b[0], b[2])
    assert [z.shape[2] for z in three.logits] == [2, 4, 8] and three.target.dtype == torch.int64
    assert all(z.dtype == torch.float32 for z in three.logits)


# --- a run ---


@pytest.mark.slow
@NEEDS_FUSED
def test_a_small_run_measures_what_is_really_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two rows at batch 1. The peaks that are read cannot be smaller than what a step is bound to hold."""
    out = tmp_path / "new" / "figures.csv"
    small = ["--patch", "64", "--classes", "8", "--scales", "2", "--time-patch", "64", "--most", "1", "--threads", "1"]
    names = "lomix_fused,last_layer_plain"
    assert main([*small, "--rounds", "2", "--budget", "2", "--margin", "0.5", "--rows", names, "--out", str(out)]) == 0
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0])[: len(COLUMNS)] == COLUMNS and all(r["cpu_model"] and r["torch"] for r in rows)
    figures = ["trial", "largest", "step", "first_step"]
    assert [(r["row"], r["figure"]) for r in rows] == [
        (name, figure) for name in names.split(",") for figure in figures
    ]
    one_map = 8 * 64**3 * 4 / 2**20  # MiB of [1, C, 64, 64, 64] in float32
    inputs = (1 + 1 / 8) * one_map + 64**3 * 8 / 2**20
    for name, gradients in (("lomix_fused", (1 + 1 / 8) * one_map), ("last_layer_plain", one_map)):
        trial, largest, step, _ = (r for r in rows if r["row"] == name)
        assert (trial["B"], trial["fits"], largest["B"], step["B"], step["n"]) == ("1", "yes", "1", "1", "2")
        assert float(trial["gradients_mib"]) == pytest.approx(gradients, rel=1e-2)
        assert float(trial["before_mib"]) - float(trial["empty_mib"]) > 0.9 * inputs
        extra = float(trial["peak_mib"]) - float(trial["before_mib"])
        # The plain loss keeps log-softmax and softmax besides, and a temporary of each in the backward pass.
        least, most = (0.9 * gradients, 3 * one_map) if name == "lomix_fused" else (4 * one_map, 7 * one_map)
        assert least < extra < most
        assert 0 < float(step["p20_ms"]) <= float(step["p50_ms"]) <= float(step["p80_ms"])
    told = capsys.readouterr()
    assert "| lomix | fused | at least 1 |" in told.out and "| last layer | plain PyTorch | at least 1 |" in told.out
    assert "gate  lomix_fused" in told.err and "round 2 of 2" in told.err


# --- what is said about the figures ---


def setting(tmp_path: Path) -> Setting:
    return Setting(Patch(96, 14, 5), Patch(64, 14, 5), 16 * 2**10, 2**10, 3, 2, 4096, tmp_path)


def made_up(name: str, largest: int, extra: float, inputs: float = 60.0) -> Figures:
    """A row whose peaks lie on a line from 400 MiB; 0 is one that was stopped at batch 1."""
    if largest == 0:
        return Figures(name, Found(0, (Trial(1, 17500.0, True, 380.0, 440.0),)), {64: [2000.0, 2100.0, 2200.0]})
    trials = [
        Trial(b, 400 + (inputs + extra) * b, False, 390.0, 400 + inputs * b, 54.0 * b, 250.0 * b, 300.0 * b)
        for b in (1, largest)
    ]
    stopped = Trial(largest + 1, 17408.5, True, 390.0, 460.0)
    return Figures(name, Found(largest, (*trials, stopped)), {96: [900.0, 950.0, 990.0], 64: [100.0, 110.0, 111.0]})


def promised(**changed: Figures) -> dict[str, Figures]:
    rows = {
        "lomix_fused": made_up("lomix_fused", 120, 66.0),
        "last_layer_plain": made_up("last_layer_plain", 50, 240.0),
        "deep_supervision_plain": made_up("deep_supervision_plain", 20, 640.0),
        "lomix_official": made_up("lomix_official", 0, 0.0),
    }
    return rows | changed


def test_promises_are_kept_broken_or_not_measured() -> None:
    verdicts = judge(list(promised().values()))
    assert [kept for kept, _ in verdicts] == [True, True, True]
    assert "beyond its inputs than last_layer_plain: 66.0 and 240.0 MiB" in verdicts[0][1]
    assert "120, and at most 50 (last_layer_plain) of 3" in verdicts[2][1]
    hungry = promised(lomix_fused=made_up("lomix_fused", 120, 300.0))
    assert [kept for kept, _ in judge(list(hungry.values()))] == [False, True, True]
    small = promised(lomix_fused=made_up("lomix_fused", 49, 66.0))
    assert [kept for kept, _ in judge(list(small.values()))] == [True, True, False]
    even = promised(lomix_fused=made_up("lomix_fused", 50, 66.0))
    assert judge(list(even.values()))[2][0] is True
    alone = judge([made_up("lomix_fused", 120, 66.0)])
    assert [kept for kept, _ in alone] == [None, None, None]
    endless = replace(promised()["last_layer_plain"].found, open_ended=True)
    assert judge(list(promised(last_layer_plain=Figures("last_layer_plain", endless)).values()))[2][0] is None
    failed = promised(last_layer_plain=Figures("last_layer_plain", failure="no"))
    assert [kept for kept, _ in judge(list(failed.values()))] == [None, True, True]


def test_a_bound_on_the_wrong_side_proves_nothing() -> None:
    one = Figures("last_layer_plain", Found(1, (Trial(1, 10_400.0, False, 390.0, 400.0), Trial(2, 17_500.0, True))))
    assert judge(list(promised(last_layer_plain=one).values()))[0][0] is None  # at most 10,000
    none = Figures("last_layer_plain", Found(0, (Trial(1, 17_500.0, True, 390.0, 460.0),)))
    assert judge(list(promised(last_layer_plain=none).values()))[0][0] is True  # more than 17,000


def test_the_table_says_what_does_not_fit(tmp_path: Path) -> None:
    rows = list(promised().values())
    rows[1].times.pop(96)
    text = table(rows, setting(tmp_path))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert lines[0][2] == "largest batch in 16 GiB" and lines[0][-3:-1] == ["ms a step, 96^3", "ms a step, 64^3"]
    ours, last, _, official = lines[2:6]
    assert ours[:5] == ["lomix", FUSED, "120", "15,520", "more than 17,408"]
    assert ours[5:] == ["126.0", "66.0", "400.0", "4", "950.0", "110.0", "1.00"]
    assert last[-3] == "stopped"
    assert official[:5] == ["lomix", "official-style", "0", "-", "more than 17,500"]
    assert official[5:8] == ["more than 17,120", "more than 17,060", "more than 380.0"]
    assert official[8:] == ["-", "does not fit", "2,100", "19.09"]


def test_the_file_holds_every_trial(tmp_path: Path) -> None:
    out = tmp_path / "new" / "figures.csv"
    rows = [made_up("lomix_fused", 120, 66.0), made_up("lomix_official", 0, 0.0)]
    assert write_csv(out, rows, setting(tmp_path), {"torch": "9"}) == 9
    with out.open(newline="") as file:
        found = list(csv.DictReader(file))
    trials = [("trial", "1", "yes"), ("trial", "120", "yes"), ("trial", "121", "stopped"), ("largest", "120", "")]
    assert [(r["figure"], r["B"], r["fits"]) for r in found] == [
        *(*trials, ("step", "1", ""), ("step", "1", "")),
        *(("trial", "1", "stopped"), ("largest", "0", ""), ("step", "1", "")),
    ]
    assert [r["spatial"] for r in found if r["figure"] == "step"] == ["96x96x96", "64x64x64", "64x64x64"]
    assert found[7]["mib_a_sample"] == "", "a bound was written as a figure"
    assert found[1]["peak_mib"] == "15520.0000" and found[3]["extra_mib_a_sample"] == "66.0000"
    assert {r["torch"] for r in found} == {"9"} and {r["budget_gib"] for r in found} == {"16.0000"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rows", "nobody"], "--rows: got 'nobody', expected names out of lomix_fused"),
        (["--rows", "math:pi"], "--rows: got 'math:pi', a float; expected a benchmarks.large_batch_rows.Row"),
        (["--rows", "no_such_module:x"], "cannot be imported"),
        (["--rounds", "0"], "--rounds: got 0, expected at least 1"),
        (["--threads", "0"], "--threads: got 0"),
        (["--most", "0"], "--most: got 0"),
        (["--classes", "1"], "--classes: got 1, expected at least 2"),
        (["--scales", "9"], "--scales: got 9, expected 1 to 8"),
        (["--patch", "31"], "--patch: got 31, expected at least 32"),
        (["--time-patch", "31"], "--time-patch: got 31, expected at least 32"),
        (["--budget", "0"], "--budget: got 0.0, expected more than 0 GiB"),
        (["--budget", "1e6"], "--budget, --margin: got 1e+06 and 1 GiB, expected together at most the"),
    ],
)
def test_wrong_usage_is_refused_before_anything_runs(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "check_numbers", lambda *_: pytest.fail("something ran"))
    if arguments[0] != "--budget":
        arguments = ["--budget", "0.5", "--margin", "0.1", *arguments]
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_rows_are_named_by_what_they_are() -> None:
    assert set(STANDARD) <= set(ROWS)
    assert {row(name).loss for name in STANDARD if row(name).written == FUSED} == set(LOSSES)
    assert all(name.startswith(one.loss) for name, one in ROWS.items())
