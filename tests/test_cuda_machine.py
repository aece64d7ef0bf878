"""The interpreter of machine code: single instructions by hand, what memory costs, and lanes that part and meet."""

from __future__ import annotations

import re

import numpy as np
import pytest

pytest.importorskip("triton", reason="its wheel brings nvdisasm, which lists the machine code")

from benchmarks.gpu.cuda_decode import decode
from benchmarks.gpu.cuda_listing import Instruction, Kernel
from benchmarks.gpu.cuda_memory import GLOBAL, SHARED, Memory
from benchmarks.gpu.cuda_warp import Block, Warp, new_state

_BANKS = {0: np.arange(64, dtype=np.uint32).tobytes(), 2: b""}


def parse(line: str, address: int = 0) -> Instruction:
    guard, op, rest = re.fullmatch(r"(?:@(\S+) )?(\S+) ?(.*)", line).groups()  # type: ignore[union-attr]
    return Instruction(address, guard or "", op, tuple(part.strip() for part in rest.split(",") if part.strip()), ())


def done(line: str, memory: Memory | None = None, **registers: object) -> Warp:
    """A warp after one instruction; registers are given as R4=..., predicates as P1=..."""
    warp = new_state(0, 0)
    for name, value in registers.items():
        if name.startswith("P"):
            warp.predicates[int(name[1:])] = value
        else:
            value = np.asarray(value)
            row = int(name.strip("UR")) + (256 if name.startswith("U") else 0)
            bits = value.astype(np.float32).view(np.uint32) if value.dtype.kind == "f" else value.astype(np.int64)
            warp.registers[row] = bits.astype(np.uint32) if value.dtype.kind != "f" else bits
    with np.errstate(all="ignore"):
        decode(parse(line), _BANKS, memory or Memory(1024), lambda *_: None)(warp)
    return warp


