"""Exceptions as results: memory that runs out, and one line for a report."""

from __future__ import annotations

import torch


class DoesNotFitError(MemoryError):
    """A step needs more memory than there is."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU, in torch's allocator for the CPU or in oneDNN."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    words = ("out of memory", "not enough memory", "allocate memory")  # the last is Linux's, of a CPU, and oneDNN's
    return isinstance(error, RuntimeError) and any(word in text for word in words)


def one_line(error: BaseException) -> str:
    """Type and message of an exception in one line of at most 600 characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 600 else f"{text[:597]}..."
