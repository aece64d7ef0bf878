"""What NVIDIA's tools say about a compiled kernel: `cuobjdump -res-usage` and `nvdisasm` as text."""

from __future__ import annotations

import re
from collections import Counter

CLASSES = (
    *("float", "compare", "special", "matrix", "global_load", "global_store", "shared", "shuffle"),
    *("spill_load", "spill_store", "constant", "convert", "integer", "control"),
)
# The first that matches decides; what matches none is an integer, address or move instruction.
_PATTERNS = (
    ("special", r"MUFU"),
    ("matrix", r"[HIDQBO]?G?MMA|UTC\w*MMA|UTCBAR|UTCATOMSWS|LDTM|STTM|WARPGROUP"),
    ("spill_load", r"LDL"),
    ("spill_store", r"STL"),
    ("global_load", r"LDG|LD|LDGSTS|UBLKCP|UTMALDG"),
    ("global_store", r"STG|ST|ATOMG|ATOM|RED|REDG|UTMASTG"),
    ("shared", r"LDS|STS|LDSM|STSM|ATOMS"),
    ("shuffle", r"SHFL|REDUX|CREDUX|MATCH|VOTEU?"),
    ("constant", r"U?LDCU?"),
    ("convert", r"I2FP?|F2IP?|F2FP?|I2I|FRND"),
    ("compare", r"FSETP|FSET|FSEL|FMNMX3?|FCHK|DSETP|DMNMX|HSETP2|HMNMX2|UFSETP|UFSEL|UFMNMX"),
    ("float", r"U?F(ADD|MUL|FMA|SWZADD)2?(32I)?|D(ADD|MUL|FMA)|HFMA2|HADD2|HMUL2"),
    (
        "control",
        r"BRA|BRX|BRXU|JMP|JMX|BSSY|BSYNC|BREAK|BMOV|BAR|UCGABAR_\w+|EXIT|RET|CALL|NOP|WARPSYNC|DEPBAR|LDGDEPBAR|YIELD"
        r"|KILL|BPT|ERRBAR|MEMBAR|FENCE|CCTL|CCTLL|ELECT|SYNCS|ACQBULK|ACQSHMINIT|NANOSLEEP|PREEXIT|UVIRTCOUNT|WARPGROUP"
        r"|CGAERRBAR|ENDCOLLECTIVE|COLLECTIVE",
    ),
)
_CLASS_OF = tuple((name, re.compile(f"(?:{pattern})$")) for name, pattern in _PATTERNS)
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)
_USAGE = re.compile(r"\b(REG|STACK|SHARED|LOCAL):(\d+)")


def class_of(mnemonic: str) -> str:
    """The class, one of CLASSES, of an instruction named without its modifiers: "LDG", "FFMA"."""
    return next((name for name, pattern in _CLASS_OF if pattern.match(mnemonic)), "integer")


def instructions(listing: str) -> Counter[str]:
    """Static instructions by class in the text of `nvdisasm -c`; padding (NOP) is not counted."""
    found: Counter[str] = Counter()
    for mnemonic in _INSTRUCTION.findall(listing):
        if mnemonic != "NOP":
            found[class_of(mnemonic)] += 1
    return found


def usage(text: str) -> dict[str, int]:
    """Registers and bytes of the kernel in the text of `cuobjdump -res-usage`.

    Returns:
        "REG", "STACK", "SHARED" and "LOCAL", the last three in bytes.

    Raises:
        ValueError: the text describes no kernel.
    """
    found = {name: int(value) for name, value in _USAGE.findall(text)}
    missing = {"REG", "STACK", "LOCAL"} - set(found)
    if missing:
        raise ValueError(
            f"text: got no {', '.join(sorted(missing))} in {text[:200]!r}, expected what cuobjdump -res-usage "
            "writes; check that this triton ships cuobjdump for the architecture"
        )
    return found
