"""Compile every kernel for every architecture, write what came out: `python -m benchmarks.gpu`."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from .compiled import Compiled, compile_one
from .counts import load_counts, save_counts
from .table import judge, name, read_csv, write_csv
from .workloads import PROBLEMS, count_problems

OK, BROKEN, USAGE = 0, 1, 2
_ROOT = Path(__file__).resolve().parents[2]
CSV = _ROOT / "benchmarks" / "results" / "gpu-compiled.csv"
EXECUTED = CSV.with_name("gpu-executed.json")
PAGE = _ROOT / "docs" / "gpu.md"
# Each architecture and kernel once, and where registers are scarcest.
SAMPLE = (
    ("gather", "sm_100", 9, 2),
    ("forward", "sm_90", 9, 2),
    ("forward", "sm_80", 16, 3),
    ("backward", "sm_80", 9, 3),
    ("backward", "sm_90", 16, 3),
    ("backward", "gfx942", 9, 3),
    ("forward", "gfx1100", 40, 2),
    ("forward", "sm_120", 4, 3),
)


def all_variants() -> list[tuple[str, str, int, int]]:
    """Kernel, architecture, C and axes of everything reported: the whole list, and what the model's cards need."""
    from lomix_fast.kernels.aot import variants

    listed = [(v.kernel, v.arch, v.classes, v.dims) for v in variants()]
    needed = [
        (kernel, "sm_89", p.classes, p.dims) for p in PROBLEMS.values() for kernel in ("forward", "backward", "gather")
    ]
    needed = [
        ("gather", arch, 9, dims) if kernel == "gather" else (kernel, arch, c, dims) for kernel, arch, c, dims in needed
    ]
    return list(dict.fromkeys([*listed, *needed]))


def compile_all(variants: Sequence[tuple[str, str, int, int]], workers: int) -> list[Compiled]:
    """Compile variants in worker processes, with a line on stderr for each; in the order given.

    Args:
        variants: kernel, architecture, C and axes of each.
        workers: processes at a time.
    """
    start, done = time.perf_counter(), {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(compile_one, *variant): variant for variant in variants}
        for future in as_completed(waiting):
            one = done[waiting[future]] = future.result()
            what = one.error or f"{one.registers} registers, {one.spills} spills, {one.seconds:.1f} s"
            passed = time.perf_counter() - start
            print(f"[{len(done)}/{len(variants)}, {passed:.0f} s] {name(one)}: {what}", file=sys.stderr, flush=True)
    return [done[variant] for variant in variants]


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--sample", action="store_true", help=f"only {len(SAMPLE)} variants; writes no file")
    parser.add_argument("--check", action="store_true", help="exit status 1 when a promise does not hold")
    parser.add_argument(
        "--saved", action="store_true", help="compile and count nothing: write the page of saved figures"
    )
    parser.add_argument("--no-model", action="store_true", help="leave out the model, whose counts take minutes")
    parser.add_argument("--workers", type=int, default=2, help="processes that compile at once (default 2)")
    parser.add_argument("--csv", type=Path, default=CSV, help="file of what the compilers made")
    parser.add_argument("--executed", type=Path, default=EXECUTED, help="file of counted operations")
    parser.add_argument("--page", type=Path, default=PAGE, help="Markdown file")
    arguments = parser.parse_args(given)
    if arguments.workers < 1:
        parser.error(f"--workers: got {arguments.workers}, expected at least 1; leave it out for 2")
    if importlib.util.find_spec("triton") is None:
        parser.error("triton: got none, expected triton >= 3.5; run: pip install triton")
    if not arguments.saved and os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET: got 1, expected 0, since interpreted kernels cannot be compiled; unset it")
    if arguments.saved and arguments.sample:
        parser.error("--sample: got it with --saved, which compiles nothing; give one of the two")
    return arguments


def main(given: Sequence[str] | None = None) -> int:
    """Compile, write, judge; returns the exit status: 0, with --check 1 where a promise is broken, 2 for bad usage."""
    arguments = _arguments(given)
    from .page import write_page  # brings the kernels, and with them triton

    if arguments.saved:
        compiled, triton = read_csv(arguments.csv)
    else:
        compiled = compile_all(SAMPLE if arguments.sample else all_variants(), arguments.workers)
        triton = importlib.metadata.version("triton")
        if not arguments.sample:
            write_csv(arguments.csv, compiled, triton)
            print(arguments.csv)
    verdicts = judge(compiled)
    for verdict in verdicts:
        word = {True: "kept", False: "broken", None: "not judged"}[verdict.kept]
        print(f"{word}: {verdict.promise}: {verdict.figure}")
    if not arguments.sample:
        executed = None
        if not arguments.no_model:
            executed = load_counts(arguments.executed) if arguments.saved else count_problems()
            save_counts(arguments.executed, executed)
        write_page(arguments.page, compiled, verdicts, triton, executed)
        print(arguments.page)
    return BROKEN if arguments.check and any(verdict.kept is False for verdict in verdicts) else OK


if __name__ == "__main__":
    sys.exit(main())
