"""One step of the loss, for tools that watch kernels: python -m benchmarks.gpu_day.one_step BACKEND CASE...

Each case takes two steps, of which a profiler sees the second alone when it is told not to start by itself. A case is
one of `lomix_fast.testing.cases`; with "_small" behind its name a benchmark's is shrunk. Exit status 1 with a message
where a loss or a gradient is not finite.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

from lomix_fast.testing.cases import Case, case

from ..cases import shrunk
from ..contenders import contender
from ..gate import results
from ..problem import make_problem
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
    device = torch.device("cpu" if rehearsing() else "cuda:0")
    for name in names:
        prepared = contender(backend).prepare(make_problem(named(name)).to(device))
        prepared.loss().backward()
        cuda.synchronize()
        prepared.clear()
        with watched(cuda):
            loss = prepared.loss()
            loss.backward()
        finite = all(bool(value.isfinite().all()) for value in results(loss, prepared).values())
        print(f"{backend} {name} loss {float(loss):.6g}", flush=True)
        if not finite:
            print(f"{backend} {name}: loss or gradients are not finite", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
