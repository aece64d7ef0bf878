"""What the state dict of `LoMixLoss` says of the criterion it came from, and what may be loaded into which."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .constants import Configured
from .distributed import is_sharded
from .mixing import AWF_SHARING
from .options import CONCAT
from .plan import MixPlan
from .pruning import check_pruning
from .weighting import WEIGHTING

# 1: the parameters alone. 2: with a description under KEY.
FORMAT = 2
_FIRST_DESCRIBED = 2
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


class CheckpointError(RuntimeError, ValueError):
    """A state dict is damaged, or belongs to another criterion or a later version; nothing of it has been loaded.

    A RuntimeError, as whatever `load_state_dict` raises, and a ValueError, for the functions that convert.
    """


def check_keys(state_dict: Any) -> None:
    """Raise CheckpointError unless it is a mapping whose keys are strings."""
    if not isinstance(state_dict, Mapping):
        raise CheckpointError(f"state_dict: got {type(state_dict).__name__}, expected a mapping of names to tensors")
    for key in state_dict:
        if not isinstance(key, str):
            raise CheckpointError(
                f"state_dict: got the key {key!r} of type {type(key).__name__}, expected names; pass the state_dict() "
                "of a module, not that of an optimizer or a list of its values"
            )


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
        CheckpointError: the description cannot be read, contradicts itself, or comes from a later version.
    """
    check_keys(state_dict)
    entry = prefix + KEY
    if entry not in state_dict:
        return {"format": 1}
    try:
        found = _decoded(state_dict[entry])
        version = found.get("format")
        if type(version) is not int or version < _FIRST_DESCRIBED:
            raise ValueError(f"got format {version!r}, expected an int of at least {_FIRST_DESCRIBED}")
        if version <= FORMAT:
            _check_description(found)
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:  # RecursionError is a RuntimeError
        raise CheckpointError(
            f"state_dict: got an entry {entry!r} that describes no LoMixLoss ({error}); leave that key out to "
            "load the parameters by their shapes alone"
        ) from error
    if version > FORMAT:
        raise CheckpointError(
            f"state_dict: got format {version}, expected at most {FORMAT}: it was written by a later lomix_fast; "
            "update the package"
        )
    return found


def _decoded(stored: Any) -> dict[str, Any]:
    """The text of an entry, which a cast of the whole state dict may have turned into floats."""
    if not isinstance(stored, Tensor) or stored.dim() != 1:
        shape = list(stored.shape) if isinstance(stored, Tensor) else type(stored).__name__
        raise TypeError(f"got {shape}, expected a tensor [bytes] of uint8")
    numbers = stored.tolist()
    text = [int(number) for number in numbers]
    if text != numbers:
        raise ValueError("got numbers that are no bytes")
    found = json.loads(bytes(text))
    if not isinstance(found, dict):
        raise TypeError(f"got a JSON {type(found).__name__}, expected an object")
    return found


def _check_description(found: dict[str, Any]) -> None:
    """Raise TypeError, ValueError or RuntimeError for whatever no `LoMixLoss` would have written."""
    lacking = [name for name in (*_MEANING, "pruning", "generator") if name not in found]
    if lacking:
        raise ValueError(f"it lacks {', '.join(lacking)}")
    classes = found["num_classes"]
    if type(classes) is not int or classes < 1:
        raise ValueError(f"num_classes: got {classes!r}, expected an int of at least 1")
    plan = plan_of(found)
    known: dict[str, tuple[Any, ...]] = {name: (value,) for name, value in maps_of(classes, plan).items()}
    known["weighting"] = WEIGHTING
    known["concat"] = CONCAT if plan.uses_cat else (None,)
    known["awf_sharing"] = AWF_SHARING if plan.uses_awf else (None,)
    for name, values in known.items():
        if found[name] not in values:
            raise ValueError(f"{name}: got {found[name]!r}, expected {' or '.join(map(repr, values))}")
    if found["pruning"] is not None:
        _check_choice_of_maps(found["pruning"], found["weighting"], plan.num_maps)
    generator = found["generator"]
    if (generator is None) == (found["concat"] == "resampled"):
        raise ValueError(f"generator: got {generator!r} with concat={found['concat']!r}")
    if generator is not None:
        torch.Generator().set_state(_generator_state(generator))  # RuntimeError where it is none


