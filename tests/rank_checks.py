"""What torchrun starts for test_distributed.py: every rank runs all checks and writes what it found to a file.

    torchrun --nproc-per-node N tests/rank_checks.py FOLDER

A check compares what the ranks make of their parts of a batch with what one process makes of the whole batch.
"""

from __future__ import annotations

import copy
import json
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from lomix_fast import LoMixLoss, with_loss

# Samples of each rank in turn: uneven, and for the second list nothing at all on the second rank.
UNEVEN, EMPTY = (3, 1, 2, 1), (3, 0, 2, 1)

RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "float64": {"dtype": torch.float64},
    "empty rank": {"shares": EMPTY},
    "empty rank, by sample": {"shares": EMPTY, "batch": False},
    "by sample": {"batch": False},
    "ce by sample": {"ce_per_sample": True, "weight_map": True},  # without weights all samples count the same
    "all by sample": {"batch": False, "ce_per_sample": True, "weight_map": True},
    "sigmoid": {"sigmoid": True},
    "one rank ignored": {"ignore_index": 2, "ignored_rank": True},
    "uncertainty, one rank ignored": {"ignore_index": 2, "ignored_rank": True, "weighting": "uncertainty"},
    "all ignored": {"ignore_index": 2, "all_ignored": True, "weighting": "uncertainty"},
    "absent classes": {"absent_classes": "exclude", "one_class_a_rank": True},
    "class weights": {"ce_weight": [1.0, 2.0, 0.5], "weight": [1.0, 3.0, 0.25]},
    "weight map": {"weight_map": True},
    "mask": {"mask": True},
    "normalized": {"weighting": "normalized"},
    "dice weights alone": {"weight_map": True, "weighted_ce": False},
    "label smoothing": {"label_smoothing": 0.2},
    "jaccard": {"jaccard": True, "include_background": False},
    "pairs": {"subsets": "pairs", "operators": ("avg", "sub", "max", "cat"), "mul": "logits"},
    "tversky": {"tversky": (0.3, 0.7), "squared_pred": False},
    "mutation": {"supervision": "mutation"},
    "deep supervision": {"supervision": "deep_supervision"},
    "last layer": {"supervision": "last_layer"},
    "one tensor": {"one_tensor": True},
    "pruned": {"prune_below": 0.5, "prune_every": 1},
    "eager": {"impl": "eager"},
}


def own_rows(shares: tuple[int, ...]) -> slice:
    """The samples of this rank."""
    before = sum(shares[: dist.get_rank()])
    return slice(before, before + shares[dist.get_rank()])


def recipe(options: dict[str, Any]) -> dict[str, float]:
    """Relative differences of loss and gradients between the ranks together and one process."""
    options = dict(options)
    dtype, shares = options.pop("dtype", torch.float32), options.pop("shares", UNEVEN)[: dist.get_world_size()]
    flags = {name: options.pop(name, False) for name in ("ignored_rank", "all_ignored", "one_class_a_rank", "mask")}
    has_map, one_tensor = options.pop("weight_map", False), options.pop("one_tensor", False)
    torch.manual_seed(1)
    batch = sum(shares)
    logits = [torch.randn(batch, 3, n, n + 1, dtype=dtype) for n in (2, 4, 8)]
    shape = (batch, 3, 8, 9) if options.get("sigmoid") else (batch, 8, 9)
    target = torch.randint(2 if options.get("sigmoid") else 3, shape)
    if flags["one_class_a_rank"]:
        target[:] = (torch.arange(batch) % 2).view(-1, 1, 1)
    if flags["ignored_rank"]:
        target[: shares[0]] = 2
    if flags["all_ignored"]:
        target[:] = 2
    pixels: dict[str, Tensor] = {"weight_map": torch.rand(batch, 8, 9)} if has_map else {}
    pixels |= {"mask": torch.rand(batch, 8, 9) < 0.5} if flags["mask"] else {}
    alone, shared = (LoMixLoss(3, 3, process_group=group, **options).to(dtype) for group in (None, "world"))
    with torch.no_grad():
        for parameter in alone.parameters():
            parameter.normal_()
    shared.load_state_dict(alone.state_dict())
    shared.sync_parameters()
    results = []
    for criterion, rows in ((alone, slice(None)), (shared, own_rows(shares))):
        leaves = [z[rows].clone().requires_grad_() for z in logits]
        given = leaves[-1] if one_tensor else leaves
        loss = criterion(given, target[rows], **{name: value[rows] for name, value in pixels.items()})
        loss.backward()
        results.append((loss.detach(), [torch.zeros_like(z) if z.grad is None else z.grad for z in leaves]))
    shared.sync_gradients()
    (expected, whole), (loss, own) = results
    rows, ranks = own_rows(shares), dist.get_world_size()
    found = {"loss": difference(loss, expected)}
    for i, (got, want) in enumerate(zip(own, whole, strict=True)):
        # DistributedDataParallel averages over ranks, so each gives what one process has, times their number.
        found[f"logits[{i}]"] = difference(got / ranks, want[rows], want)
    for (name, got), want in zip(shared.named_parameters(), alone.parameters(), strict=True):
        if want.grad is not None:
            found[name] = difference(got.grad, want.grad)
    return found