@pytest.mark.parametrize(
    "line,given,expected",
    [
        ("IADD3 R0, R1, -R2, 0x5", {"R1": 7, "R2": 9}, 3),
        ("IADD3.X R0, R1, ~R2, RZ, P1, !PT", {"R1": 7, "R2": 0xFFFFFFFF, "P1": True}, 8),
        ("IMAD R0, R1, -0x3, R2", {"R1": 5, "R2": 1}, 2**32 - 14),
        ("IMAD.HI R0, R1, 0x38e38e39, RZ", {"R1": 900}, 200),  # 900 / 9 * 2
        ("IMAD.HI.U32 R0, R1, R2, R4", {"R1": 1 << 31, "R2": 2, "R4": 0, "R5": 6}, 7),
        ("IMAD.MOV.U32 R0, RZ, RZ, c[0x0][0x10]", {}, 4),
        ("LEA R0, R1, R2, 0x4", {"R1": 3, "R2": 5}, 53),
        ("LEA.HI R0, R1, R2, RZ, 0x5", {"R1": 0xF8000000, "R2": 1}, 32),
        ("LEA.HI.SX32 R0, R1, R2, 0x1f", {"R1": -4, "R2": 10}, 8),
        ("LEA.HI.X R0, R1, R2, R3, 0x2, P0", {"R1": 0xC0000000, "R2": 100, "R3": 1, "P0": True}, 108),
        ("SHF.R.S32.HI R0, RZ, 0x1f, R1", {"R1": -5}, 0xFFFFFFFF),
        ("SHF.R.U32.HI R0, RZ, 0x4, R1", {"R1": 0x123}, 0x12),
        ("SHF.L.U32 R0, R1, R2, RZ", {"R1": 1, "R2": 40}, 0),
        ("SHF.L.U64.HI R0, R1, 0x2, R2", {"R1": 0xC0000000, "R2": 1}, 7),
        ("SHF.L.W.U32.HI R0, R1, R2, R1", {"R1": 0x80000001, "R2": 1}, 3),
        ("LOP3.LUT R0, R1, R2, RZ, 0x3c, !PT", {"R1": 12, "R2": 10}, 6),
        ("LOP3.LUT R0, R1, R2, RZ, 0xc0, !PT", {"R1": 12, "R2": 10}, 8),
        ("LOP3.LUT R0, R1, R2, R3, 0xf8, !PT", {"R1": 16, "R2": 6, "R3": 3}, 18),
        ("PRMT R0, R1, 0x5410, R2", {"R1": 0xAAAA1234, "R2": 0xBBBB5678}, 0x56781234),
        ("IMNMX R0, R1, R2, PT", {"R1": -1, "R2": 1}, 0xFFFFFFFF),
        ("IMNMX.U32 R0, R1, R2, PT", {"R1": -1, "R2": 1}, 1),
        ("VIADDMNMX R0, R1, 0x2, R2, !PT", {"R1": 3, "R2": 4}, 5),
        ("IABS R0, R1", {"R1": -9}, 9),
        ("POPC R0, R1", {"R1": 0xF0F}, 8),
        ("BREV R0, R1", {"R1": 0b1011}, 0xD0000000),
        ("FLO.U32.SH R0, R1", {"R1": 0x80000000}, 0),
        ("FLO.U32.SH R0, R1", {"R1": 1}, 31),
        ("FLO.U32.SH R0, RZ", {}, 0xFFFFFFFF),
        ("SEL R0, R1, 0x7, !P0", {"R1": 5, "P0": True}, 7),
        ("HFMA2.MMA R0, -RZ, RZ, 0, 5.9604644775390625e-08", {}, 1),
        ("I2F.RP R0, R1", {"R1": 16777217}, np.float32(16777218).view(np.uint32)),
        ("F2I.FTZ.U32.TRUNC.NTZ R0, R1", {"R1": 3.9}, 3),
        ("F2I.FTZ.FLOOR.NTZ R0, R1", {"R1": -0.5}, 0xFFFFFFFF),
        ("FADD.FTZ R0, -R1, 2", {"R1": 0.5}, np.float32(1.5).view(np.uint32)),
        (
            "FFMA.FTZ R0, R1, R2, -R3",
            {"R1": 1 + 2.0**-23, "R2": 1 + 2.0**-23, "R3": 1.0},
            np.float32(2**-22 + 2.0**-46),
        ),
        ("FMNMX.FTZ R0, R1, R2, !PT", {"R1": 0.5, "R2": -3.0}, np.float32(0.5).view(np.uint32)),
        ("FSEL R0, R1, -INF , P0", {"R1": 0.5, "P0": False}, np.float32(-np.inf).view(np.uint32)),
        ("MUFU.EX2 R0, R1", {"R1": 3.0}, np.float32(8).view(np.uint32)),
        ("UIADD3 UR0, UR1, 0x2, URZ", {"UR1": 5}, None),
        ("P2R R0, PR, RZ, 0x6", {"P0": True, "P1": True, "P2": True}, 6),
        ("LDC R0, c[0x0][R1+0x4]", {"R1": 8}, 3),
        ("S2R R0, SR_CTAID.X", {}, 0),
    ],
)
def test_a_number_comes_out(line: str, given: dict[str, object], expected: object) -> None:
    warp = done(line, **given)
    if expected is None:
        assert (warp.registers[256] == 7).all()
        return
    wanted = expected.view(np.uint32) if isinstance(expected, np.float32) else np.uint32(expected)  # type: ignore[call-overload]
    assert (warp.registers[0] == wanted).all(), hex(int(warp.registers[0][0]))


