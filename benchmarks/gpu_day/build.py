"""The first step of a GPU day: the package with its extension, for all processes that are started afterwards.

Nothing is installed and setuptools is not needed. build_cpp.py compiles under build/, for the card that is there, and a
folder build/gpu_day/lomix_fast is put together: links to the sources and to kernels/, which only an installation has as
`lomix_fast.kernels`, and a copy of the module. build/gpu_day comes first on the import path of every process that is
started with `environment`. After `run` that holds for all: it changes the environment and the path of its own process,
and `multiprocessing` hands on both. What this process has imported of lomix_fast before stays as it is.

When compiling fails or takes too long, the same folder is there without the module, and the backend triton with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .child import ROOT, run_child
from .day import FAILED, HUNG, OK, Clock, Day, Emit, Row

STAGE = ROOT / "build" / "gpu_day"
MODULE = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
RECORD = "_build_info.json"
SOURCES = "sources.sha256"  # beside a module that was compiled here, what it was compiled from
_OTHERS = ("__pycache__", "kernels", RECORD, SOURCES)  # of lomix_fast/, not linked
_BUILD = (str(ROOT / "build_cpp.py"),)  # what this Python is given to run
_PROBE_SECONDS = 60.0
_PATIENCE_SECONDS = 5.0

# What a process of the later steps finds. Of `device` the backends are asked, and that is where an error would show.
_PROBE = """
import json, sys
from pathlib import Path
import lomix_fast
from lomix_fast import available_backends, extension, triton_backend
found = available_backends(sys.argv[2])[sys.argv[1]]
print(json.dumps({
    "package": str(Path(lomix_fast.__file__).parent),
    "refusal": None if found == "usable" else found,
    "architectures": extension.cuda_architectures() if extension.load_error() is None else (),
    "triton": triton_backend.load_error(),
}))
"""


def environment(day: Day) -> dict[str, str]:
    """Environment variables, on top of the present ones, of processes that import the package with its extension.

    PYTHONSAFEPATH keeps `python -m` from putting the current folder, where lomix_fast lacks its kernels, first.
    """
    ours = [str(STAGE), str(ROOT)]
    others = [one for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one and one not in ours]
    return {**day.variables, "PYTHONPATH": os.pathsep.join([*ours, *others]), "PYTHONSAFEPATH": "1"}


def run(day: Day, clock: Clock, emit: Emit) -> None:
    """Build, or find built, what the later steps import; they import it from then on."""
    begun = time.monotonic()
    day.out.mkdir(parents=True, exist_ok=True)
    found = already_built(day, clock)
    if found is not None:
        emit(Row("build", "cuda", "", "compile", note=f"already built: {found['module']} {_whom_for(found)}"))
    else:
        status, note, found = _compile(day, clock)
        emit(Row("build", "cuda", "", "compile", status, time.monotonic() - begun, "s", note=note))
    os.environ.update(environment(day))
    sys.path[:] = [str(STAGE), *(one for one in sys.path if one != str(STAGE))]
    reason = found["triton"] if found else "a new process cannot import lomix_fast; see build-probe.log"
    emit(Row("build", "triton", "", "import", OK if reason is None else FAILED, note=reason or ""))


def already_built(day: Day, clock: Clock) -> dict[str, Any] | None:
    """Put the package together from a module that makes a build needless, if there is one that runs on the device.

    A module in the source tree, where `pip install -e .` leaves it, is taken as it is. What an earlier run or `make
    versions` has compiled is taken while the sources are the same, and can be carried to a machine in build/gpu_day.

    Returns:
        What a new process finds of the package, and the module; or None.
    """
    for module in (ROOT / "lomix_fast" / MODULE, STAGE / "lomix_fast" / MODULE):
        if not module.is_file() or not module.with_name(RECORD).is_file() or (_is_staged(module) and _is_stale(module)):
            continue
        stage(module)
        found = _probe(day, clock)
        if found and found["refusal"] is None:
            return {**found, "module": module.relative_to(ROOT)}
    return None


def _whom_for(found: dict[str, Any]) -> str:
    return f"for {' '.join(found['architectures']) or 'CPU tensors alone'}"


def _is_staged(module: Path) -> bool:
    return STAGE in module.parents


def _is_stale(module: Path) -> bool:
    digest = module.with_name(SOURCES)
    return not digest.is_file() or digest.read_text() != _digest()


def _digest() -> str:
    """Of all that the extension is made from. Times would not do: files that are carried to a machine have any."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("build_*.py"), *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _compile(day: Day, clock: Clock) -> tuple[str, str, dict[str, Any] | None]:
    """Compile and put the package together, without a module when that fails; status, a sentence, and what is found."""
    asked = {"LOMIX_FAST_BUILD": "cpu" if day.rehearse else "cuda"}
    asked["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or "native"
    log = day.out / "build.log"
    module, reason = compile_extension(asked, log, clock.left)
    if module is not None:
        stage(module)
        found = _probe(day, clock)
        if found and found["refusal"] is None:
            return OK, _whom_for(found), found
        if found:  # the module stays: what says no may be the device alone
            return FAILED, str(found["refusal"]), found
        reason = "the package with the new extension cannot be imported; see build-probe.log"
    stage(None, reason)
    status = HUNG if reason.startswith("stopped after") else FAILED
    return status, f"{reason}; see {log.name}", _probe(day, clock)


def compile_extension(variables: Mapping[str, str], log: Path, seconds: float) -> tuple[Path | None, str]:
    """Run build_cpp.py with all its messages in a file.

    Args:
        variables: environment variables that say what to build, see build_cpp.py.
        log: where messages go; what it held is lost.
        seconds: after which the build and everything it has started are killed.

    Returns:
        The module and "", or None and the reason in one line.
    """
    digest = _digest()
    # ninja, asked to end, ends its compilers and removes what they have half written.
    command, merged = [sys.executable, *_BUILD], {**os.environ, **variables}
    ended = run_child(command, merged, log, seconds, folder=ROOT, patience=_PATIENCE_SECONDS)
    lines = [line for line in ended.text.splitlines() if line.strip()]
    if ended.status is None:
        return None, f"stopped after {seconds:.0f} s, the last line was: {lines[-1] if lines else ''}"
    if ended.status == 0 and lines and Path(lines[-1]).is_file():
        Path(lines[-1]).with_name(SOURCES).write_text(digest)
        return Path(lines[-1]), ""
    errors = [line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)]
    return None, [*errors[:1], *lines[-1:], f"exit status {ended.status}"][0].strip()


