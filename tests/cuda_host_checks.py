"""What only the CUDA kernels on the host can be asked; run by test_cuda_host.py in a pytest of its own."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from common import check_gradients, check_stats, cotangent, run_backend
from cuda_host_backend import NAME, backward, library, unchecked_forward
from torch import Tensor

from benchmarks.gpu import cuda_shapes
from lomix_fast import MixPlan
from lomix_fast.testing.cases import Case, case, make_inputs

# Multiprocessors, then bytes of shared memory of a block and of a multiprocessor: of an A100, an H100, an RTX 4090 and
# the smallest that is supported.
DEVICES = {
    "sm_80": (108, 163 * 1024, 164 * 1024),
    "sm_90": (132, 227 * 1024, 228 * 1024),
    "sm_89": (128, 99 * 1024, 100 * 1024),
    "sm_75": (40, 64 * 1024, 64 * 1024),
    "one": (1, 99 * 1024, 100 * 1024),
}


@pytest.fixture(autouse=True)
def usual_device() -> Iterator[None]:
    yield
    library().cuda_host_device(2, 99 * 1024, 100 * 1024)
    library().cuda_host_seed(ctypes.c_ulonglong(1))


# Of each kernel one: several tiles, several blocks, ratios that are not whole, a native size above the full one.
SHAPES = ("many_tiles", "volume_non_integer", "long_line", "classes_12", "scales_6", "larger_and_smaller_rows")
DOUBLE = ("double_mixed", "classes_40")
# What only general calls have: few classes, then the class-tiled way.
GENERAL = (
    *("weights_many_tiles", "soft_many_tiles", "sigmoid_many_tiles", "all_operators", "label_smoothing_ignore"),
    *("weights_classes_17", "extra_classes_17", "sigmoid_weighted_double", "scales_8"),
)


# Every kernel on an H100, and of each way through them one on the others.
ON_ALL = ("many_tiles", "classes_12", "weights_many_tiles", "weights_classes_17")


@pytest.mark.parametrize(
    ("name", "device"),
    [(n, d) for n in SHAPES + DOUBLE + GENERAL for d in DEVICES if d == "sm_90" or n in ON_ALL],
)
def test_any_size_of_device(name: str, device: str) -> None:
    library().cuda_host_device(*DEVICES[device])
    got = run_backend(case(name), NAME)
    check_stats(case(name), got)
    check_gradients(case(name), got)


@pytest.mark.parametrize("name", SHAPES + DOUBLE + GENERAL)
def test_the_order_of_threads_does_not_change_a_bit(name: str) -> None:
    """Blocks, warps and threads run in another order with each seed: sums that depended on it would differ."""
    outcomes = []
    for seed in (1, 2):
        library().cuda_host_seed(ctypes.c_ulonglong(seed))
        outcomes.append(run_backend(case(name), NAME))
    first, second = outcomes
    assert torch.equal(first.stats, second.stats)
    for key, gradient in first.gradients.items():
        assert torch.equal(gradient, second.gradients[key]), key


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("value", [-1, 3, 127])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("label_dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_a_bad_label_makes_its_sample_nan_and_no_other(
    label_dtype: torch.dtype, dtype: torch.dtype, value: int, weighted: bool
) -> None:
    one = Case("bad", 3, 3, (9, 10), ((3, 3), (9, 10)), dtype=dtype, target_dtype=label_dtype)
    if weighted:
        one = replace(one, weight_map=torch.float32, ignore_index=100)
    inputs = make_inputs(one)
    parameters = list(inputs.parameters.values())
    clean, counts = unchecked_forward(inputs.logits, inputs.target_for(one), parameters, one.plan)
    inputs.target[1, 8, 9] = value
    stats, _ = unchecked_forward(inputs.logits, inputs.target_for(one), parameters, one.plan)
    assert stats[1].isnan().all() and torch.equal(stats[::2], clean[::2])
    if not weighted:  # those of other targets are summed elsewhere
        assert torch.equal(counts.sum(1), torch.full((3,), 180, dtype=counts.dtype))
    grads, _ = backward(cotangent(one), inputs.logits, inputs.target_for(one), parameters, one.plan)
    for gradient in grads:
        assert gradient[1].isnan().all() and gradient[::2].isfinite().all()


def test_a_label_of_64_bits_is_not_cut_to_32() -> None:
    one = Case("wide", 1, 3, (4, 4), ((4, 4),))
    inputs = make_inputs(one)
    inputs.target[0, 0, 0] = 2**32
    stats, _ = unchecked_forward(inputs.logits, inputs.target_for(one), [None] * 4, one.plan)
    assert stats.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [3, 17])
def test_native_pixels_that_very_many_tiles_touch(classes: int, dtype: torch.dtype) -> None:
    """A warp shares their sum."""
    one = Case("coarse", 2, classes, (80, 150), ((1, 1), (2, 3)), dtype=dtype)
    got = run_backend(one, NAME)
    check_stats(one, got)
    check_gradients(one, got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [3, 17])
def test_very_negative_and_missing_logits(classes: int, dtype: torch.dtype) -> None:
    """All logits far below zero, and classes of minus infinity: softmax sees differences alone."""
    one = Case("low", 1, classes, (3, 4), ((3, 4),), dtype=dtype, operators=())
    inputs = make_inputs(one)
    inputs.target[:] = classes - 1
    lowest = torch.finfo(dtype).min / 8
    missing = torch.full_like(inputs.logits[0], float("-inf"))
    missing[:, -1] = lowest
    stats, _ = unchecked_forward([missing], inputs.target_for(one), [None] * 4, one.plan)
    assert stats[0, 0, 0] == 0 and stats[0, 0, classes] == 12  # the last class alone is there
    low = [torch.full_like(missing, lowest)]
    stats, _ = unchecked_forward(low, inputs.target_for(one), [None] * 4, one.plan)
    torch.testing.assert_close(stats[0, 0, 0], 12 * torch.tensor(float(classes), dtype=dtype).log())


@pytest.mark.parametrize("name", ["scales_5", "double_mixed"])
def test_calls_from_several_threads_do_not_disturb_each_other(name: str) -> None:
    """They ask for different amounts of shared memory, which CUDA keeps with the kernel, not with the launch."""
    library().cuda_host_device(1, *DEVICES["sm_90"][1:])  # so that tiles are large: 51, 70 and 73 KiB
    sizes = [Case(f"threads_{scales}", 1, 4, (128, 128), ((128, 128),) * scales, operators=()) for scales in (2, 4, 6)]
    given = [(one, make_inputs(one)) for one in (*sizes, case(name))]

    def run(index: int) -> Tensor:
        one, inputs = given[index % len(given)]
        parameters = list(inputs.parameters.values())
        return unchecked_forward(inputs.logits, inputs.target_for(one), parameters, one.plan)[0]

    expected = [run(index) for index in range(len(given))]
    with ThreadPoolExecutor(6) as pool:
        for index, stats in enumerate(pool.map(run, range(24))):
            assert torch.equal(stats, expected[index % len(given)])


@pytest.mark.parametrize("which", ["forward", "backward"])
@pytest.mark.parametrize("full", [(224, 224), (96, 96, 96), (40, 7), (5000,)])
@pytest.mark.parametrize(
    "classes, scales, batch", [(4, 4, 6), (9, 4, 6), (9, 5, 1), (14, 5, 2), (16, 5, 1), (2, 3, 300)]
)
def test_the_report_lays_calls_out_as_the_launcher_does(
    classes: int, scales: int, batch: int, full: tuple[int, ...], which: str
) -> None:
    """benchmarks/gpu writes the choice of tiles down once more, in Python."""
    for arch in ("sm_80", "sm_89", "sm_90"):
        library().cuda_host_device(DEVICES[arch][0], *cuda_shapes.SHARED[arch])
        logits = [torch.zeros(1, classes, *full).expand(batch, -1, *[-1] * len(full))] * scales
        target = torch.zeros((1, *full), dtype=torch.uint8).expand(batch, *full)
        plan = MixPlan.create(scales)
        score = torch.empty(plan.num_pairs, classes)
        found = torch.ops.lomix_fast_cuda_host.layout(logits, target, score, list(plan.encoded), which == "backward")
        z, y, x = (*[1] * (3 - len(full)), *full)
        made = cuda_shapes.tiles_of(which, arch, DEVICES[arch][0], classes, scales, (z, y, x), batch)
        shape = (*made.log_size, made.strips, made.chunks, made.chunk_tiles, made.items, made.blocks, made.shared)
        assert tuple(found) == shape, arch
        assert which == "backward" or made.shared < 100 * 1024


def test_more_than_shared_memory_holds_goes_the_class_tiled_way() -> None:
    """16 classes and five scales ask for 75 KiB, which the smallest devices do not have."""
    library().cuda_host_device(*DEVICES["sm_75"])
    one = Case("wide", 1, 16, (8, 9), ((1, 1), (2, 3), (3, 4), (5, 7), (8, 9)))
    got = run_backend(one, NAME)
    check_stats(one, got)
    check_gradients(one, got)


def test_an_error_of_the_launch_is_raised() -> None:
    """A device that claims more shared memory than CUDA then gives."""
    library().cuda_host_device(1, 500 * 1024, 1000 * 1024)
    one = Case("large", 1, 16, (64, 64), ((64, 64),) * 6, operators=())
    inputs = make_inputs(one)
    with pytest.raises(RuntimeError, match=r"launching the statistics: .+"):
        unchecked_forward(inputs.logits, inputs.target_for(one), [None] * 4, one.plan)