@pytest.mark.parametrize(
    "line,given,expected",
    [
        ("ISETP.GE.AND P0, PT, R1, R2, PT", {"R1": -1, "R2": 1}, False),
        ("ISETP.GE.U32.AND P0, PT, R1, R2, PT", {"R1": -1, "R2": 1}, True),
        ("ISETP.NE.OR P0, PT, R1, R2, P3", {"R1": 1, "R2": 1, "P3": True}, True),
        ("ISETP.GE.AND.EX P0, PT, R1, R2, PT, P3", {"R1": 4, "R2": 4, "P3": False}, False),
        ("ISETP.GT.U32.AND.EX P0, PT, R1, R2, PT, P3", {"R1": 5, "R2": 4, "P3": False}, True),
        ("IADD3 R0, P0, R1, R2, RZ", {"R1": 0xFFFFFFFF, "R2": 1}, True),
        ("IADD3 R0, P0, R1, -R2, RZ", {"R1": 5, "R2": 0}, True),
        ("IADD3 R0, P0, R1, -R2, RZ", {"R1": 5, "R2": 6}, False),
        ("LEA R0, P0, R1, R2, 0x2", {"R1": 1 << 29, "R2": 1 << 31}, True),
        ("LOP3.LUT P0, RZ, R1, 0x2, RZ, 0xc0, !PT", {"R1": 2}, True),
        ("PLOP3.LUT P0, PT, P1, P2, PT, 0x2a, 0x0", {"P1": True, "P2": True}, False),
        ("PLOP3.LUT P0, PT, PT, PT, PT, 0x80, 0x0", {}, True),
        ("FSETP.NEU.FTZ.AND P0, PT, |R1|, +INF , PT", {"R1": float("nan")}, True),
        ("FSETP.GEU.FTZ.AND P0, PT, R1, -126, PT", {"R1": -127.0}, False),
        ("R2P PR, R1, 0x1", {"R1": 1}, True),
    ],
)
def test_a_predicate_comes_out(line: str, given: dict[str, object], expected: bool) -> None:
    assert (done(line, **given).predicates[0] == expected).all()


def test_guards_and_pairs() -> None:
    lanes = np.arange(32)
    warp = done("@!P1 MOV R0, 0x7", P1=lanes < 4)
    assert warp.registers[0].tolist() == [0] * 4 + [7] * 28
    warp = done("IMAD.WIDE R0, R2, -0x2, R4", R2=3, R4=1, R5=1)
    assert (warp.registers[0] == 2**32 - 5).all() and (warp.registers[1] == 0).all()
    warp = done("SHFL.BFLY PT, R0, R1, 0x10, 0x1f", R1=lanes)
    assert warp.registers[0].tolist() == [*range(16, 32), *range(16)]
    warp = done("MOV RZ, 0x7")
    assert (warp.registers[255] == 0).all()


def test_what_is_not_known_is_said() -> None:
    for line in ("BOGUS R0, R1", "S2R R0, SR_LANEID", "FLO.U32 R0, R1", "HFMA2.MMA R0, R1, R2, 1, 2"):
        with pytest.raises(ValueError, match=r"teach cuda_\w+\.py about"):
            done(line)


