"""What the tests of examples/train_3d.py share: tiny settings, and the example run in this process."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import json
from pathlib import Path
from typing import Any

import torch
import train_3d
from torch import Tensor
from train_3d_parts import data
from train_3d_parts.options import Settings
from train_3d_parts.processes import Place

HERE = Place(rank=0, world=1, device=torch.device("cpu"))
WORDS = [
    *("--network", "dynunet", "--patch", "16", "--batch", "2", "--scales", "2", "--filters", "4"),
    *("--resolution", "4", "--device", "cpu"),
]


data.load_head = functools.cache(data.load_head)  # it takes seconds


def put_malloc_back() -> None:
    """Undo, as far as glibc lets one, what makes every large allocation slow after memory has been measured."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD, to where glibc raises it by itself at most


def tiny(**changed: Any) -> Settings:
    """The settings that `WORDS` stand for, some of them changed."""
    same = {"network": "dynunet", "patch": (16, 16, 16), "batch": 2, "scales": 2, "filters": 4, "resolution": 4}
    return Settings(**{**same, **changed})


def train(out: Path, *words: str) -> dict[str, Any]:
    """Run the example in this process and return its report."""
    status = train_3d.main([*WORDS, "--out", str(out), *words])
    put_malloc_back()
    assert status == 0
    return json.loads((out / "report.json").read_text())


def refusal(*words: str) -> str:
    """What the example complains of, ending with status 2."""
    complained = io.StringIO()
    with contextlib.redirect_stderr(complained):
        assert train_3d.main(list(words)) == 2
    return complained.getvalue()


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two checkpoints differ in as much as a bit."""
    if isinstance(a, Tensor):
        return [] if torch.equal(a, b) else [where]
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        return [found for key in a for found in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        return [found for i, pair in enumerate(zip(a, b, strict=True)) for found in differences(*pair, f"{where}/{i}")]
    return [] if a == b else [where]
