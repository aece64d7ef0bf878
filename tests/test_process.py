"""Many jobs in a pool of processes: one that crashes, hangs or breaks its process costs only itself."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Sequence

import pytest

from lomix_fast.testing.process import Done, Ended, Process, TooLong, in_processes


class Actor(Process):
    """A thread that plays a process: the jobs are words that say what becomes of them."""

    started: list[Actor]

    def __init__(self, number: int) -> None:
        self.name, self._asked, self._begun = f"actor {number}", "", 0.0
        self._pipe, self._theirs = multiprocessing.Pipe()
        self.done: list[str] = []
        self.killed = False
        self.started.append(self)
        threading.Thread(target=self._play, daemon=True).start()

    def _play(self) -> None:
        while True:
            try:
                _, (word,) = self._theirs.recv()
            except (EOFError, OSError):
                return
            self.done.append(word)
            if word.startswith("crash"):
                self._theirs.close()
                return
            if word.startswith("hang"):
                return
            time.sleep(0.01)
            self._theirs.send((not word.startswith("raise"), word))

    def answer(self) -> object:
        try:
            fine, answer = self._pipe.recv()
        except EOFError as error:
            raise Ended("its process ended", -6) from error
        self._asked = ""
        if not fine:
            raise Ended(f"failed: {answer}")
        return answer

    def kill(self) -> None:
        self.killed = True
        self._pipe.close()

    close = kill


@pytest.fixture(autouse=True)
def actors() -> list[Actor]:
    Actor.started = []
    return Actor.started


def do(jobs: Sequence[str], *, workers: int = 2, seconds: float = 0.5, within: float = 20.0) -> dict[str, Done[str]]:
    """What becomes of each job; those whose words begin with the same letter after the dash belong together."""
    found = in_processes(
        jobs,
        start=Actor,
        command=lambda job: ("word", job),
        group=lambda job: job.partition("-")[2][:1],
        workers=workers,
        seconds=seconds,
        deadline=time.monotonic() + within,
        spoilt=lambda value: value.startswith("spoil"),
    )
    return {one.job: one for one in found}


def test_what_goes_wrong_costs_only_itself(actors: list[Actor]) -> None:
    jobs = ["fine-a1", "crash-a2", "fine-a3", "hang-b1", "fine-b2", "raise-b3", "fine-c1", "spoil-c2", "fine-c3"]
    done = do(jobs)
    assert set(done) == set(jobs)
    assert {job for job, one in done.items() if one.value == job} == {j for j in jobs if j[:4] in ("fine", "spoi")}
    assert done["crash-a2"].error is not None and done["crash-a2"].error.exit_code == -6
    assert isinstance(done["hang-b1"].error, TooLong) and "took longer than" in str(done["hang-b1"].error)
    assert isinstance(done["raise-b3"].error, Ended) and done["raise-b3"].error.exit_code is None
    assert all(one.killed for one in actors)
    for actor in actors:  # a process that something happened to does nothing afterwards
        assert all(word.startswith("fine") for word in actor.done[:-1])


def test_a_process_goes_on_with_what_belongs_together(actors: list[Actor]) -> None:
    do([f"fine-{group}{number}" for number in range(4) for group in "ab"])
    assert sorted(len(actor.done) for actor in actors) == [4, 4]
    assert all(len({word[5] for word in actor.done}) == 1 for actor in actors)
    actors.clear()
    do([f"fine-a{number}" for number in range(8)])
    assert len(actors) == 2 and all(actor.done for actor in actors), "the second one helps"


def test_what_there_is_no_time_for_is_not_begun() -> None:
    begin = time.monotonic()
    done = do(["hang-a1", "fine-a2", "fine-a3"], workers=1, seconds=60, within=0.3)
    assert time.monotonic() - begin < 5
    assert [done[job].begun for job in ("hang-a1", "fine-a2", "fine-a3")] == [False] * 3
    assert all(one.error is None and one.value is None for one in done.values())
