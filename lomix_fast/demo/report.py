"""What the demo prints: short lines, the same numbers as in report.json."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..testing.environment import cores, load
from .data import NOTE, Brain

if TYPE_CHECKING:
    from .run import Settings

EXPECTED_DICE = 0.80  # what the default settings reach with room to spare

# Written into report.json, so that its numbers can be read without the code.
MEANING = {
    "dice": "finest head, all pixels of all held-out slices together",
    "map_weights": "softplus(alpha) after training, 0.693 before; names count scales from the coarsest, 0",
    "step_ms": "forward and backward of the loss alone on trained logits of held-out slices, median, styles in turns",
    "peak_mib": "resident memory at its highest during one such step, less that just before it, own process each",
    "max_relative_difference": "fused against official style in float64, same parameters: largest over the loss and "
    "all gradients of (largest absolute difference / largest absolute value)",
}


def say_beginning(settings: Settings, brain: Brain, backend: str, no_kernel: str | None) -> None:
    """Print what will be trained, with which backend, why not the fused one (`no_kernel`), and whether it is busy."""
    height, width = brain.train.labels.shape[1:]
    kernel = f"{backend} ({'fused C++ kernel' if backend == 'cpu' else 'plain PyTorch'})"
    print("lomix_fast demo: a small U-Net learns grey and white matter with the LoMix loss")
    print(
        f"  data      MNI152 T1 template, {len(brain.train.numbers)} slices of {height} x {width} to train on, "
        f"{len(brain.held_out.numbers)} held out"
    )
    print(f"  loss      backend {kernel}, {torch.get_num_threads()} threads")
    if no_kernel is not None:
        print(f"  warning   slow without the fused kernel: {no_kernel}")
    busy = load()
    if busy is not None and busy > 1.5 * cores():
        print(
            f"  warning   load {busy:.1f} on {cores()} cores already: times will be long and not to be trusted; "
            "OMP_WAIT_POLICY=passive helps"
        )
    print(f"  training  {settings.steps} steps of {settings.batch} slices", flush=True)


def say_learned(result: dict[str, Any]) -> None:
    """Print held-out Dice and the largest and smallest map weights."""
    gm, wm = result["dice"]["gm"], result["dice"]["wm"]
    print(f"  trained in {result['training']['seconds']:.0f} s; held-out Dice: grey {gm:.3f}, white matter {wm:.3f}")
    if min(gm, wm) <= EXPECTED_DICE:
        print(f"  below {EXPECTED_DICE:.2f}: more --steps would help")
    ranked = sorted(result["map_weights"].items(), key=lambda item: item[1])
    for title, some in (("largest", ranked[:-4:-1]), ("smallest", ranked[:3])):
        print(f"  {title:8s} map weights  " + ", ".join(f"{name} {weight:.3f}" for name, weight in some))
    print("  comparing the loss alone with the official style (numbers, time, memory) ...", flush=True)


def say_comparison(result: dict[str, Any]) -> None:
    """Print the table of time and memory."""
    case, step, peak = result["case"], result["step_ms"], result["peak_mib"]
    size = " x ".join(map(str, (case["batch"], case["classes"], *case["size"])))
    print(f"\n  the loss alone, {size}, {len(result['map_weights'])} maps, forward and backward")
    print(f"  {'':18s}{'fused':>12s}{'official style':>18s}")
    print(
        f"  {'step':18s}{step['fused']:>9.1f} ms{step['official_style']:>15.1f} ms   "
        f"{result['speedup']:.1f} times faster (median of {case['pairs']})"
    )
    print(
        f"  {'extra peak memory':18s}{peak['fused']:>8.1f} MiB{peak['official_style']:>14.1f} MiB   "
        "(each in a process of its own)"
    )
    own = max(result["relative_difference"]["official_style"].values())
    print(
        f"  largest relative difference of loss and gradients, same parameters: "
        f"{result['max_relative_difference']:.1e}\n"
        f"  (from the official style in float64; in float32 that is itself {own:.1e} away)\n"
    )


def say_end(result: dict[str, Any], out: Path) -> None:
    """Print what the numbers do not mean, and where the files are."""
    print(textwrap.fill(NOTE, width=100, initial_indent="  ", subsequent_indent="  "))
    print(f"  {result['seconds']:.0f} s in all; wrote report.json, segmentation.png and weights.png to {out}/")
