"""The step of a GPU day that runs tests/test_gpu.py: whatever a test does, it is reported and the others go on."""

from __future__ import annotations

import inspect
import time
from itertools import chain
from pathlib import Path

import pytest
import test_gpu

from benchmarks.gpu_day import features
from benchmarks.gpu_day.day import CRASHED, FAILED, HUNG, OK, SKIPPED, Clock, Day, Row

FAKE = """
import os, subprocess, sys, time
import pytest

@pytest.fixture(params=["cuda", "triton"])
def impl(request):
    return request.param

def test_good(impl): assert impl != "triton", "wrong by a lot"
def test_also_good(): pass
def test_hangs():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])  # holds on to the output
    time.sleep(1000)
def test_aborts(): os.abort()
def test_exits(): os._exit(3)
def test_skipped(): pytest.skip("no such card")
def test_last(impl): pass
def test_teardown(broken): pass
@pytest.fixture
def broken():
    yield
    raise RuntimeError("an illegal memory access\\nwas encountered")
"""


@pytest.fixture
def tests(tmp_path: Path) -> Path:
    path = tmp_path / "test_fake.py"
    path.write_text(FAKE)
    return path


def found(tests: Path, seconds: float = 100, **options: object) -> dict[str, Row]:
    """Rows by "name[subject]"."""
    rows: list[Row] = []
    day = Day("cpu", False, tests.parent, 2)
    features.run(day, Clock(seconds), rows.append, tests=tests, **options)
    assert {row.step for row in rows} == {"features"}
    by_name = {f"{row.what}[{row.subject}]": row for row in rows}
    assert len(by_name) == len(rows)
    return by_name


@pytest.mark.slow
def test_each_test_is_reported_whatever_the_others_do(tests: Path) -> None:
    rows = found(tests, per_process=5, test_seconds=3.0)
    assert {name: row.status for name, row in rows.items()} == {
        "good[cuda]": OK,
        "good[triton]": FAILED,
        "also_good[eager]": OK,
        "hangs[eager]": HUNG,
        "aborts[eager]": CRASHED,
        "exits[eager]": CRASHED,
        "skipped[eager]": SKIPPED,
        "last[cuda]": OK,
        "last[triton]": OK,
        "teardown[eager]": FAILED,
    }
    assert rows["good[triton]"].note == "AssertionError: wrong by a lot"
    assert rows["teardown[eager]"].note == "teardown: RuntimeError: an illegal memory access"
    assert rows["aborts[eager]"].note.startswith("SIGABRT: Fatal Python error: Aborted")
    assert rows["exits[eager]"].note.startswith("exit status 3")
    assert rows["hangs[eager]"].note.startswith("still running after 3 s")
    assert rows["skipped[eager]"].note == "no such card"
    log = (tests.parent / "features.log").read_text()
    assert "was encountered" in log and "test_good[triton]: failed" in log and "test_good[cuda]" not in log


@pytest.mark.slow
def test_a_file_that_cannot_be_imported(tests: Path) -> None:
    tests.write_text("import nothing_of_that_name\n" + FAKE)
    rows = found(tests, per_process=5)
    assert len(rows) == 10 and {row.status for row in rows.values()} == {FAILED}
    assert "nothing_of_that_name" in (tests.parent / "features.log").read_text()


@pytest.mark.slow
def test_when_time_is_up_the_running_test_is_stopped_and_the_others_are_said_to_be_missing(tests: Path) -> None:
    tests.write_text("import time\ndef test_a(): time.sleep(100)\ndef test_b(): pass\n")
    begin = time.monotonic()
    rows = found(tests, seconds=6, per_process=2)
    assert time.monotonic() - begin < 20
    assert rows["a[eager]"].status == SKIPPED and "when time was up" in rows["a[eager]"].note
    assert rows["b[eager]"].status == SKIPPED and rows["b[eager]"].note == "no time left"
    assert {row.status for row in found(tests, seconds=0).values()} == {SKIPPED}


def test_long_ones_come_first_and_alone() -> None:
    names = features.test_names(features.TESTS)
    dealt = features.in_processes(names, 3, rehearse=False)
    assert dealt[0] == ["test_compiled[cuda]"] and sorted(chain(*dealt)) == sorted(names)
    assert max(map(len, dealt)) == 3
    in_rehearsal = features.in_processes(names, -(-len(names) // 2), rehearse=True)
    assert len(in_rehearsal) == 2 and sorted(chain(*in_rehearsal)) == sorted(names)


def test_names_need_no_pytest() -> None:
    """Whatever would make pytest name tests otherwise: methods, other parameters."""
    here = {name: value for name, value in vars(test_gpu).items() if name.startswith(("test_", "Test"))}
    expected = []
    for name, value in here.items():
        assert inspect.isfunction(value) and not getattr(value, "pytestmark", []), name
        takes_it = "impl" in inspect.signature(value).parameters
        expected += [f"{name}[{impl}]" for impl in features.BACKENDS] if takes_it else [name]
    assert features.test_names(features.TESTS) == expected and len(expected) > 50
