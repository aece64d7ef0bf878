"""Whether the parameters of `LoMixLoss` reach an optimizer: its parameter groups, and a warning where they do not."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class UntrainedLossWarning(UserWarning):
    """The parameters of a loss are in no optimizer that it has been shown, so they may never train."""


class _Watched:
    """Optimizers a criterion has been shown. They belong to its own parameters, so copies of it begin with none.

    Held weakly: one that is gone trains nothing, and its state must not stay in memory because of the loss.
    """

    def __init__(self) -> None:
        self.optimizers: list[Callable[[], Any]] = []
        self.handles: dict[int, Any] = {}  # of the hooks, by identity of the parameter
        self.is_checked = False  # whether the first backward pass has been

    def add(self, optimizer: Any) -> None:
        """Remember one that is to train parameters."""
        try:
            self.optimizers.append(weakref.ref(optimizer))
        except TypeError:  # some classes cannot be referred to weakly
            self.optimizers.append(lambda: optimizer)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Watched, ()

    def parameters(self) -> set[int]:
        """Identities of all their parameters, as the groups are now."""
        alive = (found for one in self.optimizers if (found := one()) is not None)
        groups = (group for optimizer in alive for group in optimizer.param_groups)
        return {id(parameter) for group in groups for parameter in group["params"]}


class TrainedParameters(nn.Module):
    """The part of `LoMixLoss` that sees to it that its parameters train."""

    _watched: _Watched

    def _start_watching(self) -> None:
        """To be called when all parameters exist."""
        self._watched = _Watched()
        self._hook_parameters()

    def _hook_parameters(self) -> None:
        """Have the first gradient of any parameter noticed; again after parameters have been replaced."""
        if self._watched.is_checked:
            return
        own = weakref.ref(self)
        for parameter in self.parameters():
            if parameter.requires_grad and id(parameter) not in self._watched.handles:
                # Of the parameter rather than of the loss: this costs the compiled and the captured step nothing.
                handle = parameter.register_post_accumulate_grad_hook(lambda _: _first_backward(own))
                self._watched.handles[id(parameter)] = handle

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies have parameters of their own, without hooks."""
        super().__setstate__(state)
        self._hook_parameters()

    def param_groups(self, lr: float | Tensor | None = None, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Parameter groups of this criterion for an optimizer, beside those of the network.

            optimizer = torch.optim.AdamW([{"params": network.parameters()}, *criterion.param_groups()], lr=1e-4)
            criterion.watch(optimizer)

        Args:
            lr: learning rate of the group, at least 0; None for the optimizer's own.
            weight_decay: 0 by default: decay draws the softplus weights towards 0.693 and not to 0, and the 1x1
                convolutions towards maps that are nothing.

        Returns:
            One group, or none at all if the criterion has no parameters.

        Raises:
            ValueError: a number out of range.
        """
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if value is not None and not isinstance(value, Tensor) and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: got {value!r}, expected a finite number of at least 0")
        parameters = list(self.parameters())
        group: dict[str, Any] = {"params": parameters, "weight_decay": weight_decay}
        return [group | ({} if lr is None else {"lr": lr})] if parameters else []

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Show the criterion an optimizer that trains its parameters, or some of them.

        At the first backward pass a parameter that is in none of the optimizers shown is named in an
        `UntrainedLossWarning`, once. What counts is what their groups hold at that moment. One that is not meant to
        train is left alone after `requires_grad_(False)`.

        Args:
            optimizer: a torch.optim.Optimizer, or whatever else has its `param_groups`.

        Raises:
            TypeError: it has none.
        """
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(f"optimizer: got {type(optimizer).__name__}, expected a torch.optim.Optimizer")
        self._watched.add(optimizer)

    def untrained_parameters(self) -> list[str]:
        """Names of the parameters that ask for a gradient and are in no optimizer shown to `watch`."""
        seen = self._watched.parameters()
        return [name for name, p in self.named_parameters() if p.requires_grad and id(p) not in seen]


def _first_backward(criterion: weakref.ref[Any]) -> None:
    """Warn where parameters are in no optimizer; called when the first gradient of the criterion has arrived."""
    own = criterion()
    if own is None or own._watched.is_checked:
        return
    own._watched.is_checked = True
    for handle in own._watched.handles.values():
        handle.remove()
    own._watched.handles.clear()
    missing = own.untrained_parameters()
    if missing:
        warnings.warn(
            f"LoMixLoss: its parameters {', '.join(missing)} are in no optimizer shown to criterion.watch(), so they "
            "may never train. Give criterion.param_groups() to the optimizer beside the network's parameters, then "
            "call criterion.watch(optimizer); or criterion.requires_grad_(False) if they are to stay as they are",
            UntrainedLossWarning,
            stacklevel=2,
        )
