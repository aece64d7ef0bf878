"""The C++ entry points survive what cannot come through `map_stats`: changed labels, and calls past its checks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lomix_fast import LoMixLoss, MixPlan, available_backends

pytestmark = pytest.mark.skipif(
    available_backends()["cpu"] is not None, reason=f"the cpu backend cannot run: {available_backends()['cpu']}"
)


def test_labels_overwritten_before_backward_write_nowhere_else() -> None:
    """numpy can change the labels behind autograd's back; the pixels concerned then have no label at all."""
    labels = np.zeros((2, 64, 64), np.uint8)
    logits = [torch.randn(2, 3, n, n, requires_grad=True) for n in (16, 64)]
    loss = LoMixLoss(3, 2, impl="cpu")(logits, torch.from_numpy(labels))
    labels[:] = 255
    loss.backward()
    assert all(z.grad is not None and z.grad.isfinite().all() for z in logits)


def arguments(**changes: Any) -> list[Any]:
    plan = MixPlan.create(2)
    given: dict[str, Any] = {
        "logits": [torch.randn(2, 3, 4, 4), torch.randn(2, 3, 8, 8)],
        "target": torch.randint(3, (2, 8, 8)),
        "cat_weight": torch.randn(2, 3, 3),
        "cat_bias": torch.randn(1, 3),
        "awf_weight": torch.randn(2, 3),
        "awf_bias": torch.randn(2),
        "maps": list(plan.encoded),
        "squared": True,
    }
    return list((given | changes).values())


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"logits": []}, "logits: got 0 tensors"),
        ({"logits": [torch.randn(2, 3, 4, 4)] * 7}, "logits: got 7 tensors"),
        ({"logits": [torch.randn(2, 3)]}, "logits[0]: got shape [2, 3]"),
        ({"logits": [torch.randn(2, 3, 4, 4), torch.randn(2, 4, 8, 8)]}, "logits: got"),
        ({"target": torch.randint(3, (1, 8, 8))}, "target: got"),
        ({"target": torch.zeros(2, 8, 8)}, "target: got"),
        ({"cat_weight": torch.randn(2, 3, 2)}, "cat_weight: got shape [2, 3, 2], expected [2, 3, 3]"),
        ({"cat_bias": None}, "cat_weight and cat_bias: got None"),
        ({"awf_weight": torch.randn(1, 3)}, "awf_weight: got shape [1, 3], expected [2, 3]"),
        ({"awf_bias": None}, "awf_weight and awf_bias: got None"),
        ({"maps": [0, 1, -1]}, "maps: got 3 integers"),
        ({"maps": [9, 1, -1, -1]}, "maps: got operator 9"),
        ({"maps": [1, 4, 0, 0]}, "maps: got operator 1 with members 4"),
    ],
)
def test_raw_calls_are_checked(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011, the message is compared below without its pattern signs
        torch.ops.lomix_fast_cpp.map_stats_forward(*arguments(**changes))
    assert words in str(caught.value)


def test_raw_backward_checks_the_shape_of_its_gradient() -> None:
    grad: Tensor = torch.zeros(2, 5, 7)
    with pytest.raises(ValueError, match=r"grad_stats: got shape \[2, 5, 7\], expected \[2, 6, 7\]"):
        torch.ops.lomix_fast_cpp.map_stats_backward(grad, *arguments())
