"""What a contender hands over once it is set up: something to run forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Prepared:
    """A contender set up for one problem.

    Attributes:
        loss: computes the total anew, a scalar with its graph.
        leaves: every tensor that a backward pass gives a gradient, by the names of `Problem.leaves`.
    """

    loss: Callable[[], Tensor]
    leaves: dict[str, Tensor]

    def clear(self) -> None:
        """Drop all gradients, as optimizer.zero_grad does."""
        for leaf in self.leaves.values():
            leaf.grad = None

    def gradient_bytes(self) -> int:
        """Bytes of all gradients there are now."""
        return sum(leaf.grad.nbytes for leaf in self.leaves.values() if leaf.grad is not None)
