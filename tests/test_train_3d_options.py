"""What examples/train_3d.py refuses, and the search for the largest batch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("monai")
pytest.importorskip("nilearn")
pytest.importorskip("tensorboard")
pytest.importorskip("tqdm")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import train_3d
from train_3d_parts import batch_search, data, options, step
from train_3d_tiny import WORDS, refusal, tiny

# Options


@pytest.mark.parametrize(
    "words, message",
    [
        (["--patch", "24"], "--patch: got 24 x 24 x 24, expected multiples of 16"),
        (["--patch", "16"], "--patch: got 16 x 16 x 16, of which --scales 4 leaves one voxel"),
        (["--patch", "32", "32"], "--patch: got 2 numbers, expected one or three"),
        (["--scales", "1"], "--scales: got 1, expected 2 to 5"),
        (["--scales", "6"], "--scales: got 6, expected 2 to 5"),
        (["--batch", "0"], "--batch: got 0, expected at least 1"),
        (["--steps", "3"], "--steps: got 3, expected at least 4"),
        (["--filters", "0"], "--filters: got 0, expected at least 1"),
        (["--lr", "nan"], "--lr: got nan"),
        (["--lr", "0"], "--lr: got 0.0, expected a finite number above 0"),
        (["--seed", "-1"], "--seed: got -1"),
        (["--resolution", "5"], "--resolution: got 5, expected 1 to 4 mm"),
        (["--save-every", "-1"], "--save-every: got -1, expected at least 0"),
        (["--log-every", "0"], "--log-every: got 0, expected at least 1"),
        (["--timeout", "0"], "--timeout: got 0.0, expected seconds above 0"),
        (["--out", __file__], "which is a file, expected a folder"),
        (["--resume", "nowhere.pt"], "--resume: got nowhere.pt, expected a checkpoint"),
        (["--memory", "2"], "--memory: belongs to --find-batch"),
        (["--max-batch", "2"], "--max-batch: belongs to --find-batch"),
        (["--find-batch"], "--memory: got None, expected the budget"),
        (["--find-batch", "--memory", "-1"], "--memory: got -1.0, expected the budget"),
        (["--find-batch", "--memory", "1", "--batch", "2"], "--batch: has no meaning for --find-batch"),
        (["--find-batch", "--memory", "1", "--save-every", "0"], "--save-every: has no meaning for --find-batch"),
        (["--find-batch", "--memory", "1", "--max-batch", "0"], "--max-batch: got 0, expected at least 1"),
        (["--find-batch", "--memory", "1e6", "--device", "cpu"], "--memory: got 1e+06 GiB, expected at most the"),
        (["--patch", "32", "--amp", "bf16", "--device", "cpu"], "--amp: got bf16 on a CPU with 2 x 2 x 2 voxels"),
    ],
)
def test_unusable_options_are_refused_before_any_work(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((data, "load_head"), (step, "build_trainer"), (batch_search, "run_trial")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("work was begun"))
    assert message in refusal(*words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_cuda_is_refused_where_there_is_none() -> None:
    assert "--device: got 'cuda'" in refusal("--device", "cuda")


def test_patch_larger_than_the_volume_is_refused(tmp_path: Path) -> None:
    assert "--patch: got 64 x 64 x 64, expected at most" in refusal(
        *WORDS, "--patch", "64", "--out", str(tmp_path / "new")
    )
    assert not (tmp_path / "new").exists()


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(options, "_NEEDED", ("monai", "no_such_package"))
    monkeypatch.setattr(data, "load_head", lambda _: pytest.fail("work was begun"))
    assert train_3d.main([]) == 1
    assert "train_3d.py needs no_such_package" in capsys.readouterr().err


# The largest batch


@given(st.integers(0, 200), st.integers(1, 200))
def test_the_search_ends_at_the_largest_batch(limit: int, most: int) -> None:
    trials = batch_search.largest(lambda b: batch_search.Trial(b, b <= limit, None, None, None), most)
    tried = [trial.batch for trial in trials]
    assert batch_search.answer(trials) == min(limit, most)
    assert max(tried) <= most and len(set(tried)) == len(tried)
    assert limit >= most or limit + 1 in tried
    assert len(tried) <= 2 * most.bit_length() + 1


def test_find_batch_writes_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With trials whose peak is made up: 100 MiB and 20 a patch, 60 in the official style."""

    def made_up(settings: options.Settings, device: torch.device, budget: int, timeout: float) -> batch_search.Trial:
        peak = 100 + (60 if settings.loss == "official-style" else 20) * settings.batch
        fits = peak * 2**20 <= budget
        return batch_search.Trial(settings.batch, fits, peak if fits else None, 2.0, None if fits else "too large")

    monkeypatch.setattr(batch_search, "run_trial", made_up)
    words = ["--find-batch", "lomix", "official-style", "--memory", "0.25", "--device", "cpu", "--out", str(tmp_path)]
    assert train_3d.main(words) == 0
    report = json.loads((tmp_path / "batch.json").read_text())
    assert {loss: one["largest"] for loss, one in report["losses"].items()} == {"lomix": 7, "official-style": 2}
    assert report["losses"]["lomix"]["peak_mib"] == 240 and report["losses"]["lomix"]["searched_to_the_end"]
    assert [t["batch"] for t in report["losses"]["official-style"]["trials"]] == [1, 2, 3, 4]
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["lomix", "7", "240", "MiB", "2.00", "s", "3.50", "too", "large"] in rows
    assert train_3d.main([*words, "--max-batch", "2"]) == 0
    report = json.loads((tmp_path / "batch.json").read_text())
    assert report["losses"]["lomix"]["largest"] == 2 and not report["losses"]["lomix"]["searched_to_the_end"]


def trial(batch: int, mib: float, timeout: float = 120) -> batch_search.Trial:
    settings = tiny(batch=batch, loss="official-style")
    return batch_search.run_trial(settings, torch.device("cpu"), int(mib * 2**20), timeout)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="watches /proc")
def test_a_trial_measures_one_batch_and_is_stopped_at_the_budget() -> None:
    free = trial(1, 4096)
    assert free.fits and free.why is None and free.seconds > 0
    assert 100 < free.peak_mib < 2048
    tight = free.peak_mib + 60
    larger = trial(48, tight)  # grows little by little: its peak, or whoever watches it
    assert not larger.fits and ("over the budget" in larger.why or "passed the budget" in larger.why)
    assert trial(2**19, tight).why == "an allocation failed"  # 8 GiB at once


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="watches /proc")
def test_a_budget_below_the_libraries_fits_nothing() -> None:
    assert trial(1, 20) == batch_search.Trial(1, False, None, None, "ended when its resident set passed the budget")


def test_a_trial_that_hangs_or_fails_is_no_answer() -> None:
    with pytest.raises(RuntimeError, match=r"--timeout 0\.2 seconds"):
        trial(1, 4096, timeout=0.2)
    with pytest.raises(RuntimeError, match="failed with exit status 1"):
        batch_search._judge(1, False, 1, "", "Traceback")
