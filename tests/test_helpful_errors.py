"""Messages that name the way out, near names for what was misspelt, and what the command line says of itself."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from common import NATIVE
from torch import Tensor, nn

import lomix_fast
from lomix_fast import LoMixLoss, MixPlan, available_backends, lomix_loss, map_stats
from lomix_fast.__main__ import main
from lomix_fast.backends import BACKENDS, why_not
from lomix_fast.convert import lomix_to_official
from lomix_fast.doctor import report
from lomix_fast.doctor.overview import overview
from lomix_fast.official import CombinatorialMutationsLossModule
from lomix_fast.target import TargetRule

ADD = MixPlan.create(2, ("add",))


def draw() -> tuple[list[Tensor], Tensor]:
    return [torch.randn(2, 3, n, n) for n in (4, 8)], torch.randint(3, (2, 8, 8))


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_a_negative_label_in_uint8_is_traced_back(impl: str) -> None:
    """-100 is 156 in uint8, as PyTorch wraps it; what to pass then is in the message, and works."""
    logits, target = draw()
    target[0, 0, 0] = -100
    words = "got the label 156 .*pass ignore_index=156, which is what -100 becomes in uint8"
    with pytest.raises(ValueError, match=words):
        LoMixLoss(3, 2, ignore_index=-100, impl=impl)(logits, target.to(torch.uint8))
    criterion = LoMixLoss(3, 2, weighting="fixed", operators=(), impl=impl, ignore_index=156)
    expected = LoMixLoss(3, 2, weighting="fixed", operators=(), impl=impl, ignore_index=-100)(logits, target)
    torch.testing.assert_close(criterion(logits, target.to(torch.uint8)), expected)


def test_labels_of_signed_types_are_not_traced_back() -> None:
    logits, target = draw()
    for label in (7, -3):
        with pytest.raises(ValueError, match=rf"pass ignore_index={label}$"):
            LoMixLoss(3, 2, impl="eager")(logits, target.index_fill(1, torch.tensor(2), label))


def test_one_head_of_another_dtype() -> None:
    logits, target = draw()
    with pytest.raises(ValueError, match=r"logits\[1\]: got dtype torch.float32, expected torch.bfloat16.*\.float\(\)"):
        LoMixLoss(3, 2)([logits[0].bfloat16(), logits[1]], target)


@pytest.mark.parametrize("value", [10**20, 2**63, -(2**63) - 1])
def test_an_ignored_label_past_int64(value: int) -> None:
    logits, target = draw()
    for call in (
        lambda: LoMixLoss(3, 2, ignore_index=value),
        lambda: lomix_loss(logits, target, torch.ones(3), ADD, ignore_index=value),
        lambda: map_stats(logits, target.double(), ADD, ignore_index=value),
    ):
        with pytest.raises(ValueError, match=f"ignore_index: got {value}, expected a number that int64 holds"):
            call()
    for edge in (2**63 - 1, -(2**63)):
        assert LoMixLoss(3, 2, ignore_index=edge)(logits, target).isfinite()


@pytest.mark.parametrize("key", ["nonsense", "ignore=x", "smooth=", "ignore=1;;", "other=1", "ignore=01"])
def test_raw_ops_with_an_unknown_rule(key: str) -> None:
    logits, target = draw()
    rest = (None,) * 6
    with pytest.raises(ValueError, match=f"rule: got {re.escape(repr(key))}, expected the text of TargetRule.key"):
        torch.ops.lomix_fast.map_stats_forward(logits, target, *rest, ADD.key, key, "eager")


def test_rules_read_back_what_they_write() -> None:
    for rule in (TargetRule(), TargetRule(-100, 0.1, False), TargetRule(label_smoothing=1e-30)):
        assert TargetRule.from_key(rule.key) == rule


def test_raw_ops_with_an_unknown_backend() -> None:
    logits, target = draw()
    with pytest.raises(ValueError, match=r"impl: got 'eagre', expected .*; did you mean 'eager'"):
        torch.ops.lomix_fast.map_stats_forward(logits, target, *(None,) * 6, ADD.key, "", "eagre")


def replica_of(network: Any) -> Any:
    """What torch.nn.parallel.replicate makes, on the CPU."""
    modules = list(network.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():
        for key, child in module._modules.items():
            setattr(replica, key, replicas[child])
        for key, value in (*module._parameters.items(), *module._buffers.items()):
            setattr(replica, key, None if value is None else value.view_as(value))
    return replicas[network]


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("operations", [["add"], ["wf"], ["mul", "weighted_fusion", "max"]], ids=str)
def test_the_drop_in_on_a_replica(operations: list[str], learned: bool) -> None:
    logits, target = draw()
    dice = type("DiceLoss", (nn.Module,), {"n_classes": 3})()
    module = CombinatorialMutationsLossModule(2, 3, 2, operations, use_learnable_weights=learned)
    expected = module(logits, target, nn.CrossEntropyLoss(), dice)
    found = replica_of(module)(logits, target, nn.CrossEntropyLoss(), dice)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) and expected[2] > 0
    if learned:
        found[0].backward()
        assert all((p.grad != 0).any() for name, p in module.named_parameters() if "weights." in name)


# Near names --------------------------------------------------------------------------------------------------------

MISSPELT = {
    "ignore_label": (TypeError, lambda: LoMixLoss(3, 2, ignore_label=1), "LoMixLoss.*'ignore_label'.*'ignore_index'"),
    "of the function": (TypeError, lambda: lomix_loss(*draw(), 1, ADD, lamda_ce=1.0), "lomix_loss.*'lambda_ce'"),
    "of the drop-in": (
        TypeError,
        lambda: CombinatorialMutationsLossModule(2, 3, selected_num_maps=2),
        "'selected_num_maps'; did you mean 'selecetd_num_maps'",
    ),
    "of a preset": (TypeError, lambda: LoMixLoss.preset("nnunet", 3, 2, label_smooth=0.1), "'label_smoothing'"),
    "far from all": (
        TypeError,
        lambda: LoMixLoss(3, 2, xyz=1),
        "'xyz'; expected some of num_classes, num_scales",
    ),
    "preset": (ValueError, lambda: LoMixLoss.preset("nnUNet", 3, 2), "did you mean 'nnunet'"),
    "supervision": (ValueError, lambda: LoMixLoss(3, 2, supervision="LoMix"), "did you mean 'lomix'"),
    "weighting": (ValueError, lambda: LoMixLoss(3, 2, weighting="soft_plus"), "did you mean 'softplus'"),
    "operators": (ValueError, lambda: LoMixLoss(3, 2, operators=("adds",)), "did you mean 'add'"),
    "operations": (ValueError, lambda: CombinatorialMutationsLossModule(2, 3, 2, ["concats"]), "did you mean 'concat'"),
    "impl": (ValueError, lambda: map_stats(*draw(), ADD, impl="Eager"), "did you mean 'eager'"),
    "fusion": (
        ValueError,
        lambda: lomix_to_official({}, num_classes=3, num_scales=2, fusion_name="weighted-fusion"),
        "did you mean 'weighted_fusion'",
    ),
}


@pytest.mark.parametrize("name", MISSPELT)
def test_near_names(name: str) -> None:
    error, call, words = MISSPELT[name]
    with pytest.raises(error, match=words):
        call()


def test_names_that_are_near_to_nothing_get_no_suggestion() -> None:
    for value in ("nonsense", None, ["lomix"]):
        with pytest.raises(ValueError, match=r"expected one of \(.*\)$"):
            LoMixLoss(3, 2, supervision=value)


# Command line ------------------------------------------------------------------------------------------------------


def test_available_backends_are_called_usable() -> None:
    found = available_backends()
    assert list(found) == list(BACKENDS) and found["reference"] == found["eager"] == "usable"
    for name, said in available_backends("meta").items():
        assert said == (why_not(name, "meta") or "usable")
    assert "meta" in available_backends("meta")["cpu"]


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0 and capsys.readouterr().out == f"lomix_fast {lomix_fast.__version__}\n"


def test_json_of_the_doctor_needs_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--device", "cpu", "--json"]) == 0
    assert (tmp_path / "runs" / "doctor.json").is_file()


@pytest.mark.parametrize(
    ("cuda", "hip", "words"),
    [(None, None, "torch is built without either"), ("12.8", None, "CUDA 12.8"), (None, "6.4", "ROCm 6.4")],
)
def test_what_torch_was_built_for_is_said_once(cuda: str | None, hip: str | None, words: str) -> None:
    found = overview([])
    found["environment"] |= {"cuda": cuda, "hip": hip}
    (line,) = [line for line in report.describe(found).splitlines() if line.startswith("CUDA, ROCm")]
    assert line.removeprefix("CUDA, ROCm").strip() == words


# What cannot be honoured ----------------------------------------------------------------------------------------------


def test_a_list_whose_sizes_shrink_is_refused_by_the_function_too() -> None:
    maps = [torch.randn(1, 3, n, n) for n in (4, 2)]
    with pytest.raises(ValueError, match=r"logits: got native sizes .* expected no axis to shrink.*coarsest first"):
        lomix_loss(maps, torch.zeros(1, 4, 4, dtype=torch.long), torch.ones(2), MixPlan.create(2, ()))


@pytest.mark.parametrize("name", ["weight", "ce_weight"])
def test_class_weights_that_ask_for_a_gradient_are_refused(name: str) -> None:
    asks = {name: torch.ones(3, requires_grad=True)}
    maps, labels = [torch.randn(1, 3, 4, 4)], torch.zeros(1, 4, 4, dtype=torch.long)
    words = f"{name}: got a tensor that requires a gradient, of which there is none"
    with pytest.raises(ValueError, match=words):
        LoMixLoss(3, 2, **asks)
    with pytest.raises(ValueError, match=words):
        lomix_loss(maps, labels, torch.ones(1), MixPlan.create(1, ()), **asks)


def test_a_mask_that_asks_for_a_gradient_is_refused() -> None:
    maps, labels = torch.randn(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="mask: got a tensor that requires a gradient"):
        LoMixLoss(3, 1)(maps, labels, mask=torch.rand(1, 4, 4, requires_grad=True))


@pytest.mark.parametrize("impl", NATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("largest", [9e19, 1.1e20, 1.1e-20, 9e-21, 1e37, 1e-38])
def test_weights_of_pixels_that_float32_cannot_sum_are_refused(largest: float, dtype: torch.dtype, impl: str) -> None:
    torch.manual_seed(0)
    maps, labels = [torch.randn(1, 3, 8, 8, requires_grad=True)], torch.randint(3, (1, 8, 8))
    weights = torch.full((1, 8, 8), largest, dtype=dtype)
    weights[0, 0, 0] = 0
    criterion = LoMixLoss(3, 1, impl=impl, lambda_dice=0.0)
    if not 1e-20 <= largest <= 1e20:
        with pytest.raises(ValueError, match=r"weight_map: got .* as the largest weight, expected 0 or 1e-20 to 1e"):
            criterion(maps, labels, weight_map=weights)
        return
    found, right = criterion(maps, labels, weight_map=weights), criterion(maps, labels, weight_map=weights != 0)
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(torch.autograd.grad(found, maps), torch.autograd.grad(right, maps))


def test_maps_that_are_no_list_are_told_so() -> None:
    maps = [torch.randn(1, 3, 4, 4, requires_grad=True) for _ in range(3)]
    with pytest.raises(ValueError, match="all of them in one list"):
        LoMixLoss(3, 3)(*maps, torch.zeros(1, 4, 4, dtype=torch.long))


def test_a_nested_tensor_of_logits_is_refused_by_name() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([torch.randn(3, 4, 4)] * 2)
    with pytest.raises(TypeError, match="logits: got a nested tensor, expected a dense tensor"):
        LoMixLoss(3, 1)(nested, torch.zeros(2, 4, 4, dtype=torch.long))


def test_a_batch_of_gradients_is_refused() -> None:
    z, labels = torch.randn(1, 3, 4, 4, requires_grad=True), torch.zeros(1, 4, 4, dtype=torch.long)
    losses = LoMixLoss(3, 2, order="coarse_to_fine").map_losses([z, z], labels)
    with pytest.raises(RuntimeError, match=r"lomix_fast: got a transform of torch\.func.*batch of gradients"):
        torch.autograd.grad(losses, z, torch.eye(len(losses)), is_grads_batched=True)
