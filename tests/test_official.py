"""The drop-in computes what the authors' module computes: losses, gradients, maps, random convolutions."""

from __future__ import annotations

import copy
import pickle
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from literal_torch import literal_map_losses, literal_upsample
from torch import Tensor, nn

import lomix_fast.official as official
from lomix_fast import available_backends
from lomix_fast.mixing import drawn
from lomix_fast.official import CombinatorialMutationsLossModule
from lomix_fast.testing.official_style import OfficialStyleLoss

CLASSES = 3
ALL = ["add", "mul", "wf", "concat"]
OURS = {"add": "add", "mul": "mul", "concat": "cat", "wf": "awf", "weighted_fusion": "awf"}
OURS |= {name: name for name in ("sub", "avg", "max")}


class DiceLoss(nn.Module):
    """Stands for the authors' class: known by its name and n_classes, never called."""

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.n_classes = n_classes


def make(scales: int = 3, operations: list[str] | None = None, **options) -> CombinatorialMutationsLossModule:
    """A module whose raw weights are all different."""
    originals = options.pop("originals", scales)
    module = CombinatorialMutationsLossModule(originals, CLASSES, scales, operations or ALL, **options)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith(("original", "synth")):
                parameter.normal_()
    return module


def batch(scales: int, axes: int = 2, dtype=torch.float64, native: bool = False) -> tuple[list[Tensor], Tensor]:
    full = (6, 9, 4)[:axes]
    sizes = [[max(1, n - 2 * (scales - 1 - i)) for n in full] if native else full for i in range(scales)]
    maps = [2 * torch.randn(2, CLASSES, *size, dtype=dtype) for size in sizes]
    return [z.requires_grad_() for z in maps], torch.randint(0, CLASSES, (2, *full))


def cat_parameters(scales: int, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    subsets = [s for size in range(2, scales + 1) for s in combinations(range(scales), size)]
    pairs = sum(map(len, subsets))
    weight = torch.randn(pairs, CLASSES, CLASSES, dtype=dtype).requires_grad_()
    return weight, torch.randn(len(subsets), CLASSES, dtype=dtype).requires_grad_()


def call(module, maps, target, **options):
    return module(maps, target, nn.CrossEntropyLoss(), DiceLoss(CLASSES), **options)


def fusion_rows(module) -> tuple[list[Tensor], list[Tensor]]:
    convs = [conv for holder in module.weighted_fusion_modules.values() for conv in holder.weight_convs]
    return [conv.weight for conv in convs], [conv.bias for conv in convs]


def expected(module, maps, target, cat_weight=None, cat_bias=None) -> tuple[Tensor, Tensor, Tensor]:
    """The three results in float64, from the literal writing-out."""
    weights, biases = fusion_rows(module)
    scales = [z.double() for z in maps]
    recipe = {"lambda_ce": module.lc1, "lambda_dice": module.lc2}
    originals = list(literal_map_losses(scales, target, (), **recipe).values())
    mixes = literal_map_losses(
        scales[: module.num_maps],
        target,
        [OURS[name] for name in module.operations],
        cat_weight=None if cat_weight is None else cat_weight.double(),
        cat_bias=None if cat_bias is None else cat_bias.double(),
        awf_weight=torch.stack([w.double().reshape(-1) for w in weights]),
        awf_bias=torch.cat(biases).double(),
        **recipe,
    )
    mixes = list(mixes.values())[module.num_maps :]
    one = torch.ones(1, dtype=torch.float64)
    original_weights, mix_weights = [one] * len(originals), [one] * len(mixes)
    if module.use_learnable_weights:
        original_weights = [(1 + raw.double().exp()).log() for raw in module.original_weights]
        raw_weights = [raw for name in module.operations for raw in module.synthesized_weights[name]]
        mix_weights = [(1 + raw.double().exp()).log() for raw in raw_weights]
    deep = sum(w * loss for w, loss in zip(original_weights, originals, strict=True))
    mutation = sum(w * loss for w, loss in zip(mix_weights, mixes, strict=True))
    return (deep if module.supervision == "deep_supervision" else deep + mutation), deep, mutation


def relative(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    got, want = got.detach(), want.detach()
    return float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30))


def gradients(total: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(total.sum(), inputs))


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize(
    "scales,axes,native",
    [(2, 1, True), (2, 2, False), (3, 2, True), (4, 2, False), (2, 3, True), (3, 3, False), (4, 3, True)],
)
def test_losses_and_all_gradients_equal_the_definition(scales, axes, dtype, tolerance, native):
    torch.manual_seed(scales + axes)
    module = make(scales).to(dtype)
    maps, target = batch(scales, axes, dtype, native)
    weight, bias = cat_parameters(scales, dtype)
    got = call(module, maps, target, cat_weight=weight, cat_bias=bias)
    want = expected(module, maps, target, weight, bias)
    for g, w in zip(got, want, strict=True):
        assert g.shape == (1,) and g.dtype == dtype
        assert relative(g, w) < tolerance
    inputs = [*maps, *module.parameters(), weight, bias]
    for g, w in zip(gradients(got[0], inputs), gradients(want[0], inputs), strict=True):
        assert w.abs().max() > 0
        assert relative(g, w) < tolerance


