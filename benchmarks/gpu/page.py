"""docs/gpu-model.md: what the compilers made, and the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from . import cards
from .compiled import Compiled
from .counts import Executed
from .cuda_page import cuda_part
from .cuda_report import CudaReport
from .model import Estimate, all_estimates, worst
from .table import Verdict, class_table, markdown, register_table, shape_table, verdict_table
from .workloads import PROBLEMS

_HEAD = """<!-- Made by `make gpu-report`; changes made here are lost. -->
# The GPU kernels, without a GPU

Everything here comes from compilers, from interpreters and from arithmetic. **No kernel was run on a GPU for this
page**: it says what the kernels are compiled to and what they execute, not how long they take. Triton's kernels come
first, the CUDA kernels after their model.
"""
_COMPILED = """## What the compilers make of them

Compiled by triton {triton} and its ptxas and LLVM, each variant with an empty cache; figures of all of them are in
[gpu-compiled.csv](../benchmarks/results/gpu-compiled.csv). A kernel is compiled for C and for the number of axes. The
number of scales L is an argument at run time: one binary serves L = 1 to 6. The report checks that at each variant: L
is no constant of what was compiled, and a launch does not specialise on its value.

{verdicts}

Time to compile is judged by processor time, the assembler's included: on an idle machine the time that one waits.
Spills of NVIDIA's are loads and stores of local memory (LDL, STL) in the listing, and its stack bytes. AMD keeps
scalar registers that it runs out of in lanes of vector registers; these are not in memory and not counted as spills.

### Registers of a thread
In brackets the programs that fit on a core (SM or CU) by registers, threads and shared memory; **sp** loads and
stores of spilled registers and the bytes of a thread's own memory; `s` AMD's scalar registers kept in vector
registers. Programs have 4 warps.
"""
_CLASSES = """### Instructions in the binary, C = 9
By class, as they stand in the listing, whether executed once or a million times. `compare` has selects, minima and
maxima of floats; `special` exponentials and reciprocals; `lane` AMD's moves between scalar and vector registers.
"""
_EXECUTED = """## What a tile executes

One tile of each kernel, run in Triton's interpreter with the launch configuration that a GPU gets, and counted there.
Operations on single elements for each output pixel; a scalar counts as one. Scratch is the program's own memory in
which interpolated logits and gradients lie; weights are loads of parameters and tables, one address for a whole warp.
A multiply-add counts once. Compilers move what does not change out of loops, so these are upper bounds.
"""
_MODEL = """## Model

A **model**: operations counted above over assumed rates. It leaves out latency, how instructions depend on each
other, bank conflicts, and the scheduler's choices; a kernel that runs few warps on a core, as these do, may be well
below the assumed share of the peak. Figures are for ranking what to improve and for orders of magnitude.

{assumptions}

- Of each rate above our kernels are assumed to reach **{share:.0f} %**; times grow in proportion if it is less.
- A core issues {schedulers} instructions of warps a clock. exp takes {exp} of them, log {log}, a division {divide}.
- Integer, address and branch instructions are not counted but scaled: as many for each float instruction as stand in
  the binary. That overstates them where the loops over pixels have fewer than the code around them; "without
  addresses" is the same model without any.
- Loads and stores take a clock for every 128 bytes of a warp. Scratch that does not fit in L1, with all programs of a
  core, is found there in proportion, and so is what does not fit in L2; stores always go to L2.
- The core with most tiles decides; a launch takes {launch:.0f} us. The loss around the kernels is counted with its
  launches.
- float32 matrix products are three of tf32 on H100 and A100, float32 multiply-adds on RTX 4090.
- The gather kernel counts with the memory that it reads and writes.

{ours}

In brackets the resource that takes longest: issue slots, float32 lanes, special functions, loads and stores of the
core (L1), matrix units, L2 or the card's memory.

### The literal loss in the same model
What `lomix_fast.testing.official_style` does, counted on a small problem: bytes of inputs and outputs of every
operation over the card's **full** memory rate, {launch:.0f} us for each launch, {sync:.0f} us for each wait of the
host (one a class and map). "At least" lets launches hide behind traffic or traffic behind launches. Operations that
are several launches count as one, and traffic that L2 would catch counts as memory traffic, so small batches may do
better than their traffic. Memory is the official code's formula, its maps alone.

