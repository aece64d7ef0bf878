"""The row "cuda" without a GPU: why it cannot run, what labels its kernels get, what "auto" takes instead."""

from __future__ import annotations

import dataclasses
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lomix_fast import MixPlan, _build_info, available_backends, backends, cuda_backend, extension, labels, target
from lomix_fast.target import Target, TargetRule

GPU = torch.device("cuda", 0)
PLAN = MixPlan.create(2, ("add",))
LOGITS = [torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 4, 4)]


@pytest.fixture
def usable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of compute capability 8.6, and an extension that was built for it."""
    monkeypatch.setattr("torch.version.hip", None)
    monkeypatch.setattr(extension, "load_error", lambda: None)
    monkeypatch.setattr(extension, "cuda_architectures", lambda: ("8.0", "9.0+PTX"))
    monkeypatch.setattr(_build_info, "read", dict)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Some GPU")


# ---- why it cannot run ----


def test_runs_where_everything_is_there(usable: None) -> None:
    assert cuda_backend.why_not(GPU) is None
    assert available_backends("cuda:0")["cuda"] == "usable"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_other_tensors_are_refused(device: str, usable: None) -> None:
    assert cuda_backend.why_not(torch.device(device)) == f"the cuda backend takes CUDA tensors, not {device}"


def test_rocm_is_refused(monkeypatch: pytest.MonkeyPatch, usable: None) -> None:
    monkeypatch.setattr("torch.version.hip", "7.1")
    said = str(cuda_backend.why_not(GPU))
    assert "for NVIDIA GPUs" in said and "built for ROCm" in said and "triton backend" in said


def test_an_extension_that_does_not_load_is_told_as_by_cpu(monkeypatch: pytest.MonkeyPatch, usable: None) -> None:
    monkeypatch.setattr(extension, "load_error", lambda: "it does not load")
    assert cuda_backend.why_not(GPU) == backends.BACKENDS["cpu"].why_not(torch.device("cpu")) == "it does not load"


@pytest.mark.parametrize("record, reason", [({"cuda_skipped": "no nvcc"}, "no nvcc"), ({}, "has recorded no reason")])
def test_an_extension_without_cuda_says_why(
    record: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch, usable: None
) -> None:
    monkeypatch.setattr(extension, "cuda_architectures", tuple)
    monkeypatch.setattr(_build_info, "read", lambda: record)
    said = str(cuda_backend.why_not(GPU))
    assert "was built without CUDA kernels: " in said and reason in said and "LOMIX_FAST_BUILD=cuda pip install" in said


def test_no_gpu_is_told(monkeypatch: pytest.MonkeyPatch, usable: None) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: pytest.fail("asked a GPU that is not there"))
    assert str(cuda_backend.why_not(GPU)).startswith("torch sees no CUDA device here")


def test_a_gpu_that_was_not_built_for_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch, usable: None) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
    said = str(cuda_backend.why_not(GPU))
    assert "built for compute capability 8.0 9.0+PTX, but Some GPU has 7.5" in said
    assert "run TORCH_CUDA_ARCH_LIST=7.5 LOMIX_FAST_BUILD=cuda pip install" in said


def test_a_device_that_is_not_there(usable: None) -> None:
    assert cuda_backend.why_not(torch.device("cuda:3")) == "torch sees 1 CUDA devices, none of them cuda:3"


@pytest.mark.parametrize(
    "built, gpu, runs",
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 9), True),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("9.0", (8, 9), False),
        ("8.0+PTX", (8, 6), True),
        ("8.0+PTX", (12, 0), True),
        ("8.0+PTX", (7, 5), False),
        ("12.0", (12, 1), True),
        ("10.0", (12, 0), False),
        ("9.0a", (9, 0), True),
        ("10.0a", (10, 3), False),
        ("9.0a+PTX", (10, 0), False),
        ("8.0", (8, 7), False),
        ("8.7", (8, 7), True),
        ("8.7", (8, 9), False),
        ("8.0+PTX", (8, 7), True),
    ],
)
def test_which_code_runs_where(built: str, gpu: tuple[int, int], runs: bool) -> None:
    assert cuda_backend._runs(built, gpu) is runs


def test_the_module_tells_what_it_was_built_for() -> None:
    if extension.load_error() is not None:
        pytest.skip(str(extension.load_error()))
    archs = _build_info.read().get("cuda_archs", "")
    assert extension.cuda_architectures() == tuple(archs.split())


# ---- labels ----


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Arguments that the compiled ops are called with; they compute nothing."""
    calls: list[tuple[Any, ...]] = []

    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        calls.append(arguments)
        return torch.zeros(1), torch.zeros(1)

    def backward(grad_stats: Tensor, *arguments: Any) -> list[Tensor]:
        calls.append(arguments)
        return [torch.full((1,), float(n)) for n in range(6)]

    monkeypatch.setattr(
        torch.ops, "lomix_fast_cpp", SimpleNamespace(map_stats_forward=forward, map_stats_backward=backward)
    )
    return calls


