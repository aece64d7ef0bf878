"""Class weights of cross-entropy keep their meaning in every dtype and at every scale."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lomix_fast import LoMixLoss, MixPlan, lomix_loss

RATIO = [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("factor", [1e-300, 1e-40, 1e-12, 1.0, 1e5, 1e37, 1e300])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_common_factor_cancels(dtype: torch.dtype, factor: float) -> None:
    torch.manual_seed(0)
    z, target = torch.randn(2, 4, 16, 16).to(dtype), torch.randint(4, (2, 16, 16))
    wanted = F.cross_entropy(z.double(), target, weight=torch.tensor(RATIO, dtype=torch.float64)).item()
    weights = [factor * w for w in RATIO]
    options = {"lambda_ce": 1.0, "lambda_dice": 0.0, "ce_weight": weights}
    criterion = LoMixLoss(4, 1, supervision="last_layer", **options).to(dtype)
    alone = lomix_loss([z], target, torch.ones(1), MixPlan.create(1, ()), **options)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for found in (criterion([z], target), alone):
        assert found.item() == pytest.approx(wanted, rel=tolerance)
    assert criterion.ce_weight.tolist() == weights


def test_weights_of_zero_are_no_number_to_divide_by() -> None:
    z, target = torch.randn(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long)
    criterion = LoMixLoss(3, 1, supervision="last_layer", lambda_dice=0.0, ce_weight=[0, 0, 0])
    assert criterion([z], target).item() == 0


def test_a_factor_of_the_positives_stays_under_casts() -> None:
    torch.manual_seed(0)
    z, target = torch.randn(2, 2, 8, 8).half(), torch.randint(2, (2, 2, 8, 8)).float()
    options = {"sigmoid": True, "lambda_ce": 1.0, "lambda_dice": 0.0, "ce_weight": [1e-12, 1e5]}
    criterion = LoMixLoss(2, 1, supervision="last_layer", **options).half()
    positive = torch.tensor([1e-12, 1e5], dtype=torch.float64).view(2, 1, 1)
    wanted = F.binary_cross_entropy_with_logits(z.double(), target.double(), pos_weight=positive)
    assert criterion([z], target).item() == pytest.approx(wanted.item(), rel=1e-6)
