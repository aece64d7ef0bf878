"""`make check-cuda`: builds lomix_fast with its CUDA kernels for a CUDA torch, installs it and tries what runs here.

Needs nvcc and no GPU. Everything is in an environment of its own, .venv-cuda, made from requirements-cuda.txt. Warnings
of our sources are errors. What is tried afterwards is in check_cuda_installed.py; with a GPU, that is every case of
the shared list.

    TORCH_CUDA_ARCH_LIST   what to build for; default 8.0;9.0;10.0
    CHECK_CUDA_OPTIONAL    1: without nvcc say so and succeed
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from build_scripts import ROOT, build_cuda

ENVIRONMENT = ROOT / ".venv-cuda"
REQUIREMENTS = ROOT / "requirements-cuda.txt"
PYTHON = str(ENVIRONMENT / "bin" / "python")
PIP = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
TARGETS = "8.0;9.0;10.0"

seconds: dict[str, float] = {}


@contextmanager
def step(name: str) -> Iterator[None]:
    """Announce a step and remember how long it took."""
    print(f"check-cuda: {name}", flush=True)
    begin = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - begin


def run(command: list[str], cwd: Path = ROOT, **variables: str) -> None:
    """Run a command whose output is shown.

    Raises:
        SystemExit: it fails.
    """
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **variables}, check=False)
    if done.returncode != 0:
        raise SystemExit(f"check-cuda: failed with status {done.returncode}: {' '.join(command)}")


def make_environment() -> None:
    """Make .venv-cuda unless it was made from the same requirements."""
    stamp = ENVIRONMENT / "requirements"
    wanted = REQUIREMENTS.read_text()
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    run([sys.executable, "-m", "venv", str(ENVIRONMENT)])
    run([*PIP, "-r", str(REQUIREMENTS)])
    stamp.write_text(wanted)


def main() -> int:
    """Make the environment, build, install, and try; return the exit status."""
    if not build_cuda.installed():
        print(
            "check-cuda: no nvcc was found in CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda; the CUDA kernels are not "
            "built. Install the CUDA toolkit, or set CUDA_HOME to where it is",
            file=sys.stderr,
        )
        return 0 if os.environ.get("CHECK_CUDA_OPTIONAL") == "1" else 1
    targets = os.environ.get("TORCH_CUDA_ARCH_LIST") or TARGETS
    variables = {"LOMIX_FAST_BUILD": "cuda", "LOMIX_FAST_WERROR": "1", "TORCH_CUDA_ARCH_LIST": targets}
    with step(f"environment {ENVIRONMENT.name}"):
        make_environment()
    with step(f"build for {targets}"):
        run([PYTHON, "build_cpp.py"], **variables)  # what pip then finds done, with the compilers' output shown
    with step("install"):
        run([*PIP, "--no-build-isolation", "--no-deps", "--force-reinstall", "."], **variables)
    with step("try what is installed"), tempfile.TemporaryDirectory() as elsewhere:
        installed = {"PYTHONSAFEPATH": "1", "CHECK_CUDA_TARGETS": targets}  # the package, not the sources
        run([PYTHON, str(ROOT / "tests" / "check_cuda_installed.py")], cwd=Path(elsewhere), **installed)
    for name, taken in seconds.items():
        print(f"check-cuda: {taken:6.1f} s  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
