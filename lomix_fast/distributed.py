"""One batch over several processes: the sums of `LoMixLoss` added up over the ranks of a torch.distributed group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .recipe import counts_any, map_losses

WORLD = "world"


class Ranks:
    """Holder of a process group: copies of a module share it, and it is looked up when it is needed."""

    def __init__(self, process_group: Any) -> None:
        self.process_group = process_group

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if isinstance(self.process_group, dist.ProcessGroup):
            raise TypeError(
                "process_group: got a ProcessGroup, which belongs to this process and cannot be pickled; make the "
                f"criterion with process_group={WORLD!r}, or save criterion.state_dict()"
            )
        return Ranks, (self.process_group,)

    def group(self) -> Any:
        """The ProcessGroup, that of all processes for "world"; None where it is this process alone.

        Raises:
            RuntimeError: torch.distributed has not been initialised.
        """
        if self.process_group != WORLD:
            return _unless_alone(self.process_group)
        if not _is_initialized():
            raise RuntimeError(
                f"process_group: got {WORLD!r}, but torch.distributed is not initialised; call "
                "torch.distributed.init_process_group() first (and start with torchrun), or leave process_group out "
                "where there is one process"
            )
        return _unless_alone(dist.group.WORLD)


def _unless_alone(group: Any) -> Any:
    return None if dist.get_world_size(group) == 1 else group


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def check_process_group(process_group: Any, concat: str) -> None:
    """Check the option of `LoMixLoss`.

    Args:
        process_group: None, "world" or a torch.distributed.ProcessGroup.
        concat: of the same criterion.

    Raises:
        TypeError: something else.
        ValueError: random convolutions, which every rank would draw for itself.
    """
    if process_group is None:
        return
    if process_group != WORLD and not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        raise TypeError(
            f"process_group: got {process_group!r}, expected None, {WORLD!r} or a torch.distributed.ProcessGroup (of "
            "a DeviceMesh: mesh.get_group())"
        )
    if concat == "resampled":
        raise ValueError(
            f"process_group: got {process_group!r} with concat='resampled', expected None: each rank draws "
            "convolutions of its own, so there is no one loss of the whole batch; pass concat='learned'"
        )


class _SumOverRanks(torch.autograd.Function):
    """Sum of a tensor over the ranks, and the gradient of what every rank makes of it, added up over the ranks.

    All ranks go on from the same sum to the same loss, so that gradient is theirs times the number of ranks: known
    without a second exchange. Averaged over ranks, as DistributedDataParallel and FSDP do, it is the gradient of one
    process with the whole batch.
    """

    @staticmethod
    def forward(ctx: Any, sums: Tensor, group: Any) -> Tensor:
        """`sums` of any shape, the same on every rank."""
        ctx.ranks = dist.get_world_size(group)
        total = sums.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The gradient times the number of ranks."""
        return gradient * ctx.ranks, None


def map_losses_over_ranks(
    stats: Tensor, target_stats: Tensor, group: Any, *, weight: Tensor | None = None, **recipe: Any
) -> tuple[Tensor, Tensor]:
    """Loss of each map over the samples of all ranks, and whether any pixel of them counts.

    One exchange of M (1 + 2C) + C + M + 2 numbers: the sums of the table over the own samples, and of the terms that
    are means over samples (`batch` false, `ce_per_sample`) the sums of their losses. The number of samples may differ
    from rank to rank, and be 0.

    Args:
        stats, target_stats: [B, M, 1 + 2C] and [B, 1 + C] of the own samples.
        group: the ProcessGroup; all its ranks must call this.
        weight, recipe: as `lomix_fast.recipe.map_losses` takes them; `recipe` holds lambda_ce, lambda_dice, batch and
            ce_per_sample.

    Returns:
        [M] in the dtype of `stats`, and a bool scalar; the same on every rank.
    """
    samples, maps, width = stats.shape
    none = {"lambda_ce": 0.0, "lambda_dice": 0.0}
    # The two terms are added, so each can be had alone: those over the batch from sums, the others sample by sample.
    by_sample = {"lambda_ce": recipe["ce_per_sample"], "lambda_dice": not recipe["batch"]}
    own = {name: recipe[name] for name, wanted in by_sample.items() if wanted}
    shared = {name: recipe[name] for name, wanted in by_sample.items() if not wanted}
    losses = stats.new_zeros(maps)
    if own:
        losses = samples * map_losses(stats, target_stats, weight=weight, **{**recipe, **none, **own})
    sums = torch.cat([stats.sum(0).flatten(), target_stats.sum(0), losses, stats.new_full((1,), samples)])
    sizes = [maps * width, target_stats.shape[1], maps, 1]
    table, targets, losses, samples = _SumOverRanks.apply(sums, group).split(sizes)
    losses = losses / samples.clamp(min=1)
    table, targets = table.view(1, maps, width), targets.unsqueeze(0).detach()
    if shared:
        whole = {**recipe, **none, **shared, "batch": True, "ce_per_sample": False}
        losses = losses + map_losses(table, targets, weight=weight, **whole)
    return losses, counts_any(targets)


