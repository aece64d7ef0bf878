"""One step of the loss, for tools that watch kernels: python -m benchmarks.gpu_day.one_step BACKEND CASE...

Each case takes two steps, of which a profiler sees the second alone when it is told not to start by itself. A case is
one of `lomix_fast.testing.cases`; with "_small" behind its name a benchmark's is shrunk. Exit status 1 with a message
where a loss or a gradient is not finite.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from lomix_fast import LoMixLoss, UntrainedLossWarning
from lomix_fast.testing.cases import Case, case

from ..cases import shrunk
from ..problem import Problem, make_problem
from .stand_in import StandInCuda, install, rehearsing

_SMALL = "_small"


def named(name: str) -> Case:
    """The case of this name, or a shrunk one.

    Raises:
        KeyError: there is none.
    """
    if name.endswith(_SMALL):
        return shrunk(case(name.removesuffix(_SMALL)), longest=16)
    return case(name)


def prepare(problem: Problem, backend: str, device: str) -> tuple[LoMixLoss, list[torch.Tensor], torch.Tensor]:
    """The loss with its parameters, logits that want gradients, and the target, all on a device."""
    one = problem.case
    criterion = LoMixLoss(
        one.classes,
        len(one.native),
        operators=one.operators,
        sigmoid=one.sigmoid,
        squared_pred=one.squared,
        impl=backend,
        **one.rule,
    )
    criterion.to(device=device, dtype=problem.alpha.dtype).load_state_dict(problem.parameters)
    logits = [z.to(device).requires_grad_() for z in problem.logits]
    return criterion, logits, problem.target.to(device)


@contextlib.contextmanager
def watched(cuda: Any) -> Iterator[None]:
    """What a profiler that waits for a start is to see."""
    tell = getattr(cuda, "cudart", None)  # a stand-in has none
    if tell is not None:
        tell().cudaProfilerStart()
    try:
        yield
    finally:
        cuda.synchronize()
        if tell is not None:
            tell().cudaProfilerStop()


def main(arguments: list[str]) -> int:
    """Do the steps; return the exit status."""
    backend, *names = arguments
    if rehearsing():
        install()
    cuda = StandInCuda() if rehearsing() else torch.cuda
    device = "cpu" if rehearsing() else "cuda"
    warnings.filterwarnings("ignore", category=UntrainedLossWarning)
    for name in names:
        criterion, logits, target = prepare(make_problem(named(name)), backend, device)
        leaves = [*logits, *criterion.parameters()]

        def step(criterion: Any = criterion, logits: Any = logits, target: Any = target) -> torch.Tensor:
            loss: torch.Tensor = criterion(logits, target)
            loss.backward()
            return loss.detach()

        step()
        cuda.synchronize()
        for leaf in leaves:
            leaf.grad = None
        with watched(cuda):
            loss = step()
        finite = all(bool(x.isfinite().all()) for x in (loss, *(leaf.grad for leaf in leaves if leaf.grad is not None)))
        print(f"{backend} {name} loss {float(loss):.6g}", flush=True)
        if not finite:
            print(f"{backend} {name}: loss or gradients are not finite", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
