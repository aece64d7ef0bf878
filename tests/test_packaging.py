"""What gets built and installed: the choice LOMIX_FAST_BUILD makes, flags, source archive, wheel, editable install."""

from __future__ import annotations

import email
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from build_scripts import ROOT, TOOLCHAIN, VARIABLES, build_cpp

import lomix_fast
from lomix_fast import _build_info

NOT_SOURCE = (".*", "build", "dist", "runs", "docs", "*.egg-info", "*.so", "_build_info.json", "__pycache__")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """None of the variables that steer a build is set, whatever the caller of pytest set."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def python(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run this Python in `cwd`, with that directory off its import path (-P appeared in 3.11)."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1", **variables}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def checked(*arguments: str, cwd: Path, **variables: str) -> str:
    done = python(*arguments, cwd=cwd, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def hook(name: str, tree: Path, out: Path) -> Path:
    """Call one PEP 517 hook in `tree` without the extension, as pip does, and return the archive it makes."""
    out.mkdir(parents=True, exist_ok=True)
    code = f"from setuptools.build_meta import *; print(); print({name}({str(out)!r}))"
    return out / checked("-c", code, cwd=tree, LOMIX_FAST_BUILD="none").splitlines()[-1]


def unpack(wheel: Path) -> Path:
    target = wheel.with_suffix("")
    zipfile.ZipFile(wheel).extractall(target)
    return target


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The source archive, unpacked."""
    base = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, base / "tree", ignore=shutil.ignore_patterns(*NOT_SOURCE))
    shutil.copy(ROOT / ".clang-format", base / "tree")
    archive = hook("build_sdist", base / "tree", base / "out")
    with tarfile.open(archive) as tar:
        tar.extractall(base, filter="data")
    return base / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist) -> Path:
    """A wheel without the extension, made from the source archive."""
    tree = shutil.copytree(sdist, sdist.parent / "wheel_tree")
    return hook("build_wheel", tree, sdist.parent / "wheel")


@pytest.fixture(scope="module")
def installed(wheel) -> Path:
    """That wheel, unpacked: a directory for sys.path."""
    return unpack(wheel)


# ---- LOMIX_FAST_BUILD ----


@pytest.mark.parametrize("value", ["gpu", "CPU", "1", ""])
def test_unknown_build_is_refused(value, monkeypatch):
    monkeypatch.setenv("LOMIX_FAST_BUILD", value)
    with pytest.raises(build_cpp.BuildError, match=f"LOMIX_FAST_BUILD: got '{value}', expected one of auto, cpu"):
        build_cpp.decide()


def test_setup_refuses_before_any_work(tmp_path):
    done = python(str(ROOT / "setup.py"), "--name", cwd=tmp_path, LOMIX_FAST_BUILD="gpu")
    assert done.returncode != 0
    assert done.stderr.strip() == "LOMIX_FAST_BUILD: got 'gpu', expected one of auto, cpu, cuda, none"
    assert done.stdout == ""


def test_none_never_looks_for_a_compiler(monkeypatch):
    monkeypatch.setenv("LOMIX_FAST_BUILD", "none")
    monkeypatch.setattr(build_cpp, "find_toolchain", lambda: pytest.fail("looked"))
    assert build_cpp.decide() == (None, "LOMIX_FAST_BUILD=none was set when it was installed")


