"""LoMixLoss inside a training loop: random draws, copies, checkpoints, mixed precision, optimizers."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from common import NATIVE
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lomix_fast import LoMixLoss, MixPlan, map_stats, with_loss

backends = pytest.mark.parametrize("impl", NATIVE)


def draw(scales: int = 2, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    logits = [torch.randn(2, 3, 2 * (i + 1), 3 * (i + 1)).to(dtype).requires_grad_() for i in range(scales)]
    return logits, torch.randint(3, (2, 6, 9))


# Resampled concatenation -------------------------------------------------------------------------------------------


def test_resampled_draws_anew_at_every_call() -> None:
    logits, target = draw()
    criterion = LoMixLoss(3, 2, concat="resampled")
    cat = torch.tensor([name.startswith("cat") for name in criterion.map_names])
    first = criterion.map_losses(logits, target)
    criterion(logits, target)
    second = criterion.map_losses(logits, target)
    assert ((first != second) == cat).all()
    torch.testing.assert_close((second * criterion.map_weights()).sum(), criterion(logits, target))


def test_logging_and_evaluation_leave_the_draws_of_training_alone() -> None:
    logits, target = draw()
    criterion = LoMixLoss(3, 2, concat="resampled")
    other = copy.deepcopy(criterion)
    for _ in range(3):
        with torch.no_grad():
            criterion.map_losses(logits, target)
            assert criterion.eval()(logits, target) == criterion(logits, target)
        assert criterion.train()(logits, target) == other(logits, target)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_that_would_draw_anew_is_refused(reentrant: bool) -> None:
    logits, target = draw()
    for criterion in (LoMixLoss(3, 2, concat="resampled"), LoMixLoss(3, 2)):
        loss = checkpoint(lambda *z, c=criterion: c(list(z), target), *logits, use_reentrant=reentrant)
        if criterion.concat == "learned":
            loss.backward()
            continue
        with pytest.raises(RuntimeError, match="concat: got 'resampled' where a backward pass computes"):
            loss.backward()


def test_threads_draw_one_after_the_other() -> None:
    logits, target = draw()
    criterion = LoMixLoss(3, 2, operators=("cat",), concat="resampled", weighting="fixed")
    other = copy.deepcopy(criterion)
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        found = sorted(pool.map(lambda _: criterion(logits, target).item(), range(40)))
        assert found == sorted(other(logits, target).item() for _ in range(40))


def test_resampled_repeats_under_manual_seed() -> None:
    logits, target = draw()
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        criterion = LoMixLoss(3, 2, operators=("cat",), concat="resampled")
        runs.append([criterion(logits, target).item() for _ in range(3)])
    assert runs[0] == runs[1] and runs[0] != runs[2]


def test_resampled_leaves_the_global_generator_alone() -> None:
    logits, target = draw()
    criterion = LoMixLoss(3, 2, concat="resampled")
    before = torch.get_rng_state()
    criterion(logits, target).backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_other_modes_leave_the_global_generator_alone() -> None:
    logits, target = draw()
    criterion = LoMixLoss(3, 2)
    before = torch.get_rng_state()
    criterion(logits, target).backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("concat", ["learned", "resampled"])
@pytest.mark.parametrize("twin", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
def test_copies_behave_alike(twin: object, concat: str) -> None:
    logits, target = draw()
    criterion = LoMixLoss(3, 2, concat=concat, awf_sharing="scale")
    criterion(logits, target)
    other = twin(criterion)
    assert other.map_names == criterion.map_names and other.plan == criterion.plan
    for _ in range(2):
        assert torch.equal(criterion(logits, target), other(logits, target))
    with torch.no_grad():
        other.alpha.add_(1)
    assert (criterion.alpha == 0).all()


def test_checkpoint_through_torch_save() -> None:
    logits, target = draw()
    criterion = LoMixLoss(3, 2)
    buffer = io.BytesIO()
    torch.save(criterion.state_dict(), buffer)
    buffer.seek(0)
    other = LoMixLoss(3, 2)
    other.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    assert torch.equal(criterion(logits, target), other(logits, target))


# Precision ---------------------------------------------------------------------------------------------------------


@backends
def test_autocast_leaves_the_result_accurate(impl: str) -> None:
    """The same narrow logits inside and outside of autocast: products, softmax and sums stay float32."""
    criterion = LoMixLoss(3, 2, impl=impl)
    logits, target = draw(dtype=torch.bfloat16)
    exact = criterion.double()([z.detach().double() for z in logits], target)
    criterion.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion(logits, target)
    inside = torch.autograd.grad(loss, logits)
    outside = torch.autograd.grad(criterion(logits, target), logits)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    for a, b in zip(inside, outside, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, rtol=8e-3, atol=1e-6)


@backends
def test_backward_inside_autocast(impl: str) -> None:
    criterion = LoMixLoss(3, 2, impl=impl)
    logits, target = draw()
    expected = torch.autograd.grad(criterion(logits, target), logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(criterion(logits, target), logits)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@backends
@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtype_of_the_loss_and_of_the_gradients(dtype: torch.dtype, result: torch.dtype, impl: str) -> None:
    criterion = LoMixLoss(3, 2, impl=impl)
    logits, target = draw(dtype=dtype)
    loss = criterion(logits, target)
    loss.backward()
    assert loss.dtype == result and loss.shape == ()
    assert all(z.grad.dtype == dtype for z in logits)
    assert all(p.grad.dtype == torch.float32 for p in criterion.parameters())


@backends
def test_scaled_loss_of_half_logits(impl: str) -> None:
    """As GradScaler does: the loss times 2^10, gradients in float16, and still the same gradient."""
    criterion = LoMixLoss(3, 2, impl=impl)
    logits, target = draw(dtype=torch.float16)
    exact = [z.detach().double().requires_grad_() for z in logits]
    criterion(exact, target).backward()
    (criterion(logits, target) * 1024).backward()
    for z, e in zip(logits, exact, strict=True):
        torch.testing.assert_close(z.grad.double() / 1024, e.grad, rtol=2e-3, atol=1e-6)


# Training ----------------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("create_graph", [True, False])
def test_double_backward_is_refused(create_graph: bool, impl: str) -> None:
    logits, target = draw()
    loss = LoMixLoss(3, 2, impl=impl)(logits, target)
    grads = torch.autograd.grad(loss, logits, create_graph=create_graph)
    with pytest.raises(RuntimeError, match=r"second derivative|does not require grad"):
        sum(g.square().sum() for g in grads).backward()


@backends
def test_backward_twice_without_retain_is_refused_by_torch_and_works_with_it(impl: str) -> None:
    logits, target = draw()
    loss = LoMixLoss(3, 2, impl=impl)(logits, target)
    loss.backward(retain_graph=True)
    first = [z.grad.clone() for z in logits]
    loss.backward()
    for z, grad in zip(logits, first, strict=True):
        torch.testing.assert_close(z.grad, 2 * grad)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@backends
def test_logits_changed_between_forward_and_backward_are_noticed(impl: str) -> None:
    """Backward recomputes from the logits; reading changed ones would be silently wrong."""
    logits, target = draw()
    values = [z * 1.0 for z in logits]
    loss = LoMixLoss(3, 2, impl=impl)(values, target)
    values[0].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@backends
def test_training_lowers_the_loss(impl: str) -> None:
    """A 1x1 convolution per scale, plain SGD, logits and parameters of the loss together."""
    target = (torch.arange(12).view(1, 1, 12).expand(2, 8, 12) // 4).contiguous()
    images = torch.nn.functional.one_hot(target, 3).movedim(-1, 1).float() + 0.3 * torch.randn(2, 3, 8, 12)
    heads = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)])
    criterion = LoMixLoss(3, 2, impl=impl)
    optimizer = torch.optim.SGD([*heads.parameters(), *criterion.parameters()], lr=0.05)
    history = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = criterion([heads[0](nn.functional.avg_pool2d(images, 2)), heads[1](images)], target)
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.6 * history[0] and all(b < a for a, b in pairwise(history))
    assert (criterion.map_weights() < 0.6931).all()


def test_train_and_eval_mode_agree_and_double_moves_everything() -> None:
    logits, target = draw()
    criterion = LoMixLoss(3, 2)
    assert torch.equal(criterion.train()(logits, target), criterion.eval()(logits, target))
    criterion.double()
    assert all(p.dtype == torch.float64 for p in criterion.parameters())
    assert criterion([z.double() for z in logits], target).dtype == torch.float64


def test_nothing_but_the_inputs_is_saved_for_backward() -> None:
    """Memory independent of the number of maps: the Function keeps the tensors it was given and no other."""
    logits, target = draw(3)
    plan = MixPlan.create(3, ("add", "mul"))
    stats, _ = map_stats(logits, target, plan)
    saved = [t for t in stats.grad_fn.saved_tensors if t is not None]
    given = {t.data_ptr() for t in (*logits, target)}
    assert {t.data_ptr() for t in saved} == given and len(saved) == 4


def test_a_call_that_raises_draws_nothing() -> None:
    criterion = LoMixLoss(3, 2, concat="resampled")
    before = criterion.state_dict()["_extra_state"]
    logits = [torch.randn(1, 3, 4, 4), torch.randn(1, 3, 8, 8)]
    with pytest.raises(ValueError, match="label"):
        criterion(logits, torch.full((1, 8, 8), 7))
    assert torch.equal(criterion.state_dict()["_extra_state"], before)
    criterion(logits, torch.zeros(1, 8, 8, dtype=torch.long))
    assert not torch.equal(criterion.state_dict()["_extra_state"], before)


def test_a_weight_map_without_target_is_refused_before_the_network_runs() -> None:
    network = torch.nn.BatchNorm2d(3)
    with pytest.raises(ValueError, match="target: got None with a mask"):
        with_loss(network, LoMixLoss(3, 2))(torch.randn(2, 3, 4, 4), mask=torch.ones(2, 4, 4))
    assert network.num_batches_tracked.item() == 0