def _check_choice_of_maps(pruning: Any, weighting: str, num_maps: int) -> None:
    """The same for the part of a description that says which maps are active."""
    names = {"below", "every", "active", "calls_left"}
    if not isinstance(pruning, dict) or set(pruning) != names:
        raise ValueError(f"pruning: got {pruning!r}, expected {', '.join(sorted(names))}")
    active, calls_left = pruning["active"], pruning["calls_left"]
    check_pruning(pruning["below"], pruning["every"], weighting, "lomix")
    if pruning["below"] == 0:
        raise ValueError("pruning: got a choice of maps with below=0, which makes none")
    if not isinstance(active, str) or len(active) != num_maps or "1" not in active or set(active) - {"0", "1"}:
        raise ValueError(f"pruning: got active={active!r}, expected {num_maps} digits 0 or 1, not all 0")
    most = pruning["every"] or 0
    is_count = isinstance(calls_left, str) and calls_left.isascii() and calls_left.isdigit()
    if not is_count or int(calls_left) > most:
        raise ValueError(f"pruning: got calls_left={calls_left!r}, expected digits of a number from 0 to {most}")


def _generator_state(text: str) -> Tensor:
    """State of a torch.Generator, uint8 on the CPU, from its base64."""
    return torch.tensor(list(base64.b64decode(text, validate=True)), dtype=torch.uint8, device="cpu")


def plan_of(found: Mapping[str, Any]) -> MixPlan:
    """The maps of a description, under softmax and squared Dice, which parameters do not depend on."""
    return MixPlan.create(
        found["num_scales"], tuple(found["operators"]), tuple(found["originals"]), subsets=found["subsets"] or None
    )


def maps_of(num_classes: int, plan: MixPlan) -> dict[str, Any]:
    """The part of a description that says which maps there are, of how many classes."""
    return {
        "num_classes": num_classes,
        "num_scales": plan.num_scales,
        "originals": list(plan.originals),
        "operators": list(plan.operators),
        "subsets": [list(subset) for subset in plan.subsets] if plan.operators else [],
    }


def fault_of(value: Any, shape: Sequence[int], meta: bool = False, sharded: bool = False) -> str | None:
    """What keeps an entry of a state dict from being a parameter, as "got (expected)"; None if nothing does.

    Args:
        value: the entry.
        shape: of the parameter.
        meta: whether a tensor without numbers will do.
        sharded: whether it has to be a DTensor, or must be none.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return f"{getattr(value, 'dtype', type(value).__name__)} (expected a float tensor {list(shape)})"
    if list(value.shape) != list(shape):
        return f"{list(value.shape)} (expected {list(shape)})"
    if value.layout != torch.strided:
        return f"layout {value.layout} (expected a dense tensor)"
    if value.is_meta and not meta:
        return "a meta tensor (expected one with numbers)"
    if is_sharded(value) != sharded:
        kinds = ("a whole tensor", "a DTensor")
        return f"{kinds[not sharded]} (expected {kinds[sharded]}; see torch.distributed.checkpoint.state_dict)"
    return None


def faulty_entries(
    module: nn.Module, state_dict: Mapping[str, Any], prefix: str, strict: bool, assign: bool
) -> list[str]:
    """What is wrong with the entries that a module would load, but for descriptions, each with its name.

    Args:
        module: whose `state_dict()` says what is expected; nothing is loaded into it.
        state_dict: with its entries under `prefix`.
        prefix: of the keys.
        strict: whether all must be there and no other; otherwise those that are there are looked at.
        assign: whether they replace its tensors, as `load_state_dict(assign=True)` has it.
    """
    own = {name: value for name, value in module.state_dict().items() if name != KEY}
    given = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    faults = []
    for name, value in own.items():
        if name in given:
            sharded = is_sharded(given[name] if assign else value)
            fault = fault_of(given[name], value.shape, assign or value.is_meta, sharded)
            faults += [] if fault is None else [f"{name} {fault}"]
    if strict:
        faults += [f"no {name} (expected {list(own[name].shape)})" for name in own if name not in given]
        faults += [f"the unknown {name}" for name in given if name not in own and name != KEY]
    return faults


def refuse_wrapped(state_dict: Mapping[str, Any]) -> None:
    """Raise CheckpointError if all keys begin as those of a wrapper's state dict do."""
    for wrapper in ("module.", "_orig_mod."):
        if state_dict and all(isinstance(key, str) and key.startswith(wrapper) for key in state_dict):
            raise CheckpointError(
                f"state_dict: got keys that all begin with {wrapper!r}, as those of DistributedDataParallel or "
                "torch.compile do, expected those of the module inside; call torch.nn.modules.utils."
                f"consume_prefix_in_state_dict_if_present(state_dict, {wrapper!r}) first, or save module.state_dict() "
                "of the one inside"
            )


