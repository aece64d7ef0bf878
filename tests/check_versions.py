"""`make versions`: what benchmarks/gpu_day needs of the machine it is prepared for works with the versions found there.

Needs no GPU. The versions are those of requirements-versions.txt, in an environment of its own, .venv-versions, on
Python 3.12 where there is one. The CUDA extension is built for an H100 the way a GPU day builds it, without setuptools,
and tried; the Triton kernels of all shared cases are compiled for an H100; and a GPU day is rehearsed.

    PYTHON312           the Python to take; default python3.12 if it runs, or one of pyenv
    VERSIONS_OPTIONAL   1: without nvcc say so, and leave out the CUDA extension
    VERSIONS_SAMPLE     1: of the Triton kernels only those of triton_paths.py, a tenth of the time
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from build_scripts import ROOT
from check_environment import Check
from triton_paths import PATHS

ARCHITECTURE = "9.0"
_RUNS = "import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (3, 12))"
# The two halves of benchmarks/gpu_day/build.py, asked for an architecture as there is no card.
_BUILD = """
import sys
from pathlib import Path
from benchmarks.gpu_day import build
log = build.ROOT / "build" / "versions.log"
log.parent.mkdir(exist_ok=True)
module, reason = build.compile_extension(dict(one.split("=") for one in sys.argv[1:]), log, 3600.0)
build.stage(module, reason)
sys.exit(f"{log.read_text(errors='replace')}\\n{reason}" if module is None else 0)
"""
_STAGE = "from benchmarks.gpu_day import build; build.stage(None, 'there is no nvcc')"


def python312() -> str:
    """A Python 3.12 that runs and can make environments, or, with a word, the Python that runs this."""
    of_pyenv = sorted(Path.home().glob(".pyenv/versions/3.12*/bin/python3.12"), reverse=True)
    for one in (os.environ.get("PYTHON312"), shutil.which("python3.12"), *map(str, of_pyenv)):
        if one and shutil.which(one) and subprocess.run([one, "-c", _RUNS], capture_output=True).returncode == 0:
            return one
    print(f"versions: no Python 3.12 runs here (PYTHON312, PATH, ~/.pyenv), taking {sys.executable}", flush=True)
    return sys.executable


def main() -> int:
    """Make the environment, build, compile, rehearse; return the exit status."""
    check = Check("versions", ROOT / ".venv-versions", ROOT / "requirements-versions.txt", python312())
    has_nvcc = check.has_nvcc()
    if not has_nvcc and os.environ.get("VERSIONS_OPTIONAL") != "1":
        return 1
    check.make_environment()
    staged = str(ROOT / "build" / "gpu_day")
    found = {"PYTHONSAFEPATH": "1", "PYTHONPATH": f"{staged}{os.pathsep}{ROOT}"}  # as build.environment has it
    if has_nvcc:
        asked = ["LOMIX_FAST_BUILD=cuda", f"TORCH_CUDA_ARCH_LIST={ARCHITECTURE}", "LOMIX_FAST_WERROR=1"]
        with check.step(f"build for {ARCHITECTURE}"):
            check.run([check.python, "-c", _BUILD, *asked])
        with check.step("try what is built"):
            expected = {"CHECK_CUDA_TARGETS": ARCHITECTURE, "CHECK_CUDA_PREFIX": staged}
            check.run([check.python, str(ROOT / "tests" / "check_cuda_installed.py")], **found, **expected)
    else:
        check.run([check.python, "-c", _STAGE])
    with check.step("compile the Triton kernels"):
        chosen = sorted(PATHS) if os.environ.get("VERSIONS_SAMPLE") == "1" else []
        check.run([check.python, "-m", "benchmarks.gpu_day.compile_triton", *chosen], **found)
    with check.step("rehearse a GPU day"):
        check.run([check.python, "-m", "benchmarks.gpu_day", "--rehearse"])
    check.summary()
    return 0


if __name__ == "__main__":
    sys.exit(main())
