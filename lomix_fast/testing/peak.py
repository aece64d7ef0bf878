"""How much memory a piece of work needs beyond what the process holds already."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

_CLEAR = Path("/proc/self/clear_refs")

# glibc gives blocks above this size back at once. Left to itself it raises the threshold as it goes and keeps freed
# blocks, differently from run to run: the official style was seen to peak a quarter higher or not.
PLAIN_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072"}


def extra_peak_mib(work: Callable[[], object]) -> float:
    """Run `work` once and return how far the resident set rose above its size just before, at the highest, in MiB.

    Call it in a process of its own: memory that earlier work has freed but the allocator kept would be used again
    unseen. What can be given back is given back first (malloc_trim, glibc). On Linux the kernel's high-water mark of
    this process is reset (clear_refs) and read (VmHWM); ru_maxrss is no replacement there, for a new process inherits
    it from the one that started it. Where the mark cannot be reset, or off Linux, the result is an upper bound: the
    highest mark since the process began.

    Args:
        work: called without arguments; its result is dropped.

    Raises:
        ModuleNotFoundError: not on Linux and psutil is missing.
    """
    gc.collect()
    if not sys.platform.startswith("linux"):
        before = _resident_elsewhere()
        work()
        return (_highest_elsewhere() - before) / 2**20
    before = reset_mark()
    work()
    return resident_mib("VmHWM") - before


def reset_mark() -> float:
    """Set the high-water mark of this process back to what is resident, free memory given back; returns that in MiB.

    On Linux. Where a container forbids it the mark stays as it is, an upper bound.
    """
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")
    return resident_mib()


def resident_mib(field: str = "VmRSS", pid: int | str = "self") -> float:
    """Resident set of a process in MiB: "VmRSS" for now, "VmHWM" for its highest. 0 when the process is a corpse.

    Raises:
        RuntimeError: not on Linux.
        FileNotFoundError: no such process.
    """
    if not Path("/proc/self/status").exists():
        raise RuntimeError("memory: got a system without /proc, expected Linux")
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 2**10
    return 0.0


def _resident_elsewhere() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _highest_elsewhere() -> int:
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, where it is not inherited
