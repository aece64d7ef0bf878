"""State dicts that say what they belong to: what is loaded, what is refused and how, and runs that go on exactly."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from lomix_fast import LoMixLoss, with_loss
from lomix_fast.checkpoint import FORMAT, KEY, CheckpointError, describe
from lomix_fast.official import CombinatorialMutationsLossModule


def saved(criterion: nn.Module) -> dict[str, Any]:
    """Its state dict by way of a file that holds tensors alone."""
    buffer = io.BytesIO()
    torch.save(criterion.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def randomised(*arguments: Any, **options: Any) -> LoMixLoss:
    criterion = LoMixLoss(*arguments, **options)
    with torch.no_grad():
        for parameter in criterion.parameters():
            parameter.normal_()
    return criterion


def format_1(criterion: nn.Module) -> dict[str, Tensor]:
    """A state dict as it was before there was a description."""
    return {name: value for name, value in criterion.state_dict().items() if not name.endswith(KEY)}


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"weighting": "normalized"},
    {"weighting": "fixed"},
    {"operators": ("mul", "awf"), "awf_sharing": "subset"},
    {"subsets": "pairs"},
    {"concat": "resampled"},
    {"supervision": "mutation"},
    {"supervision": "last_layer"},
    {"order": "fine_to_coarse"},
    {"prune_below": 0.1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_round_trip(options: dict[str, Any]) -> None:
    criterion, other = randomised(5, 3, **options), LoMixLoss(5, 3, **options)
    state = saved(criterion)
    assert all(isinstance(value, Tensor) for value in state.values())  # what safetensors and others can store
    assert not other.load_state_dict(state).missing_keys
    assert same(criterion, other)
    found = describe(state)
    assert found["format"] == FORMAT == criterion.state_dict()._metadata[""]["version"]
    assert (found["num_classes"], found["num_scales"]) == (5, 3)
    assert found["operators"] == list(criterion.plan.operators)


def test_inside_another_module() -> None:
    module, other = (with_loss(nn.Conv2d(1, 1, 1), randomised(5, 3)) for _ in range(2))
    state = saved(module)
    assert describe(state, "criterion.")["num_classes"] == 5
    other.load_state_dict(state)
    assert same(module, other)
    wrong = with_loss(nn.Conv2d(1, 1, 1), LoMixLoss(6, 3))
    before = wrong.network.weight.clone()
    words = r"num_classes=5, expected num_classes=6.*transfer\(state_dict, criterion, prefix='criterion.'\)"
    with pytest.raises(CheckpointError, match=words):
        wrong.load_state_dict(state)
    assert torch.equal(wrong.network.weight, before)


def test_through_the_state_dicts_of_torch_distributed() -> None:
    module, other = (with_loss(nn.Conv2d(1, 1, 1), randomised(5, 3)) for _ in range(2))
    set_model_state_dict(other, get_model_state_dict(module))
    assert same(module, other)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_through_torch_distributed_checkpoint(tmp_path: Path) -> None:
    """It loads into tensors of the same size, so the description of a pruned loss must not grow with its state."""
    criterion, other = (LoMixLoss(5, 3, prune_below=0.5, prune_every=700) for _ in range(2))
    with torch.no_grad():
        criterion.alpha[2] = -5.0
    criterion.update_pruning()
    dcp.save(criterion.state_dict(), checkpoint_id=tmp_path)
    state = other.state_dict()
    dcp.load(state, checkpoint_id=tmp_path)
    other.load_state_dict(state)
    assert same(criterion, other) and other.dropped_maps == criterion.dropped_maps == ("orig_2",)


def test_another_default_device(monkeypatch: pytest.MonkeyPatch) -> None:
    criterion, other = (LoMixLoss(5, 3, concat="resampled") for _ in range(2))
    with torch.device("meta"):
        state = criterion.state_dict()
        assert state[KEY].device.type == "cpu"
        other.load_state_dict(state)
    assert torch.equal(criterion._generator.get_state(), other._generator.get_state())


def test_what_a_network_loads_alone_leaves_the_choice_of_maps() -> None:
    module = with_loss(nn.Conv2d(1, 1, 1), LoMixLoss(3, 2, prune_below=0.5))
    with torch.no_grad():
        module.criterion.alpha[0] = -10.0
    module.criterion.update_pruning()
    module.load_state_dict({"network.bias": torch.ones(1)}, strict=False)
    assert module.criterion.dropped_maps == ("orig_0",)


def test_a_description_survives_what_people_do_to_state_dicts() -> None:
    criterion, other = randomised(5, 3), LoMixLoss(5, 3).double()
    other.load_state_dict({name: value.double().requires_grad_() for name, value in criterion.state_dict().items()})
    assert same(criterion, other.float())


# Earlier formats --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_format_1_is_loaded(options: dict[str, Any]) -> None:
    criterion, other = randomised(5, 3, **options), LoMixLoss(5, 3, **options)
    state = format_1(criterion)
    assert describe(state) == {"format": 1}
    other.load_state_dict(state, strict=True)
    assert same(criterion, other)


def test_format_1_of_another_shape_is_refused_before_anything_is_loaded() -> None:
    """alpha and the attention rows would fit, the convolutions of another number of classes do not."""
    other = LoMixLoss(6, 3)
    before = [p.clone() for p in other.parameters()]
    words = (
        r"got cat_weight \[9, 5, 5\] \(expected \[9, 6, 6\]\), cat_bias .*format 1.* 6 classes, 3 scales and 19 maps"
        r".*transfer\(state_dict, criterion, source="
    )
    with pytest.raises(CheckpointError, match=words):
        other.load_state_dict(format_1(randomised(5, 3)))
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


def test_a_missing_parameter_is_still_missed() -> None:
    state = LoMixLoss(5, 3).state_dict()
    del state["alpha"]
    with pytest.raises(CheckpointError, match=r"got no alpha \(expected \[19\]\)"):
        LoMixLoss(5, 3).load_state_dict(state)
    assert LoMixLoss(5, 3).load_state_dict(state, strict=False).missing_keys == ["alpha"]


def test_the_checkpoint_of_the_authors_module_is_recognised() -> None:
    state = CombinatorialMutationsLossModule(3, 5, 3, ["add", "mul"]).state_dict()
    with pytest.raises(CheckpointError, match=r"authors' loss module; .*official_to_lomix"):
        LoMixLoss(5, 3).load_state_dict(state)


# Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_classes": 6}, "num_classes=5, expected num_classes=6"),
        ({"num_scales": 4}, "num_scales=3, expected num_scales=4"),
        (
            {"operators": ("mul", "add", "cat", "awf")},
            "operators=['add', 'mul', 'cat', 'awf'], expected operators=['mul",
        ),
        ({"subsets": [(0, 1), (0, 2), (1, 2), (0, 1, 2)][:3]}, "[1, 2], [0, 1, 2]], expected subsets=[[0, 1], [0, 2],"),
        ({"concat": "resampled"}, "concat='learned', expected concat='resampled'"),
        ({"awf_sharing": "scale"}, "awf_sharing='size', expected awf_sharing='scale'"),
        ({"weighting": "uncertainty"}, "weighting='softplus', expected weighting='uncertainty'"),
        ({"supervision": "last_layer"}, "originals=[0, 1, 2], operators=['add', 'mul', 'cat', 'awf']"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
@pytest.mark.parametrize("strict", [True, False])
def test_the_checkpoint_of_another_criterion_is_refused(options: dict[str, Any], words: str, strict: bool) -> None:
    """Some have the same shapes, so that torch alone would let the weights land on other maps."""
    other = LoMixLoss(**{"num_classes": 5, "num_scales": 3, **options})
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(CheckpointError, match=re.escape(words)) as caught:
        other.load_state_dict(randomised(5, 3).state_dict(), strict=strict)
    assert "lomix_fast.transfer(state_dict, criterion)" in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"order": "fine_to_coarse"},
        {"lambda_dice": 1.0},
        {"sigmoid": True},
        {"mul": "bounded"},
        {"squared_pred": False},
        {"prune_below": 0.1},
        {"impl": "eager"},
        {"process_group": "world"},
    ],
    ids=str,
)
def test_options_that_leave_the_parameters_their_meaning_do_not_matter(options: dict[str, Any]) -> None:
    criterion, other = randomised(5, 3), LoMixLoss(5, 3, **options)
    other.load_state_dict(saved(criterion))
    assert same(criterion, other)


def test_options_of_mixes_that_are_not_made_do_not_matter() -> None:
    criterion = LoMixLoss(5, 3, operators=("add",), awf_sharing="scale", concat="resampled")
    LoMixLoss(5, 3, operators=("add",)).load_state_dict(criterion.state_dict())


def test_a_later_format_is_refused() -> None:
    state = LoMixLoss(5, 3).state_dict()
    state[KEY] = torch.tensor(list(json.dumps({"format": FORMAT + 1}).encode()), dtype=torch.uint8)
    with pytest.raises(
        CheckpointError, match=rf"got format {FORMAT + 1}, expected at most {FORMAT}.*update the package"
    ):
        LoMixLoss(5, 3).load_state_dict(state)


@pytest.mark.parametrize(
    "entry",
    [
        "text",
        torch.zeros(5),
        torch.zeros(5, device="meta"),
        *(torch.tensor(list(b), dtype=torch.uint8) for b in (b"[1]", b'{"format": null}', b'{"format": 2}')),
    ],
    ids=repr,
)
def test_a_damaged_description_is_refused(entry: Any) -> None:
    state = {**LoMixLoss(5, 3).state_dict(), KEY: entry}
    with pytest.raises(CheckpointError, match=r"'_extra_state' that describes no LoMixLoss .*leave that key out"):
        LoMixLoss(5, 3).load_state_dict(state)


# Going on ---------------------------------------------------------------------------------------------------------


class Run:
    """A network, a loss, their optimizer and schedule, and batches that depend on the number of the step alone."""

    def __init__(self, options: dict[str, Any]) -> None:
        torch.manual_seed(7)
        self.network = nn.ModuleList([nn.Conv2d(1, 3, 2, stride=2), nn.Conv2d(1, 3, 1)])
        self.criterion = LoMixLoss(3, 2, **options)
        with torch.no_grad():
            self.criterion.alpha.copy_(torch.linspace(0.0, 1.0, self.criterion.plan.num_maps))
        groups = [{"params": self.network.parameters()}, *self.criterion.param_groups(lr=0.3)]
        self.optimizer = torch.optim.AdamW(groups, lr=0.05)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.parts = {
            "network": self.network,
            "criterion": self.criterion,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
        }

    def steps(self, numbers: range) -> list[float]:
        """The loss of each step."""
        losses = []
        for number in numbers:
            if number == 4 and self.criterion.prune_every is None:
                self.criterion.update_pruning()
            images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(number))
            self.optimizer.zero_grad()
            loss = self.criterion([layer(images) for layer in self.network], (images[:, 0] > 0).long())
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            losses.append(loss.item())
        return losses


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"concat": "resampled"},
        {"weighting": "uncertainty"},
        {"prune_below": 0.4, "prune_every": 3},
        {"prune_below": 0.4, "prune_every": None},
    ],
    ids=str,
)
def test_an_interrupted_run_goes_on_bit_for_bit(options: dict[str, Any]) -> None:
    """Interrupted after every number of steps, so also in the middle of what a choice of maps is good for."""
    through = Run(options)
    losses = through.steps(range(8))
    assert bool(through.criterion.dropped_maps) == ("prune_below" in options)
    for cut in range(1, 8):
        first, second = Run(options), Run(options)
        first.steps(range(cut))
        buffer = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in first.parts.items()}, buffer)
        buffer.seek(0)
        second.steps(range(20, 22))  # whatever it has done before does not matter
        for name, state in torch.load(buffer, weights_only=True).items():
            second.parts[name].load_state_dict(state)
        assert second.steps(range(cut, 8)) == losses[cut:], cut
        assert same(second.criterion, through.criterion) and same(second.network, through.network)


def test_the_choice_of_maps_is_not_taken_over_by_other_options() -> None:
    first = LoMixLoss(3, 2, prune_below=0.5)
    with torch.no_grad():
        first.alpha[0] = -10.0
    first.update_pruning()
    assert first.dropped_maps == ("orig_0",)
    for options in ({"prune_below": 0.6}, {"prune_below": 0.5, "prune_every": 7}, {}):
        other = LoMixLoss(3, 2, **options)
        other.load_state_dict(first.state_dict())
        assert other.dropped_maps == ()
    other = LoMixLoss(3, 2, prune_below=0.5)
    other.load_state_dict(first.state_dict())
    assert other.dropped_maps == ("orig_0",)
