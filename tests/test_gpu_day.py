"""A GPU day, rehearsed: what goes wrong in a worker is reported and the rest goes on; verdicts, files, time."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gpu_day import __main__ as command
from benchmarks.gpu_day import fast, faults, problems, right
from benchmarks.gpu_day.day import CRASHED, FAILED, HUNG, NO_MEMORY, OK, SKIPPED, Clock, Day, Row
from benchmarks.gpu_day.promises import judge
from benchmarks.gpu_day.record import COLUMNS, Spent, table


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_faults_are_reported_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong kernel (5 classes), one that hangs (17), runs out of memory (6), takes its process along (4).

    The stand-in of "cuda" has them; "triton", the other cases and the other contenders are well.
    """
    monkeypatch.setattr(command.build, "run", lambda day, clock, emit: None)  # it changes the path of its process
    monkeypatch.setenv(faults.VARIABLE, "wrong:5 hang:17 memory:6 crash:4")
    monkeypatch.setattr(right, "_CASE_SECONDS", 20.0)
    made = command.steps
    patient = lambda *given: tuple(replace(one, seconds=400.0) for one in made(*given))  # noqa: E731, other work goes on
    monkeypatch.setattr(command, "steps", patient)
    monkeypatch.setattr(problems, "FIRST", problems.FIRST[:1])
    monkeypatch.setattr(problems, "REST", ())
    out = tmp_path / "day"
    assert command.main(["--rehearse", "--only", "right", "fast", "--out", str(out), "--minutes", "12"]) == 1
    with (out / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS and {row["card"] for row in rows} == {"stand-in"}
    of_cases = {(row["subject"], row["case"]): row for row in rows if row["what"] == "error"}
    found = {case: of_cases["cuda", case]["status"] for case in right._REHEARSED}
    bad = {"classes_5": FAILED, "classes_17": HUNG, "classes_6": NO_MEMORY, "base": CRASHED, "half_16": CRASHED}
    assert found == {case: bad.get(case, OK) for case in right._REHEARSED}
    assert all(of_cases["triton", case]["status"] == OK for case in right._REHEARSED)
    assert "stats group ce" in of_cases["cuda", "classes_5"]["note"]
    assert "exit code -6" in of_cases["cuda", "base"]["note"]
    # What is wrong is not timed; who is right is, torch.compile's turn included.
    (name,) = (one.name for one in problems.FIRST)
    steps = {row["subject"]: row for row in rows if row["case"] == name and row["what"] == "step"}
    assert {who: row["status"] for who, row in steps.items()} == {
        who: FAILED if who == "cuda" else OK for who in fast.CONTESTANTS
    }
    assert "no time is written for a wrong result" in steps["cuda"]["note"]
    assert all(float(steps[who]["value"]) > 0 for who in fast.CONTESTANTS if who != "cuda")
    told = capsys.readouterr().out
    assert "BROKEN     cuda: right on every shared case, to float64: 3 of 8; not " in told
    assert "kept       triton: right on every shared case, to float64: 8 of 8" in told
    whole = json.loads((out / "day.json").read_text())
    assert whole["machine"]["card"] == "stand-in" and whole["machine"]["torch"] and len(whole["rows"]) == len(rows)
    assert [one["step"] for one in whole["steps"]] == ["build", "right", "fast", "fast more", "fast rest"]
    assert {path.name for path in out.iterdir()} == {"day.json", "rows.csv", "log.txt"}


# ---- the steps ----


def steps_that(monkeypatch: pytest.MonkeyPatch, *made: command.Step) -> None:
    monkeypatch.setattr(command, "steps", lambda field, rehearse: made)
    monkeypatch.setattr(command.fast.Field, "start_compiling", lambda self, cases: None)
    monkeypatch.setattr(command._Whole, "_ask", lambda self: None)


def fine(day: Day, clock: Clock, emit: object) -> None:
    emit(Row("small", "lomix_cuda", "", "largest batch in 24 GB", value=3, unit="samples"))  # type: ignore[operator]


def raises(day: Day, clock: Clock, emit: object) -> None:
    raise KeyError("memory_mib")


def test_a_step_that_raises_or_has_no_time_left_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = (command.Step("limits", 60, raises), command.Step("features", 1, fine), command.Step("small", 60, fine))
    steps_that(monkeypatch, *made)
    assert command.main(["--rehearse", "--out", str(tmp_path)]) == 1
    told = capsys.readouterr()
    rows = json.loads((tmp_path / "day.json").read_text())["rows"]
    assert [(row["step"], row["status"]) for row in rows] == [("limits", FAILED), ("features", SKIPPED), ("small", OK)]
    assert rows[0]["note"] == "KeyError: 'memory_mib'" and "Traceback" in told.err
    assert rows[1]["note"] == "time was up"
    assert "failed: limits limits: KeyError" in told.out


def test_results_are_there_after_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is stopped leaves what it has found."""

    def looks(day: Day, clock: Clock, emit: object) -> None:
        assert len(json.loads((tmp_path / "day.json").read_text())["rows"]) == 1
        assert (tmp_path / "log.txt").read_text() == "==== build.log\nit fails here\n"
        assert not list(day.out.iterdir())
        fine(day, clock, emit)

    def leaves(day: Day, clock: Clock, emit: object) -> None:
        (day.out / "build.log").write_text("it fails here\n\n")
        (day.out / "rates").write_bytes(b"\x7fELF\0")
        fine(day, clock, emit)

    (tmp_path / "of the user.txt").write_text("stays")
    steps_that(monkeypatch, command.Step("small", 60, leaves), command.Step("right", 60, looks))
    assert command.main(["--rehearse", "--out", str(tmp_path)]) == 0
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 3
    assert (tmp_path / "of the user.txt").read_text() == "stays"


@pytest.mark.parametrize(
    "arguments,complaint",
    [
        (["--minutes", "0"], "--minutes: got 0.0, expected more than 0"),
        (["--workers", "0", "--rehearse"], "--workers: got 0, expected at least 1"),
        (["--only", "nonsense"], "invalid choice: 'nonsense'"),
        ([], "finds no GPU here; --rehearse tries all of this on a CPU"),
    ],
)
def test_wrong_usage(
    arguments: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2 and complaint in capsys.readouterr().err


def test_clocks() -> None:
    whole = Clock(0.0)
    assert whole.left == 0 and Clock(100.0, whole).left == 0 and Clock(100.0).at_most(5) == 5
    assert 99 < Clock(100.0, Clock(1000.0)).left <= 100


# ---- the verdicts ----

BUILT = [Row("build", "cuda", "", "compile", value=60.0, unit="s", note="9.0")]
RIGHT = [Row("right", "cuda", one, "error", value=0.5) for one in ("base", "line")]
FAST = [
    Row("fast", who, case, "step", value=ms, unit="ms")
    for who, times in {"cuda": (1.0, 4.0), "compile": (2.0, 3.0), "official": (50.0, 90.0)}.items()
    for case, ms in zip(("slices_b6", "volume_96_l4"), times, strict=True)
]
SMALL = [
    Row("small", who, "", f"largest batch in {budget} GB", value=count)
    for who, counts in {"lomix_cuda": (100, 200), "last_layer_plain": (99, 80)}.items()
    for budget, count in zip((24, 40), counts, strict=True)
]
MEMORY = [
    Row("fast", "triton", "slices_b6", "memory", value=202.2),
    Row("fast", "cuda", "slices_b6", "memory", value=5.0),
]


LEAN = "a step takes less than 192 MiB and one full-size map beyond inputs and gradients"


def verdicts(rows: list[Row], **floors: float) -> dict[str, tuple[bool | None, str]]:
    rows = rows + [Row("limits", "card", case, "floor of step", value=ms) for case, ms in floors.items()]
    return {one.promise: (one.kept, one.figure) for one in judge(rows)}


def test_promises_that_are_kept() -> None:
    found = verdicts([*BUILT, *RIGHT, *FAST, *SMALL, *MEMORY], slices_b6=0.6, volume_96_l4=2.1)
    assert found["builds for the card that is there"] == (True, "cuda: ok 9.0")
    assert found["cuda: right on every shared case, to float64"] == (True, "2 of 2")
    assert found["cuda: a step is faster than that of official"] == (True, "slices_b6 50.00 x, volume_96_l4 22.50 x")
    assert found[LEAN] == (True, "at most 202.2 of 202.3 MiB, triton slices_b6")
    promise = "larger batches fit than with CE + Dice of the finest scale in plain PyTorch"
    assert found[promise][0] and "largest batch in 24 GB: 100 against 99" in found[promise][1]
    assert found["cuda: a step takes at most 2 x its floor"] == (True, "slices_b6 1.7 x, volume_96_l4 1.9 x")


def test_promises_that_are_broken() -> None:
    bad = Row("right", "cuda", "paper", "error", FAILED, 3.0, note="stats group ce: 1 of 48 wrong")
    small = [*SMALL[:2], Row("small", "last_layer_plain", "", "largest batch in 24 GB", value=100)]
    memory = [Row("fast", "cuda", "slices_b6", "memory", value=202.4)]
    built = [Row("build", "cuda", "", "compile", FAILED, note="few.cu(3): error")]
    found = verdicts([*built, *RIGHT, bad, *FAST, *small, *memory], slices_b6=0.4, volume_96_l4=2.1)
    assert found["builds for the card that is there"] == (False, "cuda: failed few.cu(3): error")
    assert found["cuda: right on every shared case, to float64"] == (False, "2 of 3; not paper")
    assert found["cuda: a step is faster than that of compile"] == (False, "slices_b6 2.00 x, volume_96_l4 0.75 x")
    assert found[LEAN] == (False, "at most 202.4 of 202.3 MiB, cuda slices_b6")
    assert found["larger batches fit than with CE + Dice of the finest scale in plain PyTorch"][0] is False
    assert found["cuda: a step takes at most 2 x its floor"][0] is False


@pytest.mark.parametrize("status,kept", [(HUNG, False), (CRASHED, False), (NO_MEMORY, False), (SKIPPED, None)])
def test_what_is_not_right_is_not_kept(status: str, kept: bool | None) -> None:
    rows = [*RIGHT, Row("right", "cuda", "paper", "error", status)]
    assert verdicts(rows)["cuda: right on every shared case, to float64"][0] is kept


def test_what_was_not_measured_is_not_known() -> None:
    assert {kept for kept, _ in verdicts([]).values()} == {None}
    cannot = [Row("right", "triton", "", "can run", FAILED, note="reinstall triton")]
    found = verdicts(cannot)
    assert found["triton: right on every shared case, to float64"][0] is False
    assert found["cuda: right on every shared case, to float64"][0] is None


def test_the_table_says_what_became_of_what() -> None:
    rows = [*RIGHT, Row("right", "cuda", "paper", "error", HUNG, note="hung: 75 s"), *FAST, *MEMORY]
    text = table(rows, [Spent("right", 80.2, 90.0), Spent("fast", 10.0, 75.0)], judge(rows))
    assert "right           80    90  2 ok, 1 hung" in text
    assert "hung: right cuda paper error: hung: 75 s" in text
    assert "1.000 | 5" in text and "not known  triton: at home on a GPU: not tried" in text
