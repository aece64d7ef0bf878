"""Compiles the Triton kernels of all shared cases for an H100 that need not be here.

    python -m benchmarks.gpu_day.compile_triton

Every case runs forward and backward as a user's call would, on CPU tensors, through Triton's own launch path: its
binder chooses signature and specialisation, its compiler and ptxas make the code, its launcher is compiled with the C
compiler and parses the arguments. What is stood in for is the driver beneath all this, libcuda.so.1: a small library
that describes an H100, loads whatever it is given, and launches nothing. Results are whatever memory holds; nobody
looks at them. lomix_fast.kernels has to be importable, see build.py.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import hashlib
import multiprocessing
import os
import random
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
CORES, CAPABILITY = 132, (9, 0)  # of an H100; its other figures are in the C source

# The functions that Triton calls. The numbers of attributes are those of cuda.h, whose prototypes are not needed.
_DRIVER = """
static long launches = 0;
long lomix_launches(void) { return launches; }
int cuGetErrorString(int error, const char** text) { *text = "the stand-in for the driver"; return 0; }
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* version) { *version = 13000; return 0; }
int cuDeviceGetCount(int* count) { *count = 1; return 0; }
int cuDeviceGet(int* device, int number) { *device = 0; return 0; }
int cuCtxGetDevice(int* device) { *device = 0; return 0; }
int cuCtxGetCurrent(void** context) { *context = &launches; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { *context = &launches; return 0; }
int cuCtxSetCurrent(void* context) { return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case 8: *value = 49152; break;    /* shared memory of a block */
    case 10: *value = 32; break;      /* threads of a warp */
    case 12: *value = 65536; break;   /* registers of a block */
    case 16: *value = CORES; break;   /* multiprocessors */
    case 75: *value = MAJOR; break;   /* compute capability */
    case 76: *value = MINOR; break;
    case 81: *value = 233472; break;  /* shared memory of a multiprocessor */
    case 97: *value = 232448; break;  /* shared memory that a block may ask for */
    default: *value = 1;
  }
  return 0;
}
int cuModuleLoadData(void** module, const void* image) { *module = &launches; return 0; }
int cuModuleUnload(void* module) { return 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) { *function = &launches; return 0; }
int cuFuncGetAttribute(int* value, int attribute, void* function) { *value = attribute ? 0 : 1024; return 0; }
int cuFuncSetAttribute(void* function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void* function, int config) { return 0; }
int cuPointerGetAttribute(void* data, int attribute, unsigned long long pointer) {
  *(unsigned long long*)data = pointer;
  return 0;
}
int cuLaunchKernelEx(const void* config, void* function, void** parameters, void** extra) { ++launches; return 0; }
"""


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        name: of the case.
        failure: what was raised, in one line; "" where nothing was.
        kernels: what identifies each kernel that the process has met so far.
        launches: calls of the driver that would have started a kernel.
        seconds: it took.
    """

    name: str
    failure: str
    kernels: frozenset[str]
    launches: int
    seconds: float


def make_driver(folder: Path) -> Path:
    """Compile the stand-in for libcuda.so.1 and return it.

    Other functions of the driver that Triton's modules name are there as well, and do nothing: some linkers resolve all
    of them when a module is loaded.
    """
    import triton

    source = "".join(
        path.read_text() for path in (Path(triton.__file__).parent / "backends" / "nvidia").glob("driver.*")
    )
    others = set(re.findall(r"\b(cu[A-Z]\w+)\s*\(", source)) - set(re.findall(r"\b(cu[A-Z]\w+)\(", _DRIVER))
    folder.mkdir(parents=True, exist_ok=True)
    library, text = folder / "libcuda.so.1", folder / "driver.c"
    text.write_text(_DRIVER + "".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(others)))
    figures = [f"-DCORES={CORES}", *(f"-D{name}={n}" for name, n in zip(("MAJOR", "MINOR"), CAPABILITY, strict=True))]
    flags = ["-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", str(library), str(text)]
    subprocess.run([os.environ.get("CC", "gcc"), *figures, *flags], check=True)
    return library


