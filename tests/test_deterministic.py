"""torch.use_deterministic_algorithms(True): on CUDA torch refuses operators then that have no repeatable kernel there.

No GPU is needed to see which operators a loss calls.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from in_training import USES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lomix_fast import eager
from lomix_fast.backends import BACKENDS

# By the list in the documentation of torch.use_deterministic_algorithms, torch 2.11: what raises on CUDA.
REFUSED = {
    *("upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_trilinear3d_backward"),
    *("upsample_bicubic2d_backward", "avg_pool3d_backward", "_adaptive_avg_pool2d_backward"),
    *("_adaptive_avg_pool3d_backward", "max_pool3d_with_indices_backward", "adaptive_max_pool2d_backward"),
    *("fractional_max_pool2d_backward", "fractional_max_pool3d_backward", "max_unpool2d", "max_unpool3d"),
    *("reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward"),
    *("nll_loss_forward", "nll_loss2d_forward", "nll_loss_backward", "nll_loss2d_backward", "_ctc_loss_backward"),
    *("_embedding_bag_dense_backward", "put_", "put", "histc", "grid_sampler_2d_backward", "grid_sampler_3d_backward"),
}
FLOATS_REFUSED = {"cumsum", "cumsum_"}


class Refuses(TorchDispatchMode):
    """Fails where torch would on CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.names.add(name)
        weighted = name == "bincount" and len(args) > 1 and args[1] is not None
        indexed = name in ("median", "nanmedian") and len(args) > 1
        product = name.startswith("scatter_reduce") and "prod" in args
        floats = name in FLOATS_REFUSED and args[0].is_floating_point()
        assert not (name in REFUSED or weighted or indexed or product or floats), f"{func} is not repeatable on CUDA"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def within_eager(monkeypatch: pytest.MonkeyPatch) -> Refuses:
    """Watches the backend `eager` from inside, where a mode around a registered op does not reach."""
    watch = Refuses()

    def watched(run: Any) -> Any:
        def within(*arguments: Any) -> Any:
            with watch:
                return run(*arguments)

        return within

    row = BACKENDS["eager"]
    monkeypatch.setitem(
        BACKENDS, "eager", replace(row, forward=watched(eager.forward), backward=watched(eager.backward))
    )
    return watch


SIZES = {1: ((3,), (7,), (12,)), 2: ((2, 3), (5, 6), (8, 12)), 3: ((2, 3, 2), (3, 6, 4), (4, 8, 6))}


@pytest.mark.parametrize("axes", SIZES)
@pytest.mark.parametrize("name", USES)
def test_eager_calls_nothing_that_torch_refuses(name: str, axes: int, within_eager: Refuses) -> None:
    """Forward and backward, the loss around them included; native sizes below and at the full size."""
    use, sizes = USES[name], SIZES[axes]
    criterion = use.criterion("eager")
    logits, call = use.logits(2, sizes), use.call(2, sizes[-1])
    assert torch.are_deterministic_algorithms_enabled()
    with Refuses() as around:
        criterion(logits, **call).backward()
    assert "mul" in within_eager.names and "map_stats_backward" in around.names


def test_the_list_catches_the_usual_way() -> None:
    coarse = torch.randn(1, 2, 3, 3, requires_grad=True)
    with pytest.raises(AssertionError, match="not repeatable"), Refuses():
        F.interpolate(coarse, size=(5, 5), mode="bilinear").sum().backward()
    with pytest.raises(AssertionError, match="not repeatable"), Refuses():
        torch.ones(3).cumsum(0)


MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


@pytest.mark.parametrize("is_deterministic", [True, False])
@given(sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=3), data=st.data())
def test_adjoint_is_that_of_torch(is_deterministic: bool, sizes: list[tuple[int, int]], data: st.DataObject) -> None:
    """Against autograd through F.interpolate in float64, larger and smaller than the native size, axis by axis."""
    native, full = zip(*sizes, strict=True)
    dtype = data.draw(st.sampled_from((torch.float32, torch.float64)))
    grad = torch.randn(2, 3, *full, dtype=dtype)
    coarse = torch.zeros(2, 3, *native, dtype=torch.float64, requires_grad=True)
    torch.use_deterministic_algorithms(False)
    fine = F.interpolate(coarse, size=full, mode=MODES[len(full)], align_corners=False)
    (expected,) = torch.autograd.grad(fine, coarse, grad.double())
    torch.use_deterministic_algorithms(is_deterministic)
    found = eager._adjoint(grad.flatten(2), coarse.to(dtype), torch.Size(full))
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_no_axis_is_squared() -> None:
    """A long line: its adjoint takes memory in proportion to its length."""

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            self.most = max(self.most, out.numel() if isinstance(out, Tensor) else 0)
            return out

    grad, like = torch.ones(1, 2, 30_000), torch.empty(1, 2, 10_000)
    with Largest() as seen:
        found = eager._adjoint(grad, like, torch.Size([30_000]))
    assert found.sum() == 60_000 and seen.most <= grad.numel()
