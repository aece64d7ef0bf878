"""What the checks in environments of their own share: making the environment, running commands, telling times."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from build_scripts import ROOT, build_cuda


@dataclass
class Check:
    """One check, such as `make check-cuda`.

    Attributes:
        name: what begins its lines.
        environment: folder of its virtual environment.
        requirements: what is installed into it.
        maker: the Python that it is made with.
        seconds: what each step took.
    """

    name: str
    environment: Path
    requirements: Path
    maker: str
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def python(self) -> str:
        """The Python of the environment."""
        return str(self.environment / "bin" / "python")

    @property
    def pip(self) -> list[str]:
        """How pip is called there."""
        return [self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Announce a step and remember how long it took."""
        print(f"{self.name}: {name}", flush=True)
        begin = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - begin

    def run(self, command: list[str], cwd: Path = ROOT, **variables: str) -> None:
        """Run a command whose output is shown.

        Raises:
            SystemExit: it fails.
        """
        done = subprocess.run(command, cwd=cwd, env={**os.environ, **variables}, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{self.name}: failed with status {done.returncode}: {' '.join(command)}")

    def make_environment(self) -> None:
        """Make the environment, unless it was made from the same requirements by the same Python."""
        with self.step(f"environment {self.environment.name}"):
            stamp = self.environment / "requirements"
            wanted = f"{self.requirements.read_text()}# {self.maker}\n"
            if stamp.is_file() and stamp.read_text() == wanted:
                return
            self.run([self.maker, "-m", "venv", "--clear", str(self.environment)])
            self.run([*self.pip, "-r", str(self.requirements)])
            stamp.write_text(wanted)

    def summary(self) -> None:
        """Print what each step took."""
        for name, taken in self.seconds.items():
            print(f"{self.name}: {taken:6.1f} s  {name}")

    def has_nvcc(self) -> bool:
        """Whether there is an nvcc; what to do when there is none is printed."""
        if build_cuda.installed():
            return True
        print(
            f"{self.name}: no nvcc was found in CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda; the CUDA kernels are "
            "not built. Install the CUDA toolkit, or set CUDA_HOME to where it is",
            file=sys.stderr,
        )
        return False