class CheckedWhole(nn.Module):
    """A module that checks a state dict as a whole before any of it is loaded."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch.nn.Module has it, but what does not fit as a whole is refused before any of it is loaded.

        Raises:
            CheckpointError: an entry of the loss that is damaged, of the wrong type or shape, or of another criterion;
                with `strict` also one that is missing or unknown.
        """
        if strict and isinstance(state_dict, Mapping):
            refuse_wrapped(state_dict)
        self._check_checkpoint(state_dict, "", strict, assign)
        return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        """The same where this module is part of another."""
        # Whether all must be there is known to `load_state_dict` alone: here torch says strict=True in any case.
        self._check_checkpoint(state_dict, prefix, False, local_metadata.get("assign_to_params_buffers", False))
        self._before_loading(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def _check_checkpoint(self, state_dict: Mapping[str, Any], prefix: str, strict: bool, assign: bool) -> None:
        """Raise CheckpointError for what does not fit."""
        raise NotImplementedError

    def _before_loading(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """What has to happen between the check and the loading."""


class Checkpointed(Configured, CheckedWhole):
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

    def _watch_steps(self) -> None:
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
        """Take over the active maps and the generator of a description.

        Raises:
            CheckpointError: it is damaged or that of another criterion; nothing has changed.
        """
        found = self._fitting_description({KEY: state}, "")
        self._resume_pruning(found["pruning"])
        if self._generator is not None:
            self._generator.set_state(_generator_state(found["generator"]))

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
        """As every module does; format 1 has no description and misses none."""
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if prefix + KEY in missing_keys:
            missing_keys.remove(prefix + KEY)
        self._watch_steps()  # with assign=True the parameters are others
        self._place_constants()

    def _before_loading(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        if any(prefix + name in state_dict for name in (KEY, *PARAMETERS)):  # not for what is of the network alone
            self._restart_pruning()
            self._is_same = False  # as the other ranks may not have loaded it

    def _check_checkpoint(self, state_dict: Mapping[str, Any], prefix: str, strict: bool, assign: bool) -> None:
        """Refuse what is damaged or belongs to another criterion.

        Raises:
            CheckpointError: says which entries or settings are wrong, and how to convert.
        """
        found = self._fitting_description(state_dict, prefix)
        wrong = ", ".join(faulty_entries(self, state_dict, prefix, strict, assign))
        if wrong and found["format"] == 1:
            raise CheckpointError(
                f"state_dict: got {wrong} in a checkpoint without a description (format 1), which is damaged or of "
                f"another criterion than this one with {self.num_classes} classes, {self.plan.num_scales} scales "
                f"and {self.plan.num_maps} maps. Build the criterion as the checkpoint's was, or take over what both "
                f"have in common: lomix_fast.transfer(state_dict, criterion{_prefixed(prefix)}, source=LoMixLoss(...)) "
                "with a source built like the checkpoint's"
            )
        if wrong:
            raise CheckpointError(
                f"state_dict: got {wrong} in a checkpoint that says it is of a criterion like this one, so it is "
                "damaged; to load the entries that are whole, take the others out and pass strict=False"
            )

    def _fitting_description(self, state_dict: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        """The description of a state dict, if it is that of this criterion.

        Raises:
            CheckpointError: says which of the settings differ, and how to convert.
        """
        found, own = describe(state_dict, prefix), self._meaning()
        if any(key.startswith(prefix + "original_weights.") for key in state_dict):
            raise CheckpointError(
                "state_dict: got that of the authors' loss module; turn it into one of LoMixLoss with "
                "lomix_fast.convert.official_to_lomix(state_dict, num_classes=..., num_scales=...)"
            )
        different = [name for name, value in own.items() if found["format"] > 1 and found[name] != value]
        if "num_scales" in different:  # the maps that follow from it are no news
            different = [name for name in different if name not in ("originals", "subsets")]
        if different:
            theirs = ", ".join(f"{name}={found[name]!r}" for name in different)
            ours = ", ".join(f"{name}={own[name]!r}" for name in different)
            raise CheckpointError(
                f"state_dict: got the checkpoint of a LoMixLoss with {theirs}, expected {ours} as this criterion has, "
                "because its parameters stand for other maps. Build the criterion as the checkpoint says "
                "(lomix_fast.checkpoint.describe), or take over what both have in common: "
                f"criterion.load_state_dict(lomix_fast.transfer(state_dict, criterion{_prefixed(prefix)}))"
            )
        return found


def _prefixed(prefix: str) -> str:
    """The argument of `transfer` for keys with a prefix."""
    return f", prefix={prefix!r}" if prefix else ""
