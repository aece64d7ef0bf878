"""What is particular to the Triton backend: tiles and shares of the work, labels nobody may look at, reasons."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import types

import pytest
import torch
from common import BACKENDS, check_gradients, check_stats, run_backend
from hypothesis import given
from hypothesis import strategies as st

from lomix_fast import MixPlan, available_backends, map_stats
from lomix_fast.testing.cases import Case, case, make_inputs

needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason=available_backends()["triton"] or "")


def launch_with(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    """Launch both kernels with some fields of their configuration changed."""
    from lomix_fast.kernels import launch

    for name in ("forward_config", "backward_config"):
        usual = getattr(launch, name)
        changed = lambda *a, usual=usual: dataclasses.replace(usual(*a), **changes)  # noqa: E731
        monkeypatch.setattr(launch, name, changed)


# ---- tiles ----

# Every kind of map and of ratio with as few maps as possible: the interpreter takes a fifth of a second a map and tile.
IMAGE = Case("image", 2, 3, (13, 17), ((3, 5), (14, 30)), operators=("mul", "cat", "awf"), originals=(0,))
SAME = dataclasses.replace(IMAGE, name="same", native=((13, 5), (13, 17)), layout="channels_last")
VOLUME = Case("tiled_volume", 1, 2, (5, 6, 9), ((2, 3, 4), (5, 6, 9)), operators=("cat", "awf"), originals=())
MANY = dataclasses.replace(IMAGE, name="many", batch=1, classes=17, operators=("cat",), originals=())


@needs_triton
@pytest.mark.parametrize("tile", [(1, 1, 64), (1, 4, 16), (1, 8, 8)])
@pytest.mark.parametrize("one", [IMAGE, SAME, MANY], ids=lambda c: c.name)
def test_any_tile_of_an_image(one: Case, tile: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Borders between tiles and past the image change nothing; several steps through a tile neither."""
    launch_with(monkeypatch, tile=tile, pixels=32, block=32, span=32, per_core=3)
    got = run_backend(one, "triton")
    check_stats(one, got)
    check_gradients(one, got)


# Targets of every kind, all operators that the kernels know, and classes in registers and by parts.
GENERAL = Case("weights", 2, 3, (13, 17), ((3, 5), (14, 30)), operators=("awf",), originals=(0,), weight_map=torch.half,
               ignore_index=2, weighted_ce=False, ce_weight=True)  # fmt: skip
SOFT = dataclasses.replace(GENERAL, name="soft", operators=("cat", "max"), ignore_index=None, dense=True,
                           weight_map=torch.bool, target_dtype=torch.float32, label_smoothing=0.1)  # fmt: skip
SIGMOID = dataclasses.replace(SOFT, name="sigmoid", operators=("mul", "sub"), bounded=True, sigmoid=True,
                              label_smoothing=0.0, target_dtype=torch.bool)  # fmt: skip
MANY_SOFT = dataclasses.replace(SOFT, name="many_soft", batch=1, classes=17, operators=("avg",), originals=())
MANY_SIGMOID = dataclasses.replace(SIGMOID, name="many_sigmoid", batch=1, classes=17, operators=("cat",), originals=())


