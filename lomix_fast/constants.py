"""Numbers that follow from a module's configuration: on the device of each call, and neither buffers nor parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._dynamo import mark_static


class Constant:
    """Numbers of a configuration, as a tensor on whichever device asks for them.

    No buffer: one that checkpoints leave out is garbage after a module has been made on the meta device, and one of
    floats is rounded by `module.half()`. Every device keeps its tensor, so replicas on several share one of these, and
    a captured CUDA graph may read it for as long as the module lives.

    Args:
        values: a number or a list of numbers.
        dtype: of the tensors.
    """

    def __init__(self, values: Any, dtype: torch.dtype) -> None:
        self.values, self.dtype = values, dtype
        self._held: dict[torch.device, Tensor] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Constant, (self.values, self.dtype)  # a copy may live where these devices are not

    def on(self, device: torch.device) -> Tensor:
        """The values on the device, a tensor that must not be written to."""
        held = self._held.get(device)
        if held is None:
            held = torch.tensor(self.values, dtype=self.dtype, device=device)
            # One of inference mode could not be saved for a backward pass later, and a fake one has no values.
            if type(held) is Tensor and not torch.is_inference_mode_enabled():
                # Else torch.compile(dynamic=True) takes its length for the size of a batch that is as long.
                if not torch.compiler.is_compiling():
                    mark_static(held)
                self._held[device] = held
        return held


class Configured(nn.Module):
    """A module whose options are fixed once it is made.

    Its attributes of type `Constant` are on the device of its parameters before the first call, so no call that is
    compiled or captured has to copy them there.
    """

    _fixed: ClassVar[frozenset[str]] = frozenset()  # names of options; assigning one would change part of what it means

    def __setattr__(self, name: str, value: Any) -> None:
        """As torch.nn.Module has it.

        Raises:
            AttributeError: an option, after construction.
        """
        if name in self._fixed and "_is_made" in self.__dict__:
            own = type(self).__name__
            raise AttributeError(
                f"{name}: got {value!r} for a {own} that is already made, whose options are fixed; make a new one with "
                f"{own}(..., {name}=...) and take the parameters over"
            )
        super().__setattr__(name, value)

    def _place_constants(self) -> None:
        """To be called when all parameters exist, and after they have been replaced."""
        device = torch.device("cpu")
        for parameter in self.parameters():
            device = parameter.device
            break
        if device.type != "meta":
            for value in vars(self).values():
                if isinstance(value, Constant):
                    value.on(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What `to`, `cuda`, `to_empty` and the casts go through."""
        module = super()._apply(fn, recurse)
        self._place_constants()
        return module

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies begin with tensors of their own."""
        super().__setstate__(state)
        self._place_constants()


def refuse_meta(name: str, parameters: list[tuple[str, Tensor]]) -> None:
    """Refuse to compute with parameters that have no values.

    Args:
        name: of the module, for the message.
        parameters: names and values.

    Raises:
        ValueError: some are on the meta device.
    """
    without = [key for key, parameter in parameters if parameter.is_meta]
    if without:
        raise ValueError(
            f"{name}: got parameters on the meta device, which have no values ({', '.join(without)}), expected them on "
            "the device of the logits; give them values with load_state_dict(state_dict, assign=True), or with "
            "to_empty(device=...) and then load_state_dict(state_dict)"
        )
