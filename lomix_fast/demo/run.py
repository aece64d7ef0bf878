"""The demo from beginning to end: load, train, test, compare, report."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..backends import choose, why_not
from ..loss import LoMixLoss
from ..testing.environment import environment
from . import report
from .compare import Case, compare
from .data import CLASS_NAMES, NOTE, Brain, load_brain, spread
from .network import FACTORS, SmallUNet
from .plots import draw_segmentation, draw_weights
from .train import dice, predict, train


@dataclass(frozen=True)
class Settings:
    """What a user can change.

    Attributes:
        steps: optimizer steps. batch: slices a step, in training and in the comparison. learning_rate: its peak.
        seed: of everything random. resolution: mm of a pixel. pairs: timed steps of each style at most.
    """

    steps: int = 80
    batch: int = 6
    learning_rate: float = 1e-2
    seed: int = 0
    resolution: int = 1
    pairs: int = 15

    def __post_init__(self) -> None:
        """Check the ranges, naming the option of the command line.

        Raises:
            ValueError: an option out of range.
        """
        for name in ("steps", "batch", "pairs"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}: got {getattr(self, name)}, expected at least 1")
        if not 1 <= self.resolution <= 4:
            raise ValueError(f"--resolution: got {self.resolution}, expected 1 to 4 mm")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed: got {self.seed}, expected 0 to 2**63 - 1")


QUICK = Settings(steps=4, batch=2, resolution=2, pairs=1)  # shows that every part runs, learns next to nothing


def run_demo(settings: Settings, out: Path) -> dict[str, Any]:
    """Train, test and measure; print a summary and write report.json, segmentation.png and weights.png.

    The same settings, seed, number of threads, machine and versions give the same Dice and weights.

    Args:
        settings: see `Settings`.
        out: folder for the three files, made if missing.

    Returns:
        What report.json holds.

    Raises:
        ArithmeticError: the loss stopped being finite, or fused and official-style loss disagree; report.json
            does not exist then.
        RuntimeError: a process that measures memory failed.
    """
    begin = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").unlink(missing_ok=True)  # a report beside a failed run would be that of another one
    brain = load_brain(settings.resolution)
    device = torch.device("cpu")
    backend = choose("auto", device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = SmallUNet(len(CLASS_NAMES))
        criterion = LoMixLoss(len(CLASS_NAMES), len(FACTORS), impl="auto")
    report.say_beginning(settings, brain, backend, why_not("cpu", device))

    training = train(
        network,
        criterion,
        brain.train,
        steps=settings.steps,
        batch=settings.batch,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
    )
    prediction = predict(network, brain.held_out)
    scores = dice(prediction, brain.held_out.labels)
    weights = criterion.map_weights()
    draw_segmentation(out / "segmentation.png", brain.held_out, prediction)
    draw_weights(out / "weights.png", criterion.plan, weights, FACTORS)
    result: dict[str, Any] = {
        "dice": {"gm": scores["grey matter"], "wm": scores["white matter"]},
        "note": NOTE,
        "backend": backend,
        "training": {
            **asdict(settings),
            "seconds": training.seconds,
            "first_loss": training.losses[0],
            "last_loss": training.losses[-1],
        },
        "data": _describe(brain),
        "map_weights": dict(zip(criterion.map_names, weights.tolist(), strict=True)),
    }
    report.say_learned(result)
    result |= compare(_case(network, criterion, brain, settings.batch), settings.pairs)
    report.say_comparison(result)
    result |= {"meaning": report.MEANING, "environment": environment(), "seconds": time.perf_counter() - begin}
    (out / "report.json").write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    report.say_end(result, out)
    return result


@torch.no_grad()
def _case(network: SmallUNet, criterion: LoMixLoss, brain: Brain, batch: int) -> Case:
    """Trained logits of evenly spread held-out slices, and the trained parameters."""
    rows = spread(len(brain.held_out.numbers), batch)
    logits = network(brain.held_out.images[rows])
    return Case(logits, brain.held_out.labels[rows], dict(criterion.state_dict()), criterion.impl)


def _describe(brain: Brain) -> dict[str, Any]:
    return {
        "source": "MNI152 T1, grey and white matter templates in the nilearn package",
        "classes": list(CLASS_NAMES),
        "size": list(brain.train.labels.shape[1:]),
        "resolution_mm": brain.resolution,
        "train_slices": list(brain.train.numbers),
        "held_out_slices": list(brain.held_out.numbers),
    }
