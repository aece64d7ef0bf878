"""Machine code of one kernel: instructions, labels and constants out of a cubin and the listing of nvdisasm -gi."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .cuda_build import Binary, kernel_name

_LINE = re.compile(
    r'^(?P<label>[.$]?[\w$.]+):$|^\s*//## File "(?P<file>[^"]+)", line (?P<line>\d+)(?P<inlined> inlined)?'
    r"|^\s*/\*(?P<at>[0-9a-f]{4,})\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?(?P<op>[A-Z][\w.]*)\s*(?P<rest>[^;]*?)\s*;",
    re.MULTILINE,
)
_TARGETS = re.compile(r'\(\*"BRANCH_TARGETS [^"]*"\*\)')
_FUNCTION = re.compile(r"\b(\w+)\(")
_NOT_FUNCTIONS = {"__launch_bounds__", "alignas", "sizeof"}


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        address: in the kernel's section.
        guard: predicate, such as "P0" or "!P3"; "" for none.
        op: with modifiers, such as "LDG.E.64".
        operands: as text.
        functions: of the source, the one it was written in first, then those it was inlined into.
    """

    address: int
    guard: str
    op: str
    operands: tuple[str, ...]
    functions: tuple[str, ...]

    @property
    def mnemonic(self) -> str:
        """Without modifiers."""
        return self.op.partition(".")[0]


@dataclass(frozen=True)
class Kernel:
    """One kernel.

    Attributes:
        name: see `cuda_build.kernel_name`.
        code: instructions in their order.
        labels: place in `code` by label.
        constants: bytes of constant bank 2, with tables of branch targets.
        parameters: where in constant bank 0 the kernel's argument begins.
    """

    name: str
    code: tuple[Instruction, ...]
    labels: dict[str, int]
    constants: bytes
    parameters: int


def read_kernel(binary: Binary, name: str, argument: int) -> Kernel:
    """One kernel of a binary.

    Args:
        binary: see `cuda_build.compile_few`.
        name: such as "forward".
        argument: bytes of the kernel's only argument, which ends constant bank 0.

    Raises:
        ValueError: the binary has no such kernel.
    """
    parts = re.split(r"^\.text\.(\w+):$", binary.listing, flags=re.MULTILINE)
    for mangled, text in zip(parts[1::2], parts[2::2], strict=True):
        if kernel_name(mangled) == name:
            sections = elf_sections(binary.cubin)
            bank = len(sections[f".nv.constant0.{mangled}"])
            # The tables are addresses of the section, which a loader has nothing to add to.
            constants = sections.get(f".nv.constant2.{mangled}", b"")
            return Kernel(name, *_code(text), constants, bank - argument)
    known = ", ".join(filter(None, map(kernel_name, parts[1::2])))
    raise ValueError(f"name: got {name!r}, expected one of {known}; see few.cu")


def _code(text: str) -> tuple[tuple[Instruction, ...], dict[str, int]]:
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    functions: tuple[str, ...] = ()
    chain: list[str] = []
    for match in _LINE.finditer(text):
        if match["label"]:
            labels[match["label"]] = len(code)
        elif match["file"]:
            name = function_at(match["file"], int(match["line"]))
            if name and name not in chain:
                chain.append(name)
        else:
            if chain:
                functions, chain = tuple(chain), []
            rest = _TARGETS.sub("", match["rest"])
            operands = tuple(part.strip() for part in rest.split(",") if part.strip())
            code.append(Instruction(int(match["at"], 16), match["guard"] or "", match["op"], operands, functions))
    return tuple(code), labels


@cache
def _functions(path: str) -> tuple[tuple[int, int, str], ...]:
    """First and last line, and name, of the functions of a source of ours; none of files that are not here."""
    if not Path(path).is_file():
        return ()
    text = re.sub(r"//.*", "", Path(path).read_text(encoding="utf-8"))
    found, opened, head, line = [], [], "", 1
    for char in text:
        line += char == "\n"
        if char == "{":
            opened.append((line, _function_name(head)))
        elif char == "}" and opened:
            first, name = opened.pop()
            if name:
                found.append((first, line, name))
        head = "" if char in "{};" else head + char
    return tuple(found)


def _function_name(head: str) -> str:
    """The function that text before a brace defines; "" where it defines none."""
    text = " ".join(line for line in head.splitlines() if not line.startswith("#")).strip()
    is_head = text.endswith((")", ") const")) and text.count("(") == text.count(")")
    if not is_head or re.match(r"(else|if|for|while|switch)\b", text):
        return ""
    return next((name for name in _FUNCTION.findall(text) if name not in _NOT_FUNCTIONS), "")


def function_at(path: str, line: int) -> str:
    """Name of the function that a line of a source lies in; "" where it is none of ours."""
    inside = [(last - first, name) for first, last, name in _functions(path) if first <= line <= last]
    return min(inside)[1] if inside else ""


def elf_sections(cubin: bytes) -> dict[str, bytes]:
    """Contents of an ELF file's sections by name.

    Raises:
        ValueError: it is no ELF file of 64 bits.
    """
    if cubin[:5] != b"\x7fELF\x02":
        raise ValueError(f"cubin: got {cubin[:5]!r}, expected an ELF file of 64 bits; compile with -cubin")
    (offset,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, offset + size * n) for n in range(count)]
    strings = cubin[headers[names][4] :]
    found = {}
    for name, kind, _, _, start, length in headers:
        text = strings[name : strings.index(b"\0", name)].decode()
        found[text] = b"" if kind == 8 else cubin[start : start + length]  # 8: nothing in the file
    return found
