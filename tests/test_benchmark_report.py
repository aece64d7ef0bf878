"""Results files written and read back, and the page and pictures made of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from made_up import build_figure, contender_figures, sweep_figures

from benchmarks import report
from benchmarks.plots import DRAWERS
from benchmarks.promises import PROMISES
from benchmarks.results import COLUMNS, FOLDER, ResultsError, machine, read_csv, row, write_csv
from benchmarks.sweeps import STANDARD, SUBJECTS

COMMON = machine() | {"cpu_model": "Made-up CPU", "commit": "0123456789abcdef", "date": "2026-01-02T03:04:05+00:00"}
NUMBERS = ("p20_ms", "p50_ms", "p80_ms", "extra_peak_mib", "gradients_mib")
PNG = b"\x89PNG"


@pytest.fixture
def everything(tmp_path: Path) -> Path:
    """A file with figures of all subjects."""
    path = tmp_path / "everything.csv"
    write_csv(path, [m for name in STANDARD for m in sweep_figures(name)] + [build_figure(93.0)], COMMON)
    return path


def rounded(value: float | None) -> float | None:
    """What a file keeps of a figure."""
    return None if value is None else float(f"{value:.4f}")


def test_what_is_written_is_read_back(everything: Path) -> None:
    found, run = read_csv(everything)
    expected = [m for name in STANDARD for m in sweep_figures(name)] + [build_figure(93.0)]
    assert found == [replace(m, **{name: rounded(getattr(m, name)) for name in NUMBERS}) for m in expected]
    assert found[0].full == (224, 224) and found[-1].full == () and found[-1].p50_ms == 93e3
    assert run == {name: str(value) for name, value in COMMON.items()}
    assert set(row(found[0], COMMON)) == set(COLUMNS)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "got no rows"),
        ("case,L\n", "got no rows"),
        ("case,L\nsynapse2d,four\n", "line 2: ValueError"),
        ("case,L\nsynapse2d,4\n", "line 2: KeyError"),
    ],
)
def test_what_is_no_results_file_is_refused(text: str, message: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "other.csv"
    path.write_text(text)
    with pytest.raises(ResultsError, match=message):
        read_csv(path)
    with pytest.raises(SystemExit) as stopped:
        report.main([str(path), "--page", str(tmp_path / "page.md")])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_files_from_before_there_were_subjects_are_read() -> None:
    found, run = read_csv(FOLDER / "first.csv")
    assert {m.subject for m in found} == {"synapse2d", "patch3d"} and {m.maps for m in found} == {48}
    assert run["cpu_model"] == "AMD EPYC" and run["compiler"] == ""
    assert all(m.gradients_mib is None for m in found) and found[0].threads == 2


def test_the_report_has_a_table_and_a_picture_of_every_subject(everything: Path, tmp_path: Path, capsys) -> None:
    page = tmp_path / "docs" / "page.md"
    assert report.main([str(everything), "--page", str(page)]) == 0
    pictures = sorted((tmp_path / "docs" / "figures").glob("*.png"))
    assert {p.stem for p in pictures} == set(DRAWERS) & set(STANDARD) == set(STANDARD) - {"patch3d14", "recipes"}
    assert all(p.read_bytes().startswith(PNG) and p.stat().st_size > 5000 for p in pictures)
    assert capsys.readouterr().out.splitlines()[0] == str(page)
    text = page.read_text()
    assert text.startswith("<!-- Made by `make bench-report`")
    assert "| synapse2d | everything.csv | Made-up CPU | " in text and "commit 0123456789," in text
    for name in STANDARD:
        assert f"## {name}: {SUBJECTS[name].title}" in text
        assert (f"](figures/{name}.png)" in text) is (name in DRAWERS)
    assert "| fused | recipe_soft_labels | 9 | 4 | 48 |" in text, "recipes differ in nothing but their names"
    assert "| 64x64 | 96 |" in text and "| exp_floor |" in text and "| 93 |" in text
    assert text.count("| kept |") + text.count("| **broken** |") == len(PROMISES)
    assert "| kept | build: the extension from nothing with 2 jobs in at most 240 s: 93 s" in text


def test_the_newest_run_of_each_subject_counts(everything: Path, tmp_path: Path) -> None:
    newer, older = tmp_path / "a.csv", tmp_path / "z.csv"
    write_csv(newer, contender_figures("synapse2d", fused=77.0, official=1234.0), COMMON | {"date": "2026-02-02"})
    write_csv(older, contender_figures("synapse2d", fused=99.0), COMMON | {"date": "2025-02-02"})
    sources = report.newest([newer, everything, older])
    assert list(sources) == [*STANDARD, "build"]
    assert sources["synapse2d"].path == newer and len(sources["synapse2d"].measurements) == 10
    assert sources["patch3d"].path == everything
    page = tmp_path / "page.md"
    report.write_report({"synapse2d": sources["synapse2d"]}, page, tmp_path / "figures")
    text = page.read_text()
    assert "| fused | 38.50 | 38.50 | 77.00 |" in text and "| official | 617.0 | 617.0 | 1234 |" in text
    assert "16.03x" in text and "| not measured | pixels2d: " in text and "## pixels2d" not in text


def test_no_files_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    with pytest.raises(SystemExit) as stopped:
        report.main([])
    assert stopped.value.code == 2 and "make bench writes them" in capsys.readouterr().err
