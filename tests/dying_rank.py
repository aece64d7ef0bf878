"""One rank of two, started by test_distributed.py; the second one stops taking part after the first step.

MASTER_ADDR=... MASTER_PORT=... RANK=... WORLD_SIZE=2 python tests/dying_rank.py exit|stall SECONDS
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from lomix_fast import LoMixLoss

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=float(sys.argv[2])))
    criterion = LoMixLoss(3, 2, weighting="fixed", operators=("add",), process_group="world")
    logits, target = [torch.randn(1, 3, 4, 4), torch.randn(1, 3, 8, 8)], torch.randint(3, (1, 8, 8))
    criterion(logits, target)
    print("first step done", flush=True)
    if dist.get_rank() == 1:
        if sys.argv[1] == "stall":
            time.sleep(3600)
        os._exit(1)
    criterion(logits, target)
    print("second step done", flush=True)
