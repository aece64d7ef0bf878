"""What a run shows while it trains: a bar or ten lines, and TensorBoard. The first process alone makes one of these."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class Progress:
    """Progress bar on a terminal, elsewhere a line ten times a run; scalars for TensorBoard in <out>/tensorboard.

    Args:
        out: folder of the run.
        done: steps done before.
        steps: steps of the whole run.
    """

    def __init__(self, out: Path, done: int, steps: int) -> None:
        self.steps, self.shown = steps, sys.stderr.isatty()
        self.every = max(1, steps // 10)
        # What an interrupted run wrote about later steps is not shown.
        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=done + 1 if done else None)
        self.bar = tqdm(total=steps, initial=done, desc="training", unit="step", disable=not self.shown)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        self.writer.close()

    def log(self, step: int, loss: float, lr: float, share: float | None, weights: dict[str, float]) -> None:
        """Write the scalars of a logged step; share is the loss's share of its time, None when it was not timed."""
        self.writer.add_scalar("train/loss", loss, step)
        self.writer.add_scalar("train/learning_rate", lr, step)
        if share is not None:
            self.writer.add_scalar("train/loss_share_of_step_time", share, step)
        for name, weight in weights.items():
            self.writer.add_scalar(f"map_weights/{name}", weight, step)
        self.bar.set_postfix(loss=f"{loss:.2f}", refresh=False)

    def step(self, step: int) -> bool:
        """Count a step; return whether its loss is wanted for a printed line."""
        self.bar.update()
        return not self.shown and (step % self.every == 0 or step == self.steps)

    def say(self, step: int, loss: float) -> None:
        """Print the line."""
        print(f"  step {step:5d} of {self.steps}, loss {loss:.3f}", flush=True)
