"""The stand-in for torch.cuda of rehearsals: captures, host reads, streams, events and the limit of memory."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.gpu_day import stand_in
from benchmarks.gpu_day.stand_in import StandInCuda
from lomix_fast import LoMixLoss
from lomix_fast.backends import BACKENDS


@pytest.fixture
def cuda() -> StandInCuda:
    return StandInCuda()


def test_rehearsing_is_asked_for_by_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOMIX_FAST_REHEARSE", raising=False)
    assert not stand_in.rehearsing()
    monkeypatch.setenv("LOMIX_FAST_REHEARSE", "1")
    assert stand_in.rehearsing()


def test_gpu_backends_take_cpu_tensors_once_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "triton"):
        monkeypatch.setitem(BACKENDS, name, BACKENDS[name])  # put back afterwards
    stand_in.install()
    logits, target = [torch.randn(1, 3, 4, 4), torch.randn(1, 3, 8, 8)], torch.randint(3, (1, 8, 8))
    criterion = LoMixLoss(3, 2, impl="cuda")
    loss = criterion(logits, target)
    criterion.impl = "triton"
    torch.testing.assert_close(criterion(logits, target), loss)
    assert BACKENDS["cuda"].name == "cuda" and "not on meta" in str(BACKENDS["cuda"].why_not(torch.device("meta")))


# Graphs ---------------------------------------------------------------------------------------------------------------


def test_a_replay_computes_with_what_the_inputs_hold_now(cuda: StandInCuda) -> None:
    x, steps = torch.randn(3, requires_grad=True), torch.zeros(())
    graph = cuda.CUDAGraph()
    with cuda.graph(graph, stream=cuda.Stream()):
        assert cuda.is_current_stream_capturing()
        loss = (x.exp() * 2).sum()
        (gradient,) = torch.autograd.grad(loss, x)
        steps.add_(1)
    assert not cuda.is_current_stream_capturing()
    assert loss.isnan() and gradient.isnan().all() and steps == 0  # as on a GPU, a capture computes nothing
    for count in (1, 2):
        with torch.no_grad():
            x.copy_(torch.randn(3))
        graph.replay()
        expected = x.detach().exp() * 2
        torch.testing.assert_close(gradient, expected)
        torch.testing.assert_close(loss.detach(), expected.sum())
        assert steps == count


def test_a_replay_does_not_spoil_a_backward_pass_that_follows(cuda: StandInCuda) -> None:
    """Autograd counts writes to what it has saved; a graph on a GPU writes behind its back."""
    x = torch.ones(2, requires_grad=True)
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        y = x.exp()
    graph.replay()
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((2,), 1.0).exp())


READS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "branch": lambda x: 1 if x.sum() > 0 else 2,
}


@pytest.mark.parametrize("what", READS)
def test_a_host_read_under_capture_raises(cuda: StandInCuda, what: str) -> None:
    x, graph = torch.randn(3), cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"), cuda.graph(graph):
        READS[what](x)
    assert not cuda.is_current_stream_capturing()
    with pytest.raises(RuntimeError, match="without a preceding successful capture"):
        graph.replay()
    READS[what](x)


@pytest.mark.parametrize("what", READS)
def test_a_host_read_is_an_error_where_that_is_asked_for(cuda: StandInCuda, what: str) -> None:
    x = torch.randn(3)
    cuda.set_sync_debug_mode("error")
    try:
        (x + x[x.argsort()]).sum()
        with pytest.raises(RuntimeError, match="synchronizing"):
            READS[what](x)
    finally:
        cuda.set_sync_debug_mode("default")
    READS[what](x)


def test_synchronize_under_capture_raises(cuda: StandInCuda) -> None:
    with pytest.raises(RuntimeError, match="not permitted"), cuda.graph(cuda.CUDAGraph()):
        cuda.synchronize()
    cuda.synchronize()


def test_graphed_modules(cuda: StandInCuda) -> None:
    """PyTorch's own make_graphed_callables, its two graphs played by ours."""
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    graphed = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    graphed.load_state_dict(plain.state_dict())
    graphed = cuda.make_graphed_callables(graphed, (torch.randn(2, 3),))
    assert torch.cuda.Stream is not StandInCuda.Stream
    for _ in range(2):
        x = torch.randn(2, 3)
        for module in (plain, graphed):
            module.zero_grad()
            module(x).square().sum().backward()
        for p, q in zip(plain.parameters(), graphed.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)


# Streams, events, memory ----------------------------------------------------------------------------------------------


def test_streams_are_those_of_their_thread(cuda: StandInCuda) -> None:
    side, seen = cuda.Stream(), []
    assert cuda.current_stream() is cuda.default_stream() and side.cuda_stream != cuda.default_stream().cuda_stream
    with cuda.stream(side):
        other = threading.Thread(target=lambda: seen.append(cuda.current_stream()))
        other.start()
        other.join()
        assert cuda.current_stream() is side
        with cuda.stream(None):
            assert cuda.current_stream() is side
    assert cuda.current_stream() is cuda.default_stream() and seen == [cuda.default_stream()]
    side.wait_stream(cuda.current_stream())


def test_events_are_the_wall_clock(cuda: StandInCuda) -> None:
    start, end = (cuda.Event(enable_timing=True) for _ in range(2))
    with pytest.raises(RuntimeError, match="recorded"):
        start.elapsed_time(end)
    start.record()
    cuda._sleep(20_000_000)
    end.record()
    assert 15 < start.elapsed_time(end) < 5000
    with pytest.raises(RuntimeError, match="enable_timing"):
        cuda.Event().elapsed_time(end)


def test_memory_is_what_tensors_take(cuda: StandInCuda) -> None:
    before = cuda.memory_allocated()
    held = torch.ones(2**22)  # 16 MiB
    assert abs(cuda.memory_allocated() - before - 2**24) < 2**20
    free, total = cuda.mem_get_info()
    assert total == cuda.get_device_properties(0).total_memory and total - free >= 2**24
    cuda.reset_peak_memory_stats()
    torch.ones(2**23)  # 32 MiB, gone again
    assert abs(cuda.max_memory_allocated() - before - 3 * 2**24) < 2**22
    del held
    assert abs(cuda.memory_allocated() - before) < 2**20


def test_beyond_the_fraction_is_out_of_memory(cuda: StandInCuda) -> None:
    cuda.set_per_process_memory_fraction((cuda.memory_allocated() + 2**22) / cuda.total_memory)
    try:
        torch.ones(2**18)
        with pytest.raises(torch.OutOfMemoryError):
            torch.ones(2**22)
        gc.collect()
        torch.ones(2**18)
    finally:
        cuda.set_per_process_memory_fraction(1.0)
    torch.ones(2**22)