NO_PARAMETERS: tuple[Tensor | None, ...] = (None,) * 4


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_integer_labels_go_to_the_kernel_as_they_are(
    dtype: torch.dtype, handed_over: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labels, "may_look", lambda device: False)
    given = Target(torch.ones(1, 4, 4, dtype=dtype))
    cuda_backend.forward(LOGITS, given, NO_PARAMETERS, PLAN)
    cuda_backend.backward(torch.zeros(1), LOGITS, given, NO_PARAMETERS, PLAN)
    assert [arguments[1] is given.labels for arguments in handed_over] == [True, True]


@pytest.mark.parametrize(
    "given, expected",  # 3 is the first number that is no class
    [
        (torch.tensor([0.0, 2.0, 1.5, 3.0, -1.0, float("nan"), float("inf"), -0.5]), [0, 2, 3, 3, 3, 3, 3, 3]),
        (torch.tensor([1.0, 0.25], dtype=torch.float16), [1, 3]),
        (torch.tensor([0, 2, 3, 2**32 - 1], dtype=torch.uint32), [0, 2, 3, 3]),
        (torch.tensor([1, 2**16 - 1], dtype=torch.uint16), [1, 3]),
        (torch.tensor([1, 2**64 - 1], dtype=torch.uint64), [1, 3]),
    ],
)
def test_bad_labels_of_other_types_stay_bad(
    given: Tensor, expected: list[int], handed_over: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labels, "may_look", lambda device: False)  # as on a GPU
    monkeypatch.setattr(target, "may_look", lambda device: False)
    cuda_backend.forward(LOGITS, Target(given), NO_PARAMETERS, PLAN)
    cuda_backend.backward(torch.zeros(1), LOGITS, Target(given), NO_PARAMETERS, PLAN)
    for arguments in handed_over:
        assert arguments[1].dtype == torch.int64 and arguments[1].tolist() == expected


def test_debugging_raises_before_the_kernel_runs(handed_over: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "may_look", lambda device: True)
    with pytest.raises(ValueError, match=r"got the label 7 .*expected labels in \[0, 3\)"):
        cuda_backend.forward(LOGITS, Target(torch.full((1, 4, 4), 7)), NO_PARAMETERS, PLAN)
    assert handed_over == []


def test_gradients_are_given_to_what_they_belong_to(handed_over: list[Any]) -> None:
    parameters = (None, torch.zeros(1), None, torch.zeros(1))
    weights, classes = torch.ones(1, 4, 4), torch.ones(3)
    rule = TargetRule(ignore_index=255, label_smoothing=0.1, weighted_ce=False)
    given = Target(torch.zeros(1, 4, 4).long(), False, weights, classes, rule)
    plan = MixPlan.create(2, ("mul",), squared=False, bounded=True)
    gradients, rest = cuda_backend.backward(torch.zeros(1), LOGITS, given, parameters, plan)
    assert [float(g) for g in gradients] == [0.0, 1.0]
    assert [None if g is None else float(g) for g in rest] == [None, 3.0, None, 5.0]
    rules = (False, True, False, False, 255, 0.1)  # squared, bounded, sigmoid, and those of the target
    assert handed_over[0][2:] == (weights, classes, *parameters, list(plan.encoded), *rules)


# ---- "auto" ----


@pytest.fixture
def reasons(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Why each fast backend cannot run, for a test to set; all can."""
    found: dict[str, str | None] = {"cuda": None, "triton": None}
    for name in found:
        row = dataclasses.replace(backends.BACKENDS[name], why_not=lambda device, name=name: found[name])
        monkeypatch.setitem(backends.BACKENDS, name, row)
    backends._warn_of_fallback.cache_clear()
    return found


def test_auto_takes_cuda_then_triton_in_silence(reasons: dict[str, str | None]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose("auto", GPU) == "cuda"
        reasons["triton"] = "no triton"
        assert backends.choose("auto", GPU) == "cuda"
        reasons.update(cuda="no nvcc", triton=None)
        assert backends.choose("auto", GPU) == "triton"
        assert backends.choose("auto", torch.device("meta")) == "eager"  # nothing faster is missing there


def test_plain_pytorch_on_a_gpu_is_warned_of_once_with_both_reasons(reasons: dict[str, str | None]) -> None:
    reasons.update(cuda="no nvcc", triton="no triton")
    words = r"plain PyTorch instead of the fused cuda or triton kernel: cuda: no nvcc; triton: no triton\. Pass impl"
    with pytest.warns(RuntimeWarning, match=words):
        assert backends.choose("auto", GPU) == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose("auto", GPU) == "eager"
    backends._warn_of_fallback.cache_clear()
