"""examples/train_3d.py from the command line to its report: training, resuming, several processes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("monai")
pytest.importorskip("nilearn")
pytest.importorskip("tensorboard")
pytest.importorskip("tqdm")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import train_3d
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_3d_parts import checkpoints, data, laps, options, step
from train_3d_tiny import HERE, WORDS, differences, refusal, tiny, train

# Training


@pytest.mark.parametrize("name", options.NETWORKS)
def test_training_reports_what_it_did(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = train(tmp_path / "new" / "out", "--network", name, "--steps", "7", "--log-every", "2", "--save-every", "3")
    out = tmp_path / "new" / "out"
    assert sorted(path.name for path in out.glob("*.pt")) == ["step_000003.pt", "step_000006.pt", "step_000007.pt"]
    assert report["settings"]["network"] == name and report["settings"]["patch"] == [16, 16, 16]

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars("train/loss")}
    assert sorted(logged) == [2, 4, 6]
    assert {number: report["training"]["losses"][str(number)] for number in logged} == pytest.approx(logged, rel=1e-6)
    rates = [event.value for event in events.Scalars("train/learning_rate")]
    assert rates == pytest.approx([1e-3 * (1 - done / 7) ** 0.9 for done in (1, 3, 5)])

    shares_logged = [event.value for event in events.Scalars("train/loss_share_of_step_time")]
    its = report["loss_share"]["time"]
    assert its["steps"] == len(shares_logged) == 2, "steps 2 and 4; 6 measures memory"
    assert its["share"] == pytest.approx(sum(shares_logged) / 2, rel=1e-5)
    assert 0 < its["share"] < 1 and its["ms"]["step"] == pytest.approx(sum(its["ms"][lap] for lap in laps.LAPS))

    memory = report["loss_share"]["memory"]
    if memory is None:
        assert report["loss_share"]["no_memory"]
    else:
        assert memory["steps"] == options.MEMORY_STEPS
        assert memory["mib"]["step"] >= memory["mib"]["before_loss"] + memory["mib"]["loss"] - 0.5 > 0
        assert 0 <= memory["share"] < 1 and 0 <= memory["mib"]["added"] <= memory["mib"]["step"]

    weights = {name: events.Scalars(f"map_weights/{name}")[-1].value for name in report["map_weights"]}
    assert len(weights) == 6 and max(weights.values()) < 0.6931, "softplus weights fall from log 2 in the first step"
    assert set(report["dice"]) == {"grey matter", "white matter"}
    printed = capsys.readouterr().out
    assert f"the loss takes {its['share']:.1%} of a step" in printed and "6 maps" in printed
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("  step")] == list("1234567")


def test_a_network_learns(tmp_path: Path) -> None:
    report = train(tmp_path, "--steps", "60", "--lr", "0.01")
    found = report["training"]["losses"]
    assert found["60"] < 0.85 * found["1"]
    assert min(report["dice"].values()) > 0.4


@pytest.mark.parametrize("loss", options.LOSSES[1:])
def test_other_losses_train(loss: str, tmp_path: Path) -> None:
    report = train(tmp_path, "--loss", loss, "--steps", "4")
    maps = {"mutation": 3, "deep-supervision": 2, "last-layer": 1, "official-style": 6}[loss]
    assert len(report["map_weights"]) == maps
    assert (report["map_weights"] != dict.fromkeys(report["map_weights"], 1.0)) == (loss == "official-style")


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.json").write_text("of another run")
    assert train_3d.main([*WORDS, "--out", str(tmp_path), "--steps", "20", "--lr", "1e30"]) == 1
    assert "lower --lr" in capsys.readouterr().err
    assert not (tmp_path / "report.json").exists()


def test_with_fp16_an_overflow_is_left_to_the_scaler_while_it_has_somewhere_to_go() -> None:
    trainer = step.build_trainer(tiny(amp="fp16"), HERE)
    trainer.scaler.scale(torch.zeros(()))  # it makes its scale when it is first used
    trainer.check(1, float("inf"))
    trainer.scaler.update(0.5)
    with pytest.raises(FloatingPointError, match="the loss of step 2 is inf"):
        trainer.check(2, float("inf"))


# Resuming


@pytest.mark.parametrize(
    "words",
    [[], ["--loss", "official-style"], ["--amp", "fp16"], ["--amp", "bf16"]],
    ids=["lomix", "official-style", "fp16", "bf16"],
)
def test_a_resumed_run_has_the_same_bits(words: list[str], tmp_path: Path) -> None:
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    first = train(whole, *words, "--steps", "6", "--save-every", "3")
    torch.manual_seed(99)
    second = train(rest, *words, "--steps", "6", "--resume", str(whole / "step_000003.pt"))
    ends = [torch.load(folder / "step_000006.pt", weights_only=True) for folder in (whole, rest)]
    assert ends[0]["step"] == 6 and differences(*ends) == []
    assert second["training"]["first_step"] == 4 and sorted(second["training"]["losses"]) == ["4", "5", "6"]
    assert second["training"]["losses"].items() <= first["training"]["losses"].items()
    assert second["dice"] == first["dice"]
    assert first["loss_share"]["time"]["steps"] == 3, "steps 2 to 4: the first warms up, the last two measure memory"
    assert second["loss_share"]["time"] is None
    assert differences(torch.load(whole / "step_000003.pt", weights_only=True), ends[0]), "nothing was trained"


def test_a_run_goes_on_only_as_it_began(tmp_path: Path) -> None:
    train(tmp_path, "--steps", "5", "--save-every", "4")
    begun, ended, junk = (tmp_path / name for name in ("step_000004.pt", "step_000005.pt", "junk.pt"))
    junk.write_bytes(b"PK\x03\x04 not a checkpoint")
    for words, message in (
        (["--lr", "0.1"], "--lr: got 0.1, but"),
        (["--network", "segresnet"], "--network: got segresnet, but"),
        (["--patch", "16", "16", "20"], "--patch: got [16, 16, 20], but"),
        (["--steps", "9"], "--steps: got 9, but"),
    ):
        assert message in refusal(*WORDS, "--steps", "5", "--resume", str(begun), *words)
    assert "nothing is left to do" in refusal(*WORDS, "--steps", "5", "--resume", str(ended))
    assert "is no checkpoint of this program" in refusal(*WORDS, "--steps", "5", "--resume", str(junk))
    settings = tiny(steps=5)
    with pytest.raises(options.OptionError, match="written by 1 processes, and now there are 2"):
        checkpoints.load(begun, settings, dataclasses.replace(HERE, world=2))


def test_writing_a_checkpoint_leaves_the_old_one_until_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, settings = tmp_path / "step.pt", tiny()
    generator = torch.Generator()
    checkpoints.save(path, 1, settings, {}, generator, HERE)

    def fails(content: Any, file: Any) -> None:
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(path, 2, settings, {}, generator, HERE)
    assert checkpoints.load(path, settings, HERE)["step"] == 1


# Several processes


def started(rank: int, port: int, *words: str) -> subprocess.Popen[str]:
    """One of two processes, as torchrun would start it."""
    where = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, train_3d.__file__, *WORDS, *words],
        env={**os.environ, **where, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.slow
def test_two_processes_train_as_one_with_their_batches_together(tmp_path: Path) -> None:
    words = ["--batch", "1", "--steps", "4", "--log-every", "1", "--lr", "0.01", "--out", str(tmp_path)]
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, train_3d.__file__, *WORDS, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["processes"] == 2 and done.stdout.count("step     4 of 4") == 1

    settings = tiny(batch=1, steps=4, lr=0.01)
    trainer = step.build_trainer(settings, HERE)
    sources = [data.Patches(data.load_head(4).train, settings.patch, 1, seed) for seed in (0, 1)]
    expected = {}
    for number in range(1, 5):
        drawn = [source.draw() for source in sources]
        images, labels = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        expected[str(number)] = trainer.step(images, labels).item()
    assert report["training"]["losses"] == pytest.approx(expected, rel=1e-4)
    saved = torch.load(tmp_path / "step_000004.pt", weights_only=True)
    assert saved["world"] == 2
    for states in saved["random"]:  # of the patches and of everything else
        assert not torch.equal(*states), "the processes draw the same"
    torch.testing.assert_close(saved["criterion"]["alpha"], trainer.criterion.alpha.detach(), rtol=1e-4, atol=1e-6)
    for name, value in trainer.network.state_dict().items():
        torch.testing.assert_close(saved["network"][name], value, rtol=1e-3, atol=2e-3)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no signal that stops a process")
def test_a_process_that_hangs_is_an_error_for_the_others(tmp_path: Path) -> None:
    words = ["--steps", "100000", "--save-every", "2", "--timeout", "3", "--out", str(tmp_path)]
    port = free_port()
    first, second = (started(rank, port, *words) for rank in (0, 1))
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "step_000002.pt").exists():
            assert first.poll() is None and time.monotonic() < until, first.communicate()[0]
            time.sleep(0.05)
        second.send_signal(signal.SIGSTOP)
        printed = first.communicate(timeout=60)[0]
        assert first.returncode != 0 and "Timed out waiting" in printed
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
