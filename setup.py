"""Packaging of lomix_fast; the metadata is in pyproject.toml, the compiler's work in build_cpp.py.

LOMIX_FAST_BUILD = auto | cpu | cuda | none decides whether lomix_fast._C is built (see build_cpp.requested_build).
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

if int(setuptools.__version__.split(".")[0]) < 77:  # as in pyproject.toml, which nobody checks without isolation
    raise SystemExit(
        f"lomix_fast needs setuptools >= 77 to build, found {setuptools.__version__}; "
        "run: pip install --upgrade setuptools"
    )
from setuptools.command.bdist_wheel import bdist_wheel

sys.path.insert(0, str(Path(__file__).resolve().parent))  # a PEP 517 build does not put this directory there
import build_cpp


class BuildExt(build_ext):
    """Builds lomix_fast._C through build_cpp, or leaves it out, and records which and why."""

    skipped = ""  # why the extension was left out

    def run(self) -> None:
        """Decide, build or leave out, and write _build_info.json where the package will find it."""
        try:
            toolchain, self.skipped = build_cpp.decide()
            if toolchain is None:
                self._remove_left_overs()
                self.extensions: list[Extension] = []
            else:
                built = build_cpp.build(toolchain)
                target = Path(self.build_lib, self.get_ext_filename("lomix_fast._C"))
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(built, target)
                if self.inplace:
                    self.copy_extensions_to_source()
        except build_cpp.BuildError as error:
            raise SetupError(str(error)) from error
        self._write_build_info(toolchain)

    def get_outputs(self) -> list[str]:
        """Add the record to what setuptools knows of."""
        return [*super().get_outputs(), self._build_info(self.build_lib)]

    def _package_dirs(self) -> list[str]:
        return [self.build_lib, "."] if self.inplace else [self.build_lib]

    @staticmethod
    def _build_info(parent: str) -> str:
        return str(Path(parent, "lomix_fast", "_build_info.json"))

    def _remove_left_overs(self) -> None:
        """An extension of an earlier build must not live on in a build that has none."""
        for parent in self._package_dirs():
            Path(parent, self.get_ext_filename("lomix_fast._C")).unlink(missing_ok=True)

    def _write_build_info(self, toolchain: build_cpp.Toolchain | None) -> None:
        info = {"skipped": self.skipped} if toolchain is None else toolchain.describe()
        for parent in self._package_dirs():
            path = Path(self._build_info(parent))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(info, indent=2) + "\n")


class BdistWheel(bdist_wheel):
    """A wheel without the extension fits every Python and platform, and its name says so."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag of the wheel once build_ext has run."""
        if self.get_finalized_command("build_ext").skipped:
            return "py3", "none", "any"
        return super().get_tag()


try:
    build_cpp.requested_build()  # refuse a misspelt value before anything else happens
except build_cpp.BuildError as error:
    raise SystemExit(str(error)) from error

setup(
    packages=[
        *find_packages(include=["lomix_fast", "lomix_fast.*"]),
        "lomix_fast.kernels",
        *(f"lomix_fast.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"lomix_fast": "lomix_fast", "lomix_fast.kernels": "kernels"},
    ext_modules=[Extension("lomix_fast._C", sources=[])],
    cmdclass={"build_ext": BuildExt, "bdist_wheel": BdistWheel},
)
