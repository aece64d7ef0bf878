"""The parts of examples/train_3d.py: networks, data, losses, and what is measured."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lomix_fast.testing.official_style import official_style_step

pytest.importorskip("monai")
pytest.importorskip("nilearn")
pytest.importorskip("tensorboard")
pytest.importorskip("tqdm")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from monai.networks.nets import DynUNet
from train_3d_parts import data, laps, losses, networks, options, shares, step
from train_3d_tiny import HERE, differences, put_malloc_back, tiny

# Networks


@pytest.mark.parametrize("scales", [2, 3, 4, 5])
@pytest.mark.parametrize("name", options.NETWORKS)
def test_network_returns_native_maps_finest_first(name: str, scales: int) -> None:
    size = (2**scales, 2**scales, 2 ** (scales + 1))
    images = torch.randn(1, 1, *size)
    network = networks.build_network(name, scales, scales, 1, 3)
    maps = network(images)
    assert isinstance(maps, list)
    assert [tuple(z.shape) for z in maps] == [(1, 3, *(n >> level for n in size)) for level in range(scales)]
    with torch.no_grad():
        alone = network.eval()(images)
    torch.testing.assert_close(alone, maps[0])
    assert networks.build_network(name, scales, 1, 1, 3)(images).shape == alone.shape


def test_dynunet_differs_from_monai_in_nothing_but_the_size_of_its_maps() -> None:
    network = networks.build_network("dynunet", 3, 3, 2, 3)
    images = torch.randn(2, 1, 16, 16, 16)
    stacked = DynUNet.forward(network, images)
    maps = network(images)
    for native, full in zip(maps, stacked.unbind(1), strict=True):
        assert torch.equal(nn.functional.interpolate(native, full.shape[2:]), full)
    assert sum(one.numel() for one in network.heads) == 0, "the network holds on to the maps of the last step"


def test_network_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="expected 1 or scales=3"):
        networks.build_network("dynunet", 3, 2, 4, 3)
    with pytest.raises(ValueError, match="expected 'segresnet' or 'dynunet'"):
        networks.build_network("unet", 3, 3, 4, 3)


# Data


def test_patches_are_cut_alike_from_image_and_labels() -> None:
    labels = torch.randint(0, 200, (9, 10, 11), dtype=torch.uint8)
    volume = data.Volume(labels[None].float(), labels)
    images, cut = data.Patches(volume, (4, 5, 6), 8, seed=1).draw()
    assert images.shape == (8, 1, 4, 5, 6) and cut.shape == (8, 4, 5, 6) and cut.dtype == torch.uint8
    for image, label in zip(images.flatten(1).double(), cut.flatten(1).double(), strict=True):
        assert torch.corrcoef(torch.stack([image, label]))[0, 1] > 1 - 1e-9
    everywhere = labels.unfold(0, 4, 1).unfold(1, 5, 1).unfold(2, 6, 1).reshape(-1, 4, 5, 6)
    mirrored = [not (everywhere == one).flatten(1).all(1).any() for one in cut]
    assert 0 < sum(mirrored) < 8
    for one, flipped in zip(cut, mirrored, strict=True):
        assert (everywhere == (one.flip(0) if flipped else one)).flatten(1).all(1).any()


def test_patches_depend_on_the_seed_alone() -> None:
    volume = data.load_head(4).train
    first, same, other = (data.Patches(volume, (16, 16, 16), 1, seed) for seed in (0, 0, 1))
    for _ in range(2):
        drawn = first.draw()[0]
        assert torch.equal(drawn, same.draw()[0]) and not torch.equal(drawn, other.draw()[0])


def test_the_two_parts_of_the_head_are_apart() -> None:
    head = data.load_head(4)
    for part in (head.train, head.held_out):
        assert set(part.labels.unique().tolist()) == {0, 1, 2}
        assert part.image.shape[1:] == part.labels.shape
    rows = {part: {row.numpy().tobytes() for row in part.image[0].unbind(1)} for part in (head.train, head.held_out)}
    assert not rows[head.train] & rows[head.held_out]
    inside = head.train.image[0][head.train.labels > 0]
    assert abs(inside.mean()) < 0.05 and abs(inside.std() - 1) < 0.1


# Losses


def test_official_style_takes_the_finest_map_first() -> None:
    maps, labels = [torch.randn(1, 3, n, n, n) for n in (8, 4)], torch.randint(0, 3, (1, 8, 8, 8))
    criterion = losses.build_criterion("official-style", 3, 2, distributed=False)
    torch.manual_seed(5)
    found = criterion(maps, labels)
    torch.manual_seed(5)
    assert torch.equal(found, official_style_step(criterion.loss, maps[::-1], labels))
    with pytest.raises(ValueError, match="expected neither"):
        criterion(maps, labels, mask=labels > 0)


@pytest.mark.parametrize("loss", options.LOSSES)
def test_every_parameter_gets_a_gradient_under_every_loss(loss: str) -> None:
    """Or DistributedDataParallel would wait for it for ever."""
    trainer = step.build_trainer(tiny(loss=loss), HERE)
    trainer.module(torch.randn(2, 1, 16, 16, 16), torch.randint(0, 3, (2, 16, 16, 16))).backward()
    assert [name for name, p in trainer.module.named_parameters() if p.grad is None] == []
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in trainer.module.parameters()}
    of_the_loss = {id(p) for p in trainer.criterion.parameters()}
    for group in trainer.optimizer.param_groups:
        assert group["weight_decay"] == 0 or not of_the_loss & {id(p) for p in group["params"]}


# What is measured


class Slow(torch.autograd.Function):
    """The identity; takes its time in both passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.seconds)
        return gradient, None, None


