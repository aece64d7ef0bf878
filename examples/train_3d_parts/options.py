"""The options of train_3d.py and what is allowed in them. Imports nothing heavy."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NETWORKS = ("segresnet", "dynunet")
LOSSES = ("lomix", "mutation", "deep-supervision", "last-layer", "official-style")
AMP = ("none", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda")

MEMORY_STEPS = 2  # the last steps of a run measure memory instead of time
LEAST_STEPS = 2 + MEMORY_STEPS  # one to warm up, one to time, and these

_NEEDED = ("monai", "nilearn", "numpy", "tensorboard", "tqdm")


class OptionError(ValueError):
    """An option of the command line that cannot be used; the message names it."""


@dataclass(frozen=True)
class Settings:
    """What decides the numbers of a run. A run is resumed only under the settings that it began with.

    Attributes:
        network: one of `NETWORKS`. loss: one of `LOSSES`. amp: one of `AMP`.
        patch: voxels of a training patch along x, y, z.
        batch: patches a step in each process.
        scales: L, number of logit maps.
        filters: channels at full resolution, doubled at every level below.
        steps: optimizer steps of the whole run. lr: learning rate at its beginning.
        seed: of everything random. resolution: edge of a voxel, mm.
    """

    network: str = "segresnet"
    loss: str = "lomix"
    amp: str = "none"
    patch: tuple[int, int, int] = (64, 64, 64)
    batch: int = 2
    scales: int = 4
    filters: int = 16
    steps: int = 200
    lr: float = 1e-3
    seed: int = 0
    resolution: int = 1

    def __post_init__(self) -> None:
        """Check the ranges, naming the option of the command line.

        Raises:
            OptionError: an option out of range, or a patch that the levels of the network cannot halve.
        """
        for name, known in (("network", NETWORKS), ("loss", LOSSES), ("amp", AMP)):
            if getattr(self, name) not in known:
                raise OptionError(f"--{name}: got {getattr(self, name)!r}, expected one of {', '.join(known)}")
        for name, least in (("batch", 1), ("filters", 1), ("steps", LEAST_STEPS)):
            if getattr(self, name) < least:
                raise OptionError(f"--{name}: got {getattr(self, name)}, expected at least {least}")
        if not 2 <= self.scales <= 5:
            raise OptionError(
                f"--scales: got {self.scales}, expected 2 to 5; to train the finest map alone use --loss last-layer"
            )
        if not 0 < self.lr < float("inf"):
            raise OptionError(f"--lr: got {self.lr}, expected a finite number above 0")
        if not 0 <= self.seed < 2**62:
            raise OptionError(f"--seed: got {self.seed}, expected 0 to 2**62 - 1")
        if not 1 <= self.resolution <= 4:
            raise OptionError(f"--resolution: got {self.resolution}, expected 1 to 4 mm")
        self._check_patch()

    def _check_patch(self) -> None:
        if len(self.patch) != 3:
            raise OptionError(f"--patch: got {len(self.patch)} numbers, expected one or three")
        factor = 2**self.scales  # the network halves its input once for every scale
        if any(size < factor or size % factor for size in self.patch):
            raise OptionError(
                f"--patch: got {shape_text(self.patch)}, expected multiples of {factor}, "
                f"because the network halves it {self.scales} times (--scales {self.scales})"
            )
        if all(size == factor for size in self.patch):
            raise OptionError(
                f"--patch: got {shape_text(self.patch)}, of which --scales {self.scales} leaves one voxel at the "
                f"bottom of the network, too few to normalise; expected {2 * factor} along some axis"
            )

    def check_device(self, device: str) -> None:
        """Check that the network can be trained like this on a device.

        Args:
            device: "cpu" or "cuda".

        Raises:
            OptionError: bfloat16 on a CPU with next to nothing left at the bottom of the network. There PyTorch 2.13
                (oneDNN, on processors with AVX512_BF16) computes the weight gradient of a 3x3x3 convolution from memory
                that nobody wrote: two voxels along the first axis are enough to get NaN now and then.
        """
        bottom = [size // 2**self.scales for size in self.patch]
        if device == "cpu" and self.amp == "bf16" and min(bottom) < 4:
            raise OptionError(
                f"--amp: got bf16 on a CPU with {shape_text(bottom)} voxels left at the bottom of the network, "
                "expected at least 4 along every axis: for fewer, the gradients of PyTorch's convolution are wrong; "
                "use a larger --patch, fewer --scales or --amp none"
            )


@dataclass(frozen=True)
class Options:
    """How a run is carried out; none of it changes the numbers on one and the same device.

    Attributes:
        settings: what is trained.
        out: folder for what is written. resume: checkpoint to go on from, or None.
        save_every: steps from one checkpoint to the next; 0 writes one at the end alone.
        log_every: steps from one logged, timed step to the next.
        device: one of `DEVICES`. timeout: seconds until a process that does not answer is an error.
        find_batch: losses whose largest batch is looked for, instead of training; () to train.
        memory: budget of that search in GiB. max_batch: where the search ends.
    """

    settings: Settings
    out: Path
    resume: Path | None
    save_every: int
    log_every: int
    device: str
    timeout: float
    find_batch: tuple[str, ...]
    memory: float | None
    max_batch: int


def shape_text(shape: Sequence[int]) -> str:
    """For people: "64 x 64 x 32"."""
    return " x ".join(map(str, shape))


def check_packages() -> None:
    """Check that what the example needs beyond torch is installed, without importing it.

    Raises:
        ModuleNotFoundError: something is missing; the message says how to get it.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"train_3d.py needs {', '.join(missing)}, not installed here; run: pip install {' '.join(missing)}"
        )


