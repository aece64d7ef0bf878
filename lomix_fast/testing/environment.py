"""On what a report was made: versions, processor, threads, commit, date."""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .. import __version__


def environment() -> dict[str, Any]:
    """Describe this machine and this installation.

    Returns:
        Plain values: package, commit (None outside a checkout; ends in "-dirty" when files differ from it), python,
        torch, triton (None when it is not installed), cuda and hip (the version torch was built for, or None), driver
        (of the GPU, None where none is found), gpus (see `gpus`), platform, cpu, cpu_capability (vector instructions
        torch uses), cores (this process may use), threads (torch uses), openmp (variables that change how threads
        wait), load (average of the last minute: programs that want a core, this one among them; None where the system
        does not say), date (UTC).
    """
    return {
        "package": __version__,
        "commit": _commit(Path(__file__).resolve().parents[1]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "driver": driver_version(),
        "gpus": gpus(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "openmp": {k: v for k, v in sorted(os.environ.items()) if k.startswith(("OMP_", "GOMP_", "KMP_"))},
        "load": load(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def triton_version() -> str | None:
    """Version of triton, None when it is not installed; when it is there and broken, what its import raises.

    It is imported, not looked up: it may be installed under other names, and one that does not import is none.
    """
    try:
        return str(importlib.import_module("triton").__version__)
    except Exception as error:  # a broken installation may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            return None
        return f"cannot be imported: {type(error).__name__}: {error}"


def driver_version() -> str | None:
    """Version of the NVIDIA or AMD kernel driver as the system tells it to every program; None where it does not."""
    with contextlib.suppress(OSError):
        found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", Path("/proc/driver/nvidia/version").read_text())
        if found is not None:
            return f"NVIDIA {found[1]}"
    with contextlib.suppress(OSError):
        return f"amdgpu {Path('/sys/module/amdgpu/version').read_text().strip()}"
    return None


def gpus() -> list[dict[str, Any]]:
    """Describe the CUDA or ROCm devices that torch can use.

    Returns:
        For each device, in order, device ("cuda:0"), name, arch (compute capability such as "9.0", or the gcn
        architecture on ROCm) and memory_mib; or device and error, when it cannot be asked.
    """
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        one: dict[str, Any] = {"device": f"cuda:{index}"}
        try:
            its = torch.cuda.get_device_properties(index)
            arch = its.gcnArchName if torch.version.hip else f"{its.major}.{its.minor}"
            one |= {"name": its.name, "arch": arch, "memory_mib": its.total_memory // 2**20}
        except Exception as error:  # a device that fell off the bus; the others are still worth describing
            one |= {"error": f"{type(error).__name__}: {error}"}
        found.append(one)
    return found


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load() -> float | None:
    """Programs that wanted a core during the last minute, on average; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit(package: Path) -> str | None:
    """Commit of the checkout that tracks `package`; an environment inside some other checkout does not count."""
    try:
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        return _git(package, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(directory: Path, *arguments: str) -> str:
    # As root in somebody else's checkout git would refuse to say anything.
    command = ["git", "-c", "safe.directory=*", *arguments]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