class Compiler:
    """Runs cases in this process, for which a driver that launches nothing stands in; see the top of the file.

    Args:
        driver: what `make_driver` has made.
        cache: folder of Triton's cache, which processes share.
    """

    def __init__(self, driver: Path, cache: Path) -> None:
        os.environ.update(TRITON_LIBCUDA_PATH=str(driver.parent), TRITON_CACHE_DIR=str(cache), CUDA_VISIBLE_DEVICES="")
        os.environ.pop("TRITON_INTERPRET", None)
        # First, and by its soname: whoever asks for libcuda.so.1 from now on gets this one, driver or not.
        self.library = ctypes.CDLL(str(driver), mode=ctypes.RTLD_GLOBAL)
        self.library.lomix_launches.restype = ctypes.c_long
        sys.setdlopenflags(os.RTLD_LAZY)
        import torch
        from lomix_fast.kernels import problem
        from lomix_fast.kernels.config import Target
        from triton import knobs
        from triton.backends.nvidia.driver import CudaDriver
        from triton.runtime import driver as active

        from lomix_fast import backends

        torch.set_num_threads(1)
        warnings.filterwarnings("ignore", message="CUDA initialization")  # torch has asked the stand-in as well
        stand_in = CudaDriver()
        stand_in.get_current_device = lambda: 0
        stand_in.get_current_stream = lambda device: 0
        stand_in.get_device_capability = lambda device: CAPABILITY
        stand_in.set_current_device = lambda device: None
        active.set_active(stand_in)
        knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook = self._before, self._after
        problem.target_of = lambda device: Target("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], CORES, 32)
        usual = backends.BACKENDS["triton"]
        backends.BACKENDS["triton"] = replace(usual, why_not=lambda device: None)
        self.locks = cache / "locks"
        self.locks.mkdir(parents=True, exist_ok=True)
        self.held: list[IO[bytes]] = []
        self.kernels: set[str] = set()

    def _before(self, *, key: Any, fn: Any, **rest: object) -> bool:
        """Wait while another process compiles the same kernel; it is then found in the cache."""
        digest = hashlib.sha256(f"{fn.name} {key}".encode()).hexdigest()
        self.kernels.add(digest)
        lock = (self.locks / digest).open("wb")
        fcntl.flock(lock, fcntl.LOCK_EX)
        self.held.append(lock)
        return False

    def _after(self, **rest: object) -> None:
        self._release()

    def _release(self) -> None:
        while self.held:
            self.held.pop().close()

    def run(self, name: str) -> Outcome:
        """Run a case forward and backward."""
        from lomix_fast.testing.cases import case
        from lomix_fast.testing.judge import run_backend

        begun, before, failure = time.monotonic(), self.library.lomix_launches(), ""
        try:
            run_backend(case(name), "triton")
        except Exception as error:  # of any kind: it is the result
            failure = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        self._release()
        launches = self.library.lomix_launches() - before
        return Outcome(name, failure, frozenset(self.kernels), launches, time.monotonic() - begun)


_mine: Compiler | None = None  # of a process of the pool


def _start(driver: Path, cache: Path) -> None:
    global _mine
    _mine = Compiler(driver, cache)


def _run(name: str) -> Outcome:
    assert _mine is not None
    return _mine.run(name)


def outcomes(names: list[str], folder: Path, workers: int) -> Iterator[Outcome]:
    """Run cases in processes of their own, each kernel being compiled once.

    Args:
        names: of cases.
        folder: where the stand-in and Triton's cache go; kernels that lie there are not compiled again.
        workers: how many processes.
    """
    driver = make_driver(folder)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(driver, folder / "cache"))
    # Neighbours in the list tend to need the same kernels, for which all but one process would wait.
    shuffled = random.Random(0).sample(names, len(names))
    with pool:
        running = {pool.submit(_run, name): name for name in shuffled}
        for done in as_completed(running):
            try:
                yield done.result()
            except Exception as error:  # the process has died
                yield Outcome(running[done], f"{type(error).__name__}: {error}", frozenset(), 0, 0.0)


def main(arguments: list[str] | None = None) -> int:
    """Compile, print each failure and what was counted, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help="names of cases; default: all of the shared list")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "gpu_day_triton", help="for the cache")
    given = parser.parse_args(arguments)
    from lomix_fast.testing.cases import BENCHMARK_CASES, CASES, case

    names = [case(name).name for name in given.cases] or [one.name for one in (*CASES, *BENCHMARK_CASES)]
    begun, failures, launches = time.monotonic(), 0, 0
    kernels: set[str] = set()
    for one in outcomes(names, given.folder.resolve(), given.workers):
        kernels |= one.kernels
        launches += one.launches
        if one.failure:
            failures += 1
            print(f"FAILED {one.name}: {one.failure}", flush=True)
        elif not one.launches and case(one.name).batch:
            failures += 1
            print(f"FAILED {one.name}: it has launched nothing", flush=True)
    done = f"{len(names)} cases, {failures} failed: {len(kernels)} kernels for sm_{CAPABILITY[0]}{CAPABILITY[1]}"
    print(f"{done}, {launches} launches, {time.monotonic() - begun:.0f} s in {given.workers} processes")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
