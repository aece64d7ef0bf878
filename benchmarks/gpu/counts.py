"""Operations that one tile of each pass executes, with a GPU's launch configuration, counted in Triton's interpreter.

`python -m benchmarks.gpu.counts 9 2 32 16 8 4` prints them as JSON; TRITON_INTERPRET=1 has to be set.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

# Large enough for the coarsest scale to have several pixels; only the first tile of it is run.
_IMAGE = {2: (64, 64), 3: (32, 32, 32)}
_IMAGES = ("logits", "grads", "p_target", "p_partial", "p_grad_stats")


@dataclass(frozen=True)
class Executed:
    """One kernel on one tile.

    Attributes:
        pixels: of the tile.
        threads: of the program.
        elements, warps, wavefronts, bytes, touched: see `hooks.Counts`.
        scratch, sums: bytes that a program needs for itself, and that the sums of an item take.
        launches: kernels and PyTorch operations of the whole pass.
    """

    pixels: int
    threads: int
    elements: dict[str, float]
    warps: dict[str, float]
    wavefronts: dict[str, float]
    bytes: dict[str, float]
    touched: int
    scratch: int
    sums: int
    launches: int

    def per_pixel(self, kind: str) -> float:
        """Elements of a kind for each pixel of the tile."""
        return self.elements.get(kind, 0) / self.pixels


@lru_cache(maxsize=16)
def count(classes: int, dims: int, ratios: tuple[int, ...], image: tuple[int, ...] = ()) -> dict[str, Executed]:
    """Run one tile of the forward and of the backward kernel in a process of its own.

    Args:
        classes: C.
        dims: 2 or 3.
        ratios: full size over native size of each scale, coarsest first; L of them.
        image: size of the image; one of the usual size when empty.

    Returns:
        By "forward" and "backward".

    Raises:
        RuntimeError: the process failed; the message is what it wrote to stderr.
    """
    command = [sys.executable, "-m", "benchmarks.gpu.counts", str(classes), str(dims), *map(str, ratios)]
    command += ["--image", *map(str, image)] if image else []
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parents[2]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, timeout=1200)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: Executed(**one) for name, one in found.items()}


def save_counts(path: Path, executed: Mapping[str, Mapping[str, Executed]]) -> None:
    """Write counts by problem and kernel as JSON."""
    plain = {problem: {name: asdict(one) for name, one in kernels.items()} for problem, kernels in executed.items()}
    path.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


def load_counts(path: Path) -> dict[str, dict[str, Executed]]:
    """Read what `save_counts` wrote."""
    plain = json.loads(path.read_text(encoding="utf-8"))
    return {problem: {name: Executed(**one) for name, one in kernels.items()} for problem, kernels in plain.items()}


def _count_here(classes: int, dims: int, ratios: Sequence[int], image: Sequence[int]) -> dict[str, Any]:
    """What `count` runs in the other process."""
    import numpy as np
    import torch
    from lomix_fast.kernels import config, launch
    from lomix_fast.kernels.problem import size_in_space

    from lomix_fast.target import Target
    from lomix_fast.testing.cases import Case, make_inputs

    from .hooks import Counts, counting
    from .official import Traffic

    if not config.interpreted():
        raise SystemExit("TRITON_INTERPRET: got something else, expected 1; set it before python starts")
    native = tuple(tuple(max(1, n // ratio) for n in image) for ratio in ratios)
    case = Case("counted", 1, classes, tuple(image), native)
    inputs, plan = make_inputs(case), case.plan
    card = config.Target("cuda", 90, 132, 32)
    full = size_in_space(image)
    configs = {
        "forward": config.forward_config(card, full, classes),
        "backward": config.backward_config(card, full, classes),
    }
    launch.forward_config = lambda *_: configs["forward"]  # type: ignore[assignment]
    launch.backward_config = lambda *_: configs["backward"]  # type: ignore[assignment]
    needed: list[tuple[int, int]] = []

    def one_tile(batch: int, tiles: int, config: Any, target: Any, scratch: int, sums: int) -> Any:
        needed.append((scratch, sums))
        return launch.Shares(1, 1, 1, 1)

    launch.share_out = one_tile
    arguments = (inputs.logits, Target(inputs.target), list(inputs.parameters.values()), plan)
    out = {}

    def run(name: str, kernel: Any, call: Any) -> Any:
        counts, kernels, dry = Counts(configs[name].warps * 32), 0, False
        before = type(kernel).run

        def place(*positional: Any, **named: Any) -> None:
            given = dict(zip(kernel.arg_names, positional, strict=False)) | named
            for argument, value in given.items():
                where = "scratch" if argument == "p_scratch" else "images" if argument in _IMAGES else "tables"
                for one in value if isinstance(value, tuple) else (value,):
                    if isinstance(one, torch.Tensor):
                        counts.place(where, one.untyped_storage().data_ptr(), one.untyped_storage().nbytes())

        def launched(this: Any, *positional: Any, **named: Any) -> Any:
            """Count operations of this one kernel, not of the small ones that its pass launches besides."""
            nonlocal kernels
            kernels += 1
            if dry:
                return None
            with counting(counts) if this is kernel else contextlib.nullcontext():
                return before(this, *positional, **named)

        kernel.add_pre_run_hook(place)
        type(kernel).run = launched
        try:
            with np.errstate(all="ignore"):  # a group of maps is filled up with empty ones
                result = call()
            # Once more without the kernels: tables are kept from the first call, as in training.
            kernels, dry = 0, True
            with Traffic() as traffic:
                call()
        finally:
            type(kernel).run = before
        scratch, sums = needed[-1]
        shape = {"pixels": configs[name].size, "threads": counts.threads, "scratch": scratch, "sums": sums}
        out[name] = {**shape, "launches": traffic.launches + kernels, **counts.as_dict()}
        return result

    stats, _ = run("forward", launch.statistics_kernel, lambda: launch.forward(*arguments))
    pull = torch.ones_like(stats)
    run("backward", launch.gradients_kernel, lambda: launch.backward(pull, *arguments))
    return out


def main(given: Sequence[str] | None = None) -> int:
    """Print the counts as JSON; returns the exit status."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.counts", description=__doc__)
    parser.add_argument("classes", type=int)
    parser.add_argument("dims", type=int, choices=(2, 3))
    parser.add_argument("ratios", type=int, nargs="+", help="full over native size of each scale, coarsest first")
    parser.add_argument("--image", type=int, nargs="+", help="size of the image")
    arguments = parser.parse_args(given)
    image = arguments.image or _IMAGE[arguments.dims]
    print(json.dumps(_count_here(arguments.classes, arguments.dims, arguments.ratios, image)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
