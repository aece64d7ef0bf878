"""The CUDA kernels' own source, executed on the CPU under sanitizers: every case, forward and backward, without a GPU.

g++ compiles csrc/cuda against tests/cuda_host, where threads of a block are fibers that run in random order between
barriers. Here another pytest is started in which that is a backend like others; the sanitizers have to be loaded first.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import cuda_host_library as host
import pytest

from lomix_fast.testing.cases import CASES

pytestmark = pytest.mark.skipif(host.missing() is not None, reason=str(host.missing()))
TESTS = ["test_backends.py", "test_nonfinite.py", "test_targets.py", "cuda_host_checks.py"]


def run_tests(library: Path, report: Path, *arguments: str, seed: int = 1) -> subprocess.CompletedProcess[str]:
    """Run tests of the row in a pytest of their own."""
    environment = os.environ | host.sanitizer_environment(seed) | {"CUDA_HOST_LIBRARY": str(library)}
    environment |= {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(host.ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
    return subprocess.run(
        command, cwd=host.ROOT / "tests", env=environment, capture_output=True, text=True, timeout=2400, check=False
    )


def passed(report: Path) -> set[str]:
    """Names of the tests that passed."""
    return {
        f"{one.get('name')}"
        for one in ElementTree.parse(report).iter("testcase")
        if not any(child.tag in ("failure", "error", "skipped") for child in one)
    }


@pytest.fixture(scope="module")
def library() -> Path:
    return host.build()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_case_and_every_promise_with_the_sanitizers_silent(library: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    done = run_tests(library, report, *TESTS, "-k", "cuda_host")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert "Sanitizer" not in done.stdout + done.stderr and "runtime error" not in done.stderr
    names = passed(report)
    for one in CASES:
        assert f"test_forward_and_backward[{one.name}-cuda_host]" in names
    assert "test_the_order_of_threads_does_not_change_a_bit[many_tiles]" in names


# What removes one barrier, and a case that must then go wrong: the text before it tells which of several is meant.
# Warps that take their next map while others are still at the last tile wait for lanes that have left: an error too.
BARRIERS = {
    "staging, forward": ("few_forward.cuh", r"(atomicAdd\(&counts.*?\n.*?\})\s*__syncthreads\(\);", "base"),
    "the next tile, forward": ("few_forward.cuh", r"(last = kept\[2\];)\s*__syncthreads\(\);", "many_tiles"),
    "staging, backward": ("few_backward.cuh", r"(T\(0\)\);)\s*__syncthreads\(\);", "base"),
    "a warp's products": ("few_backward.cuh", r"(clear_rows<T, P>\(px\.kept, C\);)\s*__syncwarp\(\);", "base"),
    "between two axes of the adjoint": ("adjoint.cuh", r"(p % S\];\s*\}\);)\s*__syncthreads\(\);", "volume_thin"),
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("which", BARRIERS)
def test_without_one_barrier_the_case_goes_wrong(which: str, tmp_path: Path) -> None:
    """With it the case passes: the test above runs it."""
    file, pattern, name = BARRIERS[which]
    changed = Path("build", "cuda-host", re.sub(r"\W+", "-", which), "csrc")
    shutil.copytree(host.ROOT / "csrc", host.ROOT / changed, dirs_exist_ok=True)
    path = host.ROOT / changed / "cuda" / file
    before = path.read_text()
    after, count = re.subn(pattern, r"\1", before, flags=re.DOTALL)
    assert count == 1, f"{which}: got {count} places in {file}, expected one; the pattern has to follow the source"
    path.write_text(after)
    broken = host.build(changed, classes=[4])
    only = f"test_backends.py::test_forward_and_backward[{name}-cuda_host]"
    done = run_tests(broken, tmp_path / "broken.xml", only)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-2000:]
    assert re.search(r"WrongResultError|the mask names lanes that have ended", done.stdout), done.stdout[-3000:]
