"""What the doctor knows about devices: GPU clock and memory with a stand-in for torch.cuda, processes for the CPU."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lomix_fast.backends import BACKENDS
from lomix_fast.doctor import devices, peak, workloads
from lomix_fast.doctor.checking import check_backend
from lomix_fast.doctor.report import table
from lomix_fast.doctor.selftest import Selftest, is_interpreted, run_selftest
from lomix_fast.doctor.timing import QUICK, Effort, Timing, time_workload
from lomix_fast.doctor.workloads import OFFICIAL
from lomix_fast.testing import environment
from lomix_fast.testing.cases import Case, case
from lomix_fast.testing.devices import Cpu, Gpu
from lomix_fast.testing.errors import DoesNotFitError, is_out_of_memory, one_line
from lomix_fast.testing.process import Ended, Process, TooLong

CPU = torch.device("cpu")
TINY = Case("tiny_2d", 1, 3, (8, 9), ((4, 5), (8, 9)))


class FakeCuda:
    """Counts what is asked of it; every step takes 4 ms, allocates 3 MiB that it keeps once and 2 MiB for a while."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now, self.allocated, self.peak = 0.0, 10 * 2**20, 10 * 2**20

    @contextlib.contextmanager
    def device(self, where: torch.device) -> Iterator[None]:
        yield

    def synchronize(self, where: torch.device | None = None) -> None:
        self.log.append("synchronize")

    def Event(self, enable_timing: bool) -> Any:
        assert enable_timing
        event = SimpleNamespace(at=None)
        event.record = lambda: (self.log.append("record"), setattr(event, "at", self.now))
        event.synchronize = lambda: self.log.append("event")
        event.elapsed_time = lambda end: end.at - event.at
        return event

    def empty_cache(self) -> None:
        self.log.append("empty_cache")

    def get_device_properties(self, where: torch.device) -> Any:
        return SimpleNamespace(L2_cache_size=1024)

    def _sleep(self, clocks: int) -> None:
        self.log.append("sleep")

    def memory_allocated(self, where: torch.device) -> int:
        return self.allocated

    def reset_peak_memory_stats(self, where: torch.device) -> None:
        self.log.append("reset")
        self.peak = self.allocated

    def max_memory_allocated(self, where: torch.device) -> int:
        return self.peak

    def step(self) -> None:
        self.log.append("step")
        self.now += 4.0
        self.allocated = max(self.allocated, 13 * 2**20)
        self.peak = max(self.peak, self.allocated + 2 * 2**20)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A GPU that computes on the CPU."""
    monkeypatch.setattr(workloads, "GPU", (TINY,))
    return Gpu("cuda:0", CPU, FakeCuda())


def test_gpu_times_between_events_on_a_busy_device_with_a_cold_cache(gpu: Gpu) -> None:
    assert gpu.laps(gpu.cuda.step, gpu.cuda.step) == [4.0, 4.0]
    lap = ["record", "step", "record", "step", "record", "event"]
    assert gpu.cuda.log == ["synchronize", *lap]  # how long the host takes is not known yet
    assert gpu._l2 is not None and gpu._l2.nbytes == 2048 and not gpu._l2.any()
    gpu.cuda.log.clear()
    gpu._l2.fill_(1)
    gpu.laps(gpu.cuda.step, gpu.cuda.step)
    assert gpu.cuda.log == ["synchronize", "sleep", *lap] and not gpu._l2.any()


def test_time_of_the_host_ends_when_all_is_issued(gpu: Gpu) -> None:
    assert 0 <= gpu.host_ms(gpu.cuda.step) < 4000
    assert gpu.cuda.log == ["synchronize", "step", "synchronize"]


def test_gpu_memory_counts_what_the_first_step_keeps(gpu: Gpu) -> None:
    gpu.laps(gpu.cuda.step)  # leaves what clears L2, which is no memory of a step
    gpu.cuda.log.clear()
    gpu.cuda.allocated = gpu.cuda.peak = 10 * 2**20
    cleared = []
    assert gpu.peak(gpu.cuda.step, lambda: cleared.append(len(gpu.cuda.log))).extra_mib == 5.0
    assert gpu._l2 is None and cleared == [gpu.cuda.log.index("reset")] and gpu.cuda.log.count("step") == 2
    assert gpu.cuda.log.index("reset") > gpu.cuda.log.index("step")


def test_whole_selftest_on_a_gpu(gpu: Gpu) -> None:
    done = run_selftest([gpu], {"cuda:0": ["eager"]}, [case("only_add")], QUICK, lambda line: None)
    assert not done.failures and [row.device for row in done.checked] == ["cuda:0"]
    assert [(t.subject, t.workload, t.status) for t in done.timings] == [
        ("eager", "tiny_2d", "timed"),
        (OFFICIAL, "tiny_2d", "timed"),
    ]


def test_gpu_workloads_are_the_promised_ones() -> None:
    names = [one.name for one in workloads.of(Gpu("cuda:0", torch.device("cuda:0")))]
    assert names == ["slices_224", "volume_96"]


def test_a_gpu_that_stops_computing_ends_the_run(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def illegal(*_: object) -> None:
        calls.append(None)
        monkeypatch.setattr(Gpu, "complaint", lambda self: "AcceleratorError: an illegal memory access")
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr("lomix_fast.doctor.checking.run_backend", illegal)
    said: list[str] = []
    done = check_backend("eager", gpu, [case("only_add"), case("line"), case("base")], said.append)
    assert len(calls) == 1 and len(done.failures) == 3 and len(said) == 1
    assert "no longer computes" in str(done.failures[2].message) and "raised" in str(done.failures[0].message)


def test_a_gpu_is_asked_whether_it_computes(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.complaint() is None

    def broken(where: object = None) -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(gpu.cuda, "synchronize", broken)
    monkeypatch.setattr(gpu.cuda, "empty_cache", broken)
    assert gpu.complaint() == "RuntimeError: CUDA error: an illegal memory access"
    gpu.release()


def test_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        {"device": "cuda:0", "name": "A"},
        {"device": "cuda:1", "error": "lost"},
        {"device": "cuda:2", "name": "A"},
    ]
    monkeypatch.setattr(devices, "gpus", lambda: found)
    here = devices.present()
    assert [one.name for one in here] == ["cpu", "cuda:0", "cuda:2"] and str(here[2].where) == "cuda:2"
    assert devices.choose(None, here) == here and devices.choose(["cuda"], here) == here[1:]
    assert devices.choose(["cuda:2", "cpu"], here) == [here[0], here[2]]
    with pytest.raises(ValueError, match=r"--device: got 'cuda:1', expected names out of cpu, cuda:0, cuda:2"):
        devices.choose(["cuda:1"], here)


def test_gpus_are_described_and_a_lost_one_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def properties(index: int) -> Any:
        if index == 1:
            raise RuntimeError("GPU is lost")
        return SimpleNamespace(name="Card", major=9, minor=0, total_memory=2**34, gcnArchName="gfx942")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    card = {"device": "cuda:0", "name": "Card", "arch": "9.0", "memory_mib": 16384}
    assert environment.gpus() == [card, {"device": "cuda:1", "error": "RuntimeError: GPU is lost"}]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert environment.gpus()[0]["arch"] == "gfx942"


def test_memory_on_the_cpu_is_that_of_a_fresh_process() -> None:
    large = Case("large", 1, 5, (256, 256), ((64, 64), (128, 128)))
    assert 5 < peak.peak_mib(Cpu(), "reference", large) < 500


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (Ended("killed", -signal.SIGKILL), DoesNotFitError, "killed"),
        (TooLong("too long", -signal.SIGKILL), TooLong, "too long"),
        (Ended("failed: the reason"), Ended, "the reason"),
        ((0.0, "RuntimeError: not enough memory"), DoesNotFitError, "not enough memory"),
    ],
)
def test_a_process_that_fails(
    monkeypatch: pytest.MonkeyPatch, answer: object, error: type[Exception], message: str
) -> None:
    def ask(self: Process, *_: object, seconds: float) -> object:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(Process, "ask", ask)
    with pytest.raises(error, match=message):
        peak.peak_mib(Cpu(), "eager", TINY)


def test_what_counts_as_out_of_memory() -> None:
    full = RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")
    assert is_out_of_memory(full) and is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError())
    with pytest.raises(RuntimeError) as here:  # as torch's allocator for the CPU words it on this system
        torch.empty(1 << 60)
    assert is_out_of_memory(here.value)
    assert not is_out_of_memory(RuntimeError("shape")) and not is_out_of_memory(ValueError("out of memory"))
    assert one_line(ValueError("a\n  b")) == "ValueError: a b" and len(one_line(ValueError("x" * 999))) == 600


def test_where_triton_is_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert is_interpreted("triton", "cpu") and not is_interpreted("triton", "cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert is_interpreted("triton", "cuda") and not any(is_interpreted(n, "cpu") for n in set(BACKENDS) - {"triton"})


@pytest.mark.slow
def test_rounds_end_when_a_busy_machine_makes_them_long(gpu: Gpu) -> None:
    patient, hasty = Effort(4, 3, 0.0, 1e9), Effort(4, 3, 0.0, 0.0)
    for effort, rounds in ((patient, 3), (hasty, 1)):
        figures = time_workload(gpu, TINY, ["eager", OFFICIAL], effort, lambda line: None)
        assert [one.rounds for one in figures] == [rounds] * 2


def test_unsteady_times_are_said_to_be(gpu: Gpu) -> None:
    steady = Timing("cuda:0", "eager", "tiny_2d", "timed", None, 5, 10.0, 11.0, 14.0, 1.0, 2.0)
    text = table(Selftest([], [steady], 1.0), [gpu])
    assert "unsteady" not in text
    shaky = Timing("cuda:0", OFFICIAL, "tiny_2d", "timed", None, 5, 10.0, 11.0, 16.0, 1.0, 2.0)
    text = table(Selftest([], [steady, shaky], 1.0), [gpu])
    assert f"{OFFICIAL} on cuda:0, tiny_2d: unsteady, 10.0 to 16.0 ms" in text