{official}
"""


def write_page(
    path: Path,
    compiled: Sequence[Compiled],
    verdicts: Sequence[Verdict],
    triton: str,
    executed: Mapping[str, Mapping[str, Executed]] | None,
    cuda: CudaReport | None = None,
) -> None:
    """Write the page.

    Args:
        path: Markdown file; its folder is made.
        compiled: every variant.
        verdicts: the promises about them.
        triton: version of triton.
        executed: operations of a tile by problem and kernel; None leaves out these and the model.
        cuda: figures of the CUDA kernels; None leaves them out.
    """
    parts = [_HEAD, _COMPILED.format(triton=triton, verdicts=verdict_table(verdicts))]
    for kernel in dict.fromkeys(c.kernel for c in compiled):
        parts.append(f"**{kernel}**\n\n{register_table(compiled, kernel)}\n")
    parts.append(f"### Ranges over all C and axes\n\n{shape_table(compiled)}\n")
    parts.append(f"{_CLASSES}\n{class_table(compiled, 9)}\n")
    if executed is not None:
        parts.append(f"{_EXECUTED}\n{executed_table(executed)}\n")
        estimates = all_estimates(compiled, executed)
        parts.append(
            _MODEL.format(
                assumptions=assumption_table(),
                share=100 * cards.SHARE,
                schedulers=cards.SCHEDULERS,
                exp=cards.EXP_SLOTS,
                log=cards.LOG_SLOTS,
                divide=cards.DIVIDE_SLOTS,
                launch=1e6 * cards.LAUNCH_S,
                sync=1e6 * cards.SYNC_S,
                ours=ours_table(estimates),
                official=official_table(estimates),
            )
        )
        if cuda is not None:
            parts.append(cuda_part(cuda, compiled, executed, estimates))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts), encoding="utf-8")


def executed_table(executed: Mapping[str, Mapping[str, Executed]]) -> str:
    """Operations for each pixel, by problem and kernel."""
    lines = []
    for problem, kernels in executed.items():
        for kernel, one in kernels.items():
            at = one.per_pixel
            weights = (one.warps.get("load_tables", 0) + one.warps.get("load_scalars", 0)) * 32 / one.pixels
            scratch = (one.bytes["load_scratch"] / one.pixels, one.bytes["store_scratch"] / one.pixels)
            figures = [
                *(at("float") - at("fused"), at("fused"), at("choice"), at("exp"), at("log"), at("divide")),
                *(at("macs"), at("load_scratch"), at("store_scratch"), *scratch),
                *(at("load_images"), at("store_images"), weights, one.warps.get("shuffle", 0) * 32 / one.pixels),
            ]
            lines.append([f"{problem}, {kernel}", *(_short(value) for value in figures)])
    header = [
        *("", "float", "of these multiply-add", "select, compare", "exp", "log", "divide", "matrix multiply-add"),
        *("scratch loads", "scratch stores", "bytes loaded", "bytes stored", "image loads", "image stores"),
        *("weights (x 32 lanes)", "shuffles (x 32 lanes)"),
    ]
    return markdown(header, lines)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 or value == 0 else f"{value:.1f}"


def assumption_table() -> str:
    """What is assumed about each card."""
    lines = [
        [
            *(c.name, c.arch, c.cores, f"{c.clock / 1e9:.2f}", c.lanes, c.special, c.l1 // 2**10, c.l2 // 2**20),
            *(f"{c.l2_rate / 1e12:.1f}", f"{c.memory_rate / 1e12:.2f}", c.memory // 2**30, f"{c.tf32 / 1e12:.0f}"),
        ]
        for c in cards.CARDS
    ]
    header = [
        *("assumed", "compiled for", "SMs", "GHz", "float32 lanes/SM", "special/SM", "L1 KiB/SM", "L2 MiB"),
        *("L2 TB/s", "memory TB/s", "memory GiB", "tf32 TFLOPS"),
    ]
    return markdown(header, lines)


def ours_table(estimates: Sequence[Estimate]) -> str:
    """The model's times of our kernels."""
    lines = []
    for e in estimates:
        lines.append(
            [
                _workload(e),
                e.card.name,
                *(f"{1e3 * seconds:.2f} ({resource})" for resource, seconds in map(worst, (e.forward, e.backward))),
                f"{1e3 * e.launches * cards.LAUNCH_S:.2f} ({e.launches})",
                f"**{1e3 * e.seconds:.2f}**",
                f"{1e3 * e.seconds_arithmetic:.2f} ({'; '.join(resource for resource, _ in e.worst_arithmetic)})",
            ]
        )
    header = [
        *("modelled ms", "card", "forward", "backward", "launches", "step"),
        "step without addresses",
    ]
    return markdown(header, lines, left=2)


def official_table(estimates: Sequence[Estimate]) -> str:
    """The model's times of the literal loss, and its memory."""
    lines = []
    for e in estimates:
        traffic, launches, syncs = (1e3 * part for part in e.official)
        fits = e.official_memory <= e.card.memory
        lines.append(
            [
                _workload(e),
                e.card.name,
                *(f"{part:.1f}" for part in (traffic, launches, syncs)),
                f"{1e3 * e.official_low:.1f} - {traffic + launches + syncs:.1f}" if fits else "",
                f"{e.official_low / e.seconds:.0f}" if fits else "",
                f"{e.official_memory / 2**30:.1f}" + ("" if fits else " **does not fit**"),
            ]
        )
    header = [
        *("modelled ms", "card", "traffic", "launches", "waits", "at least - sum", "x our step, at least"),
        "maps GiB",
    ]
    return markdown(header, lines, left=2)


def _workload(e: Estimate) -> str:
    problem, w = PROBLEMS[e.workload.problem], e.workload
    size = "x".join(map(str, w.full)) if problem.dims == 2 else f"{w.full[0]}^3"
    return f"{size} C={problem.classes} L={len(problem.ratios)} B={w.batch}"