@pytest.mark.parametrize("impl", [name for name, reason in available_backends().items() if reason == "usable"])
def test_every_backend_equals_the_definition(impl):
    torch.manual_seed(2)
    module = make(3, impl=impl).double()
    maps, target = batch(3, native=True)
    weight, bias = cat_parameters(3)
    got = call(module, maps, target, cat_weight=weight, cat_bias=bias)[0]
    want = expected(module, maps, target, weight, bias)[0]
    assert relative(got, want) < 1e-10
    inputs = [*maps, *module.parameters(), weight, bias]
    for g, w in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        assert relative(g, w) < 1e-10


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("scales", [2, 3, 4])
def test_equals_the_official_style_loss(scales, axes):
    torch.manual_seed(7)
    module = make(scales, ["add", "mul", "concat", "weighted_fusion"]).double()
    style = OfficialStyleLoss(CLASSES, scales).double()
    weights, biases = fusion_rows(module)
    with torch.no_grad():
        style.alpha.copy_(torch.cat([p for n, p in module.named_parameters() if "fusion_modules" not in n]))
        style.awf_weight.copy_(torch.cat([w.reshape(1, -1) for w in weights]))
        style.awf_bias.copy_(torch.cat(biases))
    maps, target = batch(scales, axes)
    weight, bias = cat_parameters(scales)
    got, want = (
        call(module, maps, target, cat_weight=weight, cat_bias=bias)[0],
        style(maps, target, weight, bias),
    )
    assert relative(got, want.reshape(1)) < 1e-10
    shared = [*maps, weight, bias]
    for g, w in zip(gradients(got, shared), gradients(want, shared), strict=True):
        assert relative(g, w) < 1e-10


@pytest.mark.parametrize(
    "options",
    [
        {"operations": ["concat", "wf"], "supervision": "lomix"},
        {"operations": ["mul"], "use_learnable_weights": False},
        {"operations": ["weighted_fusion", "add"], "lc1": 1.0, "lc2": 0.25},
        {"supervision": "deep_supervision"},
        {"originals": 5},
        {"originals": 4, "operations": ["wf", "concat"], "use_learnable_weights": False},
        {"operations": ["max", "sub", "add", "avg"], "supervision": "lomix"},
    ],
    ids=str,
)
def test_every_configuration_equals_the_definition(options):
    torch.manual_seed(3)
    module = make(3, **options).double()
    maps, target = batch(module.original_num_maps)
    cat = cat_parameters(3) if "concat" in module.operations else (None, None)
    got = call(module, maps, target, cat_weight=cat[0], cat_bias=cat[1])
    want = expected(module, maps, target, *cat)
    for g, w in zip(got, want, strict=True):
        assert relative(g, w) < 1e-10
    for g, w in zip(gradients(got[0], maps), gradients(want[0], maps), strict=True):
        assert relative(g, w) < 1e-10


def test_no_list_of_operations_means_the_seven_of_the_authors():
    torch.manual_seed(4)
    module = CombinatorialMutationsLossModule(3, CLASSES, 3).double()
    assert module.operations == ["add", "sub", "mul", "concat", "weighted_fusion", "avg", "max"]
    maps, target = batch(3)
    cat = cat_parameters(3)
    got, want = call(module, maps, target, cat_weight=cat[0], cat_bias=cat[1]), expected(module, maps, target, *cat)
    assert relative(got[0], want[0]) < 1e-10
    for g, w in zip(gradients(got[0], maps), gradients(want[0], maps), strict=True):
        assert relative(g, w) < 1e-10


def test_no_operation_leaves_the_originals():
    module = CombinatorialMutationsLossModule(3, CLASSES, 3, [])
    maps, target = batch(3)
    final, deep, mutation = call(module, maps, target)
    assert torch.equal(final, deep) and mutation.tolist() == [0.0]
    assert module(maps) == []


def test_deep_supervision_leaves_the_mixtures_without_gradient():
    module = make(3, supervision="deep_supervision").double()
    maps, target = batch(3)
    call(module, maps, target)[0].backward()
    without = {name for name, p in module.named_parameters() if p.grad is None}
    assert without == {name for name, _ in module.named_parameters() if not name.startswith("original_weights")}


def test_one_op_call_per_forward(monkeypatch):
    calls = []

    def counting(*args, **options):
        calls.append(args)
        return op(*args, **options)

    op = official.map_stats
    monkeypatch.setattr(official, "map_stats", counting)
    maps, target = batch(4)
    call(make(4), maps, target)
    assert len(calls) == 1


@pytest.mark.parametrize("label", [torch.uint8, torch.int16, torch.float32])
def test_labels_of_other_types_and_with_a_channel(label):
    module = make(2, ["add", "wf"]).double()
    maps, target = batch(2)
    want = call(module, maps, target)[0]
    assert torch.equal(call(module, maps, target.to(label).unsqueeze(1))[0], want)