def difference(got: Tensor | None, want: Tensor, scale: Tensor | None = None) -> float:
    """max |got - want| over max |scale|; 0 for two zeros or two empty tensors."""
    assert got is not None and got.shape == want.shape
    if not want.numel():
        return 0.0
    largest = (want if scale is None else scale).abs().max().item()
    gap = (got - want).abs().max().item()
    return gap / largest if largest > 0 else gap


class Network(nn.Module):
    """A convolution and a head at three scales; [B, 1, 8, 8] to three maps, coarsest first."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(1, 4, 3, padding=1)
        self.heads = nn.ModuleList([nn.Conv2d(4, 3, 1) for _ in range(3)])

    def forward(self, images: Tensor) -> list[Tensor]:
        features = torch.tanh(self.body(images))
        return [head(F.avg_pool2d(features, 2 ** (2 - i))) for i, head in enumerate(self.heads)]


def batches() -> list[tuple[Tensor, Tensor, tuple[int, ...]]]:
    """Three batches with the samples of each rank; the last one is uneven."""
    generator = torch.Generator().manual_seed(2)
    ranks = dist.get_world_size()
    out = []
    for shares in ((2,) * ranks, (2,) * ranks, UNEVEN[:ranks]):
        images = torch.randn(sum(shares), 1, 8, 8, generator=generator)
        out.append((images, torch.randint(3, (sum(shares), 8, 8), generator=generator), shares))
    return out


def pair() -> tuple[Network, LoMixLoss]:
    """Network and criterion with the same values on every rank."""
    torch.manual_seed(3)
    return Network(), LoMixLoss(3, 3)


def trained_alone() -> dict[str, Tensor]:
    """Parameters after three steps of one process with the whole batches."""
    network, criterion = pair()
    module = with_loss(network, criterion)
    optimizer = torch.optim.SGD([{"params": network.parameters()}, *criterion.param_groups()], lr=0.05, momentum=0.9)
    for images, target, _ in batches():
        optimizer.zero_grad()
        module(images, target).backward()
        optimizer.step()
    return dict(module.named_parameters())


def differences_from_alone(module: nn.Module) -> dict[str, float]:
    """Relative differences of all parameters, gathered where they are sharded."""
    found = {}
    named = dict(module.named_parameters())
    for name, want in trained_alone().items():
        got = named[name]
        got = got.full_tensor() if hasattr(got, "full_tensor") else got
        found[name] = difference(got.detach(), want.detach())
    return found


def own_initial_values(module: nn.Module) -> None:
    """Other values on every rank but the first, as without a common seed."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(dist.get_rank())


def joined(wrap: Callable[[nn.Module], nn.Module], same_start: bool) -> dict[str, float]:
    """Training of network and loss as one wrapped module."""
    network, criterion = pair()
    shared = LoMixLoss(3, 3, process_group="world")
    shared.load_state_dict(criterion.state_dict())
    module = with_loss(network, shared)
    if not same_start:
        own_initial_values(module)
    wrapped = wrap(module)
    groups = [{"params": module.network.parameters()}, *shared.param_groups()]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    for images, target, shares in batches():
        optimizer.zero_grad()
        rows = own_rows(shares)
        wrapped(images[rows], target[rows]).backward()
        optimizer.step()
    found = differences_from_alone(module)
    wrapped.eval()
    assert wrapped(images[:1])[-1].shape == (1, 3, 8, 8)
    return found


def ddp() -> dict[str, float]:
    """DistributedDataParallel, which broadcasts and averages the loss's parameters too."""
    return joined(DistributedDataParallel, same_start=False)


def fsdp() -> dict[str, float]:
    """fully_shard (FSDP2), with the parameters of the loss sharded like those of the network."""
    from torch.distributed.fsdp import fully_shard

    return joined(lambda module: fully_shard(module) or module, same_start=True)


def compiled_ddp() -> dict[str, float]:
    """The joined module in one graph, the exchange included."""
    options = {"fullgraph": True, "backend": "aot_eager", "dynamic": True}
    return joined(lambda m: DistributedDataParallel(torch.compile(m, **options)), same_start=False)


def beside_ddp() -> dict[str, float]:
    """Only the network is wrapped, as nnU-Net does it; accumulation, scaling and clipping in their usual places."""
    network, criterion = pair()
    shared = LoMixLoss(3, 3, process_group="world")
    shared.load_state_dict(criterion.state_dict())
    own_initial_values(network)
    own_initial_values(shared)
    wrapped = DistributedDataParallel(network)
    shared.sync_parameters()
    parameters = [*network.parameters(), *shared.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for images, target, shares in batches():
        optimizer.zero_grad()
        rows = own_rows(shares)
        scaler.scale(shared(wrapped(images[rows]), target[rows])).backward()
        shared.sync_gradients()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, 1e6)
        scaler.step(optimizer)
        scaler.update()
    return differences_from_alone(with_loss(network, shared))


