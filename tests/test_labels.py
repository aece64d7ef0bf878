"""Labels as class numbers: what counts as a label, and what a bad one does where raising is not possible."""

from __future__ import annotations

import pytest
import torch
from common import BACKENDS, NATIVE

import lomix_fast.labels
from lomix_fast import map_stats
from lomix_fast.labels import class_index, poison
from lomix_fast.plan import MixPlan

TYPES = "uint8 int8 int16 int32 int64 uint16 uint32 uint64 float16 bfloat16 float32 float64"


@pytest.mark.parametrize("dtype", [getattr(torch, name) for name in TYPES.split()], ids=str)
def test_every_number_type(dtype: torch.dtype) -> None:
    labels = torch.tensor([[0, 1, 2], [2, 1, 0]])
    index, invalid = class_index(labels.to(dtype), 3)
    assert index.dtype == torch.int64 and torch.equal(index, labels) and invalid is None


def test_bool() -> None:
    index, _ = class_index(torch.tensor([[True, False]]), 2)
    assert index.tolist() == [[1, 0]]


@pytest.mark.parametrize("value", [-1, 3, 0.5, 2.999, float("nan"), float("-inf")])
def test_a_bad_label_raises_where_it_stands(value: float) -> None:
    labels = torch.zeros(2, 4, 5, dtype=torch.float64)
    labels[1, 2, 3] = value
    with pytest.raises(ValueError, match=r"target: got the label .* at index \(1, 2, 3\)"):
        class_index(labels, 3)


def test_poison_makes_the_bad_sample_nan_and_its_gradient_too() -> None:
    """What a device without a cheap way to raise does; the mask is made by hand, as this machine may have none."""
    stats = torch.randn(3, 2, 5, requires_grad=True)
    invalid = torch.zeros(3, 4, 4, dtype=torch.bool)
    invalid[1, 0, 3] = True
    spoilt = poison(stats, invalid)
    assert spoilt[1].isnan().all() and torch.equal(spoilt[[0, 2]], stats[[0, 2]])
    (grad,) = torch.autograd.grad(spoilt.sum(), stats)
    assert grad[1].isnan().all() and (grad[[0, 2]] == 1).all()


def test_poison_without_a_mask_is_the_identity() -> None:
    stats = torch.randn(1, 1, 3)
    assert poison(stats, None) is stats


def test_on_the_meta_device_bad_labels_are_masked_not_raised() -> None:
    index, invalid = class_index(torch.zeros(2, 3, dtype=torch.int64, device="meta"), 3)
    assert invalid is not None and invalid.shape == index.shape == (2, 3) and invalid.dtype == torch.bool


@pytest.mark.parametrize("impl", [name for name in BACKENDS if name != "cpu"])
def test_a_bad_label_elsewhere_than_cpu_spoils_its_sample_only(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same code path as on a GPU, entered by forbidding the host to look at the labels."""
    monkeypatch.setattr("lomix_fast.labels.may_look", lambda device: False)
    logits = [torch.randn(2, 3, 4, 4, requires_grad=True)]
    target = torch.randint(3, (2, 4, 4))
    target[1, 2, 2] = 9
    stats, _ = map_stats(logits, target, MixPlan.create(1, ()), impl=impl)
    assert stats[1].isnan().all() and stats[0].isfinite().all()
    (grad,) = torch.autograd.grad(stats.sum(), logits)
    assert grad[1].isnan().all() and grad[0].isfinite().all()


def test_float_labels_with_fractions_are_bad_elsewhere_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lomix_fast.labels.may_look", lambda device: False)
    index, invalid = class_index(torch.tensor([[0.0, 0.5, 2.0, 3.0, -1.0]]), 3)
    assert invalid is not None and invalid.tolist() == [[False, True, False, True, True]]
    assert index.tolist() == [[0, 0, 2, 0, 0]]


@pytest.mark.parametrize("value, may_look", [("1", True), ("0", False), (None, False)])
def test_debugging_lets_the_host_look(value: str | None, may_look: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is None:
        monkeypatch.delenv("LOMIX_FAST_DEBUG", raising=False)
    else:
        monkeypatch.setenv("LOMIX_FAST_DEBUG", value)
    assert lomix_fast.labels.may_look(torch.device("meta")) is may_look and lomix_fast.labels.may_look(
        torch.device("cpu")
    )


@pytest.mark.parametrize("impl", NATIVE)
@pytest.mark.parametrize(
    "dtype, ignore, label", [(torch.uint8, -100, 156), (torch.int8, 255, -1), (torch.int16, 65535, -1)]
)
def test_an_ignored_label_that_the_dtype_cannot_hold_ignores_nothing(dtype, ignore, label, impl: str) -> None:
    """In the arithmetic of the dtype the two are equal; a label that is no class must not vanish that way."""
    labels = torch.zeros(1, 2, 2, dtype=dtype)
    labels[0, 0, 1] = label
    with pytest.raises(ValueError, match=f"target: got the label {label} at index"):
        map_stats([torch.randn(1, 3, 2, 2)], labels, MixPlan.create(1, ()), ignore_index=ignore, impl=impl)
