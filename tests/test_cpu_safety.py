"""The C++ entry points survive what cannot come through `map_stats`: changed labels, and calls past its checks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lomix_fast import LoMixLoss, MixPlan, available_backends

pytestmark = pytest.mark.skipif(
    available_backends()["cpu"] != "usable", reason=f"the cpu backend cannot run: {available_backends()['cpu']}"
)


def test_labels_overwritten_before_backward_write_nowhere_else() -> None:
    """numpy can change the labels behind autograd's back; the pixels concerned then have no label at all."""
    labels = np.zeros((2, 64, 64), np.uint8)
    logits = [torch.randn(2, 3, n, n, requires_grad=True) for n in (16, 64)]
    loss = LoMixLoss(3, 2, impl="cpu")(logits, torch.from_numpy(labels))
    labels[:] = 255
    loss.backward()
    assert all(z.grad is not None and z.grad.isfinite().all() for z in logits)


def test_subnormal_numbers_are_what_they_were_afterwards() -> None:
    """The kernels flush them to zero; threads that have run a kernel must not go on doing so."""
    torch.set_num_threads(2)
    logits = [torch.randn(2, 3, n, n, requires_grad=True) for n in (64, 256)]
    LoMixLoss(3, 2, impl="cpu")(logits, torch.randint(3, (2, 256, 256))).backward()
    assert (torch.full((1 << 20,), 1e-40) * 2 > 0).all()


