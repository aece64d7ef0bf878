"""Programs that play in a rehearsal what only a machine with a GPU has: ncu, compute-sanitizer, and rates.cu built.

They take the options that `limits.py` gives, really run the program that they are to watch, and write what the tools
write, with figures made up. Each has its unpleasant moments too: a metric that is not there, a finding.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from .child import ROOT
from .ncu import METRICS
from .sanitizer import ERROR_STATUS

NAMES = ("rates", "ncu", "compute-sanitizer")
_KERNELS = {
    "cuda": ("statistics_few<float, (int)9, (int)4>", "gradients_few<float, (int)9, (int)4>", "gather_kernel<float>"),
    "triton": ("statistics_kernel", "gradients_kernel", "gather_kernel"),
}
_RATES = {
    **{"ffma": 3e13, "clock": 1.8e9, "ex2": 3.8e12, "issue": 3e13, "lds32_lane": 2.3e11, "lds32_uniform": 2.3e11},
    **{"lds128_lane": 6e10, "lds128_uniform": 2.3e11, "mma_half": 3e14, "mma_tf32": 1.5e14, "l2": 5e12},
    **{"copy": 2.8e12, "copy_kernel": 2.7e12, "copy_size": 5e8, "launch": 2e-6, "launch_and_wait": 6e-6},
}


def rates(arguments: Sequence[str]) -> int:
    """What rates.cu prints, of no card that there is."""
    clocked = ("ffma", "ex2", "issue", "lds32_lane", "lds32_uniform", "lds128_lane", "lds128_uniform", "mma_half")
    measures = [
        {"name": name, "value": value, "unit": "1/s"}
        | ({"per_sm_clock": value / 132 / 1.8e9, "clock_ghz": 1.8} if name in clocked else {})
        for name, value in _RATES.items()
    ]
    found = {"device": "stand-in", "capability": "9.0", "sms": 132, "l2_bytes": 50 * 2**20, "measures": measures}
    print(json.dumps(found))
    return 0


def _target(arguments: Sequence[str]) -> list[str]:
    """The program to watch: what follows the options, all of which have a name before them."""
    return list(arguments[arguments.index(sys.executable) :])


def _option(arguments: Sequence[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


def _backend_and_cases(target: Sequence[str]) -> tuple[str, list[str]]:
    at = target.index("benchmarks.gpu_day.one_step")
    return target[at + 1], list(target[at + 2 :])


def ncu(arguments: Sequence[str]) -> int:
    """Lists all metrics but one; with --metrics it runs the target and tells of three kernels a case."""
    if "--query-metrics" in arguments:
        print("Device NVIDIA stand-in (GH100)\n" + "-" * 80)
        for metric in METRICS:
            if metric.what != "L2 throughput":
                print(f"{metric.names[0].partition('.')[0]:60} Counter      %            made up")
        return 0
    log = Path(_option(arguments, "--log-file"))
    names = _option(arguments, "--metrics").split(",")
    alu = next((name for name in names if "pipe_alu" in name), None)
    if alu is not None:  # in the list, and refused all the same
        log.write_text(f"==PROF== Connected to process 1\n==ERROR== Failed to find metric {alu}\n")
        return 1
    target = _target(arguments)
    backend, cases = _backend_and_cases(target)
    status = subprocess.run(target, check=False).returncode
    lines = [
        "==PROF== Connected to process 1",
        '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"',
    ]
    for number in range(len(_KERNELS[backend]) * len(cases)):
        kernel = _KERNELS[backend][number % 3]
        for name in names:
            unit, value = ("ns", "1,234,567") if "duration" in name else ("%", "n/a" if "tensor" in name else "61.50")
            lines.append(f'"{number}","{kernel}","Command line profiler metrics","{name}","{unit}","{value}"')
    log.write_text("\n".join([*lines, "==PROF== Disconnected from process 1", ""]))
    return status


def compute_sanitizer(arguments: Sequence[str]) -> int:
    """Runs the target; breaks down where memcheck is to check several cases of cuda, and finds Triton's known race."""
    target = _target(arguments)
    backend, cases = _backend_and_cases(target)
    tool = _option(arguments, "--tool")
    status = subprocess.run(target, check=False).returncode
    text = ["COMPUTE-SANITIZER"]
    if (backend, tool) == ("cuda", "memcheck") and len(cases) > 1:
        print("Error: the target did not answer")
        return 1
    if (backend, tool) == ("triton", "racecheck"):
        text += ["Error: Race reported between Read access at statistics_kernel+0x430 in forward.py:150"]
        text += ["    and Write access at statistics_kernel+0x470 in forward.py:151 [8 hazards]"]
        text += ["RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"]
    else:
        text += [
            "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
            if tool == "racecheck"
            else "ERROR SUMMARY: 0 errors"
        ]
    Path(_option(arguments, "--log-file")).write_text("".join(f"========= {line}\n" for line in text))
    return status or (ERROR_STATUS if len(text) > 2 else 0)


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A folder with the programs, by the names of what they stand in for, to be put first on the PATH."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in NAMES:
            function = name.replace("-", "_")
            program = Path(scratch, name)
            program.write_text(
                f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
                f"from benchmarks.gpu_day.tool_stand_ins import {function}\nsys.exit({function}(sys.argv[1:]))\n"
            )
            program.chmod(0o755)
        yield Path(scratch)


def first_on_path(variables: dict[str, str], programs: Path) -> dict[str, str]:
    """The same environment, in which those programs are found before all others."""
    return {**variables, "PATH": f"{programs}{os.pathsep}{variables.get('PATH', '')}"}
