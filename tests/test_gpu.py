"""What only a GPU can show: autocast, compiled steps, captured graphs, streams, threads, ranks, want of memory.

Every test runs with the backends "cuda" and "triton", takes seconds and needs one GPU. Where there is none all are
skipped, unless LOMIX_FAST_REHEARSE=1 has them rehearsed on the CPU with `benchmarks.gpu_day.stand_in`.
`impl` is the only parameter of tests here, so that `benchmarks.gpu_day.features` knows their names without pytest; it
runs them a few a process, those of graphs without warm-up alone.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from in_training import Joined, SmallUNet
from torch import Tensor, nn

import lomix_fast.distributed
from benchmarks.gpu_day.faults import spoil_backends
from benchmarks.gpu_day.features import BACKENDS as GPU_BACKENDS
from benchmarks.gpu_day.stand_in import StandInCuda, install, rehearsing
from lomix_fast import LoMixLoss, MixPlan, labels, map_stats, target, with_loss
from lomix_fast.backends import BACKENDS
from lomix_fast.testing.precision import full_float32

REHEARSING = rehearsing()
if REHEARSING:
    install()
    spoil_backends()
cuda: Any = StandInCuda() if REHEARSING else torch.cuda
DEVICE = torch.device("cpu" if REHEARSING else "cuda:0")
# Deterministic mode asks cuBLAS, which "eager" and networks use, for a workspace of its own; read when it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

pytestmark = pytest.mark.skipif(
    not REHEARSING and not torch.cuda.is_available(),
    reason=f"there is no GPU here: torch {torch.__version__} sees no CUDA device",
)

CLASSES, FULL = 3, (24, 40)
SIZES = ((3, 5), (6, 10), (24, 40))

Outcome = dict[str, Tensor]
Step = Callable[[], Outcome]


@pytest.fixture(params=GPU_BACKENDS)
def impl(request: pytest.FixtureRequest) -> str:
    """A backend for GPUs."""
    reason = BACKENDS[request.param].why_not(DEVICE)
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """In place of conftest's: no deterministic mode but where a test asks for it, as users have it by default."""


