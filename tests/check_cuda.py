"""`make check-cuda`: builds lomix_fast with its CUDA kernels for a CUDA torch, installs it and tries what runs here.

Needs nvcc and no GPU. Everything is in an environment of its own, .venv-cuda, made from requirements-cuda.txt. Warnings
of our sources are errors. What is tried afterwards is in check_cuda_installed.py; with a GPU, that is every case of
the shared list.

    TORCH_CUDA_ARCH_LIST   what to build for; default 8.0;9.0;10.0
    CHECK_CUDA_OPTIONAL    1: without nvcc say so and succeed
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from build_scripts import ROOT
from check_environment import Check

CHECK = Check("check-cuda", ROOT / ".venv-cuda", ROOT / "requirements-cuda.txt", sys.executable)
TARGETS = "8.0;9.0;10.0"


def main() -> int:
    """Make the environment, build, install, and try; return the exit status."""
    if not CHECK.has_nvcc():
        return 0 if os.environ.get("CHECK_CUDA_OPTIONAL") == "1" else 1
    targets = os.environ.get("TORCH_CUDA_ARCH_LIST") or TARGETS
    variables = {"LOMIX_FAST_BUILD": "cuda", "LOMIX_FAST_WERROR": "1", "TORCH_CUDA_ARCH_LIST": targets}
    CHECK.make_environment()
    with CHECK.step(f"build for {targets}"):
        # What pip then finds done, with the compilers' output shown.
        CHECK.run([CHECK.python, "build_cpp.py"], **variables)
    with CHECK.step("install"):
        CHECK.run([*CHECK.pip, "--no-build-isolation", "--no-deps", "--force-reinstall", "."], **variables)
    with CHECK.step("try what is installed"), tempfile.TemporaryDirectory() as elsewhere:
        installed = {"PYTHONSAFEPATH": "1", "CHECK_CUDA_TARGETS": targets}  # the package, not the sources
        CHECK.run([CHECK.python, str(ROOT / "tests" / "check_cuda_installed.py")], cwd=Path(elsewhere), **installed)
    CHECK.summary()
    return 0


if __name__ == "__main__":
    sys.exit(main())
