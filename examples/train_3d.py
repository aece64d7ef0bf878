"""Train a 3D network of MONAI's with LoMix: many processes, mixed precision, checkpoints, and what the loss costs.

    python examples/train_3d.py --patch 64 --batch 2
    torchrun --nproc-per-node 2 examples/train_3d.py --network dynunet --amp bf16 --save-every 100
    python examples/train_3d.py --find-batch --memory 8

Patches are cut from the MNI152 template that nilearn carries. The parts are in train_3d_parts/: step.py is what to copy
first, data.py what to replace.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from train_3d_parts.options import OptionError, Options, check_packages, parse

if TYPE_CHECKING:
    from train_3d_parts.processes import Place


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example.

    Args:
        arguments: words of the command line; None takes those of this process.

    Returns:
        0; 1 when a package is missing or the training diverged; 2 for an option that cannot be used. The reason is
        written to stderr. Anything else is raised. Under torchrun a process that ends in either way ends them all.
    """
    try:
        options = parse(arguments, __doc__)
        check_packages()
        from train_3d_parts.processes import find_place, joined

        place = find_place(options.device)
        options.settings.check_device(place.device.type)
        if options.find_batch:
            find_batch(options, place)
        else:
            with joined(place, options.timeout):
                train(options, place)
    except OptionError as error:
        if os.environ.get("RANK", "0") == "0":  # the other processes say the same
            print(f"error: {error}", file=sys.stderr)
        return 2
    except (ArithmeticError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def train(options: Options, place: Place) -> None:
    """Train, measure, test; print a summary and write report.json, checkpoints and TensorBoard's files.

    Args:
        options: see `Options`.
        place: of this process, which has joined the others.

    Raises:
        OptionError: an option that does not fit the data or the checkpoint.
        FloatingPointError: the loss stopped being finite. report.json does not exist then.
    """
    # Not at the top: options are checked before anything heavy is imported.
    from train_3d_parts import checkpoints, report
    from train_3d_parts.data import Patches, load_head
    from train_3d_parts.evaluation import held_out_dice
    from train_3d_parts.losses import map_weights
    from train_3d_parts.progress import Progress
    from train_3d_parts.shares import Costs, memory_share, time_share
    from train_3d_parts.step import build_trainer

    settings, out = options.settings, options.out
    saved = None if options.resume is None else checkpoints.load(options.resume, settings, place)
    head = load_head(settings.resolution)
    patches = Patches(head.train, settings.patch, settings.batch, settings.seed + place.rank)
    costs = Costs(place.device, options.log_every, settings.steps)
    trainer = build_trainer(settings, place)
    done = 0 if saved is None else checkpoints.restore(saved, trainer.parts(), patches.generator, place)
    if place.is_first:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.json").unlink(missing_ok=True)  # a report beside a failed run would be that of another one
        report.say_beginning(options, place, head, trainer.criterion.plan.num_maps, done)

    losses: dict[int, float] = {}
    begin = time.perf_counter()
    trainer.module.train()
    with Progress(out, done, settings.steps) if place.is_first else contextlib.nullcontext() as progress:
        for step in range(done + 1, settings.steps + 1):
            images, labels = (tensor.to(place.device) for tensor in patches.draw())
            rate = trainer.schedule.get_last_lr()[0]
            with costs.of(step, trainer.criterion) as cost:
                loss = trainer.step(images, labels)

            is_logged = step % options.log_every == 0
            is_printed = progress is not None and progress.step(step)
            if is_logged or is_printed or step in (done + 1, settings.steps):  # to read the loss is to wait for it
                losses[step] = loss.item()
                trainer.check(step, losses[step])
            if progress is not None and is_logged:
                progress.log(step, losses[step], rate, cost.get("share"), map_weights(trainer.criterion))
            if is_printed:
                progress.say(step, losses[step])
            if step == settings.steps or (options.save_every and step % options.save_every == 0):
                path = out / f"step_{step:06d}.pt"
                checkpoints.save(path, step, settings, trainer.parts(), patches.generator, place)
    seconds = time.perf_counter() - begin
    if not place.is_first:
        return
    content = report.make(
        options,
        place,
        training={"first_step": done + 1, "last_step": settings.steps, "seconds": seconds, "losses": losses},
        time=time_share(costs.times),
        memory=memory_share(costs.peaks),
        no_memory=costs.no_memory,
        dice=held_out_dice(trainer, head.held_out, settings),
        map_weights=map_weights(trainer.criterion),
    )
    report.write(out / "report.json", content)
    report.say_end(content, out)


def find_batch(options: Options, place: Place) -> None:
    """Look for the largest batch of each loss; print a table and write batch.json.

    Raises:
        OptionError: a budget that is not there, or more than one process.
        RuntimeError: a trial failed for another reason than memory.
    """
    from train_3d_parts import batch_search, report

    assert options.memory is not None
    if place.is_distributed:
        raise OptionError(f"--find-batch: got {place.world} processes, expected one; start it without torchrun")
    budget = int(options.memory * 2**30)
    batch_search.check_budget(budget, place.device)
    found: dict[str, Any] = batch_search.search(
        options.settings, options.find_batch, place.device, budget, options.max_batch, options.timeout
    )
    path = options.out / "batch.json"
    report.write(path, found)
    print(f"  {found['meaning']}\n  wrote {path}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
