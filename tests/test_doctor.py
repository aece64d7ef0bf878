"""`python -m lomix_fast doctor`: never fails for what is missing, and says which backend fails, on what and why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lomix_fast import _build_info
from lomix_fast.__main__ import main
from lomix_fast.backends import BACKENDS, Backend
from lomix_fast.doctor import timing, workloads
from lomix_fast.doctor.checking import CaseOutcome, Checked
from lomix_fast.doctor.overview import overview
from lomix_fast.doctor.report import issue
from lomix_fast.doctor.selection import QUICK, choose_cases
from lomix_fast.doctor.selftest import Selftest
from lomix_fast.doctor.timing import Timing
from lomix_fast.doctor.workloads import OFFICIAL
from lomix_fast.testing.cases import CASES, Case
from lomix_fast.testing.devices import Cpu, Gpu

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    Case("tiny_2d", 1, 3, (32, 36), ((4, 5), (8, 9), (32, 36))),
    Case("tiny_3d", 1, 2, (6, 7, 8), ((3, 3, 4), (6, 7, 8))),
)


def always(_: torch.device) -> None:
    return None


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workloads that take milliseconds, memory without processes, and one honest backend beside those a test adds."""
    monkeypatch.setattr(workloads, "CPU", TINY)
    monkeypatch.setattr(timing, "FULL", timing.QUICK)
    monkeypatch.setattr(timing, "peak_mib", lambda device, subject, workload: 7.5)
    for name in list(BACKENDS):
        if name != "eager":
            monkeypatch.delitem(BACKENDS, name)


def selftest(path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Run the selftest on the CPU over two cases; exit status and report."""
    chosen = ["doctor", "--selftest", "--device", "cpu", "--cases", "only_add", "line_channels_last"]
    status = main([*chosen, "--json", str(path), *arguments])
    return status, json.loads(path.read_text())


def subprocess_doctor(prelude: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, after `prelude` has broken something there."""
    code = f"import sys\n{prelude}\nfrom lomix_fast.__main__ import main\nsys.exit(main(['doctor', *sys.argv[1:]]))"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, check=False
    )


def backend(name: str, change: Callable[[list[Tensor]], list[Tensor]]) -> Backend:
    """The eager backend under another name, with its gradients of the logits changed."""
    eager = BACKENDS["eager"]

    def backward(*arguments: Any) -> tuple[list[Tensor], list[Tensor | None]]:
        logits, parameters = eager.backward(*arguments)
        return change(logits), parameters

    return replace(eager, name=name, why_not=always, backward=backward)


def test_says_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text and "backends on cpu" in text and "GPU driver" in text
    assert all(f"  {name} " in text for name in BACKENDS)


def test_without_triton_and_extension(tmp_path: Path) -> None:
    path = tmp_path / "new" / "doctor.json"
    done = subprocess_doctor("sys.modules['triton'] = sys.modules['lomix_fast._C'] = None", "--json", str(path))
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    assert report["environment"]["triton"] is None and report["selftest"] is None
    assert report["devices"]["cpu"]["eager"] is None and "lomix_fast._C" in report["devices"]["cpu"]["cpu"]
    assert "triton      not installed" in done.stdout and "cpu         no: the extension" in done.stdout


