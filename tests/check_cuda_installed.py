"""What `make check-cuda` and `make versions` try of a lomix_fast that was built with its CUDA kernels; needs no GPU."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import lomix_fast
from lomix_fast import MixPlan, _build_info, available_backends, extension, map_stats
from lomix_fast.doctor.checking import check_backend
from lomix_fast.doctor.devices import present
from lomix_fast.doctor.selection import choose_cases
from lomix_fast.testing.cases import CASES, Case
from lomix_fast.testing.devices import Cpu, Device, Gpu

OPS = ("map_stats_forward", "map_stats_backward")
PLAN = MixPlan.create(2, ("add",))
LOGITS = [torch.randn(1, 3, n, n, generator=torch.Generator().manual_seed(0)) for n in (4, 8)]
TARGET = torch.arange(64).view(1, 8, 8) % 3


def expect(holds: bool, message: str) -> None:
    """Raise AssertionError with a message; unlike assert, also under python -O."""
    if not holds:
        raise AssertionError(message)


def said(call: Callable[[], object], kind: type[Exception]) -> str:
    """What a call raises, which must be of a kind."""
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"nothing was raised, expected {kind.__name__}")


def arguments(logits: list[torch.Tensor], target: torch.Tensor) -> tuple[object, ...]:
    """What the compiled ops take, past all checks: no weights and no parameters, the maps, and rules that are off."""
    rules = (PLAN.squared, False, False, True, None, 0.0)
    return (logits, target, *(None,) * 6, list(PLAN.encoded), *rules)


def raw(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward pass by the compiled op."""
    *logits, target = tensors
    return torch.ops.lomix_fast_cpp.map_stats_forward(*arguments(logits, target))


def is_the_one_built() -> None:
    """The package comes from where it should, its module was built for this torch, with what was asked for."""
    prefix = os.environ.get("CHECK_CUDA_PREFIX", sys.prefix)
    expect(Path(lomix_fast.__file__).is_relative_to(prefix), f"imported {lomix_fast.__file__}, not the one in {prefix}")
    expect(torch.version.cuda is not None, f"torch {torch.__version__} is no CUDA build")
    error = extension.load_error()
    expect(error is None, f"the extension does not load: {error}")
    wanted = tuple(re.split(r"[;\s]+", os.environ["CHECK_CUDA_TARGETS"].strip("; ")))
    built = extension.cuda_architectures()
    expect(built == wanted, f"built for {built}, asked for {wanted}")
    record = _build_info.read()
    expect(record.get("cuda_archs") == " ".join(wanted), f"the build has recorded {record}")
    expect(
        str(record.get("cuda")).split(".")[0] == torch.version.cuda.split(".")[0], f"the build has recorded {record}"
    )


def has_its_ops() -> None:
    """Each op has a kernel for CPU and CUDA tensors and for no others."""
    for op in OPS:
        has = {
            key: torch._C._dispatch_has_kernel_for_dispatch_key(f"lomix_fast_cpp::{op}", key)
            for key in ("CPU", "CUDA", "Meta")
        }
        expect(has == {"CPU": True, "CUDA": True, "Meta": False}, f"{op} has kernels for {has}")
    message = said(lambda: raw(*(z.to("meta") for z in LOGITS), TARGET.to("meta")), NotImplementedError)
    expect("lomix_fast_cpp::map_stats_forward" in message and "Meta" in message, f"unclear: {message}")


def computes_on_cpu() -> None:
    """The CPU kernel of this build is right, and CPU tensors find it."""
    for found, expected in zip(raw(*LOGITS, TARGET), map_stats(LOGITS, TARGET, PLAN, impl="cpu"), strict=True):
        expect(torch.equal(found, expected), "the compiled op and impl='cpu' differ on CPU tensors")
    passes("cpu", Cpu(), choose_cases(None, quick=True))


def refuses_cpu_tensors() -> None:
    """A named backend that cannot run says why."""
    message = said(lambda: map_stats(LOGITS, TARGET, PLAN, impl="cuda"), RuntimeError)
    expect("impl: got 'cuda'" in message and "takes CUDA tensors, not cpu" in message, f"unclear: {message}")
    # The functions registered for CUDA themselves, which dispatch does not reach with CPU tensors.
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    rest = arguments(LOGITS, TARGET)
    ops = torch.ops.lomix_fast_cpp
    for call in (
        lambda: ops.map_stats_forward.default.redispatch(keys, *rest),
        lambda: ops.map_stats_backward.default.redispatch(keys, torch.zeros(1), *rest),
    ):
        message = said(call, ValueError)
        expect("logits: got a tensor on cpu, expected CUDA tensors" in message, f"unclear: {message}")


def runs_on_gpus() -> None:
    """Every case of the shared list on every GPU; without one, the reason is told."""
    gpus = [device for device in present() if isinstance(device, Gpu)]
    if not gpus:
        reason = available_backends("cuda")["cuda"]
        expect(str(reason).startswith("torch sees no CUDA device here"), f"without a GPU, the reason is {reason}")
        print("  no GPU here: the kernels were not run")
    for device in gpus:
        reason = available_backends(device.where)["cuda"]
        expect(reason == "usable", f"on {device.name}: {reason}")
        passes("cuda", device, list(CASES))


def passes(backend: str, device: Device, cases: list[Case]) -> None:
    """Hold a backend against float64."""
    done = check_backend(backend, device, cases, lambda line: print(line, flush=True))
    expect(
        not done.failures, f"{backend} on {device.name}: {len(done.failures)} of {len(cases)} cases failed, see above"
    )
    print(f"  {backend} on {device.name}: {len(cases)} cases passed")


def main() -> None:
    """Try everything in turn."""
    torch.set_num_threads(2)
    for check in (is_the_one_built, has_its_ops, computes_on_cpu, refuses_cpu_tensors, runs_on_gpus):
        print(f"check-cuda: {check.__name__.replace('_', ' ')}", flush=True)
        check()


if __name__ == "__main__":
    main()
