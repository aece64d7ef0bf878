"""The code of docs/training.md, run from top to bottom as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lomix_fast import LoMixLoss, transfer, with_loss

PAGE = Path(__file__).parent.parent / "docs" / "training.md"


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.coarse, self.fine = nn.Conv2d(1, 3, 2, stride=2), nn.Conv2d(1, 3, 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.coarse(images), self.fine(images)]


@pytest.mark.filterwarnings("error:LoMixLoss. its parameters")
def test_the_code_of_the_training_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 8
    torch._dynamo.reset()
    # The real compiler takes a minute; that compiled code works is what other tests are about.
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **options: compiler(*a, backend="aot_eager", **options))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    images, target = torch.randn(2, 1, 8, 8), torch.randint(3, (2, 8, 8))
    names = {
        "AveragedModel": AveragedModel,
        "DistributedDataParallel": DistributedDataParallel,
        "LoMixLoss": LoMixLoss,
        "batches": [(images, target)] * 3,
        "device": "cpu",
        "dtype": torch.bfloat16,
        "get_ema_multi_avg_fn": get_ema_multi_avg_fn,
        "images": images,
        "network": Network(),
        "nn": nn,
        "path": tmp_path / "checkpoint.pt",
        "target": target,
        "torch": torch,
        "transfer": transfer,
        "with_loss": with_loss,
    }
    try:
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
    finally:
        dist.destroy_process_group()
    assert names["other"].alpha.shape == (3 + 2 * 4,) and torch.isfinite(names["loss"])
