"""Maps left out because their weight is small: what is computed, when it is decided, how it is reported."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable, Sequence

import pytest
import torch
from common import BACKENDS
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from lomix_fast import LoMixLoss, lomix_loss, map_stats
from lomix_fast.convert import lomix_to_module
from lomix_fast.recipe import map_losses

backends = pytest.mark.parametrize("impl", BACKENDS)
SIZES = ((2, 3), (3, 5), (6, 7))
NAMES = LoMixLoss(3, 3).map_names
SMALL = -20.0  # softplus of it is 2e-9


def draw(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    logits = [torch.randn(2, 3, *n, dtype=dtype, requires_grad=True) for n in SIZES]
    return logits, torch.randint(3, (2, 6, 7))


def make(dropped: Sequence[str], **options: object) -> LoMixLoss:
    """A criterion whose first training call drops these maps."""
    criterion = LoMixLoss(3, 3, **{"prune_below": 0.01, **options})
    torch.nn.init.uniform_(criterion.alpha, -1.0, 1.0)
    lower(criterion, dropped)
    return criterion


def lower(criterion: LoMixLoss, names: Sequence[str], alpha: float = SMALL) -> None:
    with torch.no_grad():
        for name in names:
            criterion.alpha[criterion.map_names.index(name)] = alpha


def all_but(keep: Callable[[str], bool]) -> tuple[str, ...]:
    return tuple(name for name in NAMES if not keep(name))


DROPPED = {
    "one": ("mul_0_1_2",),
    "all but an original": all_but(lambda name: name == "orig_1"),
    "all but a cat": all_but(lambda name: name == "cat_0_2"),
    "all but an awf": all_but(lambda name: name == "awf_1_2"),
    "all of scale 0": tuple(name for name in NAMES if "0" in name),
    "all cat": tuple(name for name in NAMES if name.startswith("cat")),
    "all awf": tuple(name for name in NAMES if name.startswith("awf")),
    "all but add": all_but(lambda name: name.startswith("add")),
}


def check_against_the_whole(criterion: LoMixLoss, dropped: Sequence[str], logits: list[Tensor], target: Tensor) -> None:
    """Loss and all gradients are those of the unpruned loss under weights that are zero for the dropped maps."""
    leaves = [*logits, *criterion.parameters()]
    loss = criterion(logits, target)
    assert criterion.dropped_maps == tuple(dropped)
    found = torch.autograd.grad(loss, leaves)  # raises if one of them took no part
    mask = torch.tensor([name not in dropped for name in criterion.map_names])
    weights = torch.nn.functional.softplus(criterion.alpha) * mask
    whole = (weights * criterion.map_losses(logits, target)).sum()
    torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)
    for got, want in zip(found, torch.autograd.grad(whole, leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)
        assert ((got == 0) == (want == 0)).all()
    alpha_grad = found[len(logits)]
    assert alpha_grad.shape == criterion.alpha.shape
    assert (alpha_grad[~mask] == 0).all() and (alpha_grad[mask] > 0).all()


@backends
@pytest.mark.parametrize("name", DROPPED)
def test_pruned_is_the_whole_with_zero_weights(name: str, impl: str) -> None:
    logits, target = draw(torch.float64)
    check_against_the_whole(make(DROPPED[name], impl=impl).double(), DROPPED[name], logits, target)


@backends
@given(dropped=st.sets(st.sampled_from(NAMES), max_size=len(NAMES) - 1), sharing=st.sampled_from(("size", "subset")))
def test_any_selection_is_the_whole_with_zero_weights(impl: str, dropped: set[str], sharing: str) -> None:
    logits, target = draw(torch.float64)
    ordered = [name for name in NAMES if name in dropped]
    criterion = make(ordered, impl=impl, awf_sharing=sharing).double()
    check_against_the_whole(criterion, ordered, logits, target)


@backends
def test_pruned_in_the_other_order(impl: str) -> None:
    """The scale without a map is the coarsest, which is last in this list."""
    dropped = DROPPED["all of scale 0"]
    logits, target = draw(torch.float64)
    criterion = make(dropped, impl=impl, order="fine_to_coarse").double()
    check_against_the_whole(criterion, dropped, logits[::-1], target)
    grads = torch.autograd.grad(criterion(logits[::-1], target), logits)
    assert [bool((g == 0).all()) for g in grads] == [True, False, False]


@backends
def test_dropped_maps_are_not_computed(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("lomix_fast.loss.map_stats", lambda z, y, plan, **rest: seen.append((plan, rest)) or 1 / 0)
    criterion = make(DROPPED["all cat"], impl=impl)
    with pytest.raises(ZeroDivisionError):
        criterion(*draw())
    ((plan, given_parameters),) = seen
    assert plan.map_names == criterion.active_maps and len(plan.maps) == 15
    assert given_parameters["cat_weight"] is None and given_parameters["awf_weight"] is not None


@backends
def test_the_functional_form_takes_a_selected_plan(impl: str) -> None:
    criterion = LoMixLoss(3, 3, impl=impl, awf_sharing="subset").double()
    logits, target = draw(torch.float64)
    kept = (1, 4, 12, 18)
    parameters = {n: p for n, p in criterion.named_parameters() if n != "alpha"}
    weights = torch.rand(4, dtype=torch.float64)
    loss = lomix_loss(logits, target, weights, criterion.plan.select(kept), impl=impl, **parameters)
    whole = criterion.map_losses(logits, target)[list(kept)]
    torch.testing.assert_close(loss, (weights * whole).sum(), rtol=1e-12, atol=0)


def test_map_losses_of_the_recipe_follow_a_selected_plan() -> None:
    """The same numbers whether a map stands alone or among the others."""
    logits, target = draw(torch.float64)
    criterion = LoMixLoss(3, 3, operators=("add", "mul")).double()
    whole = criterion.map_losses(logits, target)
    for m in range(criterion.plan.num_maps):
        alone = map_losses(*map_stats(logits, target, criterion.plan.select([m])))
        torch.testing.assert_close(alone, whole[m : m + 1], rtol=1e-12, atol=0)


# Off, and options -----------------------------------------------------------------------------------------------------


def test_off_by_default() -> None:
    criterion = LoMixLoss(3, 3)
    lower(criterion, NAMES[:5], -4.0)
    logits, target = draw()
    weights = criterion.map_weights()
    torch.testing.assert_close(criterion(logits, target), (weights * criterion.map_losses(logits, target)).sum())
    assert criterion.update_pruning() == criterion.dropped_maps == ()
    assert criterion.active_maps == NAMES and "prune" not in repr(criterion)
    assert LoMixLoss(3, 3, prune_below=0).prune_below == LoMixLoss(3, 3, prune_below=0.0, weighting="fixed").prune_below


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"prune_below": -0.1}, ValueError, ("prune_below: got -0.1", "at least 0")),
        ({"prune_below": float("nan")}, ValueError, ("prune_below: got nan", "finite")),
        ({"prune_below": float("inf")}, ValueError, ("prune_below: got inf", "finite")),
        ({"prune_below": None}, TypeError, ("prune_below: got None", "0 leaves pruning off")),
        ({"prune_below": True}, TypeError, ("prune_below: got True", "number")),
        ({"prune_below": 0.1, "prune_every": 0}, ValueError, ("prune_every: got 0", "at least 1", "update_pruning()")),
        ({"prune_below": 0.1, "prune_every": 2.0}, TypeError, ("prune_every: got 2.0", "int", "None")),
        ({"prune_below": 0.1, "prune_every": True}, TypeError, ("prune_every: got True", "int", "None")),
        (
            {"prune_below": 0.1, "weighting": "fixed"},
            ValueError,
            ("prune_below: got 0.1 with weighting='fixed'", "expected 0", "weighting='softplus'"),
        ),
        (
            {"prune_below": 0.1, "supervision": "mutation"},
            ValueError,
            ("prune_below: got 0.1 with supervision='mutation'", "expected 0", "supervision='lomix'"),
        ),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, object], error: type[Exception], words: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        LoMixLoss(3, 2, **options)
    message = str(caught.value)
    assert message.startswith(words[0]) and all(word in message for word in (*words, "expected")), message


def test_a_pruned_criterion_is_no_module_of_the_authors() -> None:
    criterion = LoMixLoss(3, 2, concat="resampled", prune_below=0.01)
    with pytest.raises(ValueError, match=r"criterion: got prune_below=0.01, expected 0"):
        lomix_to_module(criterion)


# When -----------------------------------------------------------------------------------------------------------------


def count_host_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows by one for each tensor read on the host, which is where a GPU would be waited for."""
    reads: list[str] = []
    for name in ("tolist", "item", "__bool__", "__float__", "__int__"):
        original = getattr(Tensor, name)

        def reading(self: Tensor, original: Callable = original, name: str = name) -> object:
            reads.append(name)
            return original(self)

        monkeypatch.setattr(Tensor, name, reading)
    return reads