@needs_triton
@pytest.mark.parametrize("one", [GENERAL, SOFT, SIGMOID, MANY_SOFT, MANY_SIGMOID], ids=lambda c: c.name)
def test_any_tile_under_general_targets(one: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    launch_with(monkeypatch, tile=(1, 4, 16), pixels=32, block=32, span=32, per_core=3)
    got = run_backend(one, "triton")
    check_stats(one, got)
    check_gradients(one, got)


@needs_triton
@pytest.mark.parametrize("tile", [(2, 4, 8), (4, 8, 4)])
def test_any_tile_of_a_volume(tile: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    launch_with(monkeypatch, tile=tile, pixels=32, block=32, span=32, per_core=5)
    got = run_backend(VOLUME, "triton")
    check_stats(VOLUME, got)
    check_gradients(VOLUME, got)


@needs_triton
@pytest.mark.parametrize("full", [(1, 5, 6), (1, 1, 7), (4, 1, 1)], ids=str)
def test_flat_volumes(full: tuple[int, ...]) -> None:
    """Axes of one voxel at full size and more of them at native size."""
    one = dataclasses.replace(VOLUME, name="flat", full=full, native=((2, 3, 3), full), operators=("cat", "awf"))
    got = run_backend(one, "triton")
    check_stats(one, got)
    check_gradients(one, got)


@needs_triton
@pytest.mark.parametrize("name", ["native_larger", "volume_one_voxel", "scales_2"])
def test_positions_in_int64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What very long axes take: the same results."""
    from lomix_fast.kernels import tables

    narrow = tables.geometry
    usual = run_backend(case(name), "triton")
    monkeypatch.setattr(tables, "geometry", lambda *a: dataclasses.replace(narrow(*a), wide=True))
    got = run_backend(case(name), "triton")
    assert torch.equal(got.stats, usual.stats)
    assert all(torch.equal(g, usual.gradients[n]) for n, g in got.gradients.items())


@needs_triton
@given(full=st.integers(1, 300), native=st.integers(1, 300), tile=st.sampled_from((1, 4, 8, 16, 32)))
def test_what_a_tile_can_touch_is_what_it_touches(full: int, native: int, tile: int) -> None:
    """The room that tiles get, and the tiles that a native pixel asks, against every pixel one by one."""
    from lomix_fast.kernels.tables import _near, _reach, source

    touched = [
        {n for o in range(s, min(s + tile, full)) for n in source(o, full, native)} for s in range(0, full, tile)
    ]
    assert _reach(full, native, tile) == max(max(t) - min(t) + 1 for t in touched)
    for n in range(native):
        asking = [i for i, t in enumerate(touched) if n in t]
        first = max((2 * n - 1) * full - native, 0) // (2 * native) // tile  # as in the kernel
        assert all(first <= i < first + _near(full, native, tile) for i in asking)


@given(full=st.integers(1, 200), native=st.integers(1, 200), at=st.floats(0, 1))
@needs_triton
def test_neighbours_are_those_of_torch(full: int, native: int, at: float) -> None:
    """Interpolating 0, 1, 2, ... gives the lower neighbour plus the weight of the upper one."""
    from lomix_fast.kernels.tables import source

    out = min(int(at * full), full - 1)
    ramp = torch.arange(native, dtype=torch.float64).view(1, 1, -1)
    position = torch.nn.functional.interpolate(ramp, size=full, mode="linear", align_corners=False)[0, 0, out].item()
    low, high = source(out, full, native)
    assert low - 1e-9 <= position <= high + 1e-9 and high - low <= 1


# ---- numerical derivatives ----


@needs_triton
@pytest.mark.parametrize("operator", ["add", "mul", "cat", "awf", "sub", "avg", "max", "bounded mul"])
def test_numerical_derivatives(operator: str) -> None:
    """One random combination of outputs and inputs, in float64."""
    name, is_bounded = operator.removeprefix("bounded "), operator.startswith("bounded ")
    one = Case("", 1, 3, (2, 3), ((1, 2), (3, 2)), torch.float64, (name,), (), bounded=is_bounded)
    inputs = make_inputs(one).requires_grad_()
    named = inputs.differentiable

    def stats_of(*tensors: torch.Tensor) -> torch.Tensor:
        parameters = dict(zip(list(named)[2:], tensors[2:], strict=True))
        return map_stats(tensors[:2], inputs.target, one.plan, **parameters, impl="triton")[0]

    assert torch.autograd.gradcheck(stats_of, tuple(named.values()), fast_mode=True, atol=1e-6, rtol=1e-5)


# ---- sigmoids ----


@needs_triton
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_a_tiny_loss_of_sigmoids_is_not_rounding(dtype: torch.dtype, limit: float) -> None:
    """Logits from 0 to where the loss is 1e-30, of both signs, all on the right side; one pixel each."""
    size = torch.tensor([0.0, 1e-3, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 69.0], dtype=dtype)
    logits = torch.cat([size, -size]).view(-1, 1, 1, 1).requires_grad_()
    target = (torch.arange(2 * len(size)) < len(size)).view(-1, 1, 1, 1)
    stats, _ = map_stats([logits], target, MixPlan.create(1, (), sigmoid=True), impl="triton")
    expected = torch.log1p(torch.exp(-torch.cat([size, size]).double()))
    torch.testing.assert_close(stats[:, 0, 0].double(), expected, rtol=limit * 10, atol=0)
    (gradient,) = torch.autograd.grad(stats[:, 0, 0].sum(), logits)
    exact = torch.sigmoid(-torch.cat([size, size]).double()) * torch.where(target.view(-1), -1, 1)
    torch.testing.assert_close(gradient.view(-1).double(), exact, rtol=limit * 10, atol=0)


# ---- shares ----


@needs_triton
@given(
    batch=st.integers(1, 70),
    tiles=st.integers(1, 4000),
    cores=st.integers(1, 200),
    scratch=st.integers(1, 2**28),
    partial=st.integers(1, 2**27),
)
def test_every_tile_is_done_once_within_the_memory_allowed(
    batch: int, tiles: int, cores: int, scratch: int, partial: int
) -> None:
    from lomix_fast.kernels.config import PARTIAL_BYTES, SCRATCH_BYTES, Config, Target
    from lomix_fast.kernels.launch import share_out

    shares = share_out(
        batch, tiles, Config((1, 8, 32), 4, 32, 128, 32, 4), Target("cuda", 90, cores, 32), scratch, partial
    )
    assert shares.items == batch * shares.chunks and 1 <= shares.programs <= shares.items
    assert (shares.chunks - 1) * shares.chunk_tiles < tiles <= shares.chunks * shares.chunk_tiles
    assert shares.programs == 1 or shares.programs * scratch <= SCRATCH_BYTES
    assert shares.chunks == 1 or shares.items * partial <= PARTIAL_BYTES


@needs_triton
def test_more_samples_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program goes on with the next sample, in sums of its own."""
    launch_with(monkeypatch, per_core=2)
    one = dataclasses.replace(case("kept_a_few"), name="many_samples", batch=5)
    got = run_backend(one, "triton")
    check_stats(one, got)
    check_gradients(one, got)


# ---- labels where the host may not look ----


@needs_triton
@pytest.mark.parametrize(
    "value, dtype",
    [
        (3, torch.uint8),
        (-1, torch.int64),
        (2**32 + 1, torch.int64),
        (0.5, torch.float32),
        (float("nan"), torch.float32),
    ],
)
def test_a_bad_label_of_any_type_spoils_its_sample(
    value: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lomix_fast.labels.may_look", lambda device: False)
    logits = [torch.randn(2, 3, n, n, requires_grad=True) for n in (2, 4)]
    target = torch.randint(3, (2, 4, 4)).to(dtype)
    clean, _ = map_stats(logits, target, MixPlan.create(2, ("add",)), impl="triton")
    target[0, 3, 1] = value
    stats, counts = map_stats(logits, target, MixPlan.create(2, ("add",)), impl="triton")
    assert stats[0].isnan().all() and torch.equal(stats[1], clean[1])
    assert counts[1, 1:].sum() == 16
    for gradient in torch.autograd.grad(stats, logits, torch.ones_like(stats)):
        assert gradient[0].isnan().all() and gradient[1].isfinite().all()


# ---- reasons ----


def look(code: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


_USE = """
import json, torch, lomix_fast
from lomix_fast import LoMixLoss, available_backends
loss = LoMixLoss(3, 2)([torch.randn(1, 3, n, n) for n in (2, 4)], torch.zeros(1, 4, 4, dtype=torch.int64))
try:
    LoMixLoss(3, 2, impl="triton")([torch.randn(1, 3, n, n) for n in (2, 4)], torch.zeros(1, 4, 4, dtype=torch.int64))
    said = ""
except RuntimeError as error:
    said = str(error)
print(json.dumps([float(loss), available_backends(), available_backends("cuda")["triton"], said]))
"""


@pytest.mark.parametrize(
    "absent", ["import sys; sys.modules['triton'] = None", "import importlib.util as u; f = u.find_spec; "
    "u.find_spec = lambda name, *a: None if name == 'triton' else f(name, *a)"]
)  # fmt: skip
def test_without_triton_everything_else_works(absent: str) -> None:
    loss, on_cpu, on_cuda, said = json.loads(look(f"{absent}\n{_USE}", TRITON_INTERPRET="1"))
    assert loss > 0 and on_cpu["cpu"] is None and on_cpu["eager"] is None
    assert on_cpu["triton"] == on_cuda and "triton is not installed; run: pip install triton" in on_cuda
    assert "impl: got 'triton', which cannot run here: triton is not installed" in said


@needs_triton
def test_triton_that_cannot_be_imported_says_why() -> None:
    broken = "import sys; sys.modules['lomix_fast.kernels.launch'] = None"
    _, on_cpu, _, said = json.loads(look(f"{broken}\n{_USE}", TRITON_INTERPRET="1"))
    assert "the triton kernels could not be imported (ModuleNotFoundError: " in on_cpu["triton"]
    assert said.endswith("reinstall triton. Use impl='auto' to let it fall back")


@needs_triton
def test_an_old_triton_is_named() -> None:
    old = "import triton; triton.__version__ = '3.4.0'"
    _, on_cpu, _, said = json.loads(look(f"{old}\n{_USE}", TRITON_INTERPRET="1"))
    assert on_cpu["triton"] == "triton 3.4.0 is too old, expected 3.5 or newer; upgrade torch" and "too old" in said


@needs_triton
def test_cpu_tensors_need_the_interpreter() -> None:
    _, on_cpu, on_cuda, said = json.loads(look(_USE, TRITON_INTERPRET="0"))
    assert torch.cuda.is_available() or on_cuda.startswith("torch sees no CUDA or ROCm device here")
    assert "TRITON_INTERPRET=1, set before the first import" in on_cpu["triton"] and "cannot run here" in said
    late = "import os, triton; os.environ['TRITON_INTERPRET'] = '1'\n"
    assert "set after triton was imported" in look(f"{late}{_USE}", TRITON_INTERPRET="0")


def test_other_devices_are_refused() -> None:
    assert available_backends("meta")["triton"] == "the triton backend takes CUDA or ROCm tensors, not meta"


@needs_triton
def test_nothing_is_left_of_a_call() -> None:
    """Tables are kept for the next call; two problems that differ in one thing must not share one."""
    one = case("only_awf")
    variants: list[Case] = [
        one,
        dataclasses.replace(one, name="v1", kept=(0, 2)),
        dataclasses.replace(one, name="v2", native=((3, 3), (5, 4), (9, 10))),
        dataclasses.replace(one, name="v3", batch=3),
        dataclasses.replace(one, name="v4", layout="channels_last"),
        one,
    ]
    for variant in variants:
        got = run_backend(variant, "triton", make_inputs(variant))
        check_stats(variant, got)
        check_gradients(variant, got)


def test_auto_never_takes_triton_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from lomix_fast import backends

    for name, reason in (("cpu", "it is broken"), ("triton", None)):
        row = dataclasses.replace(backends.BACKENDS[name], why_not=lambda device, reason=reason: reason)
        monkeypatch.setitem(backends.BACKENDS, name, row)
    backends._warn_of_fallback.cache_clear()
    with pytest.warns(RuntimeWarning, match="instead of the fused cpu kernel: it is broken"):
        assert backends.choose("auto", torch.device("cpu")) == "eager"
    backends._warn_of_fallback.cache_clear()


# ---- autotuning, with a clock of our own ----


@needs_triton
def test_autotuning_takes_the_quickest_and_asks_once() -> None:
    from lomix_fast.kernels import autotune
    from lomix_fast.kernels.config import Config, candidates
    from triton.runtime.errors import OutOfResources

    usual = Config((1, 8, 32), 4, 32, 128, 32, 4)
    tried = candidates(usual)
    assert tried[0] == usual and len(set(tried)) == len(tried)
    times = {config: 5.0 + n for n, config in enumerate(tried)}
    times[tried[4]] = 1.0
    asked: list[Config] = []

    def clock(work, device: torch.device) -> float:
        asked.append(work())
        if asked[-1] == tried[2]:
            raise OutOfResources(2, 1, "registers")
        return times[asked[-1]]

    for _ in range(2):
        assert autotune.best(("test", 1), tried, lambda c: c, torch.device("cpu"), clock) == tried[4]
    assert asked == tried

    def never(work, device: torch.device) -> float:
        raise RuntimeError("out of resource: shared memory")

    with pytest.raises(RuntimeError, match="shared memory"):
        autotune.best(("test", 2), tried, lambda c: c, torch.device("cpu"), never)


@needs_triton
@pytest.mark.parametrize("value, wanted", [("1", True), ("0", False), (None, False)])
def test_autotuning_is_off_unless_asked_for(value: str | None, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from lomix_fast.kernels import autotune

    monkeypatch.delenv("LOMIX_FAST_AUTOTUNE", raising=False)
    if value is not None:
        monkeypatch.setenv("LOMIX_FAST_AUTOTUNE", value)
    assert autotune.wanted() is wanted


# ---- tables on a GPU, with a stand-in for torch.cuda ----


@needs_triton
def test_another_stream_gets_a_table_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from lomix_fast.kernels import tables

    stream = types.SimpleNamespace(cuda_stream=1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    make = tables._kept(lambda number, device: object())
    one = make(7, torch.device("cuda"))
    assert make(7, torch.device("cuda")) is one and make(8, torch.device("cuda")) is not one
    stream.cuda_stream = 2
    assert make(7, torch.device("cuda")) is not one


@needs_triton
def test_no_table_is_made_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    from lomix_fast.kernels import tables

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="run a step with them before capturing"):
        tables._on(torch.device("cuda"), [[1]], torch.int64)
