"""What stands in for a GPU in a rehearsal: tensors on the CPU, `torch.cuda` played by `StandInCuda`.

Code that is written against `cuda = torch.cuda` runs line by line with `cuda = StandInCuda()`. Streams keep no order of
their own, since work on a CPU is done when the call returns; captured graphs, forbidden host reads and the limit of
memory are the real thing as far as ops that PyTorch dispatches can show it.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lomix_fast.testing.peak import reset_mark, resident_mib

aten = torch.ops.aten
VARIABLE = "LOMIX_FAST_REHEARSE"


def rehearsing() -> bool:
    """Whether this is a rehearsal on a CPU (LOMIX_FAST_REHEARSE=1)."""
    return os.environ.get(VARIABLE) == "1"


def install() -> None:
    """Have the backends "cuda" and "triton" computed by those for CPU tensors: "cpu", or "eager" where it is not built.

    The rows of `lomix_fast.backends.BACKENDS` are replaced, so `LoMixLoss(impl="cuda")` takes CPU tensors afterwards.
    """
    from lomix_fast.backends import BACKENDS

    here = torch.device("cpu")
    fused = "cpu" if BACKENDS["cpu"].why_not(here) is None else "eager"
    for name, actor in (("cuda", fused), ("triton", "eager")):
        BACKENDS[name] = replace(BACKENDS[actor], name=name, why_not=_only_cpu)


def _only_cpu(device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"in a rehearsal tensors are on the CPU, not on {device}"


# Ops --------------------------------------------------------------------------------------------------------------

_INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


def _reads_values(func: Any, args: Any) -> bool:
    """Whether the host has to wait for values: item, equal, nonzero, indexing by a mask."""
    if func in _INDEXED:  # tagged so for the sake of masks alone
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


class _NoHostReads(TorchDispatchMode):
    """What torch.cuda.set_sync_debug_mode("error") does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _reads_values(func, args):
            raise RuntimeError(f"called a synchronizing CUDA operation: {func}")
        return func(*args, **(kwargs or {}))


class _Limit(TorchDispatchMode):
    """Out of memory after the op that goes beyond a number of bytes."""

    def __init__(self, cuda: StandInCuda, most: int) -> None:
        super().__init__()
        self.cuda, self.most = cuda, most

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.cuda.memory_allocated() > self.most:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {func} went beyond {self.most} bytes")
        return out


class _Recorder(TorchDispatchMode):
    """Notes the ops of a capture. They run, for their shapes; `forget` takes back what they have done."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[tuple[int, Tensor]]]] = []
        self.own: set[int] = set()  # storages that the graph has made
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # what it has written to of others, and a copy

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _reads_values(func, args):
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {func}")
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if func._schema.is_mutable:
            for t in given:
                if _storage(t) not in self.own | self.before.keys():
                    self.before[_storage(t)] = (t, t.detach().clone())
        out = func(*args, **kwargs)
        known = {_storage(t) for t in given}
        fresh = [(i, t) for i, t in enumerate(tree_leaves(out)) if isinstance(t, Tensor) and _storage(t) not in known]
        self.own |= {_storage(t) for _, t in fresh}
        written = [] if func._schema.name.removeprefix("aten::") in _EMPTY else fresh
        self.calls.append((func, args, kwargs, written))
        return out

    def forget(self) -> None:
        """As after a capture on a GPU: nothing has been computed, results are whatever lay there."""
        for t, copy in self.before.values():
            t.data.copy_(copy)
        for _, _, _, fresh in self.calls:
            for _, t in fresh:
                if t.is_floating_point():
                    t.data.fill_(float("nan"))

    def replay(self) -> None:
        """Do it again with what the tensors hold now, into the same results."""
        with torch._C._AutoDispatchBelowAutograd(), torch.autocast("cpu", enabled=False):
            for func, args, kwargs, fresh in self.calls:
                found = tree_leaves(func(*args, **kwargs))
                for i, t in fresh:
                    t.data.copy_(found[i])


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


# torch.cuda -------------------------------------------------------------------------------------------------------


class _Stream:
    """A stream: a number, with nothing to wait for."""

    numbers = itertools.count(1)

    def __init__(self, device: Any = None, priority: int = 0, stream_ptr: int | None = None) -> None:
        self.cuda_stream = next(self.numbers) if stream_ptr is None else stream_ptr
        self.device, self.priority = torch.device("cpu"), priority

    def wait_stream(self, other: _Stream) -> None: ...

    def wait_event(self, event: _Event) -> None: ...

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record(self)
        return event

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class _Event:
    """An event: the wall clock when it was recorded."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.enable_timing = enable_timing
        self.at: float | None = None

    def record(self, stream: _Stream | None = None) -> None:
        self.at = time.perf_counter()

    def wait(self, stream: _Stream | None = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _Event) -> float:
        if not (self.enable_timing and end.enable_timing):
            raise RuntimeError("both events must be made with enable_timing=True")
        if self.at is None or end.at is None:
            raise RuntimeError("both events must be recorded before calculating elapsed time")
        return 1e3 * (end.at - self.at)