def test_products_of_half_precision_maps_are_finite():
    module = make(4, ["mul"])
    maps, target = batch(4, dtype=torch.float32)
    halves = [torch.full_like(z, 16.0).half().requires_grad_() for z in maps]
    final = call(module, halves, target)[0]
    assert final.dtype == torch.float32 and final.isfinite().all()
    assert all(fused.isfinite().all() for fused in module(halves))


@pytest.mark.parametrize("scales,native", [(3, False), (4, True)])
def test_maps_alone_give_the_mixed_maps(scales, native):
    torch.manual_seed(1)
    module = make(scales, ["mul", "concat", "add", "weighted_fusion"]).double()
    maps, _ = batch(scales, native=native)
    weight, bias = cat_parameters(scales)
    fused = module(maps, cat_weight=weight, cat_bias=bias)
    full = [literal_upsample(z, tuple(maps[-1].shape[2:])) for z in maps]
    subsets = [s for size in range(2, scales + 1) for s in combinations(range(scales), size)]
    assert isinstance(fused, list) and len(fused) == 4 * len(subsets)
    pair = 0
    for j, subset in enumerate(subsets):
        members = [full[i] for i in subset]
        kernel = torch.cat(list(weight[pair : pair + len(subset)]), dim=1)[:, :, None, None]
        pair += len(subset)
        convs = module.weighted_fusion_modules[str(len(subset))].weight_convs
        scores = torch.stack([conv(p) for conv, p in zip(convs, members, strict=True)], dim=1)
        wanted = [
            torch.stack(members).prod(0),
            F.conv2d(torch.cat(members, dim=1), kernel, bias[j]),
            torch.stack(members).sum(0),
            (scores.softmax(1) * torch.stack(members, dim=1)).sum(1),
        ]
        for operator, want in enumerate(wanted):
            assert relative(fused[operator * len(subsets) + j], want) < 1e-10


def test_random_convolutions_are_seeded_at_construction_and_differ_from_call_to_call():
    maps, target = batch(3)
    results = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        module = CombinatorialMutationsLossModule(3, CLASSES, 3, ["concat"])
        results.append([call(module, maps, target)[2].item() for _ in range(3)])
    assert results[0] == results[1] != results[2]
    assert len(set(results[0])) == 3


def test_a_call_leaves_the_global_generator_alone():
    module = make(3)
    maps, target = batch(3)
    before = torch.get_rng_state()
    call(module, maps, target)
    module(maps)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_call_that_raises_draws_nothing():
    maps, target = batch(3)
    torch.manual_seed(5)
    expected = call(CombinatorialMutationsLossModule(3, CLASSES, 3, ["concat"]), maps, target)[0]
    torch.manual_seed(5)
    module = CombinatorialMutationsLossModule(3, CLASSES, 3, ["concat"])
    with pytest.raises(ValueError, match="label"):
        call(module, maps, torch.full_like(target, CLASSES))
    assert torch.equal(call(module, maps, target)[0], expected)


def test_random_convolutions_are_distributed_as_torch_draws_them():
    module = CombinatorialMutationsLossModule(3, CLASSES, 3, ["concat"])
    calls = []
    for _ in range(2000):
        with drawn(module._generator, module._whole, CLASSES) as parameters:
            calls.append(parameters)
    weight = torch.stack([w for w, _ in calls])  # [calls, K, C, C]
    bias = torch.stack([b for _, b in calls])  # [calls, S, C]
    pair = 0
    for j, members in enumerate((2, 2, 2, 3)):
        kernels = weight[:, pair : pair + members]
        pair += members
        bound = nn.Conv2d(members * CLASSES, CLASSES, 1).weight.shape[1] ** -0.5
        for values in (kernels, bias[:, j]):
            assert 0.99 * bound < values.abs().max() <= bound
            assert abs(values.mean()) < 0.03 * bound
            assert values.std() == pytest.approx(bound / 3**0.5, rel=0.03)


def test_copies_and_pickles():
    module = make(3)
    maps, target = batch(3)
    others = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    want = call(module, maps, target)[0]
    assert all(torch.equal(call(other, maps, target)[0], want) for other in others)


def test_trains_as_the_authors_trainer_drives_it():
    torch.manual_seed(0)
    network = nn.Conv2d(1, 4 * CLASSES, 3, padding=1)
    module = CombinatorialMutationsLossModule(4, CLASSES, selecetd_num_maps=4, operations=ALL)
    optimizer = torch.optim.AdamW([*network.parameters(), *module.parameters()], lr=0.02, weight_decay=1e-4)
    image = torch.randn(2, 1, 12, 12)
    target = (image[:, 0] > 0).float() + (image[:, 0] > 1).float()
    history = []
    for _ in range(30):
        final, deep, _ = module(list(network(image).chunk(4, 1)), target, nn.CrossEntropyLoss(), DiceLoss(CLASSES))
        optimizer.zero_grad()
        final.backward()
        optimizer.step()
        history.append(deep.item())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert history[-1] < 0.6 * history[0]