@pytest.fixture(autouse=True)
def device_that_works() -> Iterator[None]:
    """float32 that is float32, repeatable convolutions; and a failure of the device is that of the test it is in."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    with full_float32():
        yield
    torch.backends.cudnn.deterministic = before
    cuda.synchronize()
    assert torch.ones(2, device=DEVICE).sum().item() == 2


class Problem:
    """A criterion, logits and labels on the device, drawn on the CPU so that they are the same everywhere.

    Args:
        impl: backend.
        full, sizes: of the labels and of the logits, coarsest first.
        batch, dtype, seed: as named.
        options: of the criterion.
    """

    def __init__(
        self,
        impl: str,
        full: tuple[int, ...] = FULL,
        sizes: tuple[tuple[int, ...], ...] = SIZES,
        batch: int = 2,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        **options: Any,
    ) -> None:
        torch.manual_seed(seed)
        self.criterion = LoMixLoss(CLASSES, len(sizes), impl=impl, **options)
        with torch.no_grad():
            for p in self.criterion.parameters():
                p.add_(0.2 * torch.randn_like(p))
        self.criterion.to(DEVICE)
        logits = [torch.randn(batch, CLASSES, *n).to(dtype) for n in sizes]
        self.logits = [z.to(DEVICE).requires_grad_() for z in logits]
        self.target = torch.randint(CLASSES, (batch, *full)).to(DEVICE)

    def step(self) -> Outcome:
        """Loss, and the gradients of logits and parameters, in tensors of their own."""
        return step_of(self.criterion, self.logits, self.target)

    def take(self, other: Problem) -> None:
        """Change logits and labels in place to those of another problem of the same sizes."""
        with torch.no_grad():
            for own, new in zip(self.logits, other.logits, strict=True):
                own.copy_(new)
            self.target.copy_(other.target)

    def truth(self) -> Outcome:
        """What `step` should find: the reference in float64 on the CPU."""
        criterion = copy.deepcopy(self.criterion).cpu().double()
        criterion.impl = "reference"
        return step_of(criterion, [z.detach().cpu().double().requires_grad_() for z in self.logits], self.target.cpu())


def step_of(criterion: nn.Module, logits: list[Tensor], labels: Tensor) -> Outcome:
    loss = criterion(logits, labels)
    leaves = {f"logits_{i}": z for i, z in enumerate(logits)} | dict(criterion.named_parameters())
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}


def saved(outcome: Outcome) -> Outcome:
    """A copy on the CPU, once the device is done."""
    cuda.synchronize()
    return {name: t.detach().cpu().clone() for name, t in outcome.items()}


def assert_same_bits(found: Outcome, expected: Outcome) -> None:
    """The same numbers to the last bit."""
    assert found.keys() == expected.keys()
    first, second = saved(found), saved(expected)
    bits = [[one[name].contiguous().flatten().view(torch.uint8) for name in first] for one in (first, second)]
    differ = [name for name, a, b in zip(first, *bits, strict=True) if not torch.equal(a, b)]
    assert not differ, f"not the same bits: {', '.join(differ)}"


def assert_near(found: Outcome, expected: Outcome, tolerance: float = 1e-5) -> None:
    """No larger difference than `tolerance` times the largest number of each tensor."""
    assert found.keys() == expected.keys()
    for name, e in saved(expected).items():
        f = found[name].detach().cpu().double()
        worst, size = float((f - e.double()).abs().max()), float(e.double().abs().max())
        assert worst <= tolerance * size, f"{name}: off by {worst:.3g}, where the largest is {size:.3g}"


def assert_right(found: Outcome, problem: Problem) -> None:
    assert_near(found, problem.truth())


def network_step(impl: str, seed: int = 0) -> tuple[Joined, Tensor, Tensor]:
    """A small U-Net with three heads and the loss; image and labels."""
    problem = Problem(impl, seed=seed)
    joined = Joined(SmallUNet(CLASSES), problem.criterion).to(DEVICE)
    return joined, torch.randn(2, 1, *FULL).to(DEVICE), problem.target


def other_work() -> None:
    """Something else on the device: NaN in the memory that others have given back, and a matrix product."""
    blocks = [torch.full((n,), float("nan"), device=DEVICE) for n in (2**k for k in range(4, 20))]
    a = torch.ones(64, 64, device=DEVICE)
    assert float((a @ a).sum()) == 64.0**3
    del blocks


# Mixed precision ------------------------------------------------------------------------------------------------------


def check_autocast(impl: str, dtype: torch.dtype) -> None:
    joined, image, labels = network_step(impl)
    optimizer = torch.optim.SGD(joined.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=256.0)
    maps: list[list[Tensor]] = []
    handle = joined.criterion.register_forward_pre_hook(lambda _, args: maps.append([z.detach() for z in args[0]]))

    def train(image: Tensor) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, dtype):
            loss = joined(image, labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    before = copy.deepcopy(joined)
    loss = train(image)
    handle.remove()
    assert loss.dtype == torch.float32 and {z.dtype for z in maps[0]} == {dtype}
    assert all(p.grad.isfinite().all() for p in joined.parameters())
    moved = [not torch.equal(p, q) for p, q in zip(joined.parameters(), before.parameters(), strict=True)]
    assert all(moved) and scaler.get_scale() == 256.0
    # The loss of these narrow logits, and autocast has changed nothing about it.
    assert_same_bits({"loss": loss}, {"loss": before.criterion(maps[0], labels).detach()})
    exact = before.criterion.cpu().double()
    exact.impl = "reference"
    assert_near({"loss": loss}, {"loss": exact([z.cpu().double() for z in maps[0]], labels.cpu())})
    # An infinity anywhere: the step is skipped, for the network and for the loss.
    before, bad = copy.deepcopy(joined), image.clone()
    bad[0, 0, 3, 5] = float("inf")
    assert not train(bad).isfinite()
    assert all(torch.equal(p, q) for p, q in zip(joined.parameters(), before.parameters(), strict=True))
    assert scaler.get_scale() == 128.0
    assert train(image).isfinite()


def test_autocast_float16(impl: str) -> None:
    check_autocast(impl, torch.float16)


def test_autocast_bfloat16(impl: str) -> None:
    check_autocast(impl, torch.bfloat16)


# torch.compile --------------------------------------------------------------------------------------------------------


def compiled(module: nn.Module, **options: Any) -> Callable[..., Tensor]:
    """One graph by the compiler that users have; in a rehearsal by one that generates no code."""
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, **({"backend": "aot_eager"} if REHEARSING else options))


def training(module: nn.Module, run: Callable[..., Tensor], steps: int) -> list[Outcome]:
    """Steps of SGD on other images and labels each; loss and gradients of each step."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    generator, found = torch.Generator().manual_seed(5), []
    for _ in range(steps):
        image = torch.randn(2, 1, *FULL, generator=generator).to(DEVICE)
        labels = torch.randint(CLASSES, (2, *FULL), generator=generator).to(DEVICE)
        optimizer.zero_grad()
        torch.compiler.cudagraph_mark_step_begin()
        loss = run(image, labels)
        loss.backward()
        found.append(saved({"loss": loss, **{name: p.grad for name, p in module.named_parameters()}}))
        optimizer.step()
    return found


