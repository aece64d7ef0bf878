"""Another default device, sparse and nested tensors, and tensors without numbers (FakeTensorMode)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lomix_fast import LoMixLoss, MixPlan, lomix_loss, map_stats
from lomix_fast.official import CombinatorialMutationsLossModule

ADD = MixPlan.create(2, ("add",))
WEIGHTS = {"ce_weight": [1, 2, 3], "weight": [0.5, 1, 2]}


def draw() -> tuple[list[Tensor], Tensor]:
    return [torch.randn(2, 3, n, n, requires_grad=True) for n in (4, 8)], torch.randint(3, (2, 8, 8))


# Another default device; "meta" stands for a GPU that is not here --------------------------------------------------


def test_weights_are_made_where_the_logits_are() -> None:
    logits, target = draw()
    options: dict[str, Any] = {**WEIGHTS, "impl": "eager"}
    expected = lomix_loss(logits, target, torch.ones(3), ADD, **options)
    weights = torch.ones(3)
    with torch.device("meta"):
        found = lomix_loss(logits, target, weights, ADD, **options)
        for one in ({"weight": 2.0}, {"weight": [1, 2, 3]}, {"ce_weight": (1, 2, 3)}):
            assert lomix_loss(logits, target, weights, ADD, **one).device.type == "cpu"
    assert torch.equal(found, expected)


@pytest.mark.parametrize("concat", ["learned", "resampled"])
@pytest.mark.parametrize("supervision", ["lomix", "mutation"])
def test_a_criterion_of_one_device_under_the_default_of_another(supervision: str, concat: str) -> None:
    logits, target = draw()
    mask, weight_map = torch.rand(2, 8, 8) > 0.5, torch.rand(2, 8, 8)
    options = {"concat": concat} if supervision == "lomix" else {}
    criterion = LoMixLoss(3, 2, supervision=supervision, impl="eager", **WEIGHTS, **options)
    state = criterion.state_dict()
    expected = criterion(logits, target, mask, weight_map)
    criterion.load_state_dict(state)  # the generator too
    with torch.device("meta"):
        found = criterion(logits, target, mask, weight_map)
        found.backward()
        assert criterion.map_losses(logits, target).device.type == "cpu" == criterion.map_weights().device.type
    assert torch.equal(found, expected) and logits[0].grad.isfinite().all()


def test_made_and_moved_under_the_default_of_another() -> None:
    """Parameters and weights of classes are made on one device, as those of every module are."""
    with torch.device("meta"):
        criterion = LoMixLoss(3, 2, **WEIGHTS)
    assert {value.device.type for value in (*criterion.parameters(), *criterion.buffers())} == {"meta"}


# Sparse and nested tensors -----------------------------------------------------------------------------------------


def nested(tensor: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(tensor.detach()), layout=torch.strided)


SPARSE: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "target": lambda make, a: {**a, "target": make(a["target"])},
    "weight_map": lambda make, a: {**a, "weight_map": make(a["weight_map"])},
    "mask": lambda make, a: {**a, "mask": make(a["mask"])},
    "logits[1]": lambda make, a: {**a, "logits": [a["logits"][0], make(a["logits"][1].detach())]},
}


@pytest.mark.parametrize("kind", ["sparse", "nested"])
@pytest.mark.parametrize("name", SPARSE)
def test_sparse_inputs_are_refused_by_name(name: str, kind: str) -> None:
    logits, target = draw()
    given = {"logits": logits, "target": target, "mask": torch.ones(2, 8, 8), "weight_map": torch.rand(2, 8, 8)}
    make, way_out = (Tensor.to_sparse, "to_dense") if kind == "sparse" else (nested, "to_padded_tensor")
    given = SPARSE[name](make, given)
    words = rf"^{name.replace('[', '.').replace(']', '.')}: got .*expected a dense tensor; .*{way_out}"
    with pytest.raises(TypeError, match=words):
        LoMixLoss(3, 2)(**given)
    with pytest.raises(TypeError, match=words):
        lomix_loss(weights=torch.ones(3), plan=ADD, **given)
    if name != "mask":
        del given["mask"]
        with pytest.raises(TypeError, match=words):
            map_stats(plan=ADD, **given)


@pytest.mark.parametrize("name", ["ce_weight", "weight", "weights", "cat_weight", "cat_bias", "awf_weight", "awf_bias"])
def test_sparse_weights_and_parameters_are_refused_by_name(name: str) -> None:
    logits, target = draw()
    plan = MixPlan.create(2)
    shapes = {"cat_weight": (2, 3, 3), "cat_bias": (1, 3), "awf_weight": (2, 3), "awf_bias": (2,)}
    given = {key: torch.randn(shape) for key, shape in shapes.items()}
    given |= {"ce_weight": torch.ones(3), "weight": torch.ones(3), "weights": torch.ones(6)}
    given[name] = given[name].to_sparse()
    with pytest.raises(
        TypeError, match=f"^{name}: got layout torch.sparse_coo, expected a dense tensor; call .to_dense"
    ):
        lomix_loss(logits, target, plan=plan, **given)
    if name in WEIGHTS:
        with pytest.raises(TypeError, match=f"^{name}: got layout torch.sparse_coo"):
            LoMixLoss(3, 2, **{name: given[name]})


def test_weights_of_maps_on_another_device_are_refused_by_name() -> None:
    logits, target = draw()
    with pytest.raises(ValueError, match=r"^weights: got device meta, expected cpu as the logits have"):
        lomix_loss(logits, target, torch.ones(3, device="meta"), ADD)


# FakeTensorMode ----------------------------------------------------------------------------------------------------

FAKE: list[dict[str, Any]] = [
    {},
    WEIGHTS,
    {"weight": 2.0},
    {"concat": "resampled"},
    {"prune_below": 0.1},
    {"prune_below": 0.1, "weighting": "normalized", "concat": "resampled", **WEIGHTS},
    {"ignore_index": 255, "label_smoothing": 0.1},
    {"supervision": "mutation", "absent_classes": "exclude"},
]


@pytest.mark.parametrize("options", FAKE, ids=str)
def test_within_a_fake_tensor_mode(options: dict[str, Any]) -> None:
    with FakeTensorMode():
        logits, target = draw()
        criterion = LoMixLoss(3, 2, **options)
        loss = criterion(logits, target, torch.ones(2, 8, 8), torch.rand(2, 8, 8))
        loss.backward()
        criterion.update_pruning()
        assert isinstance(loss, FakeTensor) and loss.shape == () and loss.dtype == torch.float32
        assert logits[0].grad.shape == (2, 3, 4, 4)
        assert criterion.dropped_maps == () and "num_classes=3" in repr(criterion)
        assert ("ce_weight=[1.0, 2.0, 3.0]" in repr(criterion)) == ("ce_weight" in options)


@pytest.mark.parametrize("name", ["ce_weight", "weight"])
def test_class_weights_without_numbers_are_refused(name: str) -> None:
    with FakeTensorMode(), pytest.raises(ValueError, match=f"{name}: got a tensor without values.*pass a list"):
        LoMixLoss(3, 2, **{name: torch.ones(3)})


def test_pruning_goes_on_where_there_are_numbers_again() -> None:
    """A call without numbers neither chooses nor counts."""
    logits, target = draw()
    criterion = LoMixLoss(3, 2, prune_below=0.5, prune_every=2)
    with torch.no_grad():
        criterion.alpha[0] = -10.0
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(z.detach().requires_grad_()) for z in logits]
        twin = LoMixLoss(3, 2, prune_below=0.5, prune_every=2)
        twin(fake, mode.from_tensor(target))
        assert twin._choice.calls_left == 0
    meta = LoMixLoss(3, 2, prune_below=0.5).to("meta")
    meta([z.to("meta") for z in logits], target.to("meta"))
    assert meta.update_pruning() == () and meta._choice.calls_left == 0
    criterion(logits, target)
    assert criterion.dropped_maps == ("orig_0",)


def test_the_drop_in_within_a_fake_tensor_mode() -> None:
    dice = type("DiceLoss", (nn.Module,), {"n_classes": 3})()
    with FakeTensorMode():
        logits, target = draw()
        final, _, _ = CombinatorialMutationsLossModule(2, 3, 2)(logits, target, nn.CrossEntropyLoss(), dice)
        assert isinstance(final, FakeTensor) and final.shape == (1,)


def test_the_seed_of_resampling_is_as_before() -> None:
    """Drawn from the global generator, which a mode that has no numbers must not hide."""
    torch.manual_seed(3)
    LoMixLoss(3, 2, operators=("add",))
    expected = torch.Generator().manual_seed(int(torch.randint(2**62, ()))).get_state()
    torch.manual_seed(3)
    assert torch.equal(LoMixLoss(3, 2, operators=("cat",), concat="resampled")._generator.get_state(), expected)
