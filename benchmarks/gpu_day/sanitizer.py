"""What compute-sanitizer is asked about the kernels, and its answers read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .child import Ended, late
from .day import CRASHED, FAILED, OK
from .ncu import base_name

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# 2D with few classes, a volume, classes by parts, half precision, and one value a class.
CASES = ("non_integer", "volume", "classes_17", "half_16", "sigmoid_bool")
ERROR_STATUS = 17  # of the tool when it has found something; programs of ours never end with it
_LIMIT = 100  # findings that are named
# Triton's forward kernel lets all warps read a count that thread 0 writes again, always with the same number, and reads
# scratch of maps that are not there, which a mask then drops.
_KNOWN = {("triton", "racecheck"): "statistics_kernel", ("triton", "initcheck"): "statistics_kernel"}
_KNOWN_NOTE = "known and harmless: a count rewritten with the same number, scratch that a mask drops"


@dataclass(frozen=True)
class Findings:
    """What a tool found.

    Attributes:
        count: errors and hazards; None where it did not come to an end.
        kernels: the kernels of those it named, each once.
        first: its first sentence about one, "" for none.
    """

    count: int | None
    kernels: tuple[str, ...]
    first: str


def command(program: str, tool: str, log: str, port: int, target: Sequence[str]) -> list[str]:
    """How to start it.

    Args:
        program: compute-sanitizer.
        tool: one of `TOOLS`.
        log: file for all that the tool itself writes.
        port: the first of those it may use; several at once must not share them.
        target: program to check, with its arguments.
    """
    # Triton's compilers are processes of their own and no concern of ours. A library that tries a call of the API and
    # copes with its failure is no error. Waiting for the target to start is limited from outside.
    only = ("--report-api-errors", "no") if tool == "memcheck" else ()
    return [
        *(program, "--tool", tool, "--error-exitcode", str(ERROR_STATUS), "--target-processes", "application-only"),
        *("--show-backtrace", "no", "--print-limit", str(_LIMIT), "--launch-timeout", "0", "--port", str(port)),
        *("--log-file", log, *only, *target),
    ]


def findings(text: str) -> Findings:
    """Read what a tool wrote."""
    lines = [line.partition("=========")[2].strip() for line in text.splitlines() if line.startswith("=========")]
    counts = [
        int(n) for line in lines for n in re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", line)
    ]
    kernels: dict[str, None] = {}
    for line in lines:
        # "at f(int *)+0x90 in file.cu:12", or as older ones have it "at 0x90 in file.cu:12:f(int *)" or "in f(int *)".
        for new, old in re.findall(r"\bat (?:(?!0x)(.+?)\+0x[0-9a-f]+|0x[0-9a-f]+ in (.+))", line):
            kernels[base_name(new or re.sub(r"^\S+:\d+:", "", old))] = None
    title = re.compile(
        r"(?:Error: |Warning: )?(?:Invalid|Uninitialized|Race reported|Potential|Barrier error|Program hit)"
    )
    first = next((line for line in lines if title.match(line)), "")
    return Findings(max(counts) if counts else None, tuple(kernels), first[:160])


def verdict(backend: str, tool: str, ended: Ended, text: str) -> tuple[str, str]:
    """Status and note.

    Args:
        backend: whose kernels.
        tool: one of `TOOLS`.
        ended: the whole.
        text: what the tool itself wrote.
    """
    if ended.status is None:
        return late(ended)
    found = findings(text)
    if found.count is None or (found.count == 0 and ended.status != 0):
        said = text.strip().splitlines()
        return CRASHED, f"exit status {ended.status}: {ended.last or (said[-1][:200] if said else 'no message')}"
    if found.count == 0:
        return OK, ""
    named = ", ".join(found.kernels) or "no kernel named"
    if found.kernels == (_KNOWN.get((backend, tool)),):
        limit = f"; only the first {_LIMIT} were named" if found.count > _LIMIT else ""
        return OK, f"{found.count} in {named}, {_KNOWN_NOTE}{limit}"
    return FAILED, f"{found.count} in {named}: {found.first}"