def test_memory_goes_where_it_should() -> None:
    memory = Memory(256)
    address = memory.place(np.arange(64, dtype=np.uint32))
    assert memory.place(np.zeros(1)) == address + 256 and address == GLOBAL
    lanes = np.arange(32)
    low = (address & 0xFFFFFFFF) + 8 * lanes
    warp = done("LDG.E.64 R0, [R2.64+0x0]", memory, R2=low, R3=address >> 32)
    assert warp.registers[0].tolist() == list(range(0, 64, 2)) and warp.registers[1].tolist() == list(range(1, 64, 2))
    done("STS [R2.X4+0x8], R4", memory, R2=lanes, R4=lanes + 5)
    assert memory.shared[2:34].tolist() == list(range(5, 37))
    warp = done("LD.E R0, [R2.64]", memory, R2=4 * lanes + 8, R3=SHARED >> 32)
    assert warp.registers[0].tolist() == list(range(5, 37))
    done("ATOMS.POPC.INC.32 RZ, [R2.X4+URZ]", memory, R2=0)
    assert memory.shared[0] == 32
    warp = done("LDG.E.U16 R0, [R2.64]", memory, R2=(address & 0xFFFFFFFF) + 2 * lanes, R3=address >> 32)
    assert warp.registers[0].tolist() == [n // 2 if n % 2 == 0 else 0 for n in range(32)]
    with pytest.raises(IndexError, match="not in shared memory"):
        done("LDS R0, [R2]", memory, R2=4096)


def test_what_an_access_costs() -> None:
    memory, lanes = Memory(8192), np.arange(32, dtype=np.uint64)
    shared = {"is_shared": True, "is_store": False}
    assert memory.note(4 * lanes, 4, **shared) == 1
    assert memory.note(0 * lanes, 4, **shared) == 1
    assert memory.note(128 * lanes, 4, **shared) == 32  # all in one bank
    assert memory.note(8 * lanes, 4, **shared) == 2
    assert memory.note(8 * lanes, 8, **shared) == 2 and memory.note(16 * lanes, 16, **shared) == 4
    assert memory.note(0 * lanes, 16, **shared) == 4  # registers are written no faster
    assert memory.note(16 * lanes[:3], 16, **shared) == 4  # nor for a few lanes
    assert memory.note(256 * (lanes % np.uint64(8)), 16, **shared) == 4 * 8
    assert memory.traffic() == (0, 0, 0)
    assert memory.note(GLOBAL + 4 * lanes, 4, False, False) == 1
    assert memory.note(GLOBAL + 128 * lanes, 4, False, False) == 32
    assert memory.note(GLOBAL + 16 * lanes, 16, False, True) == 4
    assert memory.traffic() == (32 * (4 + 32), 32 * (4 + 31), 32 * 16)
    memory.forget()
    assert memory.traffic() == (0, 0, 0)


_PARTING = """
S2R R1, SR_TID.X
ISETP.GE.AND P0, PT, R1, 0x8, PT
BSSY B0, `(.done)
@P0 BRA `(.other)
.loop
IADD3 R2, R2, 0x1, RZ
ISETP.GE.AND P1, PT, R2, R1, PT
@!P1 BRA `(.loop)
BRA `(.done)
.other
MOV R2, 0x64
.done
BSYNC B0
BAR.SYNC.DEFER_BLOCKING 0x0
STS [R1.X4], R2
EXIT
"""


def block_of(text: str, warps: int) -> tuple[Block, Memory]:
    code, labels = [], {}
    for line in text.strip().splitlines():
        if line.startswith("."):
            labels[line] = len(code)
        else:
            code.append(parse(line, 16 * len(code)))
    memory = Memory(1024)
    return Block(Kernel("made up", tuple(code), labels, b"", 0), _BANKS, memory, warps, 0), memory


def test_lanes_part_and_meet() -> None:
    block, memory = block_of(_PARTING, 2)
    block.run()
    expected = [max(1, n) if n < 8 else 100 for n in range(64)]
    assert memory.shared[:64].tolist() == expected
    issued = dict(zip([f"{one.op} {n}" for n, one in enumerate(block.code)], block.issued.tolist(), strict=True))
    assert issued["IADD3 4"] == 7  # the longest lane's turns; the second warp never comes here
    assert issued["MOV 8"] == 2 and issued["STS 11"] == 2 and issued["EXIT 12"] == 2
    assert block.wavefronts.tolist()[11] == block.least_wavefronts.tolist()[11] == 2


def test_a_block_that_cannot_end_is_stopped() -> None:
    block, _ = block_of(".loop\nBRA `(.loop)", 1)
    with pytest.raises(RuntimeError, match="got no end after so many instructions"):
        block.run(most=1000)
    waiting = "S2R R1, SR_TID.X\nISETP.GE.AND P0, PT, R1, 0x8, PT\n@P0 EXIT\nWARPSYNC 0xff\nEXIT"
    block_of(waiting, 1)[0].run()  # lanes that have ended are not waited for
    parted = "BSSY B0, `(.on)\nS2R R1, SR_TID.X\nISETP.GE.AND P0, PT, R1, 0x8, PT\n@P0 BRA `(.on)\nBSYNC B0\nEXIT\n"
    stuck = parted + ".on\nBAR.SYNC 0x0\nEXIT"
    with pytest.raises(RuntimeError, match="wait for lanes that never come"):
        block_of(stuck, 1)[0].run()
