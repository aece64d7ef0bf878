"""Pruning inside a training loop: gradients, dtypes, checkpoints, copies, torch.compile."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from common import NATIVE
from pruned import DROPPED, NAMES, draw, lower, make
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from lomix_fast import LoMixLoss

backends = pytest.mark.parametrize("impl", NATIVE)


# Safe -----------------------------------------------------------------------------------------------------------------


def test_a_weight_that_is_nan_is_not_hidden() -> None:
    criterion = make(["orig_0", "orig_1"])
    lower(criterion, ["add_0_1"], torch.nan)
    logits, target = draw()
    assert criterion(logits, target).isnan()
    assert criterion.dropped_maps == ("orig_0", "orig_1")


@backends
@pytest.mark.parametrize("name", ["all but an original", "all but a cat", "all but an awf"])
def test_nothing_goes_without_a_gradient(name: str, impl: str) -> None:
    """DistributedDataParallel stops at a parameter of network or loss that takes no part; a zero is taking part."""
    criterion = make(DROPPED[name], impl=impl)
    logits, target = draw()
    criterion(logits, target).backward()
    assert all(z.grad is not None for z in logits)
    for parameter, p in criterion.named_parameters():
        assert p.grad is not None and p.grad.shape == p.shape, parameter
        read = parameter == "alpha" or parameter[:3] in name
        assert bool((p.grad == 0).all()) is not read, parameter


def test_what_is_left_out_cannot_spoil_the_loss() -> None:
    criterion = make((*DROPPED["all cat"], *(n for n in NAMES if "0" in n and not n.startswith("cat"))))
    logits, target = draw()
    with torch.no_grad():
        criterion.cat_weight.fill_(torch.nan)
        logits[0].fill_(torch.inf)
    loss = criterion(logits, target)
    loss.backward()
    assert loss.isfinite()
    assert (logits[0].grad == 0).all() and (criterion.cat_weight.grad == 0).all()
    assert all(p.grad.isfinite().all() for p in (*logits, *criterion.parameters()))


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("own", [torch.float32, torch.float64])
def test_dtypes_are_those_of_the_unpruned_loss(dtype: torch.dtype, own: torch.dtype, impl: str) -> None:
    criterion = make(DROPPED["all but an original"], impl=impl).to(own)
    logits, target = draw(dtype)
    loss = criterion(logits, target)
    loss.backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and loss.shape == ()
    assert all(z.grad.dtype == dtype for z in logits) and all(p.grad.dtype == own for p in criterion.parameters())


def test_resampled_convolutions() -> None:
    logits, target = draw()
    criterion = make(["cat_0_1", "orig_2"], concat="resampled", prune_every=1)
    criterion(logits, target).backward()
    assert criterion.dropped_maps == ("orig_2", "cat_0_1")
    lower(criterion, DROPPED["all cat"])
    first, second = (criterion(logits, target) for _ in range(2))
    assert torch.equal(first, second)  # nothing random is left


def test_training_drops_maps_and_goes_on() -> None:
    """SGD pushes the weights down, and from unequal starts they cross the threshold one after another."""
    logits, target = draw()
    criterion = make([], prune_below=0.3, prune_every=2)
    optimizer = torch.optim.SGD([*logits, *criterion.parameters()], lr=0.2)
    counts = []
    for _ in range(18):
        optimizer.zero_grad()
        criterion(logits, target).backward()
        optimizer.step()
        counts.append(len(criterion.active_maps))
        low = [float(w) for n, w in zip(NAMES, criterion.map_weights(), strict=True) if n in criterion.dropped_maps]
        assert all(w < 0.3 for w in low)
    assert len(set(counts)) > 4 and counts == sorted(counts, reverse=True), counts


# Saved and copied -----------------------------------------------------------------------------------------------------


def test_checkpoints_are_those_of_the_unpruned_loss() -> None:
    pruned, plain = make(DROPPED["all cat"]), LoMixLoss(3, 3)
    logits, target = draw()
    pruned(logits, target)
    assert set(pruned.state_dict()) == set(plain.state_dict())
    plain.load_state_dict(pruned.state_dict(), strict=True)
    pruned.load_state_dict(LoMixLoss(3, 3).state_dict(), strict=True)
    assert pruned.dropped_maps == ()


def test_dropping_maps_adds_no_buffer() -> None:
    """DistributedDataParallel broadcasts buffers by position and AveragedModel pairs them: none may come or go."""
    criterion = make(["orig_0"])
    before = [name for name, _ in criterion.named_buffers()]
    criterion.update_pruning()
    assert criterion.dropped_maps and [name for name, _ in criterion.named_buffers()] == before


def test_loading_chooses_again_at_the_next_training_call() -> None:
    source, criterion = make(["mul_0_1"]), make(["orig_0"])
    whole = torch.nn.ModuleDict({"loss": criterion})
    logits, target = draw()
    criterion(logits, target)
    assert criterion.dropped_maps == ("orig_0",)
    whole.load_state_dict({f"loss.{name}": value for name, value in source.state_dict().items()})
    assert criterion.dropped_maps == ()
    assert torch.equal(criterion(logits, target), source(logits, target))
    assert criterion.dropped_maps == ("mul_0_1",)


def test_resuming_bit_for_bit() -> None:
    """In the middle of the calls that a choice is good for, and without a look at the choice when saving."""
    logits, target = [z.detach() for z in draw()[0]], draw()[1]

    def train(criterion: LoMixLoss, steps: int) -> list[tuple[float, tuple[str, ...]]]:
        history = []
        optimizer = torch.optim.SGD(criterion.parameters(), lr=0.5)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = criterion(logits, target)
            loss.backward()
            optimizer.step()
            history.append((loss.item(), criterion.dropped_maps))
        return history

    first = LoMixLoss(3, 3, prune_below=0.3, prune_every=3)
    train(first, 4)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    resumed = LoMixLoss(3, 3, prune_below=0.3, prune_every=3)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    on = train(first, 8)
    assert on == train(resumed, 8) and len({dropped for _, dropped in on}) > 1


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
def test_copies_keep_the_choice_and_the_count(twin: Callable[[LoMixLoss], LoMixLoss]) -> None:
    criterion = make(["orig_0", *DROPPED["all awf"]], prune_every=2)
    logits, target = draw()
    criterion(logits, target)
    other = twin(criterion)
    assert other.dropped_maps == criterion.dropped_maps != ()
    lower(other, ["orig_1"])
    assert not torch.equal(other(logits, target), torch.tensor(0.0)) and "orig_1" not in other.dropped_maps
    other(logits, target)
    assert "orig_1" in other.dropped_maps and "orig_1" not in criterion.dropped_maps
    other.load_state_dict(criterion.state_dict())
    assert other.dropped_maps == criterion.dropped_maps
    other.load_state_dict({name: value for name, value in criterion.state_dict().items() if name != "_extra_state"})
    assert other.dropped_maps == ()  # format 1 does not say


# Compiled -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_in_one_graph_with_choices_from_outside() -> None:
    torch._dynamo.reset()
    criterion = make([], prune_every=None)
    logits, target = draw()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(criterion, fullgraph=True, backend=counter)
    compiled(logits, target)
    for frames, dropped in ((2, ("orig_0",)), (3, DROPPED["all awf"]), (4, DROPPED["all but a cat"]), (4, ("orig_0",))):
        lower(criterion, NAMES, 0.5)
        lower(criterion, dropped)
        assert criterion.update_pruning() == dropped
        for _ in range(3):
            loss, plain = compiled(logits, target), criterion(logits, target)
            torch.testing.assert_close(loss, plain)
            leaves = [*logits, *criterion.parameters()]
            expected = torch.autograd.grad(plain, leaves)
            for got, want in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
                torch.testing.assert_close(got, want)
        assert counter.frame_count == frames


def test_compiled_once_for_sizes_that_vary() -> None:
    torch._dynamo.reset()
    criterion = make(["orig_0"], prune_every=None)
    criterion.update_pruning()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(criterion, fullgraph=True, backend=counter, dynamic=True)
    for batch, sizes in ((2, ((4, 5), (6, 7), (10, 8))), (3, ((2, 4), (6, 5), (7, 9)))):
        logits = [torch.randn(batch, 3, *n) for n in sizes]
        target = torch.randint(3, (batch, *sizes[-1]))
        torch.testing.assert_close(compiled(logits, target), criterion(logits, target))
        assert counter.frame_count == 1


def test_compiled_with_a_count_of_calls() -> None:
    """A graph break, but no graph for each step of the counter; asked for one graph, the refusal says what to do."""
    torch._dynamo.reset()
    criterion = make(["orig_0"], prune_every=3)
    logits, target = draw()
    with pytest.raises(RuntimeError, match=r"prune_every.*pass prune_every=None.*update_pruning\(\)"):
        torch.compile(criterion, fullgraph=True, backend="aot_eager")(logits, target)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(criterion, backend=counter)
    frames = []
    for call in range(7):
        loss = compiled(logits, target)
        torch.testing.assert_close(loss, copy.deepcopy(criterion).eval()(logits, target))
        frames.append(counter.frame_count)
        assert criterion.dropped_maps == ("orig_0", "orig_1")[: 1 if call < 3 else 2]
        lower(criterion, ["orig_1"])
    assert len(set(frames)) == 2


def test_replicas_that_would_count_calls_are_refused_and_others_use_the_choice() -> None:
    """DataParallel makes new ones for every call, so whatever they count or choose is lost."""
    criterion = make(["cat_0_1"], prune_every=1)
    with pytest.raises(RuntimeError, match=r"prune_every: got 1 in torch\.nn\.DataParallel.*prune_every=None and call"):
        criterion._replicate_for_data_parallel()
    criterion.eval()._replicate_for_data_parallel()
    criterion = make(["cat_0_1"], prune_every=None)
    criterion.update_pruning()
    assert criterion._replicate_for_data_parallel().dropped_maps == criterion.dropped_maps == ("cat_0_1",)


def test_a_call_that_raises_counts_and_chooses_nothing() -> None:
    criterion = make(["cat_0_1"], prune_every=3)
    logits, target = draw()
    for calls_left in ("000000000000", "000000000002"):
        before = criterion.state_dict()["_extra_state"]
        assert calls_left in bytes(before.tolist()).decode()
        with pytest.raises(ValueError, match="label"):
            criterion(logits, torch.full_like(target, 7))
        assert torch.equal(criterion.state_dict()["_extra_state"], before)
        assert criterion.dropped_maps == (() if calls_left == "000000000000" else ("cat_0_1",))
        criterion(logits, target)
        assert not torch.equal(criterion.state_dict()["_extra_state"], before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_computed_again_in_backward_neither_counts_nor_chooses(reentrant: bool) -> None:
    criterion = make(["cat_0_1"], prune_every=5)
    other = copy.deepcopy(criterion)
    logits, target = draw()
    if reentrant:  # computes first without gradients, which is no call in training
        other.eval()
    for call in range(3):
        loss = checkpoint(lambda *z: criterion(list(z), target), *logits, use_reentrant=reentrant)
        expected = other(logits, target)
        assert torch.equal(loss, expected)
        wanted = torch.autograd.grad(expected, logits)
        for z in logits:
            z.grad = None
        loss.backward()
        for z, right in zip(logits, wanted, strict=True):
            assert torch.equal(z.grad, right)
        assert criterion._choice.calls_left == other._choice.calls_left == (0 if reentrant else 4 - call)
