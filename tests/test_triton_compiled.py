"""The Triton kernels are compiled for GPUs that are not here: a fixed sample; `make gpu-report` compiles all."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.timeout(900)
def test_a_sample_compiles_without_spills_and_in_time() -> None:
    """In a process of its own, where kernels are compiled and not interpreted."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--sample", "--check", "--workers", "1"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = done.stdout.splitlines()
    assert len(verdicts) == 3 and all(line.startswith("kept: ") for line in verdicts), done.stdout
    for arch in ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100"):
        assert f" {arch} " in done.stderr, done.stderr


# Kernel, architecture, classes, axes, and what it is compiled for: see `MODES` of kernels/aot.py.
GENERAL = (
    ("forward", "sm_80", 9, 2, "weights"),
    ("backward", "sm_80", 9, 3, "sigmoid"),
    ("backward", "sm_80", 4, 2, "soft, all"),
    ("backward", "gfx942", 9, 2, "extra"),
)
_COMPILE = """
import json, sys
from dataclasses import asdict
from benchmarks.gpu.compiled import compile_one
print(json.dumps([asdict(compile_one(*one)) for one in json.loads(sys.argv[1])]))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.timeout(900)
def test_kernels_for_general_targets_and_all_operators_compile_without_spills() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE, json.dumps(GENERAL)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for variant, made in zip(GENERAL, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert not made["error"] and made["registers"] > 0, f"{variant}: {made['error']}"
        assert made["spills"] == made["stack_bytes"] == 0, f"{variant}: {made['spills']} spills"
