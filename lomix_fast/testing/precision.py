"""float32 that is float32: no TF32 in matrix products and convolutions on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Switch TF32 off for the time of a `with` block and put both settings back as they were.

    TF32 keeps 10 bits of a float32 mantissa. Plain PyTorch is the yardstick of every test, and a yardstick that coarse
    would let anything pass; convolutions use TF32 by default where the GPU has it.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
