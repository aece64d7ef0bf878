"""What the state dict of `LoMixLoss` says of the criterion it came from, and what may be loaded into which."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .plan import MixPlan

# 1: the parameters alone. 2: with a description under KEY.
FORMAT = 2
KEY = "_extra_state"
_MEANING = (
    "num_classes",
    "num_scales",
    "originals",
    "operators",
    "subsets",
    "weighting",
    "concat",
    "awf_sharing",
)
PARAMETERS = ("alpha", "cat_weight", "cat_bias", "awf_weight", "awf_bias")


class CheckpointError(RuntimeError):
    """A state dict belongs to another criterion, or to a later version; nothing has been loaded into the criterion."""


def describe(state_dict: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What a state dict of `LoMixLoss` says of the criterion that it came from.

    Args:
        state_dict: of a `LoMixLoss`, or of a module that holds one.
        prefix: of its keys, such as "criterion." for `lomix_fast.with_loss`.

    Returns:
        "format", and from format 2 on what the parameters belong to: "num_classes", "num_scales", "originals",
        "operators", "subsets", "weighting", "concat" (None without "cat"), "awf_sharing" (None without "awf"); besides
        "pruning" (which maps were active) and "generator" (of concat="resampled"), each None where there is none.

    Raises:
        CheckpointError: the description cannot be read, or comes from a later version.
    """
    stored = state_dict.get(prefix + KEY)
    if stored is None:
        return {"format": 1}
    try:
        found = json.loads(bytes(stored.to("cpu", torch.uint8).tolist()))
        version = found["format"]
        if version <= FORMAT and (lacking := [name for name in _MEANING if name not in found]):
            raise ValueError(f"it lacks {', '.join(lacking)}")
    except (AttributeError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"state_dict: got an entry {prefix + KEY!r} that describes no LoMixLoss ({error}); leave that key out to "
            "load the parameters by their shapes alone"
        ) from error
    if version > FORMAT:
        raise CheckpointError(
            f"state_dict: got format {version}, expected at most {FORMAT}: it was written by a later lomix_fast; "
            "update the package"
        )
    return dict(found)


def maps_of(num_classes: int, plan: MixPlan) -> dict[str, Any]:
    """The part of a description that says which maps there are, of how many classes."""
    return {
        "num_classes": num_classes,
        "num_scales": plan.num_scales,
        "originals": list(plan.originals),
        "operators": list(plan.operators),
        "subsets": [list(subset) for subset in plan.subsets] if plan.operators else [],
    }


class Checkpointed(nn.Module):
    """The part of `LoMixLoss` that reads and writes state dicts.

    Beside the parameters they hold one entry, a uint8 tensor with a text in it (JSON), so that whatever stores
    tensors can store it: torch.save with weights_only=True, safetensors, torch.distributed.checkpoint.
    """

    _version = FORMAT
    num_classes: int
    plan: MixPlan
    weighting: str
    concat: str
    awf_sharing: str
    _generator: torch.Generator | None
    _is_same: bool

    def _hook_parameters(self) -> None:
        raise NotImplementedError

    def _restart_pruning(self) -> None:
        raise NotImplementedError

    def _pruning_state(self) -> dict[str, Any] | None:
        raise NotImplementedError

    def _resume_pruning(self, state: dict[str, Any] | None) -> None:
        raise NotImplementedError

    def _meaning(self) -> dict[str, Any]:
        """What the parameters belong to."""
        plan = self.plan
        return {
            **maps_of(self.num_classes, plan),
            "weighting": self.weighting,
            "concat": self.concat if plan.uses_cat else None,
            "awf_sharing": self.awf_sharing if plan.uses_awf else None,
        }

    def get_extra_state(self) -> Tensor:
        """Description of this criterion and what else it takes to go on bit for bit, [bytes] uint8 on the CPU."""
        generator = None
        if self._generator is not None:
            generator = base64.b64encode(bytes(self._generator.get_state().tolist())).decode()
        rest = {"pruning": self._pruning_state(), "generator": generator}
        text = json.dumps({"format": FORMAT, **self._meaning(), **rest})
        return torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Take over the active maps and the generator; that the description fits has been checked."""
        found = describe({KEY: state})
        self._resume_pruning(found.get("pruning"))
        if self._generator is not None and found.get("generator"):
            held = base64.b64decode(found["generator"])
            self._generator.set_state(torch.tensor(list(held), dtype=torch.uint8, device="cpu"))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Check first, then load as every module does; format 1 has no description and misses none."""
        self._check_checkpoint(state_dict, prefix)
        if any(prefix + name in state_dict for name in (KEY, *PARAMETERS)):  # not for what is of the network alone
            self._restart_pruning()
            self._is_same = False  # as the other ranks may not have loaded it
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if prefix + KEY in missing_keys:
            missing_keys.remove(prefix + KEY)
        self._hook_parameters()  # with assign=True they are others

    def _check_checkpoint(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Refuse what belongs to another criterion.

        Raises:
            CheckpointError: says which of the settings differ, and how to convert.
        """
        if any(key.startswith(prefix + "original_weights.") for key in state_dict):
            raise CheckpointError(
                "state_dict: got that of the authors' loss module; turn it into one of LoMixLoss with "
                "lomix_fast.convert.official_to_lomix(state_dict, num_classes=..., num_scales=...)"
            )
        found, own = describe(state_dict, prefix), self._meaning()
        if found["format"] == 1:
            self._check_shapes(state_dict, prefix)
            return
        different = [name for name, value in own.items() if found.get(name) != value]
        if "num_scales" in different:  # the maps that follow from it are no news
            different = [name for name in different if name not in ("originals", "subsets")]
        if different:
            theirs = ", ".join(f"{name}={found.get(name)!r}" for name in different)
            ours = ", ".join(f"{name}={own[name]!r}" for name in different)
            raise CheckpointError(
                f"state_dict: got the checkpoint of a LoMixLoss with {theirs}, expected {ours} as this criterion has, "
                "because its parameters stand for other maps. Build the criterion as the checkpoint says "
                "(lomix_fast.checkpoint.describe), or take over what both have in common: "
                f"criterion.load_state_dict(lomix_fast.transfer(state_dict, criterion{_prefixed(prefix)}))"
            )

    def _check_shapes(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """The same for format 1, by shapes, which is all it has."""
        own = dict(self.named_parameters())
        wrong = []
        for name in PARAMETERS:
            theirs = state_dict.get(prefix + name)
            if theirs is not None and name in own and tuple(theirs.shape) != tuple(own[name].shape):
                wrong.append(f"{name} {list(theirs.shape)} (expected {list(own[name].shape)})")
        if wrong:
            raise CheckpointError(
                f"state_dict: got {', '.join(wrong)} in a checkpoint without a description (format 1), which belongs "
                f"to another criterion than this one with {self.num_classes} classes, {self.plan.num_scales} scales "
                f"and {self.plan.num_maps} maps. Build the criterion as the checkpoint's was, or take over what both "
                f"have in common: lomix_fast.transfer(state_dict, criterion{_prefixed(prefix)}, source=LoMixLoss(...)) "
                "with a source built like the checkpoint's"
            )


def _prefixed(prefix: str) -> str:
    """The argument of `transfer` for keys with a prefix."""
    return f", prefix={prefix!r}" if prefix else ""
