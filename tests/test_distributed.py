"""The loss over several processes: torchrun starts 1, 2 and 4 of them with gloo, and each is compared with one."""

from __future__ import annotations

import copy
import json
import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_checks import CHECKS, RECIPES

from lomix_fast import LoMixLoss, with_loss

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
TRAININGS = ("ddp", "fsdp", "compiled ddp", "beside ddp")

Found = list[dict[str, dict[str, Any]]]  # by rank, then by check


@pytest.fixture(
    scope="module",
    params=[pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)],
    ids="{} ranks".format,
)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What every rank of one torchrun found."""
    folder = tmp_path_factory.mktemp("ranks")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={request.param}"]
    done = subprocess.run(
        [*run, str(HERE / "rank_checks.py"), str(folder)], env=ENVIRONMENT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]


def worst(found: Found, check: str) -> float:
    """The largest relative difference any rank saw in a check."""
    for one in found:
        assert "failed" not in one[check], one[check]["failed"]
    assert found[0][check]  # the first rank always has something to compare
    return max(value for one in found for value in one[check].values())


@pytest.mark.parametrize("name", RECIPES)
def test_ranks_together_equal_one_process(found: Found, name: str) -> None:
    limit = 1e-6 if name != "float64" else 1e-13
    assert worst(found, name) <= (limit if len(found) > 1 else 0.0)  # one rank: the same bits as no process group


@pytest.mark.parametrize("name", TRAININGS)
def test_training_equals_one_process(found: Found, name: str) -> None:
    """Three steps with momentum, the last batch uneven, ranks that would have started with different parameters."""
    assert worst(found, name) <= 1e-6


def test_a_group_of_some_ranks(found: Found) -> None:
    assert worst(found, "part of the ranks") <= 1e-6


def test_evaluation_does_not_wait_for_other_ranks(found: Found) -> None:
    assert worst(found, "evaluation") == 0.0


def test_the_loss_has_the_same_bits_on_all_ranks(found: Found) -> None:
    assert len({one["same bits"]["loss"] for one in found}) == 1


@pytest.mark.parametrize("check", ["without sync_parameters", "sync before loading"])
def test_gradients_of_different_parameters_are_not_averaged(found: Found, check: str) -> None:
    for one in found:
        expected = "call criterion.sync_parameters()" if len(found) > 1 else ""
        assert expected in one[check]["error"] and bool(one[check]["error"]) == bool(expected)


def test_pruned_maps_of_one_rank_become_those_of_all(found: Found) -> None:
    """Ranks with different maps would exchange tensors of different lengths."""
    assert worst(found, "loaded by one") <= 1e-6


def test_every_check_is_looked_at() -> None:
    others = {"part of the ranks", "evaluation", "same bits", "loaded by one"}
    assert set(CHECKS) == {*TRAININGS, *others, "without sync_parameters", "sync before loading"}


# A rank that dies -------------------------------------------------------------------------------------------------


def two_ranks(how: str, seconds: float) -> tuple[list[subprocess.Popen[str]], str]:
    """Start two ranks without torchrun, which would stop the other one itself; wait for the first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**ENVIRONMENT, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE / "dying_rank.py"), how, str(seconds)],
            env={**common, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        out, err = ranks[0].communicate(timeout=120)
    finally:
        for rank in ranks:
            rank.kill()
        ranks[1].communicate()
    assert "first step done" in out and "second step done" not in out
    return ranks, err


@pytest.mark.slow
def test_a_rank_that_exits_gives_the_others_an_error() -> None:
    """Long before a timeout of an hour."""
    ranks, err = two_ranks("exit", 3600)
    assert ranks[0].returncode > 0 and "Error" in err


@pytest.mark.slow
def test_a_rank_that_stalls_gives_the_others_an_error_within_the_timeout() -> None:
    ranks, err = two_ranks("stall", 8)
    assert ranks[0].returncode > 0 and "imed out" in err


@pytest.mark.slow
def test_torchrun_ends_when_a_rank_dies() -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    begin = time.monotonic()
    done = subprocess.run(
        [*run, str(HERE / "dying_rank.py"), "exit", "3600"], env=ENVIRONMENT, capture_output=True, timeout=120
    )
    assert done.returncode != 0 and time.monotonic() - begin < 120


# One process ------------------------------------------------------------------------------------------------------


def draw() -> tuple[list[torch.Tensor], torch.Tensor]:
    return [torch.randn(2, 3, 4, 4), torch.randn(2, 3, 8, 8)], torch.randint(3, (2, 8, 8))


def test_without_initialisation_the_call_says_what_to_do() -> None:
    criterion = LoMixLoss(3, 2, process_group="world")
    with pytest.raises(RuntimeError, match=r"process_group: got 'world', but .*init_process_group\(\)"):
        criterion(*draw())
    criterion.eval()(*draw())


@pytest.mark.parametrize("group", ["all", 0, True, ["world"]], ids=repr)
def test_what_is_no_group_is_refused(group: Any) -> None:
    with pytest.raises(TypeError, match=r"process_group: got .* expected None, 'world' or a torch"):
        LoMixLoss(3, 2, process_group=group)


def test_convolutions_that_every_rank_draws_for_itself_are_refused() -> None:
    with pytest.raises(ValueError, match=r"process_group: got 'world' with concat='resampled'.*concat='learned'"):
        LoMixLoss(3, 2, concat="resampled", process_group="world")
    LoMixLoss(3, 2, concat="resampled", operators=("add",), process_group="world")


def test_sync_in_a_single_process_changes_nothing() -> None:
    criterion = LoMixLoss(3, 2)
    before = copy.deepcopy(criterion.state_dict())
    criterion(*draw()).backward()
    gradients = [p.grad.clone() for p in criterion.parameters()]
    criterion.sync_gradients()
    criterion.sync_parameters()
    assert all(torch.equal(p.grad, g) for p, g in zip(criterion.parameters(), gradients, strict=True))
    assert all(torch.equal(v, before[k]) for k, v in criterion.state_dict().items())


def test_sync_before_initialisation_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It had nobody to agree with."""
    criterion = LoMixLoss(3, 2)
    criterion.sync_parameters()
    criterion(*draw()).backward()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
        with pytest.raises(RuntimeError, match="the ranks may hold different parameters"):
            criterion.sync_gradients()
    finally:
        dist.destroy_process_group()


def test_objects_travel_by_the_device_of_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL would take those of all ranks to GPU 0 otherwise. A stand-in for two ranks, "meta" for their device."""
    sent: list[torch.device | None] = []
    monkeypatch.setattr(LoMixLoss, "_group", lambda self: "two ranks")
    monkeypatch.setattr(dist, "broadcast", lambda tensor, **others: sent.append(tensor.device))

    def send(objects: list[Any], device: torch.device | None = None, **others: Any) -> None:
        sent.append(device)

    monkeypatch.setattr(dist, "broadcast_object_list", send)
    criterion = LoMixLoss(3, 2, prune_below=1e-3).to("meta")
    criterion.sync_parameters()
    assert sent == [torch.device("meta")] * (len(list(criterion.parameters())) + 1)
    sent.clear()
    LoMixLoss(3, 2, supervision="deep_supervision").sync_parameters()
    assert not sent  # it has nothing that could differ


def test_copies_keep_the_group() -> None:
    criterion = LoMixLoss(3, 2, process_group="world")
    assert copy.deepcopy(criterion).process_group == "world"
    assert pickle.loads(pickle.dumps(criterion)).process_group == "world"
    assert "process_group='world'" in repr(criterion) and "process_group" not in repr(LoMixLoss(3, 2))


def test_a_group_object_is_shared_by_copies_and_cannot_be_pickled(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        criterion = LoMixLoss(3, 2, process_group=dist.group.WORLD)
        assert copy.deepcopy(criterion).process_group is dist.group.WORLD
        with pytest.raises(TypeError, match=r"process_group: got a ProcessGroup, .* cannot be pickled"):
            pickle.dumps(criterion)
        logits, target = draw()
        alone = LoMixLoss(3, 2)
        criterion.load_state_dict(alone.state_dict())
        assert torch.equal(criterion(logits, target), alone(logits, target))
    finally:
        dist.destroy_process_group()


# Network and loss as one module -----------------------------------------------------------------------------------


def test_joined_module_computes_the_loss_or_predicts() -> None:
    network, criterion = torch.nn.Identity(), LoMixLoss(3, 2)
    module = with_loss(network, criterion)
    logits, target = draw()
    mask = torch.rand(2, 8, 8) < 0.5
    assert torch.equal(module(logits, target), criterion(logits, target))
    assert torch.equal(module(logits, target, mask), criterion(logits, target, mask=mask))
    assert module(logits) is logits
    assert module.network is network and module.criterion is criterion
    assert {name for name, _ in module.named_parameters()} == {
        f"criterion.{n}" for n, _ in criterion.named_parameters()
    }
    # Any other loss, which knows of no mask.
    assert with_loss(network, torch.nn.MSELoss())(torch.ones(2), torch.zeros(2)) == 1


def test_joined_module_refuses_what_it_would_have_to_ignore() -> None:
    module = with_loss(torch.nn.Identity(), LoMixLoss(3, 2))
    with pytest.raises(ValueError, match="target: got None with a mask or weight_map"):
        module(draw()[0], mask=torch.ones(2, 8, 8))
    with pytest.raises(TypeError, match=r"criterion: got function, expected a torch\.nn\.Module"):
        with_loss(torch.nn.Identity(), torch.nn.functional.cross_entropy)
