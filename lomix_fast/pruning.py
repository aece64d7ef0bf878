"""Which maps `LoMixLoss` leaves out because their weight has decayed: decided rarely, on the host, and reported."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .checks import has_numbers
from .constants import Constant
from .plan import MixPlan

_log = logging.getLogger("lomix_fast")


def check_pruning(prune_below: Any, prune_every: Any, weighting: str, supervision: str) -> None:
    """Check the two options of `LoMixLoss`.

    Args:
        prune_below: finite number of at least 0; 0 is off.
        prune_every: int of at least 1, or None.
        weighting, supervision: of the same criterion, `weighting` as the mode sets it.

    Raises:
        TypeError, ValueError: an option out of range, or a threshold for weights that never change.
    """
    if isinstance(prune_below, bool) or not isinstance(prune_below, (int, float)):
        raise TypeError(f"prune_below: got {prune_below!r}, expected a number; 0 leaves pruning off")
    if not math.isfinite(prune_below) or prune_below < 0:
        raise ValueError(
            f"prune_below: got {prune_below!r}, expected a finite number of at least 0; 0 leaves pruning off"
        )
    if prune_every is not None and type(prune_every) is not int:
        raise TypeError(f"prune_every: got {prune_every!r}, expected an int of at least 1, or None")
    if prune_every is not None and prune_every < 1:
        raise ValueError(
            f"prune_every: got {prune_every}, expected at least 1, or None to decide only in update_pruning()"
        )
    if prune_below > 0 and weighting == "fixed":
        cause = "weighting='fixed'" if supervision == "lomix" else f"supervision={supervision!r}"
        remedy = "weighting='softplus'" if supervision == "lomix" else "supervision='lomix'"
        raise ValueError(
            f"prune_below: got {prune_below!r} with {cause}, expected 0 because every weight is 1 and stays so; leave "
            f"it out, or pass {remedy}"
        )


def kept_maps(weights: Sequence[float], below: float) -> tuple[int, ...]:
    """Numbers of the maps whose weight is not under `below`, or of all maps if that would leave none.

    A NaN is under nothing, so its map stays and shows in the loss.
    """
    kept = tuple(m for m, weight in enumerate(weights) if not weight < below)
    return kept or tuple(range(len(weights)))


class PrunedMaps(nn.Module):
    """The part of `LoMixLoss` that knows which maps are active, and when to choose them again.

    The state dict holds which maps are active and for how many calls, so that a resumed run goes on as it was.
    """

    plan: MixPlan
    prune_below: float
    prune_every: int | None
    _counts_calls: bool  # stored, because torch.compile(dynamic=True) compiles twice over a float like prune_below
    _active: MixPlan
    _active_index: Constant | None  # numbers of the active maps, int64; None for all of them

    def _start_pruning(self, plan: MixPlan, prune_below: float, prune_every: int | None) -> None:
        """Start with all maps of `plan` active."""
        self.plan, self.prune_below, self.prune_every = plan, prune_below, prune_every
        self._counts_calls = prune_below > 0 and prune_every is not None
        self._restart_pruning()

    def _restart_pruning(self) -> None:
        self._active, self._active_index = self.plan, None
        self._calls_left = 0  # training calls that the last choice is still good for
        self._all_under = False

    def _pruning_state(self) -> dict[str, Any] | None:
        """What a checkpoint holds of the choice."""
        if self.prune_below == 0:
            return None
        kept = range(self.plan.num_maps) if self._active.kept is None else self._active.kept
        # Of the same length whatever the choice: torch.distributed.checkpoint loads into an entry of the same size.
        active = "".join("1" if m in kept else "0" for m in range(self.plan.num_maps))
        options = {"below": self.prune_below, "every": self.prune_every}
        return options | {"active": active, "calls_left": f"{self._calls_left:012d}"}

    def _resume_pruning(self, state: dict[str, Any] | None) -> None:
        """Go on with the choice of a checkpoint, if it was made by the same options; if not, the next call chooses."""
        if state is None or (state["below"], state["every"]) != (self.prune_below, self.prune_every):
            return
        self._calls_left = int(state["calls_left"])
        kept = tuple(m for m, flag in enumerate(state["active"]) if flag == "1")
        if len(kept) == self.plan.num_maps:
            self._active, self._active_index = self.plan, None
        else:
            self._active, self._active_index = self.plan.select(kept), Constant(kept, torch.int64)

    def _weights(self) -> Tensor:
        raise NotImplementedError

    def _replicate_for_data_parallel(self) -> Any:
        """Refuse replicas that would have to count calls: what they count is lost with them, after one call."""
        if self._counts_calls and self.training and torch.is_grad_enabled():
            raise RuntimeError(
                f"prune_every: got {self.prune_every} in torch.nn.DataParallel, whose replicas forget the calls that "
                "they count, expected None: pass prune_every=None and call criterion.update_pruning() between steps, "
                "or use DistributedDataParallel"
            )
        return super()._replicate_for_data_parallel()

    @property
    def active_maps(self) -> tuple[str, ...]:
        """Names of the maps that enter the loss now, in order; all of them unless `prune_below` has dropped some."""
        return self._active.map_names

    @property
    def dropped_maps(self) -> tuple[str, ...]:
        """Names of the maps that `prune_below` has left out, in order."""
        return tuple(name for name in self.plan.map_names if name not in self.active_maps)

    def update_pruning(self) -> tuple[str, ...]:
        """Choose the active maps now, by their current weights. Nothing happens while `prune_below` is 0.

        Nor where there are no weights to read, on the meta device and inside a FakeTensorMode.

        From then on a call computes the active maps alone: the loss is the sum over them, and what belongs to the
        others only (their alpha, their rows of the mixes, a scale that no active map reads) gets a gradient of
        exactly zero, not none, so that DistributedDataParallel finds nothing unused.

        When: here, and in the first and then every `prune_every`-th call with a list of logits in training mode with
        gradients enabled. Other calls (evaluation, no_grad) use the last choice, all maps before the first, and do
        not count. A choice reads the M weights on the host, the only time that it waits for a GPU; it must not happen
        inside the capture of a CUDA graph, so call this before and pass prune_every=None.

        Reported: `dropped_maps`, `active_maps`, print(criterion), and for each change a line of level INFO by the
        logger "lomix_fast", with names and weights. If all weights are under the threshold nothing is dropped, and a
        WARNING says so: the loss stays what it is, only slow. What a threshold means depends on the weighting.
        "softplus": weights only fall, and an optimizer such as AdamW takes them down nearly together, so choose a
        threshold far under the weights that matter. "normalized": 1 is an equal share; a dropped map keeps its share
        of the total M, so no weight jumps. "uncertainty": a weight rests at 1 / loss, so a threshold of 1e-3 drops
        maps whose loss has stayed over 1000; minus the logarithm of their weights leaves the loss with them.

        A dropped weight moves by momentum and weight decay alone. If it rises to the threshold, the next choice takes
        its map back. Equal weights give the same choice, so the ranks of a distributed job agree, as long as all of
        them call this where one does, and load a checkpoint where one does (or call `sync_parameters` afterwards).

        The state dict holds the choice and the calls it is still good for, so a resumed run goes on bit for bit. Loaded
        into a criterion with other options, or from a checkpoint of format 1, the next training call chooses.

        Under torch.compile the count of calls breaks the graph; for fullgraph=True, which refuses that, pass
        prune_every=None and call this outside of the compiled code. Each new set of maps compiles once more, up to
        torch._dynamo.config.recompile_limit.

        Returns:
            `dropped_maps`.
        """
        if self.prune_below > 0 and has_numbers(weights := self._weights()):
            self._choose_maps(weights)
        return self.dropped_maps

    @torch.compiler.disable(
        reason="prune_every counts calls in Python, which breaks the graph. For fullgraph=True pass prune_every=None "
        "and call criterion.update_pruning() outside of the compiled code every so many steps"
    )
    def _count_training_call(self, weights: Tensor) -> None:
        """Count one call and choose if it is time; weights [M]."""
        if not has_numbers(weights):
            return
        if self._calls_left == 0:
            self._choose_maps(weights)
        self._calls_left -= 1

    def _choose_maps(self, weights: Tensor) -> None:
        """Choose by the weights [M]: the one place that waits for their device."""
        values: list[float] = weights.detach().tolist()
        all_under = all(value < self.prune_below for value in values)
        if all_under and not self._all_under:
            _log.warning(
                "pruning: all %d weights are under prune_below=%g (the largest is %.3g), so no map is dropped; lower "
                "prune_below",
                len(values),
                self.prune_below,
                max(values),
            )
        self._all_under = all_under
        kept = kept_maps(values, self.prune_below)
        active = self.plan.select(kept)
        if active != self._active:
            self._report(active, values)
            self._active, self._active_index = active, None if active == self.plan else Constant(kept, torch.int64)
            self._active_on(weights.device)  # so that no captured or compiled step has to copy it there
        self._calls_left = self.prune_every or 0

    def _active_on(self, device: torch.device) -> Tensor | None:
        """Numbers of the active maps, int64 on the device; None for all maps."""
        return None if self._active_index is None else self._active_index.on(device)

    def _report(self, active: MixPlan, weights: list[float]) -> None:
        before, after = set(self.active_maps), set(active.map_names)
        weight_of = dict(zip(self.plan.map_names, weights, strict=True))

        def listed(names: set[str]) -> str:
            return ", ".join(f"{name} ({w:.3g})" for name, w in weight_of.items() if name in names) or "none"

        _log.info(
            "pruning: %d of %d maps active at prune_below=%g; dropped: %s; restored: %s",
            len(after),
            len(weights),
            self.prune_below,
            listed(before - after),
            listed(after - before),
        )


def no_gradient_from(tensors: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """A scalar 0 that gives each tensor a gradient of exactly zero instead of none.

    It is a sum over no element, so not even a NaN gets through.
    """
    zero = like.new_zeros(())
    for tensor in tensors:
        if tensor is not None:
            zero = zero + tensor[:0].sum().to(like.dtype)
    return zero
