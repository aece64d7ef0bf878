"""Nothing waits for a GPU: no value is read by the host, no tensor made of host data, no branch depends on a value.

That is what the capture of a CUDA graph asks for. It is checked without a GPU, by looking at every op that is issued.
"""

from __future__ import annotations

import pytest
import torch
from in_training import USES, Use
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from watch import HostError, Watch

from lomix_fast import MapStatsFunction, MixPlan, lomix_loss

uses = pytest.mark.parametrize("name", USES)
FULL = (16, 24)
SIZES = ((2, 3), (4, 6), (16, 24))


# The trap works -------------------------------------------------------------------------------------------------------

CAUGHT = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x.sum()),
    "branch": lambda x: 1 if x.sum() > 0 else 2,
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: (x > 0).nonzero(),
    "where": lambda x: torch.where(x > 0),
    "unique": lambda x: x.unique(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "mask": lambda x: x[x > 0],
    "put by mask": lambda x: x.clone().__setitem__(x > 0, 0),
    "host data": lambda x: torch.tensor([1.0, 2.0]),
    "a number of the host": lambda x: torch.tensor(1.0, device=x.device),
}


@pytest.mark.parametrize("what", CAUGHT)
def test_the_watch_catches(what: str) -> None:
    with pytest.raises(HostError), Watch():
        CAUGHT[what](torch.randn(2))


def test_the_watch_catches_another_device() -> None:
    x = torch.randn(2, device="meta")
    with Watch():
        for move in (lambda: torch.zeros(()).to("meta"), lambda: x + torch.zeros(2), lambda: x.copy_(torch.ones(()))):
            with pytest.raises(HostError, match="cpu"):
                move()
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):
            x.cpu()


# The whole loss -------------------------------------------------------------------------------------------------------


def other_values(use: Use, call: dict[str, Tensor]) -> dict[str, Tensor]:
    """The most different call of the same form: one class everywhere, nothing that counts."""
    found = {name: torch.zeros_like(t) for name, t in call.items()}
    found["target"] = torch.full_like(call["target"], use.options.get("ignore_index", 0))
    return found if use.target != "shares" else found | {"target": call["target"].flip(1)}


@uses
def test_a_step_reads_no_value(name: str) -> None:
    """Forward and backward on real tensors; the ops of the loss itself are one each, and seen through below."""
    use = USES[name]
    criterion = use.criterion()
    found = []
    for values in (lambda t: t, lambda t: torch.full_like(t, torch.nan)):
        for change in (lambda call: call, lambda call: other_values(use, call)):
            logits, call = use.logits(2, SIZES), change(use.call(2, FULL))
            with torch.no_grad():
                logits = [values(z).requires_grad_() for z in logits]
            with Watch() as watch:
                criterion(logits, **call).backward()
            criterion.zero_grad()
            found.append(watch.ops)
    assert all(ops == found[0] for ops in found)
    assert sum(op.startswith("lomix_fast") for op in found[0]) == 2


@uses
def test_a_step_on_another_device(name: str) -> None:
    """The device "meta" in place of a GPU: whoever wants a value there, or goes back to the CPU, raises."""
    use = USES[name]
    criterion = use.criterion().to("meta")
    logits, call = use.logits(2, SIZES), use.call(2, FULL)
    logits = [z.detach().to("meta").requires_grad_() for z in logits]
    call = {key: t.to("meta") for key, t in call.items()}
    criterion(logits, **call)  # what moves there at the first call may do so
    with Watch():
        criterion(logits, **call).backward()
    assert all(z.grad.is_meta for z in logits if z.grad is not None)
    assert all(p.grad.is_meta for p in criterion.parameters())


def test_the_functional_loss_with_numbers_for_classes() -> None:
    """lomix_loss writes them to the device number by number, because a copy from the host would wait."""
    plan = MixPlan.create(3, ("add", "mul"))
    logits = [torch.randn(2, 3, *n, device="meta") for n in SIZES]
    labels, weights = torch.zeros(2, *FULL, dtype=torch.int64, device="meta"), torch.ones(plan.num_maps, device="meta")
    with Watch():
        lomix_loss(logits, labels, weights, plan, ce_weight=[1.0, 2.0, 0.5], weight=(1.0, 0.0, 3.0))


@uses
def test_a_step_can_be_traced(name: str) -> None:
    """make_fx of forward and backward as one function, with fake tensors of symbolic sizes; other numbers replayed."""
    use = USES[name]
    criterion = use.criterion()
    parameters = [p for p in criterion.parameters() if p.requires_grad]

    def step(logits: list[Tensor], call: dict[str, Tensor]) -> list[Tensor | None]:
        loss = criterion(logits, **call)
        return [loss, *torch.autograd.grad(loss, [*logits, *parameters], allow_unused=True)]

    draw = lambda: (use.logits(2, SIZES), use.call(2, FULL))  # noqa: E731
    graph = make_fx(step, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*draw())
    assert [str(n.target) for n in graph.graph.nodes if "lomix" in str(n.target)] == [
        "lomix_fast.map_stats_forward.default",
        "lomix_fast.map_stats_backward.default",
    ]
    given = draw()
    for found, expected in zip(graph(*given), step(*given), strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected)


# What torch.compile has to take --------------------------------------------------------------------------------------


def test_the_function_is_given_tensors_and_constants_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile of torch 2.8 cannot hand any other object to an autograd Function, not even a frozen dataclass."""
    given: list[object] = []
    apply = MapStatsFunction.apply
    monkeypatch.setattr(MapStatsFunction, "apply", lambda *arguments: given.extend(arguments) or apply(*arguments))
    USES["as published"].criterion("eager")(USES["as published"].logits(2, SIZES), **USES["as published"].call(2, FULL))
    constants = [a for a in given if a is not None and not isinstance(a, Tensor)]
    assert len(constants) == 4
    for one in constants:
        assert type(one) is str or (type(one) is tuple and all(type(n) is int for n in one))