class SlowNetwork(nn.Module):
    """Three maps; 0.01 s a map forward, 0.04 s backward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self) -> list[Tensor]:
        return [Slow.apply(one, 0.01, 0.04) for one in self.weight]


class SlowLoss(nn.Module):
    """0.02 s a map forward, 0.03 s backward."""

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return torch.stack([Slow.apply(one, 0.02, 0.03) for one in maps]).sum()


def test_the_laps_of_a_step_are_told_apart() -> None:
    network, criterion, clock = SlowNetwork(), SlowLoss(), laps.Clock(torch.device("cpu"))
    steps = []
    for _ in range(5):
        with laps.measured(criterion, clock) as found:
            criterion(network()).backward()
        steps.append(found)
    fastest = {lap: min(one[lap] for one in steps) for lap in laps.LAPS}
    assert fastest == pytest.approx(dict(zip(laps.LAPS, (0.03, 0.06, 0.09, 0.12), strict=True)), abs=0.014)
    assert not criterion._forward_hooks and not criterion._forward_pre_hooks
    assert shares.time_share(steps)["share"] == pytest.approx(0.5, abs=0.05)


def test_measuring_changes_nothing() -> None:
    found = []
    for meter in (None, laps.Clock(torch.device("cpu"))):
        trainer = step.build_trainer(tiny(), HERE)
        patches = data.Patches(data.load_head(4).train, (16, 16, 16), 2, 0)
        for _ in range(2):
            with laps.measured(trainer.criterion, meter) as said:
                trainer.step(*patches.draw())
            assert bool(said) == (meter is not None)
        found.append({name: part.state_dict() for name, part in trainer.parts().items()})
    assert differences(*found) == []


def test_half_a_step_cannot_be_measured() -> None:
    criterion = SlowLoss()
    with (
        pytest.raises(RuntimeError, match="ended without loss_backward"),
        laps.measured(criterion, laps.Clock(torch.device("cpu"))),
    ):
        criterion([torch.ones((), requires_grad=True)])


class Hungry(nn.Module):
    """A loss that needs 64 MiB while it runs, on top of what the network holds."""

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        torch.ones(16 * 2**20)
        return maps[0].sum()


def test_the_memory_of_the_loss_is_told_from_that_of_the_network() -> None:
    try:
        peak = laps.Peak(torch.device("cpu"))
    except RuntimeError as error:
        pytest.skip(str(error))
    criterion, weight = Hungry(), torch.ones((), requires_grad=True)
    peak.prepare()
    steps = []
    for _ in range(3):  # a system short of memory drops pages of libraries in between
        with laps.measured(criterion, peak) as found:
            torch.ones(128 * 2**20)  # 512 MiB, which are not the loss's
            held = torch.ones(16 * 2**20) * weight  # 64 MiB, and the ones that the backward pass needs
            criterion([held]).backward()
            del held
        steps.append(found)
    put_malloc_back()
    mib = shares.memory_share(steps)["mib"]
    assert mib["loss"] == pytest.approx(64, abs=12)
    assert mib["before_loss"] == pytest.approx(128, abs=12)
    assert mib["step"] == pytest.approx(512, abs=12)
    assert mib["added"] == 0


_FREES = """
import torch
from train_3d_parts import laps

peak = laps.Peak(torch.device("cpu"))
torch.ones(2**22)  # freed at once, after which malloc keeps blocks of up to that size
peak.prepare()
blocks = [torch.ones(2**18) for _ in range(100)]  # of 1 MiB
highest = laps._resident("VmRSS")
del blocks[:-1]  # malloc would keep what lies before the last one
print(highest - laps._resident("VmRSS"))
"""


def test_freed_memory_leaves_the_resident_set_at_once() -> None:
    """In a process of its own: in this one blocks would take the place of others that were freed before."""
    environment = {**os.environ, "PYTHONPATH": str(Path(laps.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", _FREES], env=environment, capture_output=True, text=True, timeout=120)
    if "RuntimeError" in done.stderr:
        pytest.skip(done.stderr)
    assert int(done.stdout) == pytest.approx(99 * 2**20, abs=12 * 2**20)


def test_shares_by_hand() -> None:
    times = [dict(zip(laps.LAPS, seconds, strict=True)) for seconds in ((1, 2, 3, 4), (3, 1, 1, 5), (1, 1, 2, 1))]
    found = shares.time_share(times)
    assert found == {
        "steps": 3,
        "ms": {
            "network_forward": 1000,
            "loss_forward": 1000,
            "loss_backward": 2000,
            "rest": 4000,
            "step": 10000,
        },
        "share": 0.5,
    }
    mib = 2**20
    peaks = [
        dict(
            zip(
                laps.LAPS,
                ((70 * mib, 50 * mib), (90 * mib, 60 * mib), (100 * mib, 55 * mib), (80 * mib, 0)),
                strict=True,
            )
        )
    ]
    assert shares.memory_share(peaks) == {
        "steps": 1,
        "mib": {"step": 100, "before_loss": 50, "loss": 50, "added": 20},
        "share": 0.5,
    }
    assert shares.time_share([]) is None and shares.memory_share([]) is None
