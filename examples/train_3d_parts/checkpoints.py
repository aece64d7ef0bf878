"""Checkpoints from which a run goes on as if it had never stopped: on a CPU with the same bits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from .options import OptionError, Settings
from .processes import Place, gather


class Stateful(Protocol):
    """What has a state dict: modules, optimizers, schedulers, gradient scalers."""

    def state_dict(self) -> dict[str, Any]:
        """Everything it takes to go on."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take it over."""
        ...


def save(
    path: Path, step: int, settings: Settings, parts: Mapping[str, Stateful], patches: torch.Generator, place: Place
) -> None:
    """Write a checkpoint. All processes must call this: the random states of all are in it; the first one writes.

    The file appears under its name when it is complete, so whoever stops the program leaves no half of one.

    Args:
        path: the file.
        step: steps done.
        settings: of the run.
        parts: by name what has a state dict.
        patches: the generator that patches are drawn with.
        place: of this process.
    """
    random = [gather(state, place) for state in _random_states(patches, place)]
    if not place.is_first:
        return
    state = {name: part.state_dict() for name, part in parts.items()}
    content = {"settings": _plain(settings), "world": place.world, "step": step, "random": random, **state}
    unfinished = path.with_suffix(".part")
    with unfinished.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def load(path: Path, settings: Settings, place: Place) -> dict[str, Any]:
    """Read a checkpoint and check that this run may go on from it.

    Args:
        path: the file.
        settings: of this run.
        place: of this process.

    Returns:
        What `restore` takes; "step" says how many steps are done. All tensors are on the CPU.

    Raises:
        OptionError: it belongs to other settings or another number of processes, it is of the last step, or the file is
            no checkpoint of this program; the message names the option.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        was, world, step = content["settings"], content["world"], content["step"]
    except Exception as error:  # torch.load raises whatever the bytes make it stumble over
        raise OptionError(
            f"--resume: {path} is no checkpoint of this program ({type(error).__name__}: {error})"
        ) from None
    for name, value in _plain(settings).items():
        if was.get(name) != value:
            raise OptionError(
                f"--{name}: got {value}, but {path} was written with {was.get(name)}; a run goes on under the options "
                "that it began with"
            )
    if world != place.world:
        raise OptionError(f"--resume: {path} was written by {world} processes, and now there are {place.world}")
    if step >= settings.steps:
        raise OptionError(f"--resume: {path} is of step {step}, the last one of this run; nothing is left to do")
    return dict(content)


def restore(content: Mapping[str, Any], parts: Mapping[str, Stateful], patches: torch.Generator, place: Place) -> int:
    """Put everything back and return the number of steps done.

    Args:
        content: from `load`.
        parts, patches, place: as for `save`.

    Raises:
        RuntimeError: the parts do not fit.
    """
    for name, part in parts.items():
        part.load_state_dict(content[name])
    mine = [states[place.rank] for states in content["random"]]
    patches.set_state(mine[0])
    torch.set_rng_state(mine[1])
    if place.device.type == "cuda" and len(mine) > 2:
        torch.cuda.set_rng_state(mine[2], place.device)
    return int(content["step"])


def _random_states(patches: torch.Generator, place: Place) -> list[torch.Tensor]:
    """Of the patches, of the CPU and, where there is one, of the GPU; each a uint8 tensor."""
    states = [patches.get_state(), torch.get_rng_state()]
    return states + ([torch.cuda.get_rng_state(place.device)] if place.device.type == "cuda" else [])


def _plain(settings: Settings) -> dict[str, Any]:
    """The settings as what weights_only=True can read."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()}
