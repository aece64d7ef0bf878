"""The build scripts of the project's root, imported without leaving the root on the import path."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import build_cpp  # noqa: E402
import build_cuda  # noqa: E402

sys.path.remove(str(ROOT))

__all__ = ["CUDA", "ROOT", "TOOLCHAIN", "VARIABLES", "build_cpp", "build_cuda"]

# What steers a build; a test clears it, whatever the caller of pytest set.
VARIABLES = (
    *("LOMIX_FAST_BUILD", "LOMIX_FAST_WERROR", "CXX", "MAX_JOBS", "DEBUG", "PYTHONPATH"),
    *("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"),
)

CUDA = build_cuda.Cuda(
    nvcc="/toolkit/bin/nvcc",
    version="13.0",
    architectures=("8.0", "9.0+PTX"),
    include=("/toolkit/include",),
    cudart="/torch/lib/libcudart.so.13",
)
TOOLCHAIN = build_cpp.Toolchain(
    cxx=("g++",),
    cxx_version="g++ 12",
    ninja="ninja",
    torch_version="2.13.0",
    torch_include=("/torch/include",),
    torch_lib="/torch/lib",
    cxx11_abi=True,
    capabilities=("DEFAULT", "AVX2", "AVX512"),
)
