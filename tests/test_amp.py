"""Mixed precision: autocast around network and loss, GradScaler, and float16 logits whose products overflow it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import NATIVE
from in_training import USES, Joined, SmallUNet
from literal_torch import literal_map_losses
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lomix_fast import LoMixLoss, MixPlan, map_stats

backends = pytest.mark.parametrize("impl", NATIVE)
narrow = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
FULL = (16, 24)
SIZES = ((2, 3), (4, 6), (8, 12))


def draw(batch: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 1, *FULL), torch.randint(3, (batch, *FULL))


def make(impl: str = "auto") -> Joined:
    return Joined(SmallUNet(), USES["as published"].criterion(impl))


# Autocast -------------------------------------------------------------------------------------------------------------


class WideCopies(TorchDispatchMode):
    """Notes what the op of the loss is given, and every other op that makes a wide float tensor [B, C, *space]."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Tensor] = []
        self.wide: list[str] = []
        self.gradients: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.lomix_fast.map_stats_forward.default:
            self.given += args[0]
        elif func is torch.ops.lomix_fast.map_stats_backward.default:
            self.gradients += [g.dtype for g in out if g.dim() == 4]
        elif func.namespace != "lomix_fast":
            for found in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(found, Tensor) and found.dim() == 4 and found.dtype in (torch.float32, torch.float64):
                    self.wide.append(f"{func}: {found.dtype} of shape {tuple(found.shape)}")
        return out


# Not "reference": a mode does not get along with the torch.func.vjp that it uses.
@pytest.mark.parametrize("impl", [name for name in NATIVE if name != "reference"])
@narrow
def test_narrow_logits_are_taken_as_they_are(dtype: torch.dtype, impl: str) -> None:
    """No op outside of ours makes a float32 tensor the size of a logit map, forward or backward, inside autocast."""
    use = USES["pixels weighed"]
    criterion, call = use.criterion(impl), use.call(2, FULL)
    call["weight_map"] = call["weight_map"].squeeze(1)  # so that what has four axes is a map of logits
    logits = use.logits(2, SIZES, dtype)
    with WideCopies() as seen, torch.autocast("cpu", dtype):
        loss = criterion(logits, **call)
        loss.backward()
    assert seen.wide == []
    assert [z.data_ptr() for z in seen.given] == [z.data_ptr() for z in logits]
    assert seen.gradients == [dtype] * 3 and [z.grad.dtype for z in logits] == [dtype] * 3
    assert loss.dtype == torch.float32


def plain_loss(criterion: LoMixLoss, maps: list[Tensor], target: Tensor) -> Tensor:
    """The loss as published, spelt out map by map."""
    mixes = {name: p for name, p in criterion.named_parameters() if name != "alpha"}
    losses = literal_map_losses(maps, target, ("add", "mul", "cat", "awf"), **mixes)
    return (torch.stack(list(losses.values())) * nn.functional.softplus(criterion.alpha)).sum()


def gradients(step: Joined) -> dict[str, Tensor]:
    """Those of the network as one vector, and those of the criterion by name."""
    own = {name: p.grad.double() for name, p in step.criterion.named_parameters()}
    return {"network": torch.cat([p.grad.double().flatten() for p in step.network.parameters()]), **own}


@backends
@narrow
def test_a_step_is_as_exact_as_plain_pytorch(dtype: torch.dtype, impl: str) -> None:
    """Network and loss under autocast against float64; the yardstick is a float32 loss on the same narrow logits."""
    ours, (image, target) = make(impl), draw()
    plain, truth = copy.deepcopy(ours), copy.deepcopy(ours).double()
    exact = plain_loss(truth.criterion, truth.network(image.double()), target)
    exact.backward()
    with torch.autocast("cpu", dtype):
        loss = ours(image, target)
        maps = plain.network(image)
    assert all(z.dtype == dtype for z in maps)
    yardstick = plain_loss(plain.criterion, [z.float() for z in maps], target)
    for one in (loss, yardstick):
        one.backward()
    assert abs(loss - exact) <= abs(yardstick - exact) + 1e-6 * exact
    expected, allowed = gradients(truth), gradients(plain)
    for name, found in gradients(ours).items():
        size = expected[name].norm()
        error, limit = ((g - expected[name]).norm() / size for g in (found, allowed[name]))
        assert error <= 1.1 * limit, f"{name}: {error:.2e}, plain PyTorch {limit:.2e}"
        assert limit < 0.05


