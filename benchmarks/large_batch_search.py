"""The largest batch that fits, found by trying: a line through small ones says where to look, a trial yes or no."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Trial:
    """One step at one batch in a fresh process.

    Attributes:
        batch: samples.
        peak_mib: highest resident set during the step; where `stopped`, what was held when it was stopped.
        stopped: passed the limit by so much that it was killed; the true peak is larger.
        empty_mib: resident before the inputs were made.
        before_mib: resident just before the step, inputs included and gradients not.
        gradients_mib: size of all gradients; 0 where `stopped`.
        step_ms: time of the step; 0 where `stopped`.
        first_step_ms: of the first step in the process, which compiles where there is something to compile.
    """

    batch: int
    peak_mib: float
    stopped: bool = False
    empty_mib: float = 0.0
    before_mib: float = 0.0
    gradients_mib: float = 0.0
    step_ms: float = 0.0
    first_step_ms: float = 0.0

    def fits(self, budget_mib: float) -> bool:
        """Whether the process never held more than the budget during the step."""
        return not self.stopped and self.peak_mib <= budget_mib


@dataclass(frozen=True)
class Bound:
    """A figure in MiB: "exactly", "at most" or "more than" so much."""

    word: str
    mib: float


EXACTLY, AT_MOST, MORE_THAN = "exactly", "at most", "more than"
# Trials that the line is trusted for, and how far beyond what fits.
_PATIENCE, _GROWTH = 6, 10


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        largest: most samples that fit; 0 when not even one does.
        trials: all that were run, by batch. Unless `open_ended`, `largest` (if not 0) and `largest` + 1 are among them.
        open_ended: whether the search ended at its own limit, so that more may fit.
    """

    largest: int
    trials: tuple[Trial, ...]
    open_ended: bool = False

    def trial(self, batch: int) -> Trial | None:
        """The trial of this batch, None when there was none."""
        return next((trial for trial in self.trials if trial.batch == batch), None)

    @property
    def a_sample(self) -> Bound:
        """What another sample takes, its inputs included."""
        return self._slope(lambda trial: trial.peak_mib, lambda trial: trial.peak_mib - trial.empty_mib)

    @property
    def extra_a_sample(self) -> Bound:
        """What another sample takes beyond its logits and target; its gradients count."""
        extra = lambda trial: trial.peak_mib - trial.before_mib  # noqa: E731
        return self._slope(extra, extra)

    @property
    def fixed(self) -> Bound:
        """What the process takes without any sample, by the line through its peaks."""
        done = self._done
        if len(done) > 1:
            return Bound(EXACTLY, done[0].peak_mib - done[0].batch * self.a_sample.mib)
        return Bound(MORE_THAN, self.trials[0].empty_mib)

    @property
    def _done(self) -> list[Trial]:
        return [trial for trial in self.trials if not trial.stopped]

    def _slope(self, of: Callable[[Trial], float], alone: Callable[[Trial], float]) -> Bound:
        """Between the smallest and the largest batch that were finished; of one, what it takes in all is a bound."""
        done = self._done
        if len(done) > 1:
            return Bound(EXACTLY, (of(done[-1]) - of(done[0])) / (done[-1].batch - done[0].batch))
        if done:
            return Bound(AT_MOST, alone(done[0]) / done[0].batch)
        return Bound(MORE_THAN, alone(self.trials[0]) / self.trials[0].batch)


def largest_batch(run: Callable[[int], Trial], budget_mib: float, most: int) -> Found:
    """Search for the largest batch whose trial fits the budget, so that one more sample does not.

    Batches 1 and 2 give a line; the batch that it predicts is tried, but none more than ten times as large as what is
    known to fit, and the line drawn anew, until two neighbours are left of which one fits and the other does not. Peaks
    on a line within some MiB take four to six trials. Whatever they are, the search ends soon: where trials contradict
    the line twice in a row, and from the seventh on every other time, what is left is halved.

    Args:
        run: batch -> its trial; called at most once a batch.
        budget_mib: most that a process may hold.
        most: batch at which the search gives up, at least 1.
    """
    trials: list[Trial] = []
    fitting, failing = 0, most + 1
    candidate, misses = 1, 0
    while failing - fitting > 1:
        trials.append(run(candidate))
        if trials[-1].fits(budget_mib):
            fitting = candidate
        else:
            failing = candidate
        guess = predicted(trials, budget_mib)
        misses = 0 if fitting < guess < failing else misses + 1
        if misses > 1 or (len(trials) >= _PATIENCE and len(trials) % 2 == 0):
            guess = 2 * fitting if failing > most else (fitting + failing) // 2
        candidate = min(max(min(guess, _GROWTH * fitting), fitting + 1), failing - 1)
    return Found(fitting, tuple(sorted(trials, key=lambda trial: trial.batch)), failing > most)


def predicted(trials: Sequence[Trial], budget_mib: float) -> int:
    """Largest batch within the budget by a line through two finished trials; 0 when none was finished.

    They are the largest that fits and the smallest that does not, which lie closest about the answer, or where nothing
    too large was finished the smallest and the largest that fit. Twice the largest where there is no line that rises.
    """
    done = sorted((trial for trial in trials if not trial.stopped), key=lambda trial: trial.batch)
    fit = [trial for trial in done if trial.fits(budget_mib)]
    above = [trial for trial in done if not trial.fits(budget_mib)]
    if not fit:
        return 0
    low, high = (fit[-1], above[0]) if above else (fit[0], fit[-1])
    if high.peak_mib <= low.peak_mib:
        return 2 * high.batch
    slope = (high.peak_mib - low.peak_mib) / (high.batch - low.batch)
    return int(low.batch + (budget_mib - low.peak_mib) / slope)