def arguments(**changes: Any) -> list[Any]:
    plan = MixPlan.create(2)
    given: dict[str, Any] = {
        "logits": [torch.randn(2, 3, 4, 4), torch.randn(2, 3, 8, 8)],
        "target": torch.randint(3, (2, 8, 8)),
        "weight_map": None,
        "ce_weight": None,
        "cat_weight": torch.randn(2, 3, 3),
        "cat_bias": torch.randn(1, 3),
        "awf_weight": torch.randn(2, 3),
        "awf_bias": torch.randn(2),
        "maps": list(plan.encoded),
        "squared": True,
        "bounded": False,
        "sigmoid": False,
        "weighted_ce": True,
        "ignore_index": None,
        "label_smoothing": 0.0,
    }
    return list((given | changes).values())


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"logits": []}, "logits: got 0 tensors"),
        ({"logits": [torch.randn(2, 3, 4, 4)] * 9}, "logits: got 9 tensors"),
        ({"logits": [torch.randn(2, 3)]}, "logits[0]: got shape [2, 3]"),
        ({"logits": [torch.randn(2, 3, 4, 4), torch.randn(2, 4, 8, 8)]}, "logits: got"),
        ({"target": torch.randint(3, (1, 8, 8))}, "target: got"),
        ({"target": torch.zeros(2, 8, 8)}, "target: got Float, expected bool, uint8"),
        ({"target": torch.zeros(2, 2, 8, 8)}, "target: got torch.FloatTensor [2, 2, 8, 8], expected class numbers"),
        ({"sigmoid": True}, "target: got class numbers, expected values [B, C, *full] under sigmoid"),
        ({"target": torch.zeros(2, 3, 8, 8), "ignore_index": 1}, "ignore_index: got 1 with a target of 3 values"),
        ({"target": torch.full((2, 3, 8, 8), 1.5)}, "target: got the value 1.5 at index (0, 0, 0, 0), expected shares"),
        ({"target": torch.full((2, 3, 8, 8), torch.nan)}, "target: got the value nan at index (0, 0, 0, 0)"),
        ({"target": torch.full((2, 8, 8), 3)}, "target: got the label 3 at index (0, 0, 0), expected labels in [0, 3)"),
        ({"label_smoothing": 2.0}, "label_smoothing: got 2, expected 0 to 1"),
        (
            {"label_smoothing": 0.1, "sigmoid": True, "target": torch.zeros(2, 3, 8, 8)},
            "label_smoothing: got 0.1 under sigmoid, expected 0",
        ),
        ({"logits": [torch.zeros(2, 3, 4, 4, dtype=torch.int64)] * 2}, "logits: got Long, expected float16"),
        ({"weight_map": torch.full((2, 8, 8), -1.0)}, "weight_map: got the weight -1 at index (0, 0, 0)"),
        ({"weight_map": torch.ones(2, 8, 7)}, "weight_map: got shape [2, 8, 7] on cpu, expected [2, 8, 8]"),
        (
            {"weight_map": torch.ones(2, 8, 8).to(torch.complex64)},
            "target or weight_map: got ComplexFloat, expected bool",
        ),
        ({"ce_weight": torch.ones(2)}, "ce_weight: got shape [2], expected [3]"),
        ({"cat_weight": torch.randn(2, 3, 2)}, "cat_weight: got shape [2, 3, 2], expected [2, 3, 3]"),
        ({"cat_bias": None}, "cat_weight and cat_bias: got None"),
        ({"awf_weight": torch.randn(1, 3)}, "awf_weight: got shape [1, 3], expected [2, 3]"),
        ({"maps": [3, 3, 1, 0]}, "maps: got rows 1 and 0 for operator 3 with members 3"),
        ({"maps": [4, 3, 0, 1]}, "maps: got rows 0 and 1 for operator 4 with members 3"),
        ({"maps": [4, 3, 0, 2**63 - 2]}, "maps: got rows 0 and 9223372036854775806 for operator 4"),
        ({"maps": [1, 3, 2**17, 0]}, "maps: got rows 131072 and 0 for operator 1"),
        ({"maps": [0, 1, -1, -1] * 513}, "maps: got 513, expected at most 512"),
        ({"awf_bias": None}, "awf_weight and awf_bias: got None"),
        (
            {"target": torch.zeros(2, 0, 8, dtype=torch.int64)},
            "target: got shape [2, 0, 8], expected at least one pixel",
        ),
        ({"logits": [torch.randn(2, 3, 4, 0), torch.randn(2, 3, 8, 8)]}, "logits: got shape [2, 3, 4, 0], expected at"),
        ({"maps": [0, 1, -1]}, "maps: got 3 integers"),
        ({"maps": [9, 1, -1, -1]}, "maps: got operator 9"),
        ({"maps": [1, 4, 0, 0]}, "maps: got operator 1 with members 4"),
        ({"maps": [0, 3, -1, -1]}, "maps: got operator 0 with members 3"),
        ({"maps": [2, 1, 0, 0]}, "maps: got operator 2 with members 1"),
        ({"maps": [1, 3, -1, 0]}, "maps: got operator 1 with members 3 of subset -1"),
        ({"maps": [1, 3, 0, 0, 2, 3, 0, 0, 1, 3, 0, 0]}, "maps: got operator 1 with members 3 twice"),
        ({"target": torch.zeros(2, 8, 8, dtype=torch.uint16)}, "target: got UInt16, expected bool, uint8"),
        (
            {"awf_bias": torch.zeros(2, dtype=torch.int64)},
            "awf_bias: got torch.LongTensor on cpu, expected floats",
        ),
    ],
)
def test_raw_calls_are_checked(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011, the message is compared below without its pattern signs
        torch.ops.lomix_fast_cpp.map_stats_forward(*arguments(**changes))
    assert words in str(caught.value)


def test_maps_of_the_same_members_have_the_same_parameters() -> None:
    """The backward pass takes them together."""
    logits = [torch.randn(2, 3, n, n) for n in (2, 4, 8)]
    parameters = [torch.randn(9, 3, 3), torch.randn(4, 3), torch.randn(9, 3), torch.randn(9)]
    target = torch.randint(3, (2, 8, 8))
    with pytest.raises(ValueError, match="maps: got rows 0 and 4 for members 3, expected those of its other maps"):
        torch.ops.lomix_fast_cpp.map_stats_forward(
            logits, target, None, None, *parameters, [3, 3, 0, 0, 4, 3, 0, 4], True, False, False, True, None, 0.0
        )


def test_members_have_rows_of_their_own() -> None:
    """The gradients of W, b, u and v of two subsets would otherwise overwrite each other."""
    logits = [torch.randn(2, 3, n, n) for n in (2, 4, 8)]
    parameters = [torch.randn(9, 3, 3), torch.randn(4, 3), torch.randn(9, 3), torch.randn(9)]
    target = torch.randint(3, (2, 8, 8))
    with pytest.raises(
        ValueError, match="maps: got rows 1 and 1 for members 5, expected rows that no other members have"
    ):
        torch.ops.lomix_fast_cpp.map_stats_forward(
            logits, target, None, None, *parameters, [4, 3, 0, 0, 4, 5, 1, 1], True, False, False, True, None, 0.0
        )


def test_raw_backward_checks_the_shape_of_its_gradient() -> None:
    grad: Tensor = torch.zeros(2, 5, 7)
    with pytest.raises(ValueError, match=r"grad_stats: got shape \[2, 5, 7\], expected \[2, 6, 7\]"):
        torch.ops.lomix_fast_cpp.map_stats_backward(grad, *arguments())