# GradScaler -----------------------------------------------------------------------------------------------------------


def scaled_step(
    step: Joined,
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    image: Tensor,
    target: Tensor,
    before: Callable[[], object] = lambda: None,
) -> Tensor:
    """One iteration as PyTorch's documentation writes it, in float16; `before` runs between backward and step."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    with torch.autocast("cpu", torch.float16):
        loss = step(image, target)
    scaler.scale(loss).backward()
    before()
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    return loss.detach()


def optimizers_of(step: Joined, together: bool) -> list[torch.optim.Optimizer]:
    """One for both, or one for each."""
    groups = [[*step.network.parameters()], [*step.criterion.parameters()]]
    return [torch.optim.SGD(group, lr=0.1) for group in ([groups[0] + groups[1]] if together else groups)]


def parameters_of(step: Joined) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in step.named_parameters()}


def assert_trained(step: Joined, before: dict[str, Tensor]) -> None:
    """Every tensor of network and criterion has moved, to finite numbers."""
    for name, p in step.named_parameters():
        assert p.isfinite().all() and not torch.equal(p, before[name]), f"{name} has not trained"


def assert_untouched(step: Joined, before: dict[str, Tensor]) -> None:
    assert [name for name, p in step.named_parameters() if not torch.equal(p, before[name])] == []


@backends
def test_a_scaled_step_is_the_step_without_scaling(impl: str) -> None:
    step, (image, target) = make(impl), draw()
    twin, before = copy.deepcopy(step), parameters_of(step)
    with torch.autocast("cpu", torch.bfloat16):
        twin(image, target).backward()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    optimizers = optimizers_of(step, together=True)
    for optimizer in optimizers:
        optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):  # a power of two changes no bit of the gradients
        scaler.scale(step(image, target)).backward()
    scaler.step(optimizers[0])
    assert_trained(step, before)
    for (name, p), q in zip(step.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(p, before[name] - 0.1 * q.grad, rtol=1e-6, atol=1e-7)


@backends
@pytest.mark.parametrize("together", [True, False], ids=["one optimizer", "one each"])
@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_a_step_with_bad_logits_is_skipped_for_network_and_criterion(poison: float, together: bool, impl: str) -> None:
    """Each optimizer looks at its own gradients alone, so those of the criterion must be bad as well."""
    step, (image, target) = make(impl), draw()
    optimizers, scaler = optimizers_of(step, together), torch.amp.GradScaler("cpu", init_scale=256.0)
    scaled_step(step, optimizers, scaler, image, target)
    before = parameters_of(step)
    bad = image.clone()
    bad[0, 0, 3, 5] = poison
    assert not scaled_step(step, optimizers, scaler, bad, target).isfinite()
    assert_untouched(step, before)
    assert scaler.get_scale() == 128.0
    assert scaled_step(step, optimizers, scaler, image, target).isfinite()
    assert_trained(step, before)
    assert scaler.get_scale() == 128.0


@backends
def test_a_scale_that_overflows_float16_gradients_is_halved_until_it_fits(impl: str) -> None:
    """The loss itself stays finite: only the gradients of the logits, in float16, overflow."""
    step, (image, target) = make(impl), draw()
    optimizers, scaler = optimizers_of(step, together=True), torch.amp.GradScaler("cpu", init_scale=2.0**24)
    start = parameters_of(step)
    scales, skipped = [scaler.get_scale()], 0
    while torch.equal(step.criterion.alpha, start["criterion.alpha"]):
        before = parameters_of(step)
        assert scaled_step(step, optimizers, scaler, image, target).isfinite()
        scales.append(scaler.get_scale())
        if scales[-1] < scales[-2]:
            assert scales[-1] == scales[-2] / 2
            assert_untouched(step, before)
            skipped += 1
        assert len(scales) < 24
    assert skipped >= 2 and scales[-1] == scales[-2]
    assert_trained(step, start)


@backends
def test_unscaled_gradients_can_be_clipped(impl: str) -> None:
    step, (image, target) = make(impl), draw()
    twin, before = copy.deepcopy(step), parameters_of(step)
    with torch.autocast("cpu", torch.float16):
        (256 * twin(image, target)).backward()
    expected = [p.grad / 256 for p in twin.parameters()]
    optimizers, scaler = optimizers_of(step, together=False), torch.amp.GradScaler("cpu", init_scale=256.0)
    norms = []

    def clip() -> None:
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norms.append(nn.utils.clip_grad_norm_(step.parameters(), 0.5))

    scaled_step(step, optimizers, scaler, image, target, before=clip)
    norm = torch.cat([g.flatten() for g in expected]).norm()
    torch.testing.assert_close(norms[0], norm, rtol=1e-5, atol=0)
    assert norm > 0.5  # otherwise nothing was clipped
    for (name, p), g in zip(step.named_parameters(), expected, strict=True):
        torch.testing.assert_close(p, before[name] - 0.1 * g * (0.5 / norm), rtol=1e-5, atol=1e-7)


# Logits whose products are beyond float16 -----------------------------------------------------------------------------


@backends
@pytest.mark.parametrize(("scales", "magnitude"), [(2, 300.0), (3, 300.0), (3, 6e4), (7, 5e4)])
def test_products_beyond_float16_keep_a_finite_loss(scales: int, magnitude: float, impl: str) -> None:
    """5e4 to the seventh is 8e32: beyond float16 by far, and float32 still holds it."""
    plan = MixPlan.create(scales, ("mul",))
    logits = [(torch.rand(1, 2, 3, 4) * 2 - 1).mul(magnitude).half() for _ in range(scales)]
    target = torch.randint(2, (1, 6, 8))
    truth = map_stats([z.double() for z in logits], target, plan, impl="reference")[0]
    assert truth.float().isfinite().all()
    products = torch.stack([z.double() for z in logits]).prod(0)
    assert products.abs().max() > torch.finfo(torch.float16).max
    stats = map_stats(logits, target, plan, impl=impl)[0]
    plain = map_stats([z.float() for z in logits], target, plan, impl="reference")[0]
    assert stats.isfinite().all()
    allowed = (plain - truth).abs().amax() + 1e-5 * truth.abs()
    assert ((stats - truth).abs() <= allowed).all()


@backends
def test_a_loss_and_its_gradient_at_large_float16_logits(impl: str) -> None:
    """The module as well: products near 1e5, and gradients that float16 holds."""
    criterion = USES["as published"].criterion(impl)
    logits = [(40 * z.detach()).half().requires_grad_() for z in USES["as published"].logits(2, SIZES)]
    exact = [z.detach().double().requires_grad_() for z in logits]
    target = torch.randint(3, (2, *FULL))
    loss, truth = criterion(logits, target), copy.deepcopy(criterion).double()(exact, target)
    loss.backward()
    truth.backward()
    assert loss.isfinite() and loss.item() == pytest.approx(truth.item(), rel=1e-5)
    for z, e in zip(logits, exact, strict=True):
        assert z.grad.isfinite().all()
        torch.testing.assert_close(z.grad.double(), e.grad, rtol=2e-3, atol=2e-3 * float(e.grad.abs().max()))
