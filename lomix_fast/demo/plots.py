"""The two pictures of the demo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from ..plan import MixPlan
from .data import CLASS_NAMES, SliceSet, spread
from .train import dice

_COLOURS = ("#000000", "#3b8fc4", "#f2c14e")  # background, grey, white: told apart by the colour-blind too
_OPERATOR_TITLES = {"orig": "original", "add": "add", "mul": "mul", "cat": "cat", "awf": "awf"}


def draw_segmentation(path: Path, data: SliceSet, prediction: Tensor, columns: int = 5) -> None:
    """Draw held-out slices: image above, truth below it, prediction at the bottom.

    Args:
        path: PNG file to write.
        data: held-out slices.
        prediction: [N, H, W] class of every pixel.
        columns: how many slices, evenly spread over the brain.
    """
    rows = spread(len(data.numbers), columns)
    colours = ListedColormap(_COLOURS)
    height, width = data.labels.shape[1:]
    figure = Figure(figsize=(2.1 * len(rows) + 0.6, 2.1 * 3 * height / width + 1.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, len(rows), squeeze=False)
    for column, i in enumerate(rows):
        scores = list(dice(prediction[i], data.labels[i]).values())
        axes[0, column].imshow(data.images[i, 0].numpy(), cmap="gray", vmin=-4, vmax=2.5)
        for row, labels in ((1, data.labels[i]), (2, prediction[i])):
            axes[row, column].imshow(labels.numpy(), cmap=colours, vmin=0, vmax=2, interpolation="nearest")
        axes[0, column].set_title(f"z = {data.heights[i]:+.0f} mm", fontsize=10)
        axes[2, column].set_xlabel(f"Dice GM {scores[0]:.3f}\nWM {scores[1]:.3f}", fontsize=9)
    for row, name in enumerate(("T1 image", "truth", "prediction")):
        axes[row, 0].set_ylabel(name, fontsize=11)
    for one in axes.flat:
        one.set(xticks=[], yticks=[])
    patches = [Patch(color=colour, label=name) for colour, name in zip(_COLOURS, CLASS_NAMES, strict=True)]
    figure.legend(handles=patches[1:], loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle("Held-out slices of the MNI152 template (one averaged brain: learning, not accuracy)", fontsize=11)
    figure.savefig(path, dpi=110)


def draw_weights(path: Path, plan: MixPlan, weights: Tensor, factors: Sequence[int]) -> None:
    """Draw the learned weight of every map: one row per subset of scales, one column per operator.

    Args:
        path: PNG file to write.
        plan: which maps, in the order of `weights`.
        weights: [M].
        factors: by how much each scale is smaller than the image, coarsest first.
    """
    subsets = [(scale,) for scale in range(plan.num_scales)] + list(plan.subsets)
    operators = ["orig", *plan.operators]
    table = np.full((len(subsets), len(operators)), np.nan)
    for spec, weight in zip(plan.maps, weights.tolist(), strict=True):
        table[subsets.index(spec.members), operators.index(spec.operator)] = weight
    sizes = ["1" if factor == 1 else f"1/{factor}" for factor in factors]

    figure = Figure(figsize=(1.05 * len(operators) + 3.2, 0.36 * len(subsets) + 2.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(table, cmap="viridis", aspect="auto")
    middle = (np.nanmin(table) + np.nanmax(table)) / 2
    for (row, column), weight in np.ndenumerate(table):
        if not np.isnan(weight):
            colour = "white" if weight < middle else "black"
            axes.text(column, row, f"{weight:.3f}", ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(len(operators)), [_OPERATOR_TITLES[name] for name in operators])
    axes.set_yticks(range(len(subsets)), [" + ".join(sizes[i] for i in members) for members in subsets])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_ylabel("scales mixed, as fractions of the image size")
    figure.colorbar(image, label="softplus(alpha), 0.693 at the start of training")
    figure.suptitle(f"Learned weights of the {plan.num_maps} supervised maps", fontsize=12)
    figure.savefig(path, dpi=110)
