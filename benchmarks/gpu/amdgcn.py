"""What LLVM says about a kernel compiled for AMD: its assembly as text."""

from __future__ import annotations

import re
from collections import Counter

CLASSES = (
    *("float", "compare", "special", "matrix", "global_load", "global_store", "shared", "shuffle"),
    *("spill_load", "spill_store", "lane", "convert", "integer", "scalar", "control"),
)
# The first that matches decides. A float addition that takes its operand from another lane ("_dpp") is a shuffle.
_PATTERNS = (
    ("matrix", r"v_s?mfma\w*|v_smfmac\w*|v_s?wmma\w*"),
    ("spill_load", r"scratch_load\w*"),
    ("spill_store", r"scratch_store\w*"),
    ("global_load", r"(global|buffer|flat)_(load|gl\w*)\w*"),
    ("global_store", r"(global|buffer|flat)_(store|atomic)\w*"),
    ("shuffle", r"ds_b?permute\w*|ds_swizzle\w*|v_\w+_dpp8?|v_permlane\w*"),
    ("shared", r"ds_\w+"),
    ("lane", r"v_(read|write)(first)?lane\w*"),
    ("special", r"v_s?_?(exp|log|rcp|rsq|sqrt|sin|cos)_\w+"),
    ("compare", r"v_cmpx?_\w+_f(16|32|64)\w*|v_(max|min|med)(3|num|imum)?_(num_)?f(16|32|64)\w*|v_cndmask\w*"),
    ("convert", r"v_cvt_\w+|v_(rndne|floor|trunc|fract)_\w+"),
    (
        "float",
        r"v_(pk_|dual_)?(add|sub|subrev|mul|fma|fmac|mac|mad|fmaak|fmamk|ldexp|div_scale|div_fmas|div_fixup|frexp\w*)"
        r"(_dx9|_legacy|_mix\w*)?_f(16|32|64)\w*",
    ),
    (
        "control",
        r"s_(c?branch\w*|barrier\w*|wait\w*|endpgm\w*|nop|sleep\w*|setprio|delay_alu|sendmsg\w*|setpc\w*|swappc\w*|clause"
        r"|inst_prefetch|code_end|sethalt|trap|icache_inv|dcache\w*|setreg\w*|getreg\w*|set_inst_prefetch\w*)",
    ),
    ("scalar", r"s_\w+"),
)
_CLASS_OF = tuple((name, re.compile(f"(?:{pattern})$")) for name, pattern in _PATTERNS)
_MNEMONIC = re.compile(r"(?:^\s+|::\s+)((?:v|s|ds|global|buffer|flat|scratch)_[a-z0-9_]+)", re.MULTILINE)
_FIELDS = (
    *("vgpr_count", "agpr_count", "sgpr_count", "vgpr_spill_count", "sgpr_spill_count"),
    *("group_segment_fixed_size", "private_segment_fixed_size"),
)


def class_of(mnemonic: str) -> str:
    """The class, one of CLASSES, of an instruction: "v_fmac_f32_e32", "s_barrier"."""
    return next((name for name, pattern in _CLASS_OF if pattern.match(mnemonic)), "integer")


def instructions(assembly: str) -> Counter[str]:
    """Static instructions by class; each half of a dual-issue instruction (":: v_dual_...") counts, s_nop does not."""
    code = assembly.split(".amdgpu_metadata", 1)[0]
    return Counter(class_of(found) for found in _MNEMONIC.findall(code) if found not in ("s_nop", "s_code_end"))


def usage(assembly: str) -> dict[str, int]:
    """Registers, spills and bytes out of the metadata at the end of the assembly.

    Returns:
        vgpr_count, agpr_count (0 where there are none), sgpr_count, vgpr_spill_count, sgpr_spill_count,
        group_segment_fixed_size (LDS bytes) and private_segment_fixed_size (bytes of a thread's own memory).

    Raises:
        ValueError: the metadata is missing.
    """
    found = {name: 0 for name in _FIELDS}
    for name in _FIELDS:
        value = re.search(rf"^\s*(?:- )?\.{name}:\s+(\d+)", assembly, re.MULTILINE)
        if value:
            found[name] = int(value[1])
        elif name != "agpr_count":
            raise ValueError(
                f"assembly: got none with .{name}, expected AMD's kernel metadata; check that it is the asm['amdgcn'] "
                "of a whole kernel"
            )
    return found
