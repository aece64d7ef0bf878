"""The first step of a GPU day with stand-ins: a build that works, one that fails, one that hangs, one that is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu_day import build, compile_triton
from benchmarks.gpu_day.day import FAILED, HUNG, OK, Clock, Day, Row

# Of a package as small as what `_PROBE` asks for. Its extension is a text that says for which GPUs it is.
_PACKAGE = """
from pathlib import Path
_here = Path(__file__).parent
_found = sorted(_here.glob("_C.*"))
_record = (_here / "_build_info.json").read_text() if (_here / "_build_info.json").is_file() else ""
def available_backends(device):
    reason = "usable" if _found and device in ("cpu", "cuda:0") else f"there is no module, or no {device}"
    return {"cpu": reason, "cuda": reason}
class extension:
    load_error = staticmethod(lambda: None if _found else _record)
    cuda_architectures = staticmethod(lambda: _found[0].read_text().split())
class triton_backend:
    load_error = staticmethod(lambda: None if (_here / "kernels" / "launch.py").is_file() else "no kernels")
"""
# Stands in for build_cpp.py.
_WORKS = """
import os, pathlib
print("asked for", os.environ["LOMIX_FAST_BUILD"], os.environ["TORCH_CUDA_ARCH_LIST"])
module = pathlib.Path("build", "objects", "_C.so").resolve()
module.parent.mkdir(parents=True, exist_ok=True)
module.write_text("9.0" if os.environ["LOMIX_FAST_BUILD"] == "cuda" else "")
module.with_name("_build_info.json").write_text('{"torch": "2"}')
print(module)
"""
_FAILS = """
print("[1/2] compile a.cu")
print("a.cu(7): error: identifier \\"x\\" is undefined")
print("b.cu(8): error: another")
raise SystemExit("building lomix_fast._C failed; the compiler's messages are above")
"""
# Like ninja, it gives what it starts a process group of its own; unlike ninja, it does not listen.
_HANGS = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], process_group=0)
print("[1/2] compile, of process", child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def tree(monkeypatch, tmp_path) -> Path:
    """A source tree with a package, kernels and C++, and no module; nothing of it is imported here."""
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setenv("PYTHONPATH", "/somewhere/else")
    monkeypatch.setenv("PYTHONSAFEPATH", "")  # so that both are put back after `run` has set them
    monkeypatch.setattr(sys, "path", list(sys.path))
    root = tmp_path / "tree"
    for name, text in {
        "lomix_fast/__init__.py": _PACKAGE,
        "lomix_fast/testing/cases.py": "",
        "kernels/__init__.py": "",
        "kernels/launch.py": "",
        "csrc/a.cpp": "",
        "build_cpp.py": _WORKS,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(build, "ROOT", root)
    monkeypatch.setattr(build, "STAGE", root / "build" / "gpu_day")
    monkeypatch.setattr(build, "_BUILD", (str(root / "build_cpp.py"),))
    monkeypatch.setattr(build, "_PATIENCE_SECONDS", 0.2)
    return root


def run(tree: Path, seconds: float = 60, rehearse: bool = False, device: str = "cuda:0") -> list[Row]:
    rows: list[Row] = []
    build.run(Day(device, rehearse, tree / "runs", 2), Clock(seconds), rows.append)
    assert [(row.step, row.subject, row.what) for row in rows] == [
        ("build", "cuda", "compile"),
        ("build", "triton", "import"),
    ]
    return rows


def imported(*arguments: str, cwd: Path, **variables: str) -> dict[str, str]:
    """What a process started as the later steps are finds: the package and its kernels."""
    code = (
        "import json, lomix_fast, lomix_fast.kernels.launch as k; "
        "print(json.dumps({'package': lomix_fast.__file__, 'kernels': k.__file__}))"
    )
    done = subprocess.run(
        [sys.executable, *arguments, "-c", code],
        cwd=cwd,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_what_is_built_is_what_later_processes_import(tree):
    compiled, triton = run(tree)
    assert (compiled.status, compiled.unit, compiled.note) == (OK, "s", "for 9.0") and compiled.value > 0
    assert triton.status == OK and not triton.note
    assert (tree / "runs" / "build.log").read_text().startswith("asked for cuda native\n")
    package = tree / "build" / "gpu_day" / "lomix_fast"
    assert (package / build.MODULE).read_text() == "9.0"
    assert (package / "_build_info.json").read_text() == '{"torch": "2"}'
    assert sys.path[0] == str(tree / "build" / "gpu_day")  # what multiprocessing hands on
    # In the folder of the sources, whose lomix_fast must not win.
    found = imported(cwd=tree)
    assert found == {"package": str(package / "__init__.py"), "kernels": str(package / "kernels" / "launch.py")}
    assert not (tree / "lomix_fast" / build.MODULE).exists() and not (tree / "lomix_fast" / "kernels").exists()


def test_a_second_run_builds_nothing_until_a_source_changes(tree):
    run(tree)
    (tree / "build" / "objects" / "_C.so").unlink()
    os.utime(tree / "csrc" / "a.cpp", (time.time() + 60, time.time() + 60))  # as when it was carried to another machine
    compiled, triton = run(tree)
    assert compiled.note == f"already built: build/gpu_day/lomix_fast/{build.MODULE} for 9.0"
    assert (compiled.status, compiled.value, triton.status) == (OK, None, OK)
    (tree / "csrc" / "a.cpp").write_text("// changed")
    assert run(tree)[0].note == "for 9.0"


def test_a_module_in_the_source_tree_is_taken(tree):
    (tree / "build_cpp.py").write_text(_FAILS)
    (tree / "lomix_fast" / build.MODULE).write_text("8.0 9.0+PTX")
    assert run(tree)[0].status == FAILED  # nobody knows what it is for
    (tree / "lomix_fast" / "_build_info.json").write_text("{}")
    compiled, _ = run(tree)
    assert compiled.note == f"already built: lomix_fast/{build.MODULE} for 8.0 9.0+PTX"
    assert imported(cwd=tree)["package"].startswith(str(build.STAGE))
    (tree / "lomix_fast" / build.MODULE).unlink()
    assert run(tree)[0].status == FAILED  # nor from what


def test_a_module_that_does_not_run_there_is_not_taken(tree):
    (tree / "lomix_fast" / build.MODULE).write_text("8.0")
    (tree / "lomix_fast" / "_build_info.json").write_text("{}")
    compiled, triton = run(tree, device="cuda:7")
    assert (compiled.status, compiled.note) == (FAILED, "there is no module, or no cuda:7") and triton.status == OK
    assert (build.STAGE / "lomix_fast" / build.MODULE).read_text() == "9.0"  # the new one


def test_a_failing_compiler_leaves_triton(tree):
    (tree / "build_cpp.py").write_text(_FAILS)
    compiled, triton = run(tree)
    assert compiled.status == FAILED
    assert compiled.note == 'a.cu(7): error: identifier "x" is undefined; see build.log'
    assert triton.status == OK and imported(cwd=tree)["kernels"].startswith(str(build.STAGE))
    record = json.loads((build.STAGE / "lomix_fast" / "_build_info.json").read_text())
    assert record == {"skipped": 'a.cu(7): error: identifier "x" is undefined'}


def test_what_is_missing_is_told(tree):
    (tree / "build_cpp.py").write_text("raise SystemExit('LOMIX_FAST_BUILD=cuda: no nvcc was found')")
    assert run(tree)[0].note == "LOMIX_FAST_BUILD=cuda: no nvcc was found; see build.log"
    (tree / "build_cpp.py").write_text("")
    assert run(tree)[0].status == FAILED


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the stand-in starts a process group with Popen's own argument")
def test_a_hanging_compiler_is_ended_with_all_it_has_started(tree):
    (tree / "build_cpp.py").write_text(_HANGS)
    begun = time.monotonic()
    compiled, triton = run(tree, seconds=3)
    assert compiled.status == HUNG and compiled.note.startswith("stopped after 3 s, the last line was: [1/2] compile")
    assert triton.status == OK and time.monotonic() - begun < 60
    compiler = int((tree / "runs" / "build.log").read_text().split()[-1])
    deadline = time.monotonic() + 10
    while is_alive(compiler) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(compiler)


def test_a_rehearsal_builds_for_the_cpu(tree):
    compiled, _ = run(tree, rehearse=True, device="a stand-in")
    assert (compiled.status, compiled.note) == (OK, "for CPU tensors alone")
    assert "asked for cpu" in (tree / "runs" / "build.log").read_text()


def test_without_kernels_or_package_it_says_so(tree):
    (tree / "kernels" / "launch.py").unlink()
    compiled, triton = run(tree)
    assert (compiled.status, triton.status, triton.note) == (OK, FAILED, "no kernels")
    (tree / "lomix_fast" / "__init__.py").write_text("raise RuntimeError('broken')")
    compiled, triton = run(tree)
    assert compiled.status == triton.status == FAILED and "build-probe.log" in triton.note
    assert "broken" in (tree / "runs" / "build-probe.log").read_text()


def test_environment(tree):
    day = Day("cuda:0", True, tree / "runs", 2)
    found = build.environment(day)
    ours = f"{build.STAGE}{os.pathsep}{tree}"
    assert found == {
        "LOMIX_FAST_REHEARSE": "1",
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": f"{ours}{os.pathsep}/somewhere/else",
    }
    os.environ.update(found)
    assert build.environment(day) == found  # no longer for being asked again


# ---- compiling the Triton kernels, see compile_triton.py ----


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_case_is_compiled_for_a_gpu_that_is_not_there(tmp_path):
    """In processes of their own, as triton may run in its interpreter here."""
    pytest.importorskip("triton")
    pytest.importorskip("lomix_fast.kernels")
    command = [sys.executable, "-m", "benchmarks.gpu_day.compile_triton", "one_pixel", "empty_batch"]
    done = subprocess.run(
        [*command, "--workers", "1", "--folder", str(tmp_path)],
        cwd=compile_triton.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Both passes and the search for bad labels; scales as large as the labels need no gathering.
    assert done.stdout.splitlines()[-1].startswith("2 cases, 0 failed: 3 kernels for sm_90, 3 launches, ")
    assert list((tmp_path / "cache").glob("*/gradients_kernel.cubin"))


@pytest.mark.parametrize(
    "failure, launches, line",
    [
        ("", 3, None),
        ("CompilationError: at 7:3", 1, "FAILED base: CompilationError: at 7:3"),
        ("", 0, "FAILED base: it has launched nothing"),
    ],
)
def test_failures_are_counted(failure, launches, line, monkeypatch, tmp_path, capsys):
    of_base = compile_triton.Outcome("base", failure, frozenset({"a", "b"}), launches, 1.0)
    of_none = compile_triton.Outcome("empty_batch", "", frozenset({"b", "c"}), 0, 1.0)
    monkeypatch.setattr(compile_triton, "outcomes", lambda names, folder, workers: iter([of_base, of_none]))
    status = compile_triton.main(["base", "empty_batch", "--workers", "3", "--folder", str(tmp_path)])
    said = capsys.readouterr().out.splitlines()
    assert status == int(line is not None) and said[:-1] == ([] if line is None else [line])
    counted = f"2 cases, {status} failed: 3 kernels for sm_90, {launches} launches, 0 s in 3 processes"
    assert said[-1] == counted