@pytest.mark.parametrize("every", [1, 3])
def test_decided_at_the_first_call_and_then_every_so_many(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    criterion = make(["orig_0"], prune_every=every, impl=BACKENDS[-1])
    logits, target = draw()
    reads = count_host_reads(monkeypatch)
    for call in range(7):
        before, dropped = len(reads), criterion.dropped_maps
        criterion(logits, target).backward()
        decided = call % every == 0
        assert reads[before:] == (["tolist"] if decided else []), call
        expected = ("orig_0", *(f"add_{i}" for i in ("0_1", "0_2", "1_2", "0_1_2")[:call]))[:5]
        assert criterion.dropped_maps == (expected if decided else dropped), call
        lower(criterion, [f"add_{i}" for i in ("0_1", "0_2", "1_2", "0_1_2")[: call + 1]])


def test_off_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    criterion = LoMixLoss(3, 3, impl=BACKENDS[-1], prune_every=1)
    logits, target = draw()
    reads = count_host_reads(monkeypatch)
    criterion(logits, target).backward()
    assert reads == []


def test_only_when_asked_to() -> None:
    criterion = make(["orig_0"], prune_every=None)
    logits, target = draw()
    for _ in range(3):
        criterion(logits, target)
        assert criterion.dropped_maps == ()
    assert criterion.update_pruning() == criterion.dropped_maps == ("orig_0",)
    lower(criterion, ["orig_0"], 0.0)
    criterion(logits, target)
    assert criterion.dropped_maps == ("orig_0",)
    assert criterion.update_pruning() == ()


def test_evaluation_uses_the_last_choice_and_does_not_count() -> None:
    criterion = make(["orig_0"], prune_every=2)
    logits, target = draw()

    def others() -> list[Tensor]:
        with torch.no_grad():
            values = [criterion(logits, target)]
        values.append(criterion.eval()(logits, target))
        criterion.train()(logits[0], target)  # a single tensor has nothing to prune
        return values

    whole = others()
    assert criterion.dropped_maps == ()
    first = criterion(logits, target)
    assert criterion.dropped_maps == ("orig_0",)
    lower(criterion, ["orig_1"])
    for _ in range(2):
        assert all(value < before for value, before in zip(others(), whole, strict=True))
        assert criterion.dropped_maps == ("orig_0",)
    assert criterion(logits, target) < first and criterion.dropped_maps == ("orig_0",)
    criterion(logits, target)
    assert criterion.dropped_maps == ("orig_0", "orig_1")


def test_a_weight_at_the_threshold_stays() -> None:
    criterion = LoMixLoss(3, 2, prune_below=0.25)
    values = torch.tensor([0.25, 0.2499, 0.2501, 1.0, 0.0, 3.0])
    criterion._choose_maps(values)
    assert criterion.dropped_maps == ("orig_1", "cat_0_1")


def test_a_change_between_forward_and_backward() -> None:
    """The backward pass belongs to the maps that its forward pass was made of."""
    dropped = ("add_0_1", "cat_0_1")
    criterion = make(dropped)
    logits, target = draw()
    expected = torch.autograd.grad(criterion(logits, target), logits)
    loss = criterion(logits, target)
    lower(criterion, dropped, 0.0)
    assert criterion.update_pruning() == ()
    for got, want in zip(torch.autograd.grad(loss, logits), expected, strict=True):
        assert torch.equal(got, want)


# Reported -------------------------------------------------------------------------------------------------------------


def test_a_change_is_logged_and_nothing_else_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lomix_fast")
    criterion = LoMixLoss(3, 2, prune_below=0.01)
    criterion.update_pruning()
    assert caplog.messages == []
    lower(criterion, ["add_0_1", "orig_1"], -5.0)
    criterion.update_pruning()
    criterion.update_pruning()
    lower(criterion, ["add_0_1"], 0.0)
    lower(criterion, ["mul_0_1"], -6.0)
    criterion.update_pruning()
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    assert caplog.messages == [
        "pruning: 4 of 6 maps active at prune_below=0.01; dropped: orig_1 (0.00672), add_0_1 (0.00672); restored: none",
        "pruning: 4 of 6 maps active at prune_below=0.01; dropped: mul_0_1 (0.00248); restored: add_0_1 (0.693)",
    ]
    assert criterion.dropped_maps == ("orig_1", "mul_0_1")
    assert criterion.active_maps == ("orig_0", "add_0_1", "cat_0_1", "awf_0_1")
    text = repr(criterion)
    assert "prune_below=0.01, prune_every=100, dropped_maps=('orig_1', 'mul_0_1')" in text


def test_all_weights_under_the_threshold_drop_nothing_and_warn_once(caplog: pytest.LogCaptureFixture) -> None:
    criterion = LoMixLoss(3, 2, prune_below=0.01, prune_every=1)
    logits, target = [z.detach() for z in draw()[0][1:]], draw()[1]
    lower(criterion, criterion.map_names[1:])
    criterion(logits, target)
    assert criterion.active_maps == ("orig_0",)
    lower(criterion, ["orig_0"], -6.0)
    for _ in range(3):
        loss = criterion(logits, target)
        assert criterion.dropped_maps == ()
    torch.testing.assert_close(loss, (criterion.map_weights() * criterion.map_losses(logits, target)).sum())
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    for part in ("all 6 weights", "prune_below=0.01", "largest is 0.00248", "no map is dropped", "lower prune_below"):
        assert part in record.getMessage()


def test_map_losses_and_weights_stay_whole() -> None:
    criterion = make(DROPPED["all cat"])
    logits, target = draw()
    before = criterion.map_losses(logits, target)
    criterion(logits, target)
    assert criterion.dropped_maps == DROPPED["all cat"]
    assert torch.equal(criterion.map_losses(logits, target), before)
    assert criterion.map_weights().shape == (19,) and criterion.map_names == NAMES


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
    """update_pruning() at the checkpoint puts the run that goes on and the resumed one in step."""
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
    first.update_pruning()
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
    assert other.dropped_maps == () != criterion.dropped_maps


# Compiled -------------------------------------------------------------------------------------------------------------


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