def part_of_the_ranks() -> dict[str, float]:
    """A group of the first half of the ranks."""
    ranks = max(1, dist.get_world_size() // 2)
    group = dist.new_group(list(range(ranks)))
    if dist.get_rank() >= ranks:
        return {}
    logits = [torch.randn(ranks, 3, n, n, generator=torch.Generator().manual_seed(n)) for n in (2, 4)]
    target = torch.arange(ranks * 16).view(ranks, 4, 4) % 3
    expected = LoMixLoss(3, 2, weighting="fixed", operators=("add",))(logits, target)
    criterion = copy.deepcopy(LoMixLoss(3, 2, weighting="fixed", operators=("add",), process_group=group))
    rows = slice(dist.get_rank(), dist.get_rank() + 1)
    return {"loss": difference(criterion([z[rows] for z in logits], target[rows]), expected)}


def loaded_by_one() -> dict[str, float]:
    """One rank alone loads a checkpoint of which some maps are pruned; then all go on together."""
    logits, target = [torch.randn(1, 3, 4, 4), torch.randn(1, 3, 8, 8)], torch.randint(3, (1, 8, 8))
    source = LoMixLoss(3, 2, prune_below=0.5, prune_every=None)
    with torch.no_grad():
        source.alpha[1] = -5.0
    source.update_pruning()
    shared = LoMixLoss(3, 2, prune_below=0.5, prune_every=None, process_group="world")
    if dist.get_rank() == 0:
        shared.load_state_dict(source.state_dict())
    shared.sync_parameters()
    alone = LoMixLoss(3, 2, prune_below=0.5, prune_every=None)
    alone.load_state_dict(shared.state_dict())
    every = [torch.empty(1, 3, n, n) for n in (4, 8)]
    everyone = [[torch.empty_like(z) for _ in range(dist.get_world_size())] for z in every]
    for z, found in zip(logits, everyone, strict=True):
        dist.all_gather(found, z)
    targets = [torch.empty_like(target) for _ in range(dist.get_world_size())]
    dist.all_gather(targets, target)
    expected = alone([torch.cat(found) for found in everyone], torch.cat(targets))
    return {"loss": difference(shared(logits, target), expected), "dropped": 6.0 - len(shared.active_maps) - 1}


def refusal_to_average(criterion: LoMixLoss) -> dict[str, str]:
    """What sync_gradients says after a step, "" where it works."""
    criterion([torch.randn(1, 3, 4, 4), torch.randn(1, 3, 8, 8)], torch.randint(3, (1, 8, 8))).backward()
    try:
        criterion.sync_gradients()
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": ""}


def sync_before_loading() -> dict[str, str]:
    """What was the same need not be so after one rank has loaded another checkpoint."""
    criterion = LoMixLoss(3, 2)
    criterion.sync_parameters()
    criterion.load_state_dict(LoMixLoss(3, 2).state_dict())
    return refusal_to_average(criterion)


def evaluation() -> dict[str, float]:
    """After eval() a rank may call the loss alone, and it is that of its own batch."""
    if dist.get_rank() > 0:
        return {}
    logits, target = [torch.randn(1, 3, 4, 4), torch.randn(1, 3, 8, 8)], torch.randint(3, (1, 8, 8))
    alone, shared = LoMixLoss(3, 2, weighting="fixed"), LoMixLoss(3, 2, weighting="fixed", process_group="world")
    shared.load_state_dict(alone.state_dict())
    return {"loss": difference(shared.eval()(logits, target), alone(logits, target))}


def without_sync_parameters() -> dict[str, str]:
    """Gradients of parameters that differ must not be averaged."""
    criterion = LoMixLoss(3, 2)
    return refusal_to_average(criterion)


def same_bits_on_all_ranks() -> dict[str, str]:
    """The loss of every rank, as text: they must not differ even in the last bit."""
    torch.manual_seed(10 + dist.get_rank())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    criterion = LoMixLoss(3, 2, process_group=mesh.get_group())
    criterion.sync_parameters()
    loss = criterion([torch.randn(2, 3, 4, 4), torch.randn(2, 3, 8, 8)], torch.randint(3, (2, 8, 8)))
    return {"loss": loss.item().hex()}


CHECKS: dict[str, Callable[[], dict[str, Any]]] = {
    "ddp": ddp,
    "fsdp": fsdp,
    "compiled ddp": compiled_ddp,
    "beside ddp": beside_ddp,
    "part of the ranks": part_of_the_ranks,
    "loaded by one": loaded_by_one,
    "sync before loading": sync_before_loading,
    "evaluation": evaluation,
    "without sync_parameters": without_sync_parameters,
    "same bits": same_bits_on_all_ranks,
}


def main(folder: Path) -> None:
    """Run everything and write {check: what it found, or {"failed": traceback}}."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found: dict[str, Any] = {}
    checks = {name: lambda options=options: recipe(options) for name, options in RECIPES.items()} | CHECKS
    for name, check in checks.items():
        try:
            found[name] = check()
        except Exception:
            found[name] = {"failed": traceback.format_exc()}
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