class _Graph:
    """A CUDA graph: the ops that were issued in `StandInCuda.graph`."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.recorder: _Recorder | None = None

    def replay(self) -> None:
        if self.recorder is None:
            raise RuntimeError("called replay without a preceding successful capture")
        self.recorder.replay()

    def reset(self) -> None:
        self.recorder = None

    def pool(self) -> tuple[int, int]:
        return (0, id(self))


class StandInCuda:
    """Plays `torch.cuda` with one device that computes on the CPU.

    Every attribute means what it means in torch.cuda. What is "allocated" is what malloc has given out since this was
    made (glibc; elsewhere the resident set), so it counts Python's large objects too and is exact to some 100 kB.

    Args:
        total_memory: bytes that the device claims to have.
    """

    Stream, ExternalStream, Event, CUDAGraph = _Stream, _Stream, _Event, _Graph
    OutOfMemoryError = torch.OutOfMemoryError

    def __init__(self, total_memory: int = 2**30) -> None:
        self.total_memory = total_memory
        self._default, self._here = _Stream(stream_ptr=0), threading.local()
        self._modes: dict[str, TorchDispatchMode] = {}
        self._zero, self._at_reset, self._resident = _allocated(), 0, 0.0
        self.reset_peak_memory_stats()

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None: ...

    def device(self, device: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def get_device_properties(self, device: Any = None) -> Any:
        return SimpleNamespace(
            name="stand-in",
            major=9,
            minor=0,
            total_memory=self.total_memory,
            multi_processor_count=132,
            L2_cache_size=2**20,
            warp_size=32,
            regs_per_multiprocessor=65536,
            max_threads_per_multi_processor=2048,
            shared_memory_per_block_optin=232448,
            shared_memory_per_multiprocessor=233472,
        )

    def get_device_name(self, device: Any = None) -> str:
        return "stand-in"

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        return (9, 0)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed = manual_seed_all

    # Streams.

    def synchronize(self, device: Any = None) -> None:
        if self.is_current_stream_capturing():
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing: synchronize")

    def default_stream(self, device: Any = None) -> _Stream:
        return self._default

    def current_stream(self, device: Any = None) -> _Stream:
        return getattr(self._here, "stream", self._default)

    @contextlib.contextmanager
    def stream(self, stream: _Stream | None) -> Iterator[None]:
        before = self.current_stream()
        self._here.stream = stream or before
        try:
            yield
        finally:
            self._here.stream = before

    def _sleep(self, cycles: int) -> None:
        time.sleep(cycles / 1e9)

    def set_sync_debug_mode(self, mode: int | str) -> None:
        self._switch("sync", _NoHostReads() if mode in ("error", 2) else None)

    def _switch(self, what: str, mode: TorchDispatchMode | None) -> None:
        """Put a mode of this thread in the place of the one of that name; to be undone in the reverse order."""
        if what in self._modes:
            self._modes.pop(what).__exit__(None, None, None)
        if mode is not None:
            self._modes[what] = mode
            mode.__enter__()

    # Graphs.

    def is_current_stream_capturing(self) -> bool:
        return getattr(self._here, "capturing", False)

    def graph_pool_handle(self) -> tuple[int, int]:
        return (0, 1)

    @contextlib.contextmanager
    def graph(
        self, cuda_graph: _Graph, pool: Any = None, stream: _Stream | None = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        if self.is_current_stream_capturing():
            raise RuntimeError("a capture within a capture")
        recorder = _Recorder()
        with self.stream(stream or _Stream()), recorder:
            self._here.capturing = True
            try:
                yield
            finally:
                self._here.capturing = False
        recorder.forget()
        cuda_graph.recorder = recorder

    def make_graphed_callables(self, callables: Any, sample_args: Any, **options: Any) -> Any:
        """PyTorch's own, which finds this in the place of torch.cuda."""
        names = ("CUDAGraph", "Stream", "graph", "stream", "synchronize")
        with mock.patch.multiple(torch.cuda, **{name: getattr(self, name) for name in names}):
            options.setdefault("pool", self.graph_pool_handle())
            return torch.cuda.graphs.make_graphed_callables(callables, sample_args, **options)

    # Memory.

    def memory_allocated(self, device: Any = None) -> int:
        return max(0, _allocated() - self._zero)

    memory_reserved = memory_allocated

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        self._at_reset, self._resident = self.memory_allocated(), reset_mark()

    def max_memory_allocated(self, device: Any = None) -> int:
        risen = int(2**20 * max(0.0, resident_mib("VmHWM") - self._resident))
        return max(self.memory_allocated(), self._at_reset + risen)

    max_memory_reserved = max_memory_allocated

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return max(0, self.total_memory - self.memory_allocated()), self.total_memory

    def empty_cache(self) -> None: ...

    def set_per_process_memory_fraction(self, fraction: float, device: Any = None) -> None:
        """Beyond it ops of the calling thread raise torch.OutOfMemoryError; what they need in between goes unseen."""
        self._switch("memory", None if fraction >= 1 else _Limit(self, int(fraction * self.total_memory)))


class _MallInfo(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    )


def _allocated() -> int:
    """Bytes that malloc has given out and not got back; off glibc what is resident."""
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if ask is None:
        return int(2**20 * resident_mib())
    ask.restype = _MallInfo
    found = ask()
    return found.uordblks + found.hblkhd