def parse(arguments: Sequence[str] | None, description: str | None) -> Options:
    """Read the command line.

    Args:
        arguments: words after the name of the program; None takes those of this process.
        description: first lines of the help.

    Raises:
        SystemExit: words that argparse refuses, or --help.
        OptionError: a value out of range, or options that contradict each other; the message names them.
    """
    given = _parser(description).parse_args(arguments)
    own = Settings.__dataclass_fields__
    chosen = {name: value for name, value in vars(given).items() if name in own and value is not None}
    if given.find_batch is None:
        for name in ("memory", "max_batch"):
            if getattr(given, name) is not None:
                raise OptionError(f"--{name.replace('_', '-')}: belongs to --find-batch, which is not given")
    else:
        for name in ("batch", "loss", "steps", "lr", "resume", "save_every", "log_every", "resolution"):
            if getattr(given, name) is not None:
                raise OptionError(f"--{name.replace('_', '-')}: has no meaning for --find-batch, leave it out")
        if given.memory is None or not 0 < given.memory < float("inf"):
            raise OptionError(f"--memory: got {given.memory}, expected the budget of --find-batch in GiB")
    if (patch := chosen.get("patch")) is not None:
        chosen["patch"] = tuple(patch * 3 if len(patch) == 1 else patch)
    settings = Settings(**chosen)
    options = Options(
        settings=settings,
        out=given.out,
        resume=given.resume,
        save_every=given.save_every or 0,
        log_every=max(1, settings.steps // 20) if given.log_every is None else given.log_every,
        device=given.device,
        timeout=given.timeout,
        find_batch=() if given.find_batch is None else tuple(given.find_batch or LOSSES),
        memory=given.memory,
        max_batch=1024 if given.max_batch is None else given.max_batch,
    )
    _check(options)
    return options


def _check(options: Options) -> None:
    for name, least in (("save_every", 0), ("log_every", 1), ("max_batch", 1)):
        if getattr(options, name) < least:
            raise OptionError(f"--{name.replace('_', '-')}: got {getattr(options, name)}, expected at least {least}")
    if not 0 < options.timeout < float("inf"):
        raise OptionError(f"--timeout: got {options.timeout}, expected seconds above 0")
    if options.out.exists() and not options.out.is_dir():
        raise OptionError(f"--out: got {options.out}, which is a file, expected a folder")
    if options.resume is not None and not options.resume.is_file():
        raise OptionError(f"--resume: got {options.resume}, expected a checkpoint, a file that an earlier run wrote")


def _parser(description: str | None) -> argparse.ArgumentParser:
    """Left-out options that belong to `Settings` are None, so that its defaults hold and misplaced ones are seen."""
    plain = Settings()
    parser = argparse.ArgumentParser(
        prog="train_3d.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--network", choices=NETWORKS, help=f"MONAI's SegResNetDS or DynUNet ({plain.network})")
    add("--loss", choices=LOSSES, help=f"what is trained with ({plain.loss})")
    add("--patch", type=int, nargs="+", metavar="N", help="voxels of a patch, one number or x y z (64)")
    add("--batch", type=int, help=f"patches a step in each process ({plain.batch})")
    add("--scales", type=int, help=f"L, number of logit maps, 2 to 5 ({plain.scales})")
    add("--filters", type=int, help=f"channels of the network at full resolution ({plain.filters})")
    add("--steps", type=int, help=f"optimizer steps, at least {LEAST_STEPS} ({plain.steps})")
    add(
        "--lr",
        type=float,
        help=f"learning rate at the beginning, falling to 0; LoMix multiplies maps, go easy ({plain.lr:g})",
    )
    add("--seed", type=int, help=f"of everything random; process r draws patches with seed + r ({plain.seed})")
    add("--resolution", type=int, help=f"edge of a voxel of the template in mm, 1 to 4 ({plain.resolution})")
    add("--amp", choices=AMP, help=f"autocast, with a gradient scaler for fp16 ({plain.amp})")
    add("--device", choices=DEVICES, default="auto", help="auto: cuda where there is one (%(default)s)")
    add("--out", type=Path, default=Path("runs/train_3d"), help="folder for what is written (%(default)s)")
    add("--save-every", type=int, metavar="N", help="steps between checkpoints; 0: one at the end (0)")
    add("--resume", type=Path, metavar="FILE", help="go on from this checkpoint, under the same options")
    add("--log-every", type=int, metavar="N", help="steps between logged and timed ones (a twentieth of --steps)")
    add(
        "--timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="after this a process that others wait for is taken for dead (%(default)g)",
    )
    add(
        "--find-batch",
        nargs="*",
        choices=LOSSES,
        metavar="LOSS",
        help="train nothing; look for the largest batch whose step fits --memory, for each loss named, or for all",
    )
    add("--memory", type=float, metavar="GIB", help="the budget of --find-batch")
    add("--max-batch", type=int, metavar="N", help="where --find-batch stops looking (1024)")
    return parser
