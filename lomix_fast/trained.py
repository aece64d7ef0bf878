"""Whether the parameters of `LoMixLoss` train: parameter groups, and warnings where an optimizer leaves them alone."""

from __future__ import annotations

import gc
import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .caller import stacklevel_outside
from .checks import has_numbers
from .distributed import is_sharded


class UntrainedLossWarning(UserWarning):
    """Parameters of a loss do not train: optimizers step, none holds them, and they stay as they are."""


class DecayedLossWarning(UserWarning):
    """Parameters of a loss are in an optimizer's group with weight decay, which draws them to values of its own."""


class _Watched:
    """What is known of the optimizers of a criterion. They belong to its own parameters, so copies of it begin anew.

    Held weakly: one that is gone trains nothing, and its state must not stay in memory because of the loss.
    """

    def __init__(self) -> None:
        self.optimizers: list[Callable[[], Any]] = []
        self.may_decay = False  # the user has asked for it, or has been warned
        # An optimizer without parameters of ours that has made a step, and the values of those after it.
        self.other: tuple[Callable[[], Any], dict[str, Tensor]] | None = None

    def add(self, optimizer: Any) -> None:
        """Remember one that trains parameters."""
        if not any(one() is optimizer for one in self.optimizers):
            self.optimizers.append(_reference(optimizer))

    def __reduce__(self) -> tuple[Any, ...]:
        return _Watched, ()

    def parameters(self) -> set[int]:
        """Identities of all their parameters, as the groups are now."""
        alive = (found for one in self.optimizers if (found := one()) is not None)
        return {id(parameter) for optimizer in alive for parameter in _held_by(optimizer)}


