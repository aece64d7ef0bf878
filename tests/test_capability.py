"""Every compiled copy of the CPU kernel that this machine can run is run, not only the one it would choose."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from common import CAPABILITIES, best_capability

from lomix_fast import available_backends

needs_cpu = pytest.mark.skipif(
    available_backends()["cpu"] != "usable", reason=f"the cpu backend cannot run: {available_backends()['cpu']}"
)


def run_python(capability: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python of its own, since the capability is chosen once a process."""
    environment = {**os.environ, "LOMIX_FAST_CPU_CAPABILITY": capability}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


@pytest.mark.slow
@needs_cpu
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_all_cases_pass_on_every_capability(capability: str) -> None:
    if CAPABILITIES.index(capability) > CAPABILITIES.index(best_capability()):
        pytest.skip(f"this CPU or build has {best_capability()} at most")
    if capability == best_capability() and "LOMIX_FAST_CPU_CAPABILITY" not in os.environ:
        pytest.skip(f"{capability} is what the other tests run")
    select = "(test_forward_and_backward and -cpu) or (nonfinite and cpu) or contradict"
    files = ("tests/test_backends.py", "tests/test_nonfinite.py")
    done = run_python(capability, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", select)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout and "failed" not in done.stdout


@needs_cpu
def test_the_capability_asked_for_is_the_one_in_use() -> None:
    done = run_python("DEFAULT", "-c", "import torch; from lomix_fast import _C; print(_C.cpu_capability())")
    assert done.stdout.strip() == "DEFAULT", done.stderr


@needs_cpu
def test_a_capability_that_does_not_exist_is_refused() -> None:
    done = run_python("AVX9", "-c", "import torch; from lomix_fast import _C; _C.cpu_capability()")
    assert done.returncode != 0
    assert "LOMIX_FAST_CPU_CAPABILITY: got 'AVX9', expected DEFAULT, AVX2 or AVX512" in done.stderr
