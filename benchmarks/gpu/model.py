"""A MODEL of the time of a step on three cards: counted operations over assumed rates. Nothing in it is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lomix_fast.kernels import config, launch, tables
from lomix_fast.kernels.pixels import TARGET_FIELDS
from lomix_fast.kernels.problem import size_in_space

from .cards import (
    CARDS,
    DIVIDE_SLOTS,
    EXP_SLOTS,
    LAUNCH_S,
    LOG_SLOTS,
    MMA_MACS,
    SCHEDULERS,
    SHARE,
    SYNC_S,
    WAVEFRONT,
    Card,
)
from .compiled import Compiled
from .counts import Executed
from .official import Step, official_memory
from .workloads import PROBLEMS, WORKLOADS, Problem, Workload

_FLOAT, _LABEL = 4, 8  # bytes of a logit and of a label


@dataclass(frozen=True)
class Tile:
    """Instructions of warps, and bytes, that one tile takes on one kind of card.

    Attributes:
        issued: instructions of all kinds, without `other`.
        other: integer, address, move and branch instructions: `Compiled.static` says how many come with one of floats.
        floats: of `issued`, those on float32 lanes.
        special: of `issued`, those on the special function units.
        wavefronts: of 128 bytes, of loads, stores and operands of matrix products.
        macs: multiply-adds for matrix units; 0 where they are float32 instructions, in `floats`.
        scratch_loads, scratch_stores: bytes.
        touched: bytes of scratch that the tile goes back to.
    """

    issued: float
    other: float
    floats: float
    special: float
    wavefronts: float
    macs: float
    scratch_loads: float
    scratch_stores: float
    touched: int


def tile_cost(done: Executed, static: Mapping[str, int], matrix: bool) -> Tile:
    """Instructions of one tile out of the operations that it executes.

    Args:
        done: the operations.
        static: instructions by class in the compiled kernel.
        matrix: whether float32 matrix products are three of tf32, rather than float32 multiply-adds.
    """
    warps = done.warps
    macs = done.elements.get("macs", 0)
    floats = sum(warps.get(kind, 0) for kind in ("float", "choice", "convert")) - warps.get("fused", 0)
    floats += (EXP_SLOTS - 1) * warps.get("exp", 0) + LOG_SLOTS * warps.get("log", 0)
    floats += (DIVIDE_SLOTS - 1) * warps.get("divide", 0) + (0 if matrix else macs / 32)
    special = warps.get("exp", 0) + warps.get("divide", 0)
    memory = sum(value for kind, value in warps.items() if kind.startswith(("load_", "store_")))
    plain = sum(static.get(kind, 0) for kind in ("float", "compare"))
    rest = sum(static.get(kind, 0) for kind in ("integer", "constant", "convert", "control"))
    products = 3 * macs / MMA_MACS if matrix else 0
    return Tile(
        issued=floats + special + memory + warps.get("shuffle", 0) + products,
        other=floats * rest / plain,
        floats=floats,
        special=special,
        # Operands of products go to shared memory and come back.
        wavefronts=sum(done.wavefronts.values()) + 2 * done.bytes.get("operands", 0) / WAVEFRONT,
        macs=3 * macs if matrix else 0,
        scratch_loads=done.bytes.get("load_scratch", 0),
        scratch_stores=done.bytes.get("store_scratch", 0),
        touched=done.touched,
    )


@dataclass(frozen=True)
class Spread:
    """How tiles lie on a card.

    Attributes:
        tiles: of all samples.
        busiest: tiles of the core that has most.
        resident: programs on a core at once.
        programs: launched.
        compulsory: bytes of memory that inputs, outputs and sums take at least.
    """

    tiles: int
    busiest: int
    resident: int
    programs: int
    compulsory: float


def bounds(tile: Tile, spread: Spread, card: Card) -> dict[str, float]:
    """Seconds that each resource of a card needs for one kernel, at SHARE of its peak; the model's time is the largest.

    "arithmetic" is no resource: it is "issue" without integer, address and branch instructions, a lower figure for it.
    """
    core = card.clock * SHARE / spread.busiest  # tiles of the busiest core a second, times clocks of one
    # A working set larger than a cache is assumed to be found there in proportion.
    in_l1 = min(1.0, card.l1 / (spread.resident * tile.touched))
    l2 = spread.tiles * (tile.scratch_stores + (1 - in_l1) * tile.scratch_loads)
    live = min(spread.programs, card.cores * spread.resident) * tile.touched
    out_of_l2 = max(0.0, 1 - card.l2 / live)
    return {
        "issue": (tile.issued + tile.other) / SCHEDULERS / core,
        "float32": tile.floats * 32 / card.lanes / core,
        "special": tile.special * 32 / card.special / core,
        "loads and stores": tile.wavefronts / core,
        "matrix": 2 * tile.macs * card.cores * spread.busiest / (card.tf32 * SHARE),
        "L2": l2 / (card.l2_rate * SHARE),
        "memory": (spread.compulsory + out_of_l2 * l2) / (card.memory_rate * SHARE),
        "arithmetic": tile.issued / SCHEDULERS / core,
    }


@dataclass(frozen=True)
class Estimate:
    """The model's figures for one workload on one card; seconds and bytes.

    Attributes:
        forward, backward: by resource, see `bounds`.
        launches: of the whole step.
        official: the literal loss: its bytes over the card's full rate, its launches, its waits.
        official_memory: what it holds, by formula.
    """

    workload: Workload
    card: Card
    forward: dict[str, float]
    backward: dict[str, float]
    launches: int
    official: tuple[float, float, float]
    official_memory: int

    @property
    def seconds(self) -> float:
        """The step: its kernels and its launches."""
        return worst(self.forward)[1] + worst(self.backward)[1] + self.launches * LAUNCH_S

    @property
    def seconds_arithmetic(self) -> float:
        """The same if no integer, address or branch instruction took a slot."""
        return sum(seconds for _, seconds in self.worst_arithmetic) + self.launches * LAUNCH_S

    @property
    def worst_arithmetic(self) -> list[tuple[str, float]]:
        """Likewise the resource that takes longest, forward and backward, and its seconds."""
        return [worst({**b, "issue": b["arithmetic"]}) for b in (self.forward, self.backward)]

    @property
    def official_low(self) -> float:
        """The literal loss if launches and memory traffic overlapped completely."""
        traffic, launches, syncs = self.official
        return max(traffic, launches) + syncs


def worst(resources: Mapping[str, float]) -> tuple[str, float]:
    """The resource that takes longest, and its seconds."""
    return max(((n, s) for n, s in resources.items() if n != "arithmetic"), key=lambda one: one[1])


def spread_of(name: str, workload: Workload, problem: Problem, done: Executed, resident: int, card: Card) -> Spread:
    """How the tiles of "forward" or "backward" lie on a card, by the package's own rules."""
    target = config.Target("cuda", int(card.arch[3:]), card.cores, 32)
    full = size_in_space(workload.full)
    chosen = (config.forward_config if name == "forward" else config.backward_config)(target, full, problem.classes)
    native = tuple(size_in_space([-(-n // ratio) for n in workload.full]) for ratio in problem.ratios)
    strides = ((0,) * 5,) * len(native)
    used = (True,) * len(native)
    plain = (0,) * len(TARGET_FIELDS)
    shape = tables.geometry(
        *(full, native, chosen.tile, strides, strides, plain, used, workload.batch, problem.classes)
    )
    shares = launch.share_out(workload.batch, shape.tiles, chosen, target, done.scratch, done.sums)
    on_core = -(-shares.programs // card.cores)
    # Of the first core, which has most: its programs, and the items that each of them takes in turn.
    items = sum(-(-(shares.items - first) // shares.programs) for first in range(0, shares.programs, card.cores))
    logits = workload.batch * problem.classes * _FLOAT * sum(z * y * x for z, y, x in native)
    once = logits + workload.pixels * _LABEL + 2 * shares.items * done.sums
    # Backward: gradients, labels once more to look for bad ones, and what tiles write to be gathered.
    again = logits + workload.pixels * _LABEL + 2 * shape.partial * _FLOAT
    return Spread(
        tiles=workload.batch * shape.tiles,
        busiest=items * shares.chunk_tiles,
        resident=max(1, min(resident, on_core)),
        programs=shares.programs,
        compulsory=once + (again if name == "backward" else 0),
    )


def estimate(
    workload: Workload,
    card: Card,
    executed: Mapping[str, Executed],
    compiled: Sequence[Compiled],
    rest: Step,
    official: Step,
) -> Estimate:
    """The model's figures for one workload on one card.

    Args:
        executed: operations of a tile, by "forward" and "backward".
        compiled: variants, among them those of this problem on this card.
        rest: what the loss does around its kernels.
        official: the literal loss on a small problem.

    Raises:
        ValueError: a variant of the problem is not among `compiled`.
    """
    problem = PROBLEMS[workload.problem]
    found = {}
    for name in ("forward", "backward"):
        wanted = (name, card.arch, problem.classes, problem.dims)
        one = next((c for c in compiled if (c.kernel, c.arch, c.classes, c.dims) == wanted and not c.error), None)
        if one is None or one.static is None:
            raise ValueError(
                f"compiled: got no {wanted}, expected every variant that the model needs; compile them all"
            )
        spread = spread_of(name, workload, problem, executed[name], one.programs, card)
        found[name] = bounds(tile_cost(executed[name], one.static, card.matrix), spread, card)
    traffic = official.bytes / official.pixels * workload.pixels / card.memory_rate
    return Estimate(
        workload,
        card,
        found["forward"],
        found["backward"],
        sum(one.launches for one in executed.values()) + rest.launches,
        (traffic, official.launches * LAUNCH_S, official.syncs * SYNC_S),
        official_memory(problem.classes, len(problem.ratios), workload.pixels),
    )


def all_estimates(compiled: Sequence[Compiled], executed: Mapping[str, Mapping[str, Executed]]) -> list[Estimate]:
    """Every workload on every card; executed by problem."""
    from .official import official_step, rest_of_ours

    found = []
    for workload in WORKLOADS:
        p = PROBLEMS[workload.problem]
        rest, official = (step(p.classes, p.dims, p.ratios) for step in (rest_of_ours, official_step))
        for card in CARDS:
            found.append(estimate(workload, card, executed[workload.problem], compiled, rest, official))
    return found