def stage(module: Path | None, reason: str = "") -> None:
    """Put the package together anew.

    Args:
        module: the extension, beside which lies its record; None for a package without one.
        reason: why there is none, for messages.
    """
    new = STAGE.with_name(f"{STAGE.name}.{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    package = new / "lomix_fast"
    package.mkdir(parents=True)
    # No copies: results name the commit of the checkout they come from.
    linked = [path for path in (ROOT / "lomix_fast").iterdir() if path.name not in _OTHERS and path.suffix != ".so"]
    for path in (*linked, ROOT / "kernels"):
        (package / path.name).symlink_to(os.path.relpath(path, package))
    if module is None:
        (package / RECORD).write_text(json.dumps({"skipped": reason}))
    else:
        shutil.copy2(module, package / MODULE)  # no link: the next build must not change what processes have loaded
        for name in (RECORD, SOURCES):
            if module.with_name(name).is_file():
                shutil.copy2(module.with_name(name), package / name)
    shutil.rmtree(STAGE, ignore_errors=True)
    new.rename(STAGE)


def _probe(day: Day, clock: Clock) -> dict[str, Any] | None:
    """What a new process finds of the package; None when it fails, with its messages in build-probe.log."""
    backend, device = ("cpu", "cpu") if day.rehearse else ("cuda", day.device)
    # In its own folder: before Python 3.11 there is no PYTHONSAFEPATH, and the current folder comes first.
    command = [sys.executable, "-c", _PROBE, backend, device]
    variables = {**os.environ, **environment(day)}
    seconds = max(clock.at_most(_PROBE_SECONDS), _PROBE_SECONDS / 2)  # without its answer the day has nothing to go on
    try:
        done = subprocess.run(
            command, cwd=STAGE, env=variables, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode != 0:
        (day.out / "build-probe.log").write_text(done.stdout + done.stderr)
        return None
    found = json.loads(done.stdout.splitlines()[-1])
    return found if found["package"] == str(STAGE / "lomix_fast") else None
