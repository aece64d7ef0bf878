"""What the build recorded about lomix_fast._C, so that an error can name the real cause."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import torch

_RECORD = Path(__file__).with_name("_build_info.json")  # written by setup.py, absent in a tree that was never built


def read() -> dict[str, str]:
    """Return the record of the build.

    Returns:
        {"skipped": reason} when the extension was left out; {"torch", "compiler", "capabilities"} when it was built,
        with {"cuda", "cuda_archs"} (version, "8.0 9.0+PTX") or {"cuda_skipped": reason} for its CUDA kernels; {} when
        there is no record.
    """
    try:
        return dict(json.loads(_RECORD.read_text()))
    except FileNotFoundError:
        return {}


def not_installed() -> str | None:
    """Return why parts of the package are missing where it is imported from sources that were not installed, or None.

    Python prefers the directory that it runs in, so that happens in the root of the repository, even where the package
    is installed elsewhere. An installation, editable or not, brings `lomix_fast.kernels`, which the sources keep beside
    the package.
    """
    package = Path(__file__).parent
    if importlib.util.find_spec("lomix_fast.kernels") is not None or not (package.parent / "setup.py").is_file():
        return None
    return (
        f"lomix_fast is imported from {package.parent}, a source tree that is not installed, and without what an "
        "installation adds; run pip install --no-build-isolation -e . there, or start Python in another directory"
    )


def obstacle() -> str | None:
    """Return why lomix_fast._C cannot be used, as far as that is known before it is imported, otherwise None.

    torch promises no stable C++ interface between releases: an extension built for another one may fail to load, or
    load and misbehave, so the releases are compared first.
    """
    record = read()
    if "skipped" in record:
        return f"the extension lomix_fast._C was not built: {record['skipped']}; to build it, {reinstall()}"
    built_for = record.get("torch")
    if built_for is not None and _release(built_for) != _release(torch.__version__):
        return (
            f"the extension lomix_fast._C was built for torch {built_for}, but this is torch {torch.__version__}; "
            f"to build it anew, {reinstall()}"
        )
    cuda = record.get("cuda")
    if cuda is not None and _release(cuda)[0] != (_release(torch.version.cuda or "") or [""])[0]:
        its = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        return (
            f"the extension lomix_fast._C was built for CUDA {cuda}, but this torch {torch.__version__} is built {its}"
            f"; to build it anew, {reinstall('auto')}"
        )
    return None


def reinstall(build: str = "cpu", architectures: str = "") -> str:
    """Return how to build the extension anew, as the end of a sentence.

    Args:
        build: what LOMIX_FAST_BUILD has to ask for.
        architectures: GPUs to build for, "" for those that are built for anyway.
    """
    these = f"TORCH_CUDA_ARCH_LIST={architectures} " if architectures else ""
    command = "pip install --no-build-isolation --no-deps --force-reinstall ."
    return f"run {these}LOMIX_FAST_BUILD={build} {command} in its sources"


def _release(version: str) -> list[str]:
    return re.findall(r"\d+", version)[:2]
