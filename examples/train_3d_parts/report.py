"""What a run prints, and report.json: the same numbers."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lomix_fast.testing.environment import environment

from .data import NOTE, Head
from .options import Options, Settings, shape_text
from .processes import Place

# Written into report.json, so that its numbers can be read without the code.
MEANING = {
    "time": "loss forward and backward over the whole step: network and loss, both passes, exchange between processes, "
    "optimizer; without drawing patches; of this run's logged steps but its first; in the first process, where "
    "loss_forward includes waiting for the others when the loss sums over processes",
    "memory": "of the last steps: loss is how far memory rose above before_loss while the loss ran, step the highest "
    "of the whole step, share loss / step; added is how much lower the highest of the other laps is",
    "memory_cpu": "resident set of the first process over what it held before the network was made, with what "
    "libraries load when they are first used (some 30 MiB); freed memory was given back at once",
    "memory_cuda": "bytes handed out by PyTorch's allocator on the first process's device",
    "dice": "finest map, all voxels of the held-out part together",
    "map_weights": "learned weight of each supervised map after the run; names count scales from the coarsest, 0",
}


def say_beginning(options: Options, place: Place, head: Head, maps: int, done: int) -> None:
    """Print what will be trained, on what, from which step on."""
    settings = options.settings
    processes = f", {place.world} processes" if place.is_distributed else ""
    supervised = f"{maps} map{'s' * (maps > 1)}"
    print(
        f"train_3d: {settings.network} with the {settings.loss} loss, {supervised}, on {place.device.type}{processes}"
    )
    print(
        f"  data      MNI152 T1 template, {shape_text(head.train.labels.shape)} voxels to train on, "
        f"{shape_text(head.held_out.labels.shape)} held out"
    )
    print(
        f"  training  steps {done + 1} to {settings.steps} of {settings.batch * place.world} patches of "
        f"{shape_text(settings.patch)}, amp {settings.amp}",
        flush=True,
    )


def make(
    options: Options,
    place: Place,
    *,
    training: dict[str, Any],
    time: dict[str, Any] | None,
    memory: dict[str, Any] | None,
    no_memory: str | None,
    dice: dict[str, float],
    map_weights: dict[str, float],
) -> dict[str, Any]:
    """Put report.json together.

    Args:
        options, place: of the run.
        training: what happened.
        time, memory: from `shares`, or None where no step was measured.
        no_memory: why memory could not be measured, or None.
        dice, map_weights: by name.
    """
    settings: Settings = options.settings
    return {
        "settings": asdict(settings),
        "processes": place.world,
        "device": place.device.type,
        "training": training,
        "loss_share": {"time": time, "memory": memory, "no_memory": no_memory},
        "dice": dice,
        "note": NOTE,
        "map_weights": map_weights,
        "meaning": MEANING,
        "environment": {**environment(), "threads": torch.get_num_threads()},
    }


def write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON, refusing numbers that are not finite."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def say_end(content: dict[str, Any], out: Path) -> None:
    """Print the loss's share, Dice, and where the files are."""
    time, memory = content["loss_share"]["time"], content["loss_share"]["memory"]
    print(f"  trained in {content['training']['seconds']:.1f} s")
    if time is None:
        print("  time      no step was timed: this run logged none but its first and last ones, see --log-every")
    else:
        ms = time["ms"]
        print(
            f"  time      the loss takes {time['share']:.1%} of a step: {ms['loss_forward']:.1f} ms forward and "
            f"{ms['loss_backward']:.1f} ms backward of {ms['step']:.1f} ms (median of {_steps(time)}; "
            "patches drawn outside)"
        )
    if memory is None:
        print(f"  memory    not measured: {content['loss_share']['no_memory'] or 'no step was left for it'}")
    else:
        mib = memory["mib"]
        what = (
            "allocated by PyTorch"
            if content["device"] == "cuda"
            else "resident set over that of the process before it made the network"
        )
        print(
            f"  memory    the loss takes {mib['loss']:.1f} MiB, {memory['share']:.1%} of the step's peak of "
            f"{mib['step']:.1f} MiB, to which it adds {mib['added']:.1f} MiB (median of {_steps(memory)}; "
            f"{what})"
        )
    print("  Dice      " + ", ".join(f"{name} {value:.3f}" for name, value in content["dice"].items()) + ", held out")
    print(textwrap.fill(NOTE, width=100, initial_indent="  ", subsequent_indent="  "))
    print(f"  wrote report.json, checkpoints and tensorboard/ to {out}/", flush=True)


def _steps(measured: dict[str, Any]) -> str:
    return f"{measured['steps']} step{'s' * (measured['steps'] > 1)}"
