"""Faults to rehearse: what a GPU day says when a kernel is wrong, hangs, runs out of memory or takes its process along.

LOMIX_FAST_REHEARSE_FAULT="KIND:CLASSES ..." has the stand-in of the backend "cuda" fail so on problems of that many
classes; KIND is one of `FAULTS`.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

import torch

VARIABLE = "LOMIX_FAST_REHEARSE_FAULT"


def _wrong(result: Any) -> Any:
    stats, target_stats = result
    return 1.001 * stats, target_stats


def _hang(result: Any) -> Any:
    time.sleep(3600)
    return result


def _no_memory(result: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB (rehearsed)")


def _crash(result: Any) -> Any:
    os.abort()


FAULTS = {"wrong": _wrong, "hang": _hang, "memory": _no_memory, "crash": _crash}


def spoil_backends() -> None:
    """Make the backend "cuda" of this process fail as the environment variable says, if it says anything."""
    asked = [one.split(":") for one in os.environ.get(VARIABLE, "").split()]
    if not asked:
        return
    from lomix_fast.backends import BACKENDS

    right, faults = BACKENDS["cuda"], {int(classes): FAULTS[kind] for kind, classes in asked}

    def forward(logits: Any, *rest: Any) -> Any:
        result = right.forward(logits, *rest)
        fault = faults.get(logits[0].shape[1])
        return result if fault is None else fault(result)

    BACKENDS["cuda"] = replace(right, forward=forward)