class TrainedParameters(nn.Module):
    """The part of `LoMixLoss` that sees to it that its parameters train.

    torch.optim tells after each step which optimizer has made it. A criterion listens until it knows of all of its
    parameters; calls and backward passes have no part in it, compiled, captured or not.
    """

    _watched: _Watched

    def _start_watching(self) -> None:
        """To be called when all parameters exist."""
        self._watched = _Watched()
        self._watch_steps()

    def _watch_steps(self) -> None:
        """Also to be called when parameters have been replaced, which an optimizer does not notice."""
        _undecided.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies have parameters of their own."""
        super().__setstate__(state)
        self._watch_steps()

    def param_groups(self, lr: float | Tensor | None = None, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Parameter groups of this criterion for an optimizer, beside those of the network.

            optimizer = torch.optim.AdamW([{"params": network.parameters()}, *criterion.param_groups()], lr=1e-4)

        Args:
            lr: learning rate of the group, at least 0; None for the optimizer's own.
            weight_decay: 0 by default: decay draws the softplus weights towards 0.693 and not to 0, and the 1x1
                convolutions towards maps that are nothing.

        Returns:
            One group, or none at all if the criterion has no parameters.

        Raises:
            TypeError, ValueError: not a number, or one out of range.
        """
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number and not (name == "lr" and (value is None or isinstance(value, Tensor))):
                expected = "None, a number or a tensor" if name == "lr" else "a number"
                raise TypeError(f"{name}: got {value!r}, expected {expected}")
            if value is not None and not isinstance(value, Tensor) and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: got {value!r}, expected a finite number of at least 0")
        self._watched.may_decay = self._watched.may_decay or weight_decay != 0
        parameters = list(self.parameters())
        group: dict[str, Any] = {"params": parameters, "weight_decay": weight_decay}
        return [group | ({} if lr is None else {"lr": lr})] if parameters else []

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Show the criterion an optimizer that trains its parameters, or some of them.

        Only one that is no torch.optim.Optimizer has to be shown, as only those tell of their steps. After the second
        step of an optimizer the parameters that have a gradient, are in no optimizer and have not changed are named in
        an `UntrainedLossWarning`, once. Those that are in a group with weight decay are named in a
        `DecayedLossWarning`, once, unless `param_groups` was asked for decay. One that is not meant to train is left
        alone after `requires_grad_(False)`.

        Args:
            optimizer: a torch.optim.Optimizer, or whatever else has its `param_groups`.

        Raises:
            TypeError: it has none.
        """
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(f"optimizer: got {type(optimizer).__name__}, expected a torch.optim.Optimizer")
        self._watched.add(optimizer)
        self._warn_of_decay(optimizer)

    def untrained_parameters(self) -> list[str]:
        """Names of the parameters that ask for a gradient and are in no optimizer shown to `watch` or seen to step."""
        seen = self._watched.parameters()
        return [name for name, p in self.named_parameters() if p.requires_grad and id(p) not in seen]

    def _warn_of_decay(self, optimizer: Any) -> None:
        decayed = {id(p) for group in optimizer.param_groups if group.get("weight_decay") for p in group["params"]}
        names = [name for name, p in self.named_parameters() if p.requires_grad and id(p) in decayed]
        if names and not self._watched.may_decay:
            self._watched.may_decay = True
            warnings.warn(
                f"LoMixLoss: its parameters {', '.join(names)} are in a group of {type(optimizer).__name__} with "
                "weight decay, which draws map weights towards 0.693 (softplus of 0) whatever a map is worth; give the "
                "optimizer criterion.param_groups() beside the network's parameters, which has none",
                DecayedLossWarning,
                stacklevel=stacklevel_outside(),
            )

    def _learn_from(self, optimizer: torch.optim.Optimizer) -> bool:
        """Take note of an optimizer that has made a step.

        Returns:
            Whether all there is to know is known.
        """
        watched, own = self._watched, {id(p) for p in self.parameters()}
        if any(id(p) in own for p in _held_by(optimizer)):
            watched.add(optimizer)
            self._warn_of_decay(optimizer)
        names = self.untrained_parameters()
        waiting = {n: p for n, p in self.named_parameters() if n in names and p.grad is not None and has_numbers(p)}
        if not waiting or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return not names
        if watched.other is None or watched.other[0]() is None:
            watched.other = _reference(optimizer), {name: _own_part(p).clone() for name, p in waiting.items()}
        elif watched.other[0]() is optimizer:
            before = watched.other[1]
            optimizers = [one for one in gc.get_objects() if issubclass(type(one), torch.optim.Optimizer)]
            held = {id(p) for one in optimizers for p in _held_by(one)}
            # Compared by their values: some trainers write to parameters in ways that leave no other trace.
            idle = [n for n, p in waiting.items() if id(p) not in held and n in before and _is_same(before[n], p)]
            if idle:
                warnings.warn(
                    f"LoMixLoss: its parameters {', '.join(idle)} do not train: no optimizer holds them, and they have "
                    f"not changed in a step of {type(optimizer).__name__}. Give criterion.param_groups() to the "
                    "optimizer beside the network's parameters; or call criterion.requires_grad_(False) if they are to "
                    "stay as they are",
                    UntrainedLossWarning,
                    stacklevel=stacklevel_outside(),
                )
            watched.other = None
            return True
        return False


_undecided: weakref.WeakSet[TrainedParameters] = weakref.WeakSet()


def _reference(optimizer: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(optimizer)
    except TypeError:  # some classes cannot be referred to weakly
        return lambda: optimizer


def _held_by(optimizer: Any) -> list[Tensor]:
    return [parameter for group in getattr(optimizer, "param_groups", ()) for parameter in group["params"]]


def _own_part(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter, detached."""
    local: Tensor = parameter.to_local() if is_sharded(parameter) else parameter  # type: ignore[attr-defined]
    return local.detach()


def _is_same(before: Tensor, parameter: Tensor) -> bool:
    now = _own_part(parameter)
    return before.shape == now.shape and before.device == now.device and torch.equal(before, now)


@torch.compiler.disable
def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for criterion in list(_undecided):
        if criterion._learn_from(optimizer):
            _undecided.discard(criterion)


register_optimizer_step_post_hook(_after_step)
