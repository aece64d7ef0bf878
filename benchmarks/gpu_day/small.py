"""Question 4, is it small: the largest batch of a 3D patch that fits a card of 24, 40 or 80 GB, by loss."""

from __future__ import annotations

import gc

from lomix_fast.testing.errors import is_out_of_memory, one_line
from lomix_fast.testing.precision import full_float32
from lomix_fast.testing.process import Ended, Process

from ..large_batch_rows import Patch, draw, row
from ..large_batch_search import Trial, largest_batch
from .day import SKIPPED, Clock, Day, Emit, Row
from .workers import about, open_device, start, status_of

# The losses that are compared, ours first; at one budget after the other, for time may not suffice for all.
ROWS = ("lomix_cuda", "lomix_plain", "last_layer_plain", "deep_supervision_plain", "lomix_official", "lomix_triton")
BUDGETS_GB = (24, 40, 80)
PATCH = Patch(96, 14, 5)
_MOST = 4096
_REHEARSED_GB, _REHEARSED_MOST = (0.004, 0.1, 2), 3  # of a stand-in of 1 GiB
_TRIAL_SECONDS = 30.0
# Of a card sold with so many GB, torch can have a little less: the driver and the context of the process keep theirs.
_OURS = 0.97


class Trials:
    """What runs in the process: steps at any batch under a limit of memory.

    Args:
        device: name of the device.
        name: of the row.
        patch: its problem.
    """

    def __init__(self, device: str, name: str, patch: Patch) -> None:
        self._device, self._row, self._patch = open_device(device), row(name), patch
        full_float32().__enter__()  # for as long as this process lives

    def attempt(self, batch: int, budget_mib: float) -> Trial | str:
        """One step; `stopped` where memory runs out. Peaks are those of torch's allocator, inputs included.

        Returns:
            The trial; or why there can be none: others hold so much that not the budget would end it, but they.
        """
        try:
            free = self._device.cuda.mem_get_info(self._device.where)[0] / 2**20
            if free < budget_mib:
                return f"only {free:.0f} of {budget_mib:.0f} MiB are free"
            return self._trial(batch, budget_mib)
        finally:  # here the tensors are gone
            gc.collect()
            self._device.release()  # the next one to try has a process of its own

    def _trial(self, batch: int, budget_mib: float) -> Trial:
        cuda, where = self._device.cuda, self._device.where
        total = cuda.get_device_properties(where).total_memory / 2**20
        cuda.set_per_process_memory_fraction(min(1.0, budget_mib / total), where)
        cuda.reset_peak_memory_stats(where)
        empty = cuda.memory_allocated(where) / 2**20
        try:
            before, gradients = self._step(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            held = cuda.max_memory_allocated(where) / 2**20
            del error  # its traceback holds the tensors
            return Trial(batch, held, stopped=True, empty_mib=empty)
        finally:
            cuda.set_per_process_memory_fraction(1.0, where)
        return Trial(batch, cuda.max_memory_allocated(where) / 2**20, False, empty, before, gradients)

    def _step(self, batch: int) -> tuple[float, float]:
        """MiB allocated before the step, and MiB of gradients."""
        where = self._device.where
        prepared = self._row.prepare(draw(self._patch.case(self._row.loss, batch), where))
        before = self._device.cuda.memory_allocated(where) / 2**20
        prepared.loss().backward()
        self._device.cuda.synchronize(where)
        return before, prepared.gradient_bytes() / 2**20


def run(day: Day, clock: Clock, emit: Emit) -> None:
    """Search for each loss and budget; a row for each, whose value is the largest batch."""
    patch = Patch(16, 3, 3) if day.rehearse else PATCH
    total = about(day)["memory_mib"]
    # All at once, for they take seconds to start.
    processes = {name: start(day, name, Trials, day.device, name, patch) for name in ROWS}
    try:
        for gigabytes in _REHEARSED_GB if day.rehearse else BUDGETS_GB:
            # GB as cards are sold: those of 80 have some 81,000 MiB, and torch can ask for all of them.
            budget = _OURS * gigabytes * 1e9 / 2**20
            for name in ROWS:
                subject, case = name, f"{patch.edge}^3 C={patch.classes} L={patch.scales}"
                what = f"largest batch in {gigabytes} GB"
                if gigabytes * 1e9 / 2**20 > 1.05 * total:
                    emit(Row("small", subject, case, what, SKIPPED, note=f"the card has {total} MiB"))
                elif clock.left < 2:
                    emit(Row("small", subject, case, what, SKIPPED, note="time was up"))
                else:
                    if name not in processes:
                        processes[name] = start(day, name, Trials, day.device, name, patch)
                    emit(_search(day, name, case, what, budget, processes, clock))
    finally:
        for process in processes.values():
            process.close()


class _NotFree(Exception):
    """Others hold memory that a budget counts on."""


def _search(
    day: Day, name: str, case: str, what: str, budget: float, processes: dict[str, Process], clock: Clock
) -> Row:
    def attempt(batch: int) -> Trial:
        seconds = max(clock.at_most(_TRIAL_SECONDS), 0.5)
        found = processes[name].ask("attempt", batch, budget, seconds=seconds)
        if isinstance(found, str):
            raise _NotFree(found)
        return found

    try:
        found = largest_batch(attempt, budget, _REHEARSED_MOST if day.rehearse else _MOST)
    except _NotFree as error:
        return Row("small", name, case, what, SKIPPED, note=str(error))
    except Ended as error:
        processes.pop(name).close()
        return Row("small", name, case, what, status_of(error, clock), note=one_line(error))
    a_sample, fixed = found.a_sample, found.fixed
    note = f"another sample takes {a_sample.word} {a_sample.mib:.0f} MiB, none {fixed.word} {fixed.mib:.0f} MiB"
    note += "; the search ended at its own limit" if found.open_ended else ""
    return Row("small", name, case, what, value=found.largest, unit="samples", n=len(found.trials), note=note)
