"""Which maps `LoMixLoss` leaves out because their weight has decayed: decided rarely, on the host, and reported."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .checks import has_numbers
from .constants import Constant
from .mixing import is_recomputation
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


@dataclass(frozen=True)
class Choice:
    """Which maps are active, and for how long.

    Attributes:
        active: the plan of those maps.
        index: their numbers, int64; None for all of them.
        calls_left: training calls that the choice is still good for.
        weights: of all maps when the choice was made, [M]; () if none was.
    """

    active: MixPlan
    index: Constant | None = None
    calls_left: int = 0
    weights: tuple[float, ...] = ()

    def index_on(self, device: torch.device) -> Tensor | None:
        """Numbers of the active maps, int64 on the device; None for all maps."""
        return None if self.index is None else self.index.on(device)


class PrunedMaps(nn.Module):
    """The part of `LoMixLoss` that knows which maps are active, and when to choose them again.

    The state dict holds which maps are active and for how many calls, so that a resumed run goes on as it was.
    """

    plan: MixPlan
    prune_below: float
    prune_every: int | None
    _counts_calls: bool  # stored, because torch.compile(dynamic=True) compiles twice over a float like prune_below
    _choice: Choice
    _all_under: bool  # said once, and again after a choice where it was not so

    def _start_pruning(self, plan: MixPlan, prune_below: float, prune_every: int | None) -> None:
        """Start with all maps of `plan` active."""
        self.plan, self.prune_below, self.prune_every = plan, prune_below, prune_every
        self._counts_calls = prune_below > 0 and prune_every is not None
        self._restart_pruning()

    def _restart_pruning(self) -> None:
        self._choice, self._all_under = Choice(self.plan), False

    def _pruning_state(self) -> dict[str, Any] | None:
        """What a checkpoint holds of the choice."""
        if self.prune_below == 0:
            return None
        choice = self._choice
        kept = range(self.plan.num_maps) if choice.active.kept is None else choice.active.kept
        # Of the same length whatever the choice: torch.distributed.checkpoint loads into an entry of the same size.
        active = "".join("1" if m in kept else "0" for m in range(self.plan.num_maps))
        options = {"below": self.prune_below, "every": self.prune_every}
        return options | {"active": active, "calls_left": f"{choice.calls_left:012d}"}

    def _resume_pruning(self, state: dict[str, Any] | None) -> None:
        """Go on with the choice of a checkpoint, if it was made by the same options; if not, the next call chooses."""
        if state is None or (state["below"], state["every"]) != (self.prune_below, self.prune_every):
            return
        kept = tuple(m for m, flag in enumerate(state["active"]) if flag == "1")
        self._choice = self._choice_of(kept, int(state["calls_left"]))

    def _choice_of(self, kept: tuple[int, ...], calls_left: int, weights: tuple[float, ...] = ()) -> Choice:
        active = self.plan.select(kept)
        index = None if active == self.plan else Constant(kept, torch.int64)
        return Choice(active, index, calls_left, weights)

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
        return self._choice.active.map_names

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
        not count, nor does what torch.utils.checkpoint computes again (with use_reentrant=True it computes first
        without gradients, so call this yourself where the loss is inside). A choice reads the M weights on the host,
        the only time that it waits for a GPU; it must not happen inside the capture of a CUDA graph, so call this
        before and pass prune_every=None.

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
            self._take(self._chosen_by(weights))
        return self.dropped_maps

    @torch.compiler.disable(
        reason="prune_every counts calls in Python, which breaks the graph. For fullgraph=True pass prune_every=None "
        "and call criterion.update_pruning() outside of the compiled code every so many steps"
    )
    @torch.compiler.disable(
        reason="prune_every counts calls in Python, which breaks the graph. For fullgraph=True pass prune_every=None "
        "and call criterion.update_pruning() outside of the compiled code every so many steps"
    )
    def _next_choice(self, weights: Tensor) -> Choice:
        """The choice for one more call in training, and a call less for it; weights [M]. Nothing is taken over yet."""
        if not has_numbers(weights) or is_recomputation():
            return self._choice
        choice = self._choice if self._choice.calls_left > 0 else self._chosen_by(weights)
        return replace(choice, calls_left=choice.calls_left - 1)

    def _chosen_by(self, weights: Tensor) -> Choice:
        """Choose by the weights [M]: the one place that waits for their device."""
        values = tuple(weights.detach().tolist())
        choice = self._choice_of(kept_maps(values, self.prune_below), self.prune_every or 0, values)
        if choice.active == self._choice.active:
            return replace(choice, index=self._choice.index)
        choice.index_on(weights.device)  # so that no captured or compiled step has to copy it there
        return choice

    @torch.compiler.disable(reason="it logs, and takes over what prune_every counts in Python")
    def _take(self, choice: Choice) -> None:
        """Take a choice over and report what is new."""
        before, self._choice = self._choice, choice
        if choice.weights == before.weights:
            return
        all_under = all(value < self.prune_below for value in choice.weights)
        if all_under and not self._all_under:
            _log.warning(
                "pruning: all %d weights are under prune_below=%g (the largest is %.3g), so no map is dropped; lower "
                "prune_below",
                len(choice.weights),
                self.prune_below,
                max(choice.weights),
            )
        self._all_under = all_under
        if choice.active != before.active:
            self._report(set(before.active.map_names), set(choice.active.map_names), choice.weights)

    def _report(self, before: set[str], after: set[str], weights: tuple[float, ...]) -> None:
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
