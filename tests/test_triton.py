"""What is particular to the Triton backend: tiles and shares of the work, labels nobody may look at, reasons."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from common import BACKENDS, check_gradients, check_stats, run_backend
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lomix_fast import MixPlan, _build_info, available_backends, extension, map_stats, triton_backend
from lomix_fast.target import Target
from lomix_fast.testing.cases import Case, case, make_inputs

needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason=available_backends()["triton"])


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


@pytest.mark.slow
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


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("one", [GENERAL, SOFT, SIGMOID, MANY_SOFT, MANY_SIGMOID], ids=lambda c: c.name)
def test_any_tile_under_general_targets(one: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    launch_with(monkeypatch, tile=(1, 4, 16), pixels=32, block=32, span=32, per_core=3)
    got = run_backend(one, "triton")
    check_stats(one, got)
    check_gradients(one, got)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "absent", ["import sys; sys.modules['triton'] = None", "import importlib.util as u; f = u.find_spec; "
    "u.find_spec = lambda name, *a: None if name == 'triton' else f(name, *a)"]
)  # fmt: skip
def test_without_triton_everything_else_works(absent: str) -> None:
    loss, on_cpu, on_cuda, said = json.loads(look(f"{absent}\n{_USE}", TRITON_INTERPRET="1"))
    assert loss > 0 and on_cpu["cpu"] == on_cpu["eager"] == "usable"
    assert on_cpu["triton"] == on_cuda and "triton is not installed; run: pip install triton" in on_cuda
    assert "impl: got 'triton', which cannot run here: triton is not installed" in said


@pytest.mark.slow
@needs_triton
def test_triton_that_cannot_be_imported_says_why() -> None:
    broken = "import sys; sys.modules['lomix_fast.kernels.launch'] = None"
    _, on_cpu, _, said = json.loads(look(f"{broken}\n{_USE}", TRITON_INTERPRET="1"))
    assert "the triton kernels could not be imported (ModuleNotFoundError: " in on_cpu["triton"]
    assert said.endswith("reinstall triton. Use impl='auto' to let it fall back")


@pytest.mark.slow
@needs_triton
def test_an_old_triton_is_named() -> None:
    old = "import triton; triton.__version__ = '3.4.0'"
    _, on_cpu, _, said = json.loads(look(f"{old}\n{_USE}", TRITON_INTERPRET="1"))
    assert on_cpu["triton"] == "triton 3.4.0 is too old, expected 3.5 or newer; upgrade torch" and "too old" in said


@pytest.mark.slow
@needs_triton
def test_cpu_tensors_need_the_interpreter() -> None:
    _, on_cpu, on_cuda, said = json.loads(look(_USE, TRITON_INTERPRET="0"))
    assert torch.cuda.is_available() or on_cuda.startswith("torch sees no CUDA or ROCm device here")
    assert "TRITON_INTERPRET=1, set before the first import" in on_cpu["triton"] and "cannot run here" in said
    late = "import os, triton; os.environ['TRITON_INTERPRET'] = '1'\n"
    assert "set after triton was imported" in look(f"{late}{_USE}", TRITON_INTERPRET="0")


@needs_triton
def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    said = available_backends("cuda:7")["triton"]
    assert said == "torch sees 2 CUDA or ROCm devices, none of them cuda:7"


@needs_triton
def test_an_interpreter_that_does_not_work_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of triton 3.6 with numpy 2.4; before a kernel of any call runs."""
    import numpy
    import triton
    from lomix_fast.kernels import config

    def fails() -> None:
        raise TypeError("only 0-dimensional arrays can be converted to Python scalars")

    assert config.interpreter_fault() is None
    config.interpreter_fault.cache_clear()
    monkeypatch.setattr(config, "_count_kernel", {(1,): fails})
    said = str(available_backends("cpu")["triton"])
    config.interpreter_fault.cache_clear()
    assert said.startswith(f"the interpreter of triton {triton.__version__} fails with numpy {numpy.__version__} (only")
    assert said.endswith("run: pip install 'numpy<2.4', or upgrade triton")