class SharedByRanks(nn.Module):
    """The part of `LoMixLoss` that knows of other processes."""

    _ranks: Ranks | None
    _is_same: bool  # whether the parameters have been made the same on all ranks

    def _pruning_state(self) -> dict[str, Any] | None:
        raise NotImplementedError

    def _resume_pruning(self, state: dict[str, Any] | None) -> None:
        raise NotImplementedError

    def _start_sharing(self, process_group: Any, concat: str) -> None:
        check_process_group(process_group, concat)
        self._ranks = None if process_group is None else Ranks(process_group)
        self._is_same = False

    @property
    def process_group(self) -> Any:
        """None, "world", or the ProcessGroup over which the statistics are added up."""
        return None if self._ranks is None else self._ranks.process_group

    def _group(self) -> Any:
        """The group of the parameters, or None where this is the only process."""
        if self._ranks is not None:
            return self._ranks.group()
        return _unless_alone(dist.group.WORLD) if _is_initialized() else None

    def sync_parameters(self) -> None:
        """Give every rank the parameters and the active maps of the group's first rank; in one process nothing happens.

        For trainers that wrap only the network in DistributedDataParallel, as nnU-Net does: the mixing weights are
        drawn at random, so ranks begin with different ones. Call it on every rank, once torch.distributed is
        initialised, after construction and again after loading. Also of use inside DistributedDataParallel where the
        first rank alone has loaded a checkpoint: that broadcasts parameters, but not which maps are pruned.
        The group is `process_group`, or all processes.

        Raises:
            RuntimeError: the parameters are sharded (FSDP), which makes them one already.
        """
        self._refuse_shards()
        group = self._group()
        if group is not None:
            for parameter in self.parameters():
                dist.broadcast(parameter.detach(), group=group, group_src=0)
            # NCCL takes an object through the current device unless told: every rank through GPU 0, if none is set.
            for device in {p.device for p in self.parameters()}:  # one, or none where nothing can be pruned either
                choice = [self._pruning_state()]
                dist.broadcast_object_list(choice, group=group, group_src=0, device=device)
                self._resume_pruning(choice[0])
            self._is_same = True

    def sync_gradients(self) -> None:
        """Average the gradients of the parameters over the ranks; nothing happens in a single process.

        For trainers that wrap only the network in DistributedDataParallel. Call it on every rank after backward (of
        the last of several accumulated batches) and before anything reads the gradients: `GradScaler.unscale_`,
        clipping, `optimizer.step`. One exchange for all parameters. A parameter that has no gradient counts as 0. A
        criterion inside DistributedDataParallel or FSDP, see `lomix_fast.with_loss`, needs no such call.

        Raises:
            RuntimeError: `sync_parameters` has not been called since construction or loading, so the ranks may train
                different parameters; or the parameters are sharded (FSDP).
        """
        self._refuse_shards()
        group = self._group()
        trained = [p for p in self.parameters() if p.requires_grad]
        if group is None or not trained:
            return
        if not self._is_same:
            raise RuntimeError(
                "sync_gradients: the ranks may hold different parameters, whose average gradient trains none of them; "
                "call criterion.sync_parameters() on every rank after init_process_group, and again after loading"
            )
        with torch.no_grad():
            for parameter in trained:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            gradients = [p.grad for p in trained if p.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat, group=group)
            flat /= dist.get_world_size(group)
            for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(mean.view_as(gradient))

    def _refuse_shards(self) -> None:
        if any(is_sharded(p) for p in self.parameters()):
            raise RuntimeError(
                "sync: got parameters that are DTensors, which FSDP keeps the same and averages itself; leave the call "
                "out"
            )


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which each rank holds a part."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered from all ranks if it is a DTensor, which every rank must then ask for."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