@pytest.mark.parametrize(
    "record, words",
    [
        ({"cuda": "13.0", "cuda_archs": "8.0 9.0+PTX"}, "by CUDA 13.0, for 8.0 9.0+PTX"),
        ({"cuda_skipped": "no nvcc was found"}, "none: no nvcc was found"),
        ({}, "none: its build has recorded no reason"),
    ],
)
def test_says_whether_the_extension_has_its_cuda_part(
    record: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built = {"torch": "2.13.0", "compiler": "g++ 12", "capabilities": "DEFAULT", **record}
    monkeypatch.setattr(_build_info, "read", lambda: built)
    assert main(["doctor"]) == 0
    assert f"\nCUDA part   {words}\n" in capsys.readouterr().out


def test_a_triton_that_does_not_import(tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text("raise ImportError('libtriton.so: wrong ELF class')")
    done = subprocess_doctor(f"sys.path.insert(0, {str(tmp_path)!r})")
    assert done.returncode == 0, done.stderr
    assert "cannot be imported: ImportError: libtriton.so: wrong ELF class" in done.stdout


def test_what_cannot_even_be_asked_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def raises(*_: object) -> None:
        raise OSError("undefined symbol")

    monkeypatch.setitem(BACKENDS, "odd", replace(BACKENDS["eager"], name="odd", why_not=raises))
    monkeypatch.setattr(_build_info, "read", raises)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "odd         no: asking it raised OSError: undefined symbol" in text
    assert "extension   OSError: undefined symbol" in text


def test_selftest_reports_everything(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = selftest(tmp_path / "doctor.json")
    assert status == 0
    test = report["selftest"]
    assert test["passed"] and test["failures"] == [] and test["cases"] == ["only_add", "line_channels_last"]
    (row,) = test["checked"]
    assert (row["device"], row["backend"], row["passed"], row["total"]) == ("cpu", "eager", 2, 2)
    assert 0 < row["worst_ratio"] <= 1 and [c["name"] for c in row["cases"]] == test["cases"]
    assert [(t["subject"], t["workload"]) for t in test["timings"]] == [
        (subject, one.name) for one in TINY for subject in ("eager", OFFICIAL)
    ]
    for one in test["timings"]:
        assert one["status"] == "timed" and one["rounds"] == 3 and one["peak_mib"] == 7.5
        assert 0 < one["p20_ms"] <= one["p50_ms"] <= one["p80_ms"]
    mine, official = test["timings"][:2]
    assert mine["speedup"] == pytest.approx(official["p50_ms"] / mine["p50_ms"]) and official["speedup"] == 1
    assert test["workloads"]["cpu"][0]["full"] == [32, 36]
    assert {"triton", "cuda", "hip", "driver", "gpus", "torch", "commit"} <= set(report["environment"])
    text = capsys.readouterr().out
    assert "everything usable passed" in text and "2/2" in text and "2D on cpu: tiny_2d, batch 1, 3 classes" in text


def test_slightly_wrong_gradients_are_found_and_not_timed(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(BACKENDS, "off", backend("off", lambda gradients: [g * (1 + 1e-3) for g in gradients]))
    status, report = selftest(tmp_path / "doctor.json")
    assert status == 1
    test = report["selftest"]
    assert not test["passed"]
    assert [(f["backend"], f["case"]) for f in test["failures"]] == [("off", "only_add"), ("off", "line_channels_last")]
    assert "gradient of logits[0]" in test["failures"][0]["message"]
    honest, off = test["checked"]
    assert honest["passed"] == 2 and off["passed"] == 0 and off["worst_ratio"] > 1
    statuses = {t["subject"]: (t["status"], t["p50_ms"], t["peak_mib"]) for t in test["timings"]}
    assert statuses["off"] == ("not timed", None, None) and statuses["eager"][0] == statuses[OFFICIAL][0] == "timed"
    text = capsys.readouterr().out
    assert "4 failed" not in text and "2 failed:" in text and "off on cpu, only_add: gradient of logits[0]" in text


@pytest.mark.slow
def test_a_backend_that_raises_is_found(small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def raises(*_: object) -> tuple[Tensor, Tensor]:
        raise ZeroDivisionError("no blocks to launch")

    monkeypatch.setitem(BACKENDS, "raises", replace(BACKENDS["eager"], name="raises", forward=raises))
    status, report = selftest(tmp_path / "doctor.json")
    assert status == 1
    failure = report["selftest"]["failures"][0]
    assert failure["case"] == "only_add" and "raised ZeroDivisionError: no blocks to launch" in failure["message"]
    assert report["selftest"]["checked"][1]["worst_ratio"] is None


@pytest.mark.slow
def test_a_nan_is_written_as_null(small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(BACKENDS, "nan", backend("nan", lambda gradients: [g * float("nan") for g in gradients]))
    status, report = selftest(tmp_path / "doctor.json")
    assert status == 1 and report["selftest"]["checked"][1]["worst_ratio"] is None
    assert report["selftest"]["checked"][1]["worst_case"] == "only_add"


@pytest.mark.slow
def test_what_is_wrong_only_at_full_size_is_found(small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def change(gradients: list[Tensor]) -> list[Tensor]:
        return [g * (1.01 if g.shape[2:] == (32, 36) else 1) for g in gradients]

    monkeypatch.setitem(BACKENDS, "large", backend("large", change))
    status, report = selftest(tmp_path / "doctor.json")
    assert status == 1
    (failure,) = report["selftest"]["failures"]
    assert failure["case"] == "tiny_2d" and "logits_2 is off by 1.00e-02" in failure["message"]
    large = [t for t in report["selftest"]["timings"] if t["subject"] == "large"]
    assert [t["status"] for t in large] == ["wrong", "timed"] and large[0]["p50_ms"] is None


@pytest.mark.slow
def test_a_new_row_is_tested_and_the_interpreter_is_not_timed(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(BACKENDS, "triton", backend("triton", list))
    monkeypatch.setitem(BACKENDS, "newest", backend("newest", list))
    status, report = selftest(tmp_path / "doctor.json")
    assert status == 0
    by_name = {t["subject"]: t for t in report["selftest"]["timings"]}
    assert by_name["newest"]["status"] == "timed"
    assert by_name["triton"]["reason"] == "interpreter, not timed" and by_name["triton"]["p50_ms"] is None
    assert [row["passed"] for row in report["selftest"]["checked"]] == [2, 2, 2]
    assert "interpreter, not timed" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("when", ["memory", "rounds"])
def test_running_out_of_memory_is_a_result(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, when: str, capsys: pytest.CaptureFixture[str]
) -> None:
    right = workloads.step_of

    def step_of(subject: str, given: Any) -> Callable[[], Any]:
        step, calls = right(subject, given), []

        def fails_later() -> Any:
            calls.append(None)
            if subject == OFFICIAL and len(calls) > (0 if when == "memory" else 2):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
            return step()

        return fails_later

    monkeypatch.setattr(workloads, "step_of", step_of)
    status, report = selftest(tmp_path / "doctor.json")
    assert status == 0 and report["selftest"]["passed"]
    mine, official = report["selftest"]["timings"][:2]
    assert official["status"] == "does not fit" and official["p50_ms"] is None and "9 GiB" in official["reason"]
    assert mine["status"] == "timed" and mine["p50_ms"] > 0 and mine["speedup"] is None
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.slow
def test_the_report_is_one_text_for_an_issue(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "off", backend("off", lambda logits: [1.01 * g for g in logits]))
    path = tmp_path / "new" / "issue.md"
    status, record = selftest(tmp_path / "doctor.json", "--report", str(path))
    text = path.read_text()
    assert status == 1 and "backends on cpu" in text and "off on cpu, only_add: gradient of" in text
    values = json.loads(text.split("```json\n")[1].split("\n```")[0])
    assert values["environment"]["torch"] == torch.__version__
    kept = {row["backend"]: [one["name"] for one in row["cases"]] for row in values["selftest"]["checked"]}
    assert kept == {"eager": [], "off": ["only_add", "line_channels_last"]}
    assert values["selftest"]["timings"] == record["selftest"]["timings"]
    assert main(["doctor", "--device", "cpu", "--report", str(path)]) == 0
    assert "backends on cpu" in path.read_text() and "worst error" not in path.read_text()


def test_the_longest_report_fits_into_an_issue() -> None:
    failed = [CaseOutcome(one.name, False, 2.0, 600 * "x", "wrong") for one in CASES]
    devices = [Cpu(), Gpu("cuda:0", torch.device("cuda:0"))]
    checked = [Checked(device.name, name, failed) for device in devices for name in BACKENDS]
    timings = [
        Timing(device.name, name, one.name, "timed", None, 30, 1.0, 1.0, 1.0, 1.0, 1.0)
        for device in devices
        for name in BACKENDS
        for one in workloads.of(device)
    ]
    text = issue(overview([Cpu()]), Selftest(checked, timings, 1.0), devices, [one.name for one in CASES])
    assert len(text) < 65536 and "and 1" in text


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--selftest", "--cases", "base", "nonsense"], "--cases: got 'nonsense', expected names out of"),
        (["--selftest", "--cases", "base", "--quick"], "--cases and --quick: got both"),
        (["--selftest", "--device", "cuda:99"], "--device: got 'cuda:99', expected names out of cpu"),
        (["--quick"], "--quick: got it without --selftest"),
        (["--cases", "base"], "--cases: got it without --selftest"),
        (["--selftest", "--json", "."], "which is a folder"),
        (["--report", "."], "--report: got ., which is a folder"),
        (["--selftest", "--json", __file__ + "/doctor.json"], "is a file, expected a folder"),
    ],
)
def test_options_that_do_not_fit(
    arguments: Sequence[str], complaint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lomix_fast.doctor.selftest.run_selftest", lambda *_: pytest.fail("work has begun"))
    assert main(["doctor", *arguments]) == 2
    out, err = capsys.readouterr()
    assert complaint in err and err.startswith("error: ") and not out


def test_quick_cases_exist_and_cover_every_kind() -> None:
    chosen = choose_cases(None, True)
    assert len(chosen) == len(QUICK) == len(set(QUICK)) and choose_cases(None, False) == list(CASES)
    assert {len(one.full) for one in chosen} == {1, 2, 3} and {one.dtype for one in chosen} == {o.dtype for o in CASES}
    assert {one.squared for one in chosen} == {True, False} and {one.layout for one in chosen} >= {"mixed", "sliced"}