def check_compiled(impl: str, **options: Any) -> None:
    plain, _, _ = network_step(impl)
    twin = copy.deepcopy(plain)
    plain.criterion.impl = "reference"
    steps = 3 if REHEARSING else 6
    results = training(twin, compiled(twin, **options), steps), training(plain, plain, steps)
    for found, expected in zip(*results, strict=True):
        assert_near(found, expected, 1e-3)  # the compiler sums up in other orders, and steps carry that on


def test_compiled(impl: str) -> None:
    check_compiled(impl)


def test_compiled_with_cuda_graphs(impl: str) -> None:
    """mode="reduce-overhead": recorded at the second call, replayed from the third on."""
    from torch._dynamo.utils import counters

    counters.clear()
    check_compiled(impl, mode="reduce-overhead")
    skipped = counters["inductor"]["cudagraph_skips"]
    assert skipped == 0, f"{skipped} graphs were not made CUDA graphs"


# CUDA graphs ----------------------------------------------------------------------------------------------------------


def captured(step: Step, stream: Any = None) -> tuple[Any, Outcome]:
    """A graph of the step, and the results that its replay writes to."""
    graph = cuda.CUDAGraph()
    with cuda.graph(graph, stream=stream):
        outcome = step()
    return graph, outcome


def warm_up(step: Step, stream: Any) -> None:
    stream.wait_stream(cuda.current_stream())
    with cuda.stream(stream):
        for _ in range(2):
            step()
    cuda.current_stream().wait_stream(stream)
    cuda.synchronize()


def check_replays(problem: Problem, graph: Any, outcome: Outcome, seeds: tuple[int, ...] = (1, 2)) -> None:
    """Replays on other logits and labels equal steps without a graph."""
    for seed in seeds:
        sizes = tuple(tuple(z.shape[2:]) for z in problem.logits)
        problem.take(Problem("eager", tuple(problem.target.shape[1:]), sizes, len(problem.target), seed=seed))
        graph.replay()
        found = saved(outcome)
        assert_same_bits(found, saved(problem.step()))
    assert_right(found, problem)


def test_graph_after_a_warm_up_on_the_same_stream(impl: str) -> None:
    problem, stream = Problem(impl), cuda.Stream()
    warm_up(problem.step, stream)
    check_replays(problem, *captured(problem.step, stream))


def test_graph_after_a_warm_up_on_another_stream(impl: str) -> None:
    """As torch.cuda.graph does by default: it captures on a stream of its own, which nobody has used before."""
    problem = Problem(impl)
    warm_up(problem.step, cuda.Stream())
    check_replays(problem, *captured(problem.step))


def test_graph_of_sizes_not_seen_before(impl: str) -> None:
    """The kernels have run, but for other sizes, strides and maps."""
    warm_up(Problem(impl, (16, 24), ((4, 6), (8, 12), (16, 24)), operators=("add", "cat")).step, cuda.Stream())
    problem = Problem(impl)
    check_replays(problem, *captured(problem.step))


