"""The demo: data, network, training and comparison, on tiny settings."""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lomix_fast import LoMixLoss
from lomix_fast.__main__ import main
from lomix_fast.testing.peak import extra_peak_mib

pytest.importorskip("nilearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from lomix_fast.demo import compare, data, network, train

QUICK = ["demo", "--quick", "--steps", "2"]


@pytest.fixture(scope="module")
def brain() -> data.Brain:
    return data.load_brain(resolution=2)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small work; a second thread would only wait when other programs use the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> tuple[Path, str]:
    """Folder and terminal output of one quick run."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main([*QUICK, "--out", str(out)]) == 0
    return out, printed.getvalue()


@pytest.fixture
def case() -> compare.Case:
    """Three classes, four scales, 32 x 48, with logits large enough that the product maps matter."""
    torch.manual_seed(1)
    logits = [3 * torch.randn(2, 3, 32 // f, 48 // f) for f in network.FACTORS]
    target = torch.randint(0, 3, (2, 32, 48))
    return compare.Case(logits, target, dict(LoMixLoss(3, 4).state_dict()), "auto")


# Data


@given(st.integers(1, 400), st.integers(1, 60), st.integers(1, 20), st.integers(0, 10))
def test_training_and_held_out_slices_keep_their_distance(count: int, first: int, held_out: int, gap: int) -> None:
    period = first + held_out + 2 * gap
    if count <= first + gap:
        with pytest.raises(ValueError, match="shorten the period"):
            data.split_blocks(count, period, held_out, gap)
        return
    trained, tested = data.split_blocks(count, period, held_out, gap)
    assert min(abs(a - b) for a in trained for b in tested) > gap
    assert sorted(trained) == trained and sorted(tested) == tested
    assert min(trained + tested) >= 0 and max(trained + tested) < count


def test_brain_has_three_classes_and_slices_that_do_not_leak(brain: data.Brain) -> None:
    for part in (brain.train, brain.held_out):
        count = len(part.numbers)
        assert part.images.shape[0] == part.labels.shape[0] == len(part.heights) == count > 5
        assert part.images.shape[1] == 1 and part.images.shape[2:] == part.labels.shape[1:]
        assert all(size % 16 == 0 for size in part.labels.shape[1:])
        shares = torch.bincount(part.labels.flatten(), minlength=3) / part.labels.numel()
        assert shares.tolist() == pytest.approx([0.6, 0.25, 0.15], abs=0.07)
        # White matter is brighter than grey matter in T1, which is brighter than what is outside.
        means = [part.images[:, 0][part.labels == c].mean().item() for c in range(3)]
        assert means == sorted(means)
    assert min(abs(a - b) for a in brain.train.numbers for b in brain.held_out.numbers) > 2
    inside = brain.train.images[:, 0][brain.train.labels > 0]
    assert inside.mean().abs() < 0.1 and 0.8 < inside.std() < 1.1


def test_head_is_upright_and_complete(brain: data.Brain) -> None:
    labels = torch.cat([brain.train.labels, brain.held_out.labels])
    edges = torch.cat([labels[:, 0], labels[:, -1]], 1).sum() + torch.cat([labels[..., 0], labels[..., -1]], 1).sum()
    assert edges == 0  # no tissue is cut off
    # Far below the origin lie the temporal lobes and, behind them, the cerebellum: nothing in the front third.
    low = brain.train.labels[0] > 0
    third = low.shape[0] // 3
    assert low[:third].sum() == 0 and low[third:].sum() > 0


def test_batches_repeat_with_the_seed_and_leave_the_data_alone(brain: data.Brain) -> None:
    before = brain.train.images.clone(), brain.train.labels.clone()

    def draw(seed: int) -> list[tuple[Tensor, Tensor]]:
        return list(data.batches(brain.train, 3, 20, torch.Generator().manual_seed(seed)))

    first, again, other = draw(0), draw(0), draw(1)
    assert len(first) == 20
    for (images, labels), (images_again, labels_again) in zip(first, again, strict=True):
        assert images.shape[:2] == (3, 1) and labels.shape[0] == 3
        assert torch.equal(images, images_again) and torch.equal(labels, labels_again)
    assert not torch.equal(first[0][0], other[0][0])
    assert torch.equal(before[0], brain.train.images) and torch.equal(before[1], brain.train.labels)


@pytest.mark.parametrize("count,wanted", [(28, 5), (3, 5), (1, 1), (6, 6)])
def test_spread(count: int, wanted: int) -> None:
    rows = data.spread(count, wanted)
    assert len(rows) == min(count, wanted) == len(set(rows))
    assert rows == sorted(rows) and rows[0] >= 0 and rows[-1] < count


# Network and training


def test_heads_have_the_promised_sizes() -> None:
    logits = network.SmallUNet(5)(torch.randn(2, 1, 48, 32))
    assert [tuple(z.shape) for z in logits] == [(2, 5, 48 // f, 32 // f) for f in network.FACTORS]
    assert list(network.FACTORS) == sorted(network.FACTORS, reverse=True)  # coarsest first


def test_network_names_a_size_it_cannot_halve() -> None:
    with pytest.raises(ValueError, match=r"images: got \(1, 1, 48, 40\).*multiples of 16"):
        network.SmallUNet(3)(torch.randn(1, 1, 48, 40))


def run_training(brain: data.Brain, steps: int = 3) -> tuple[train.Training, dict[str, Tensor]]:
    torch.manual_seed(0)
    net, criterion = network.SmallUNet(3), LoMixLoss(3, 4)
    done = train.train(net, criterion, brain.train, steps=steps, batch=2, learning_rate=1e-2, seed=0)
    return done, {**net.state_dict(), **criterion.state_dict()}


def test_training_is_repeatable_and_moves_every_parameter(brain: data.Brain, one_thread: None) -> None:
    (first, state), (second, state_again) = run_training(brain), run_training(brain)
    assert first.losses == second.losses and len(first.losses) == 3
    assert all(torch.equal(state[name], state_again[name]) for name in state)
    torch.manual_seed(0)
    start = {**network.SmallUNet(3).state_dict(), **LoMixLoss(3, 4).state_dict()}
    assert [name for name in start if torch.equal(start[name], state[name])] == ["_extra_state"]
    assert bool((state["alpha"] < 0).all())  # the gradient of alpha is positive, always


def test_loss_parameters_are_trained_without_weight_decay(brain: data.Brain, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.optim.Optimizer] = []

    class Spy(torch.optim.AdamW):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    run_training(brain, steps=1)
    net, loss = made[0].param_groups
    assert net["weight_decay"] > 0 and loss["weight_decay"] == 0
    assert sum(p.numel() for p in loss["params"]) == sum(p.numel() for p in LoMixLoss(3, 4).parameters())


def test_training_stops_when_the_loss_is_not_finite(brain: data.Brain) -> None:
    criterion = LoMixLoss(3, 4)
    with torch.no_grad():
        assert criterion.alpha is not None
        criterion.alpha[0] = math.nan
    with pytest.raises(FloatingPointError, match="loss of step 1 is nan"):
        train.train(network.SmallUNet(3), criterion, brain.train, steps=2, batch=2, learning_rate=1e-3, seed=0)


def test_dice() -> None:
    truth = torch.tensor([[0, 1, 1, 2]])
    assert train.dice(truth, truth) == {"grey matter": 1.0, "white matter": 1.0}
    assert train.dice(torch.tensor([[0, 1, 2, 2]]), truth) == pytest.approx(
        {"grey matter": 2 / 3, "white matter": 2 / 3}
    )
    assert train.dice(torch.zeros_like(truth), truth) == {"grey matter": 0.0, "white matter": 0.0}


# Comparison


def test_both_styles_agree_and_name_every_gradient(case: compare.Case) -> None:
    found = compare.differences(case)
    names = {"loss", "alpha", "cat_weight", "cat_bias", "awf_weight", "awf_bias", *(f"logits_{i}" for i in range(4))}
    assert set(found) == set(compare.STYLES)
    for by_name in found.values():
        assert set(by_name) == names
        assert 0 < max(by_name.values()) < 2e-5
    exact = compare.differences(case.double())
    assert max(exact["fused"].values()) < 1e-9 and max(exact["official_style"].values()) == 0


def test_comparison_does_not_change_its_case(case: compare.Case) -> None:
    logits, parameters = [z.clone() for z in case.logits], {k: v.clone() for k, v in case.parameters.items()}
    compare.step_times(case, pairs=1, seconds=0)
    assert all(torch.equal(a, b) for a, b in zip(logits, case.logits, strict=True))
    assert all(torch.equal(parameters[k], case.parameters[k]) for k in parameters)


@pytest.mark.parametrize("wrong", [1.001, math.nan])
@pytest.mark.parametrize("name", ["loss", "awf_bias"])
def test_no_speed_is_shown_for_a_wrong_result(
    case: compare.Case, monkeypatch: pytest.MonkeyPatch, name: str, wrong: float
) -> None:
    right = compare.make_step

    def spoilt(style: str, given: compare.Case) -> Any:
        step = right(style, given)
        return (lambda: {k: v * wrong if k == name else v for k, v in step().items()}) if style == "fused" else step

    monkeypatch.setattr(compare, "make_step", spoilt)
    monkeypatch.setattr(compare, "step_times", lambda *_: pytest.fail("timed a wrong result"))
    with pytest.raises(ArithmeticError, match=f"differs from the official-style loss: {name} by"):
        compare.compare(case, pairs=1)


def test_unknown_style(case: compare.Case) -> None:
    with pytest.raises(ValueError, match="style: got 'fast', expected one of"):
        compare.make_step("fast", case)


def test_a_failed_measuring_process_says_what_it_wrote(case: compare.Case) -> None:
    broken = compare.Case(case.logits, case.target[:1], case.parameters, "auto")
    with pytest.raises(RuntimeError, match=r"(?s)memory of the fused loss failed.*ValueError"):
        compare.peak_memory(broken)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_extra_peak_is_what_the_work_took() -> None:
    def work() -> None:
        block = bytearray(64 * 2**20)  # zeros that were never written are not resident
        block[:: 4096 // 4] = b"\x01" * (len(block) // 1024)

    assert 63 < extra_peak_mib(work) < 72
    assert extra_peak_mib(lambda: None) < 2  # the peak of the work before is forgotten


# The whole


def test_report_has_every_field_with_a_sane_value(finished: tuple[Path, str]) -> None:
    report = json.loads((finished[0] / "report.json").read_text())
    assert set(report["dice"]) == {"gm", "wm"}
    assert all(0 <= value <= 1 for value in report["dice"].values())
    for field in ("step_ms", "peak_mib"):
        assert set(report[field]) == {"fused", "official_style"}
    assert all(0 < value < 60_000 for value in report["step_ms"].values())
    assert 0 <= report["peak_mib"]["fused"] < report["peak_mib"]["official_style"] < 1000
    assert 0 < report["max_relative_difference"] <= 1e-4
    assert report["backend"] in ("cpu", "eager")
    assert list(report["map_weights"]) == list(LoMixLoss(3, 4).map_names)
    assert all(0.6 < weight < 0.7 for weight in report["map_weights"].values())
    assert report["case"]["size"] == report["data"]["size"] and report["case"]["batch"] == 2
    assert not set(report["data"]["train_slices"]) & set(report["data"]["held_out_slices"])
    assert report["training"]["steps"] == 2 and report["training"]["seed"] == 0
    assert "not how accurate" in report["note"]
    environment = report["environment"]
    assert {"package", "commit", "python", "torch", "platform", "cpu", "cpu_capability", "date"} <= set(environment)
    assert environment["cores"] >= 1 and environment["threads"] == 1
    assert environment["torch"] == torch.__version__


def test_pictures_are_png_files(finished: tuple[Path, str]) -> None:
    for name in ("segmentation.png", "weights.png"):
        content = (finished[0] / name).read_bytes()
        assert content.startswith(b"\x89PNG") and 20_000 < len(content) < 1_000_000


def test_output_is_short_and_says_what_it_does_not_show(finished: tuple[Path, str]) -> None:
    out, printed = finished
    printed = printed.replace(str(out), "runs/demo")
    assert len(printed.splitlines()) < 35
    assert max(map(len, printed.splitlines())) <= 120
    for part in ("backend", "one template brain", "not how accurate", "extra peak memory", "report.json"):
        assert part in printed
    assert printed.count("step ") >= 2  # not a terminal: progress in lines


@pytest.mark.parametrize("package", ["nilearn", "matplotlib", "tqdm"])
def test_a_missing_package_names_the_extra(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main([*QUICK, "--out", str(tmp_path / "out")]) == 1
    assert f"needs {package}" in (message := capsys.readouterr().err) and "pip install 'lomix_fast[demo]'" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options,message",
    [
        (["--steps", "0"], "--steps: got 0, expected at least 1"),
        (["--batch", "-1"], "--batch: got -1"),
        (["--resolution", "9"], "--resolution: got 9, expected 1 to 4 mm"),
        (["--seed", "-1"], "--seed: got -1"),
        (["--out", __file__], "which is a file"),
    ],
)
def test_bad_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, *options]) == 2
    assert message in capsys.readouterr().err


def test_a_wrong_loss_fails_the_demo_and_leaves_no_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, one_thread: None
) -> None:
    (tmp_path / "report.json").write_text("{}")  # of an earlier run
    monkeypatch.setattr(compare, "TOLERANCE", 0.0)
    assert main([*QUICK, "--steps", "1", "--out", str(tmp_path)]) == 1
    written = capsys.readouterr()
    assert "no speed is reported" in written.err and "faster" not in written.out
    assert not (tmp_path / "report.json").exists()


def test_help_names_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        main(["--help"])
    assert exit_status.value.code == 0
    assert "demo" in capsys.readouterr().out