def no_compiler(monkeypatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++ -m64")


def no_torch(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # what `import torch` then raises is an ImportError


@pytest.mark.parametrize(
    "remove, words",
    [
        (no_compiler, ["/nowhere/g++ -m64", "C++20", "environment variable CXX"]),
        (no_torch, ["cannot import torch", "--no-build-isolation"]),
    ],
)
def test_auto_goes_on_and_others_fail_when_something_is_missing(remove, words, monkeypatch, capfd):
    remove(monkeypatch)
    toolchain, reason = build_cpp.decide()
    warning = capfd.readouterr().err
    assert toolchain is None
    assert all(word in reason for word in words), reason
    assert "WITHOUT its C++ extension" in warning and reason in warning
    for asked in ("cpu", "cuda"):
        monkeypatch.setenv("LOMIX_FAST_BUILD", asked)
        with pytest.raises(build_cpp.BuildError) as caught:
            build_cpp.decide()
        assert all(word in str(caught.value) for word in [*words, f"LOMIX_FAST_BUILD={asked}", "LOMIX_FAST_BUILD=none"])


def test_old_torch_is_named(monkeypatch):
    monkeypatch.setattr("torch.__version__", "2.7.1+cpu")
    with pytest.raises(build_cpp.CannotBuild, match=r"torch 2.7.1\+cpu is too old, expected 2.8 or newer"):
        build_cpp.find_toolchain()


@pytest.mark.parametrize("jobs", ["many", "0", "-1"])
def test_max_jobs_is_checked(jobs, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", jobs)
    with pytest.raises(build_cpp.BuildError, match=f"MAX_JOBS: got '{jobs}'"):
        build_cpp.build(TOOLCHAIN)


# ---- flags and link order ----


def test_baseline_code_is_linked_before_code_for_newer_cpus():
    capabilities = [capability for _, capability in build_cpp.units(TOOLCHAIN)]
    order = [None, "DEFAULT", "AVX2", "AVX512"]
    assert capabilities == sorted(capabilities, key=order.index)
    assert set(capabilities) == set(order)
    sources = {source for source, _ in build_cpp.units(TOOLCHAIN)}
    both = (*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp"))
    assert sources == {path.relative_to(ROOT).as_posix() for path in both}


@pytest.mark.parametrize("capability", [None, "DEFAULT"])
def test_baseline_code_uses_no_newer_instructions(capability):
    assert not [flag for flag in build_cpp.compile_flags(TOOLCHAIN, capability) if flag.startswith("-m")]


def test_flags_say_what_each_unit_is_for():
    glue, avx2 = (build_cpp.compile_flags(TOOLCHAIN, capability) for capability in (None, "AVX2"))
    assert {"-DLOMIX_HAVE_AVX2", "-DLOMIX_HAVE_AVX512"} < set(glue)
    assert {"-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2", "-mavx2", "-mfma", "-mf16c"} < set(avx2)
    for flags in (glue, avx2):
        assert {"-std=c++20", "-O3", "-Wall", "-Wextra"} < set(flags)
        assert not {"-ffast-math", "-Ofast", "-march=native", "-Werror"} & set(flags)


def test_flags_follow_the_environment(monkeypatch):
    usual = build_cpp.build_directory(TOOLCHAIN)
    monkeypatch.setenv("LOMIX_FAST_WERROR", "1")
    monkeypatch.setenv("DEBUG", "1")
    for _, capability in build_cpp.units(TOOLCHAIN):
        flags = build_cpp.compile_flags(TOOLCHAIN, capability)
        assert {"-Werror", "-O0", "-g"} < set(flags) and "-O3" not in flags
    assert build_cpp.build_directory(TOOLCHAIN) != usual


# ---- what is in the archives ----


def test_version_is_in_one_place(wheel):
    holders = [
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.toml", "*.py", "*.txt", "Makefile", "lomix_fast/**/*.py", "kernels/**/*.py", "csrc/**/*.*")
        for path in ROOT.glob(pattern)
        if lomix_fast.__version__ in path.read_text()
    ]
    assert holders == ["lomix_fast/__init__.py"]
    assert wheel.name == f"lomix_fast-{lomix_fast.__version__}-py3-none-any.whl"


def test_sdist_holds_all_sources_and_nothing_built(sdist):
    names = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    wanted = {"LICENSE", "Makefile", "pyproject.toml", "setup.py"}
    for pattern in (
        "build_*.py",
        "requirements-*.txt",
        "csrc/**/*.*",
        "kernels/**/*.py",
        "lomix_fast/**/*.py",
        "tests/**/*.py",
        "tests/**/*.h",
        "tests/**/*.cpp",
        "tests/**/*.cu",
    ):
        found = {path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern)}
        assert found
        wanted |= found
    assert wanted <= names, wanted - names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc", "_build_info.json"))]


def test_wheel_holds_the_package_alone(installed):
    (info,) = installed.glob("*.dist-info")
    assert {path.name for path in installed.iterdir()} == {"lomix_fast", info.name}
    assert (installed / "lomix_fast" / "kernels" / "__init__.py").is_file()
    assert (installed / "lomix_fast" / "py.typed").is_file()
    for path in (ROOT / "lomix_fast").rglob("*.py"):
        assert (installed / path.relative_to(ROOT)).is_file(), f"{path} is missing from the wheel"
    metadata = email.message_from_string((info / "METADATA").read_text())
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert required == ["torch>=2.8"]
    assert metadata["Requires-Python"] == ">=3.10"


# ---- what an installation does ----

_LOOK = """
import importlib.util, json, sys, lomix_fast, lomix_fast.kernels
print(json.dumps({
    "package": lomix_fast.__file__,
    "kernels": lomix_fast.kernels.__file__,
    "bare": importlib.util.find_spec("kernels") is not None,
    "backends": lomix_fast.available_backends(),
}))
"""


def test_package_without_extension_works_and_says_why(installed, tmp_path):
    seen = json.loads(checked("-c", f"import sys; sys.path.insert(0, {str(installed)!r})\n{_LOOK}", cwd=tmp_path))
    assert Path(seen["package"]).is_relative_to(installed) and Path(seen["kernels"]).is_relative_to(installed)
    assert not seen["bare"]
    assert seen["backends"]["reference"] == seen["backends"]["eager"] == "usable"
    assert "was not built: LOMIX_FAST_BUILD=none was set" in seen["backends"]["cpu"]


@pytest.mark.slow
def test_editable_install_maps_kernels(sdist, tmp_path):
    tree = shutil.copytree(sdist, tmp_path / "tree")
    stale = tree / "lomix_fast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    stale.write_bytes(b"left over from a build with extension")
    site = unpack(hook("build_editable", tree, tmp_path / "out"))
    assert not stale.exists()
    # -S and a bare sys.path, so that an editable install in the environment of the tests is not seen instead.
    paths = [entry for entry in sys.path if entry.endswith("-packages")]
    start = f"import site, sys; site.addsitedir({str(site)!r}); sys.path += {paths!r}"
    seen = json.loads(checked("-S", "-c", f"{start}\n{_LOOK}", cwd=tmp_path))
    assert seen["package"] == str(tree / "lomix_fast" / "__init__.py")
    assert seen["kernels"] == str(tree / "kernels" / "__init__.py")
    assert not seen["bare"]
    assert "LOMIX_FAST_BUILD=none" in seen["backends"]["cpu"]


def test_this_installation_has_kernels_under_the_package_only(tmp_path):
    try:
        importlib.metadata.distribution("lomix_fast")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("lomix_fast is not installed here; make test installs it")
    seen = json.loads(checked("-c", _LOOK, cwd=tmp_path))
    assert Path(seen["kernels"]).name == "__init__.py" and not seen["bare"]


# ---- what a failed import says ----


def test_build_record_names_the_cause(monkeypatch, tmp_path):
    record = tmp_path / "_build_info.json"
    monkeypatch.setattr(_build_info, "_RECORD", record)
    assert _build_info.obstacle() is None
    record.write_text(json.dumps({"skipped": "no compiler"}))
    assert "was not built: no compiler; to build it, run LOMIX_FAST_BUILD=cpu pip install" in _build_info.obstacle()
    record.write_text(json.dumps({"torch": "1.13.1+cu117"}))
    assert "was built for torch 1.13.1+cu117, but this is torch" in _build_info.obstacle()
    record.write_text(json.dumps(TOOLCHAIN.describe()))
    monkeypatch.setattr("torch.__version__", "2.13.9+cu130")
    assert _build_info.obstacle() is None  # the same release: only major and minor count


@pytest.mark.parametrize(
    "cuda, words",
    [
        ("13.2", None),
        ("12.8", "built for CUDA 13.0, but this torch 2.13.0 is built for CUDA 12.8"),
        (None, "without CUDA"),
    ],
)
def test_an_extension_for_another_cuda_is_not_loaded(cuda, words, monkeypatch, tmp_path):
    record = tmp_path / "_build_info.json"
    record.write_text(json.dumps({**TOOLCHAIN.describe(), "cuda": "13.0", "cuda_archs": "9.0"}))
    monkeypatch.setattr(_build_info, "_RECORD", record)
    monkeypatch.setattr("torch.__version__", "2.13.0")
    monkeypatch.setattr("torch.version.cuda", cuda)
    said = _build_info.obstacle()
    assert said is None if words is None else words in said and "run LOMIX_FAST_BUILD=auto pip install" in said