def test_graph_without_warm_up(impl: str) -> None:
    """A step of sizes that nobody has seen is captured, on a stream that nobody has used.

    One of its kind has run elsewhere: that a kernel may be loaded while a graph is captured is not promised.
    """
    warm_up(Problem(impl, (17, 23), ((5, 7), (9, 11), (17, 23))).step, cuda.Stream())
    problem = Problem(impl)
    check_replays(problem, *captured(problem.step))


def forget_everything() -> None:
    """Empty every cache of the library, and fill the memory that this frees with something else."""
    for one in gc.get_objects():
        # By type alone first: what objects are imported lazily answer to anything they are asked.
        if type(one) is functools._lru_cache_wrapper and (one.__module__ or "").startswith("lomix_fast"):
            one.cache_clear()
    gc.collect()
    filled = [torch.full((n,), -1, dtype=torch.int64, device=DEVICE) for n in (1, 8, 64, 512, 4096) for _ in range(64)]
    cuda.synchronize()
    del filled


def test_graphs_outlive_caches(impl: str) -> None:
    """Several at once; then other sizes run and everything that was kept is thrown away."""
    problems = [Problem(impl), Problem(impl, batch=1), Problem(impl, (17, 23), ((5, 7), (9, 11), (17, 23)))]
    for problem in problems:
        warm_up(problem.step, cuda.Stream())
    graphs = [captured(problem.step) for problem in problems]
    for size in range(8, 10 if REHEARSING else 40):
        Problem(impl, (size, size + 3), ((3, 4), (5, 6), (size, size + 3))).step()
    forget_everything()
    other_work()
    for problem, (graph, outcome) in zip(problems, graphs, strict=True):
        check_replays(problem, graph, outcome)
    del graphs[1:], graph, outcome
    gc.collect()
    other_work()
    check_replays(problems[0], *graphs[0], seeds=(3,))


def test_graphed_network(impl: str) -> None:
    """make_graphed_callables around the network, the loss after it as usual."""
    plain, image, _ = network_step(impl)
    graphed = copy.deepcopy(plain)
    graphed.network = cuda.make_graphed_callables(graphed.network, (image.clone(),))
    check_same_training(graphed, plain)


def test_graphed_loss(impl: str) -> None:
    """make_graphed_callables around the loss, whose parameters it then trains."""
    plain, image, labels = network_step(impl)
    graphed = copy.deepcopy(plain)
    maps = [z.detach().clone().requires_grad_() for z in graphed.network(image)]
    graphed.criterion = cuda.make_graphed_callables(graphed.criterion, (maps, labels.clone()))
    check_same_training(graphed, plain)


def check_same_training(graphed: Joined, plain: Joined) -> None:
    plain.criterion.impl = "reference"
    for found, expected in zip(training(graphed, graphed, 3), training(plain, plain, 3), strict=True):
        assert_near(found, expected, 1e-4)


# Streams and threads --------------------------------------------------------------------------------------------------


def test_side_streams(impl: str) -> None:
    """Two streams at once with the same sizes: neither touches what the other is using or has handed out."""
    problems, sides = [Problem(impl), Problem(impl, seed=7)], [cuda.Stream(), cuda.Stream()]
    expected = [saved(problem.step()) for problem in problems]
    assert_right(expected[0], problems[0])
    found: list[list[Outcome]] = [[], []]
    for side in sides:
        side.wait_stream(cuda.current_stream())
    for _ in range(3):
        for problem, side, ours in zip(problems, sides, found, strict=True):
            with cuda.stream(side):
                ours.append(problem.step())
    for side, ours, right in zip(sides, found, expected, strict=True):
        cuda.current_stream().wait_stream(side)
        for one in ours:
            assert_same_bits(one, right)


def test_inputs_made_on_another_stream(impl: str) -> None:
    """The step waits for the stream that makes its inputs, late, and for no longer than it has to."""
    problem, wanted = Problem(impl), Problem(impl, seed=7)
    expected = saved(wanted.step())
    problem.step()
    producer, consumer = cuda.Stream(), cuda.Stream()
    for stream in (producer, consumer):
        stream.wait_stream(cuda.current_stream())
    with cuda.stream(producer):
        cuda._sleep(50_000_000)
        with torch.no_grad():
            problem.take(wanted)
            for p, q in zip(problem.criterion.parameters(), wanted.criterion.parameters(), strict=True):
                p.copy_(q)
    with cuda.stream(consumer):
        consumer.wait_stream(producer)
        found = problem.step()
    cuda.current_stream().wait_stream(consumer)
    assert_same_bits(found, expected)