@needs_triton
def test_sources_that_are_not_installed_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As when Python runs in the root of the repository: the package is found there, without what is compiled."""
    assert _build_info.not_installed() is None
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n: None if n == "lomix_fast.kernels" else found(n))
    monkeypatch.setattr(_build_info, "__file__", str(tmp_path / "lomix_fast" / "_build_info.py"))
    assert _build_info.not_installed() is None, "an installation that lacks something is none of these"
    (tmp_path / "setup.py").touch()
    said = f"lomix_fast is imported from {tmp_path}, a source tree that is not installed"
    assert str(triton_backend.load_error.__wrapped__()).startswith(said)

    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr("importlib.import_module", missing)
    monkeypatch.setattr(_build_info, "obstacle", lambda: None)
    assert str(extension.load_error.__wrapped__()).startswith(said)
    assert "run pip install --no-build-isolation -e . there" in str(extension.load_error.__wrapped__())


def test_other_devices_are_refused() -> None:
    assert available_backends("meta")["triton"] == "the triton backend takes CUDA or ROCm tensors, not meta"


@pytest.mark.slow
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
    assert autotune.wanted(torch.device("cpu")) is wanted


# ---- tables on a GPU, with stand-ins ----


class StreamsOfTwo:
    """Stands in for torch.cuda: two devices, of which one may be capturing on its current stream."""

    def __init__(self, capturing: int | None = None) -> None:
        self.capturing, self.current = capturing, 0

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        """Makes it the current one meanwhile."""
        before, self.current = self.current, device.index
        yield
        self.current = before

    def is_current_stream_capturing(self) -> bool:
        """Of the current device, as in torch."""
        return self.current == self.capturing


def put_on_a_gpu(monkeypatch: pytest.MonkeyPatch, streams: StreamsOfTwo) -> list[int]:
    """Let launches take tensors on a CPU for those of cuda:1; returns where page-locked memory lies, as it is made."""
    from lomix_fast.kernels import launch, problem, tables

    pinned: list[Tensor] = []
    kept: list[int] = []

    def pin(words: Tensor) -> Tensor:
        pinned.append(words.clone())
        kept.append(pinned[-1].data_ptr())
        return pinned[-1]

    there = types.SimpleNamespace(
        **{name: getattr(torch, name) for name in ("tensor", "cat", "int32", "int64", "_foreach_add_", "dtype")},
        cuda=streams,
        empty_like=lambda words, device: torch.empty_like(words),
        zeros_like=lambda words, device: torch.zeros_like(words),
    )
    monkeypatch.setattr(tables, "torch", there)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(problem.Problem, "device", property(lambda self: torch.device("cuda", 1)))
    monkeypatch.setattr(launch, "_current", lambda device: contextlib.nullcontext())
    for host in (tables._forward_host, tables._backward_host):
        host.cache_clear()
    return kept


class Copies(TorchDispatchMode):
    """Notes the operators that run, and copies out of some memory: where from, and whether the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.copies: list[tuple[int, bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        if self.names[-1] == "copy_":
            self.copies.append((args[1].data_ptr(), not (args[2] if len(args) > 2 else False)))
        return func(*args, **(kwargs or {}))


def both_passes() -> tuple[list[Tensor], list[Copies]]:
    """Everything that the kernels make of a small problem with all tables, and what each pass has done for it."""
    from lomix_fast.kernels import launch

    torch.manual_seed(0)
    plan = MixPlan.create(2, ("mul", "cat", "awf"))
    logits = [torch.randn(2, 3, 2, 3), torch.randn(2, 3, 5, 7)]
    target = Target(torch.randint(3, (2, 5, 7)))
    parameters = [torch.randn(2, 3, 3), torch.randn(1, 3), torch.randn(2, 3), torch.randn(2)]
    with Copies() as ahead:
        stats, counts = launch.forward(logits, target, parameters, plan)
    with Copies() as back:
        grads, parameter_grads = launch.backward(torch.ones_like(stats), logits, target, parameters, plan)
    return [stats, counts, *grads, *parameter_grads], [ahead, back]


@needs_triton
def test_each_pass_makes_one_copy_of_its_tables_to_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """From page-locked memory, which is kept, so that the host does not wait and nothing of the device is kept."""
    expected, _ = both_passes()
    pinned = put_on_a_gpu(monkeypatch, StreamsOfTwo())
    for _ in range(2):  # on another stream, for all that the tables know
        found, passes = both_passes()
        assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
        assert len(pinned) == 2, "made once for each pass"
        for one, where in zip(passes, pinned, strict=True):
            assert [copy for copy in one.copies if copy[0] in pinned] == [(where, False)]


@needs_triton
@pytest.mark.parametrize("warm", [False, True])
def test_a_captured_graph_reads_nothing_of_the_host(warm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are arguments of kernels then, whether a step has run before or not; nothing is page-locked either."""
    from lomix_fast.kernels import tables

    expected, _ = both_passes()
    streams = StreamsOfTwo()
    pinned = put_on_a_gpu(monkeypatch, streams)
    if warm:
        both_passes()
    before, kept = len(pinned), tables._forward_host.cache_info().currsize
    streams.capturing = 1
    found, passes = both_passes()
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    assert len(pinned) == before and tables._forward_host.cache_info().currsize == kept
    for one in passes:
        assert one.names.count("_foreach_add_") == 1 and not [copy for copy in one.copies if copy[0] in pinned]
    streams.capturing = None
    both_passes()
    assert len(pinned) == 2, "what a capture has made is not taken for page-locked"


@needs_triton
def test_tables_are_what_kernels_are_compiled_for() -> None:
    """Types, and beginnings at multiples of 16 bytes, of tables whose sizes are no multiples themselves."""
    from lomix_fast.kernels import tables

    with torch.device("meta"):  # a default device is not where tables are made
        assert tables._pack([(torch.int64, [[5]])], False).words.tolist() == [5, 0]
    shape = tables.Geometry(((1, 2, 3), (-4, 2**40, 6)), 1, 1, 1, 1, False)
    encoded = MixPlan.create(3).encoded
    device = torch.device("cpu")
    ahead, back = tables.forward_tables(encoded, 4, shape, device), tables.backward_tables(encoded, shape, device)
    for geometry in (ahead.geometry, back.geometry):
        assert geometry.dtype == torch.int64 and geometry.tolist() == [[1, 2, 3], [-4, 2**40, 6]]
    groups, maps = tables._forward_rows(encoded, 4)
    assert ahead.groups.tolist() == groups and ahead.maps.tolist() == maps
    assert back.sets.tolist() == tables._backward_rows(encoded)
    assert {t.dtype for t in (ahead.groups, ahead.maps, back.sets)} == {torch.int32} and back.cat.dtype == torch.int64
    assert back.cat.tolist() == [[0, 1, 2, 3], [0, 2, 4, 6]]  # pairs 01, 02, 12, then the three: 2 + 2 + 2 members
    start = ahead.geometry.data_ptr()
    assert all((t.data_ptr() - start) % 16 == 0 for t in (ahead.groups, ahead.maps))
    assert all((t.data_ptr() - back.geometry.data_ptr()) % 16 == 0 for t in (back.sets, back.cat))


@needs_triton
def test_the_device_of_the_tensors_is_asked_whether_it_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    from lomix_fast.kernels import autotune, tables

    monkeypatch.setenv("LOMIX_FAST_AUTOTUNE", "1")
    streams = StreamsOfTwo(capturing=1)
    monkeypatch.setattr(tables, "torch", types.SimpleNamespace(cuda=streams))
    assert [tables.is_capturing(torch.device("cuda", n)) for n in (0, 1)] == [False, True]
    assert [autotune.wanted(torch.device("cuda", n)) for n in (0, 1)] == [True, False]
    assert streams.current == 0 and not tables.is_capturing(torch.device("cpu"))


@needs_triton
def test_no_axis_of_a_grid_but_the_first_grows_with_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others end at 65,535. A bad label is found in each part of a sample, and spoils no other sample."""
    from lomix_fast.kernels import launch

    grids: dict[str, set[tuple[int, ...]]] = {}

    def watched(name: str) -> object:
        kernel = getattr(launch, name)

        def of(grid: tuple[int, ...]) -> object:
            grids.setdefault(name, set()).add(grid)
            return kernel[grid]

        return type("Watched", (), {"__getitem__": staticmethod(of)})()

    names = ("statistics_kernel", "gradients_kernel", "gather_kernel", "bad_labels_kernel")
    for name in names:
        monkeypatch.setattr(launch, name, watched(name))
    monkeypatch.setattr(launch, "_LABELS", 8)
    monkeypatch.setattr("lomix_fast.labels.may_look", lambda device: False)
    for bad in ((0, 4, 3), (1, 0, 0), (2, 2, 1)):
        logits = [torch.randn(3, 2, 2, 2, requires_grad=True), torch.randn(3, 2, 5, 4)]
        target = torch.zeros(3, 5, 4, dtype=torch.int64)
        target[bad] = 2
        stats, _ = map_stats(logits, target, MixPlan.create(2, ("add",)), impl="triton")
        (gradient,) = torch.autograd.grad(stats.sum(), logits[:1])
        assert gradient.flatten(1).isnan().any(1).tolist() == [sample == bad[0] for sample in range(3)]
    assert set(grids) == set(names)
    assert grids["bad_labels_kernel"] == {(9,)}  # 20 pixels in parts of 8, of three samples
    assert all(size <= 2 for seen in grids.values() for grid in seen for size in grid[1:])  # scales at most
