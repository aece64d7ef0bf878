"""Compile every kernel for every architecture, write what came out: `python -m benchmarks.gpu`.

CUDA kernels come after Triton's: compiled by nvcc, then their machine code executed on the CPU and counted.
"""

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
from .cuda_build import nvcc
from .cuda_compiled import judge_cuda
from .cuda_report import CudaReport, make_cuda_report, read_cuda_report
from .table import judge, name, read_csv, write_csv
from .workloads import PROBLEMS, count_problems

OK, BROKEN, USAGE = 0, 1, 2
_ROOT = Path(__file__).resolve().parents[2]
CSV = _ROOT / "benchmarks" / "results" / "gpu-compiled.csv"
EXECUTED = CSV.with_name("gpu-executed.json")
PAGE = _ROOT / "docs" / "gpu-model.md"
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
    parser.add_argument(
        "--cuda", action="store_true", help="only the CUDA kernels anew; figures of Triton's are the saved ones"
    )
    parser.add_argument("--no-model", action="store_true", help="leave out the model, whose counts take minutes")
    parser.add_argument("--workers", type=int, default=2, help="processes that compile at once (default 2)")
    parser.add_argument("--csv", type=Path, default=CSV, help="file of what the compilers made")
    parser.add_argument("--executed", type=Path, default=EXECUTED, help="file of counted operations")
    parser.add_argument("--cuda-csv", type=Path, help="file of what nvcc made; default: cuda-compiled.csv beside --csv")
    parser.add_argument(
        "--counted", type=Path, help="file of counted machine code; default: cuda-counted.json beside it"
    )
    parser.add_argument("--page", type=Path, default=PAGE, help="Markdown file")
    arguments = parser.parse_args(given)
    if arguments.workers < 1:
        parser.error(f"--workers: got {arguments.workers}, expected at least 1; leave it out for 2")
    if importlib.util.find_spec("triton") is None:
        parser.error("triton: got none, expected triton >= 3.5; run: pip install triton")
    if not arguments.saved and os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET: got 1, expected 0, since interpreted kernels cannot be compiled; unset it")
    chosen = [f"--{name}" for name in ("saved", "sample", "cuda") if getattr(arguments, name)]
    if len(chosen) > 1:
        parser.error(f"{chosen[1]}: got it with {chosen[0]}, expected one of them; leave the other out")
    if arguments.cuda and not nvcc()[0]:
        parser.error("--cuda: got no nvcc, expected one on PATH or in CUDA_HOME; install the CUDA toolkit")
    return arguments


def main(given: Sequence[str] | None = None) -> int:
    """Compile, write, judge; returns the exit status: 0, with --check 1 where a promise is broken, 2 for bad usage."""
    arguments = _arguments(given)
    from .page import write_page  # brings the kernels, and with them triton

    if arguments.saved or arguments.cuda:
        compiled, triton = read_csv(arguments.csv)
    else:
        compiled = compile_all(SAMPLE if arguments.sample else all_variants(), arguments.workers)
        triton = importlib.metadata.version("triton")
        if not arguments.sample:
            write_csv(arguments.csv, compiled, triton)
            print(arguments.csv)
    cuda = None if arguments.sample else _cuda_report(arguments)
    verdicts = judge(compiled)
    all_verdicts = [*verdicts, *(judge_cuda(cuda.compiled) if cuda else [])]
    broken = [verdict for verdict in all_verdicts if verdict.kept is False]
    for verdict in all_verdicts:
        word = {True: "kept", False: "broken", None: "not judged"}[verdict.kept]
        print(f"{word}: {verdict.promise}: {verdict.figure}")
    if not arguments.sample:
        executed = None
        if not arguments.no_model:
            is_saved = arguments.saved or arguments.cuda
            executed = load_counts(arguments.executed) if is_saved else count_problems()
            save_counts(arguments.executed, executed)
        write_page(arguments.page, compiled, verdicts, triton, executed, cuda)
        print(arguments.page)
    return BROKEN if arguments.check and broken else OK


def _cuda_report(arguments: argparse.Namespace) -> CudaReport | None:
    """Figures of the CUDA kernels: made anew, or the saved ones where nothing is compiled or nvcc is missing."""
    csv = arguments.cuda_csv or arguments.csv.with_name("cuda-compiled.csv")
    counted = arguments.counted or csv.with_name("cuda-counted.json")
    if not arguments.saved:
        if nvcc()[0]:
            return make_cuda_report(csv, None if arguments.no_model else counted, arguments.workers)
        print("nvcc: got none, so figures of the CUDA kernels are the saved ones", file=sys.stderr)
    if not csv.exists():
        print(f"{csv}: not there, so figures of the CUDA kernels are left out", file=sys.stderr)
        return None
    return read_cuda_report(csv, None if arguments.no_model else counted)


if __name__ == "__main__":
    sys.exit(main())