def test_two_threads(impl: str) -> None:
    """Different sizes at once, each thread on its own stream."""
    problems = [Problem(impl), Problem(impl, (17, 23), ((5, 7), (9, 11), (17, 23)), batch=3)]
    expected = [saved(problem.step()) for problem in problems]
    start, failures = threading.Barrier(2), []

    def work(problem: Problem, right: Outcome) -> None:
        try:
            start.wait(60)
            stream = cuda.Stream()
            with cuda.stream(stream):
                for _ in range(3 if REHEARSING else 30):
                    found = problem.step()
                    stream.synchronize()
                    assert_same_bits(found, right)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=pair, daemon=True) for pair in zip(problems, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if failures:
        raise failures[0]


# The same bits --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """torch.use_deterministic_algorithms(True), which also fills fresh memory with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check_deterministic_mode(impl: str) -> None:
    problem = Problem(impl)
    plain = saved(problem.step())
    with deterministic():
        found = [saved(problem.step()) for _ in range(2)]
    assert_same_bits(*found)
    assert_right(found[0], problem)
    assert_near(found[0], plain)


def test_deterministic_mode(impl: str) -> None:
    check_deterministic_mode(impl)


def test_deterministic_mode_of_eager() -> None:
    check_deterministic_mode("eager")


def test_ten_runs_give_the_same_bits(impl: str) -> None:
    sizes = ((3, 5, 4), (6, 10, 8), (12, 20, 16))
    for problem in (Problem(impl), Problem(impl, sizes[-1], sizes, batch=1)):
        expected = saved(problem.step())
        for _ in range(9 if not REHEARSING else 3):
            other_work()
            assert_same_bits(problem.step(), expected)


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def labels_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a rehearsal: labels are not looked at unless debugging; "eager" stands in, as C++ looks for itself."""
    if REHEARSING:
        for module in (labels, target):
            monkeypatch.setattr(module, "may_look", lambda _: os.environ.get("LOMIX_FAST_DEBUG") == "1")
        for name in ("cuda", "triton"):
            monkeypatch.setitem(BACKENDS, name, replace(BACKENDS["eager"], name=name))


def test_bad_label(labels_as_on_a_gpu: None, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN for the sample that has it, nothing for the other; and the device goes on."""
    monkeypatch.delenv("LOMIX_FAST_DEBUG", raising=False)
    problem, plan = Problem(impl), MixPlan.create(len(SIZES), ("add", "mul"))
    clean, whole = problem.target.clone(), saved(problem.step())

    def stats() -> Outcome:
        found, _ = map_stats(problem.logits, problem.target, plan, impl=impl)
        gradients = torch.autograd.grad(found.sum(), problem.logits)
        return saved({"stats": found, **{f"logits_{i}": g for i, g in enumerate(gradients)}})

    expected = stats()
    for bad in (99, -1, 2**40):
        problem.target.copy_(clean)
        problem.target[0, 5, 7] = bad
        found = stats()
        assert all(t[0].isnan().all() for t in found.values()), f"label {bad} passed for a class"
        assert_same_bits({k: t[1] for k, t in found.items()}, {k: t[1] for k, t in expected.items()})
        of_step = saved(problem.step())
        assert of_step["loss"].isnan() and all(of_step[f"logits_{i}"][0].isnan().all() for i in range(len(SIZES)))
    problem.target.copy_(clean)
    assert_same_bits(problem.step(), whole)


def test_bad_label_while_debugging(labels_as_on_a_gpu: None, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOMIX_FAST_DEBUG", "1")
    problem = Problem(impl)
    expected = saved(problem.step())
    clean = problem.target.clone()
    problem.target[1, 5, 7] = 99
    with pytest.raises(ValueError, match=r"target: got the label 99 at index \(1, 5, 7\)"):
        problem.step()
    problem.target.copy_(clean)
    assert_same_bits(problem.step(), expected)


def test_out_of_memory(impl: str) -> None:
    """A step that finds no room for a gradient raises; what it held comes back, and the next one is right."""
    side = 256 if REHEARSING else 2048
    problem = Problem(impl, (side, side), ((side // 4, side // 4), (side, side)), batch=1, operators=("add",))
    expected = saved(problem.step())
    gc.collect()
    cuda.empty_cache()
    before, gradient = cuda.memory_allocated(), problem.logits[-1].nbytes
    total = cuda.get_device_properties(DEVICE).total_memory
    message = ""
    cuda.set_per_process_memory_fraction((cuda.memory_reserved() + gradient / 2) / total)
    try:
        problem.step()
    except torch.OutOfMemoryError as error:
        message = str(error)
    finally:
        cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory" in message, "there was room for the gradient"
    gc.collect()
    cuda.synchronize()
    slack = gradient // 4 if REHEARSING else 0
    assert abs(cuda.memory_allocated() - before) <= slack
    assert_same_bits(problem.step(), expected)
    assert abs(cuda.memory_allocated() - before) <= slack


# Ranks ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of one, whose exchanges the loss does not leave out."""
    where = {} if REHEARSING else {"device_id": DEVICE}
    method = f"file://{tmp_path}/store"
    dist.init_process_group("gloo" if REHEARSING else "nccl", init_method=method, rank=0, world_size=1, **where)
    monkeypatch.setattr(lomix_fast.distributed, "_unless_alone", lambda group: group)
    yield
    dist.destroy_process_group()


def test_one_rank_with_nccl(one_rank: None, impl: str) -> None:
    alone, shared = Problem(impl, batch=2), Problem(impl, batch=2, process_group="world")
    exchanges = []
    all_reduce = dist.all_reduce
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", lambda *a, **k: (exchanges.append(1), all_reduce(*a, **k))[1])
        found = shared.step()
    assert exchanges == [1]
    assert_near(found, alone.step(), 1e-6)
    # What trainers call that wrap the network alone; with objects, which NCCL sends by way of the GPU.
    criterion = shared.criterion
    before = copy.deepcopy(criterion.state_dict())
    criterion.sync_parameters()
    criterion(shared.logits, shared.target).backward()
    gradients = {name: p.grad.clone() for name, p in criterion.named_parameters()}
    criterion.sync_gradients()
    assert_same_bits({name: p.grad for name, p in criterion.named_parameters()}, gradients)
    assert all(torch.equal(v, before[name]) for name, v in criterion.state_dict().items())
    objects = [{"maps": shared.criterion.map_names}]
    dist.broadcast_object_list(objects, src=0, device=DEVICE)
    assert objects[0]["maps"] == alone.criterion.map_names


def test_ddp_around_network_and_loss(one_rank: None, impl: str) -> None:
    plain, _, _ = network_step(impl)
    shared = copy.deepcopy(plain)
    criterion = LoMixLoss(CLASSES, len(SIZES), impl=impl, process_group="world").to(DEVICE)
    criterion.load_state_dict(plain.criterion.state_dict())
    module = with_loss(shared.network, criterion)
    plain.criterion.impl = "reference"
    wrapped = nn.parallel.DistributedDataParallel(module, device_ids=None if REHEARSING else [DEVICE])
    for found, expected in zip(training(module, wrapped, 2), training(plain, plain, 2), strict=True):
        assert_near(found, expected, 1e-4)


# The host waits for nothing, and nothing is left behind ---------------------------------------------------------------


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        cuda.set_sync_debug_mode("default")


def test_the_host_does_not_wait(impl: str) -> None:
    """Neither at sizes that have been seen nor at new ones."""
    seen = Problem(impl)
    new = Problem(impl, (17, 23), ((5, 7), (9, 11), (17, 23)))
    seen.step()
    cuda.synchronize()
    with pytest.raises(RuntimeError, match="synchronizing"), no_waiting():
        seen.target.sum().item()
    with no_waiting():
        found = [seen.step(), seen.step(), new.step()]
    assert_right(found[1], seen)
    assert_right(found[2], new)


def test_no_memory_is_left_behind(impl: str) -> None:
    problem = Problem(impl)

    def allocated() -> int:
        for _ in range(10):
            problem.step()
        cuda.synchronize()
        gc.collect()
        return int(cuda.memory_allocated())

    allocated()
    before = allocated()
    assert abs(allocated() - before) <= (2**15 if REHEARSING else 0)


def test_empty_batch(impl: str) -> None:
    found = saved(Problem(impl, batch=0).step())
    assert found["loss"] == 0 and found["logits_0"].shape == (0, CLASSES, *SIZES[0])
    assert all(not t.any() for t in found.values())
    problem = Problem(impl)
    assert_right(problem.step(), problem)


def test_tensors_are_made_on_the_gpu_by_default(impl: str) -> None:
    """Under torch.set_default_device, where a tensor that is meant for the host needs to say so."""
    expected = saved(Problem(impl).step())
    sizes = ((5, 7), (9, 11), (17, 23))
    truth = Problem(impl, sizes[-1], sizes)
    with DEVICE:
        LoMixLoss(CLASSES, 2, impl=impl)
        problem = Problem("eager", sizes[-1], sizes)
        problem.take(truth)
        problem.criterion.load_state_dict(truth.criterion.state_dict())
        problem.criterion.impl = impl
        found = saved(problem.step())  # of sizes that are new
    assert_right(found, truth)
    assert_same_bits(Problem(impl).step(), expected)


def test_another_stream_or_device_is_current(impl: str) -> None:
    """Inputs on cuda:0 where the current device, if there is another, and stream are others."""
    problem = Problem(impl)
    expected = saved(problem.step())
    with cuda.device(cuda.device_count() - 1), cuda.stream(cuda.Stream()):
        cuda.synchronize(DEVICE)
        found = problem.step()
        cuda.synchronize(DEVICE)
    assert_same_bits(found, expected)


def test_strides(impl: str) -> None:
    """Channels last, a slice, a transposed and an expanded tensor; gradients laid out like what they belong to."""
    problem = Problem(impl)
    expected = saved(problem.step())
    first, second, third = (z.detach() for z in problem.logits)
    wide = torch.full((2, CLASSES, 6, 25), float("nan"), device=DEVICE)
    wide[..., 3:23:2] = second
    turned = third.transpose(2, 3).contiguous().transpose(2, 3)
    laid = [first.contiguous(memory_format=torch.channels_last), wide[..., 3:23:2], turned]
    leaves = [z.requires_grad_() for z in laid]
    turned_target = problem.target.transpose(1, 2).contiguous().transpose(1, 2)
    assert not any(z.is_contiguous() for z in leaves) and not turned_target.is_contiguous()
    found = step_of(problem.criterion, leaves, turned_target)
    assert found["logits_2"].stride() == turned.stride()
    assert_near(found, expected, 2e-6)
    assert_right(found, problem)
    with torch.no_grad():
        third.copy_(third[:1].expand_as(third))
    expanded = [*leaves[:2], third[:1].expand_as(third).requires_grad_()]
    assert_near(step_of(problem.criterion, expanded, problem.target), problem.step(), 2e-6)


def test_checkpoints_move_between_devices(impl: str, tmp_path: Path) -> None:
    problem = Problem(impl)
    found = saved(problem.step())
    torch.save(problem.criterion.state_dict(), tmp_path / "gpu.pt")
    here = LoMixLoss(CLASSES, len(SIZES), impl="reference")
    here.load_state_dict(torch.load(tmp_path / "gpu.pt", map_location="cpu", weights_only=True))
    on_cpu = step_of(here, [z.detach().cpu().requires_grad_() for z in problem.logits], problem.target.cpu())
    assert_near(on_cpu, found)
    torch.save(here.state_dict(), tmp_path / "cpu.pt")
    there = LoMixLoss(CLASSES, len(SIZES), impl=impl).to(DEVICE)
    there.load_state_dict(torch.load(tmp_path / "cpu.pt", weights_only=True))
    assert_same_bits(step_of(there, problem.logits, problem.target), found)
    assert all(p.device == DEVICE for p in there.parameters())
