"""When the CUDA part is built, by which nvcc, for which GPUs, with which flags; toolkits are made up, no nvcc runs."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import check_cuda
import check_versions
import pytest
from build_scripts import CUDA, TOOLCHAIN, VARIABLES, build_cpp, build_cuda
from check_environment import Check
from triton_paths import PATHS

from lomix_fast import _build_info

WITH_CUDA = replace(TOOLCHAIN, cuda=CUDA)
ALL = (50, 75, 80, 86, 87, 89, 90, 100, 103, 110, 120)


@pytest.fixture(autouse=True)
def a_cuda_torch_and_no_toolkit(monkeypatch, tmp_path):
    """A torch for CUDA 13.0; nothing in the places where nvcc is looked for."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.version.hip", None)
    monkeypatch.setattr("torch.__version__", "2.13.0+cu130")
    monkeypatch.setattr(build_cuda, "DEFAULT_HOME", str(tmp_path / "usr" / "local" / "cuda"))
    monkeypatch.setattr(build_cuda, "_find_cudart", lambda libraries: "/torch/lib/libcudart.so.13")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(build_cpp, "find_toolchain", lambda: TOOLCHAIN)


def toolkit(home: Path, version: str = "13.0", known: tuple[int, ...] = ALL, complaint: str = "") -> str:
    """Make a toolkit whose nvcc answers what a build asks it, and return that nvcc."""
    nvcc, include, lib = home / "bin" / "nvcc", home / "targets" / "include", home / "targets" / "lib"
    for directory in (nvcc.parent, include, lib):
        directory.mkdir(parents=True, exist_ok=True)
    (include / "cuda_runtime.h").touch()
    names = "\\n".join(f"compute_{n}" for n in known)
    nvcc.write_text(f"""#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
--list-gpu-arch) printf '{names}\\n' ;;
--dryrun) printf '#$ TOP=x\\n#$ INCLUDES="-I{include}"  \\n#$ LIBRARIES=  "-L{lib}"\\n' >&2 ;;
*) [ -z "{complaint}" ] || {{ echo "{complaint}" >&2; exit 1; }} ;;
esac
""")
    nvcc.chmod(0o755)
    return str(nvcc)


def found() -> build_cuda.Cuda:
    return build_cuda.find(("g++",))


# ---- LOMIX_FAST_BUILD ----


def no_cuda_torch(monkeypatch, tmp_path):
    toolkit(tmp_path / "usr" / "local" / "cuda")
    monkeypatch.setattr("torch.version.cuda", None)
    monkeypatch.setattr("torch.__version__", "2.13.0+cpu")


def a_rocm_torch(monkeypatch, tmp_path):
    toolkit(tmp_path / "usr" / "local" / "cuda")
    monkeypatch.setattr("torch.version.hip", "7.1")
    monkeypatch.setattr("torch.version.cuda", None)


def no_nvcc(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "empty"))


def another_major(monkeypatch, tmp_path):
    toolkit(tmp_path / "usr" / "local" / "cuda", "12.8")
    monkeypatch.setenv("CUDA_PATH", str(Path(toolkit(tmp_path / "other", "14.1")).parents[1]))


def too_old(monkeypatch, tmp_path):
    toolkit(tmp_path / "usr" / "local" / "cuda", "11.8")
    monkeypatch.setattr("torch.version.cuda", "11.8")


def a_compiler_nvcc_refuses(monkeypatch, tmp_path):
    toolkit(tmp_path / "usr" / "local" / "cuda", complaint="fatal error: unsupported GNU version")


def no_headers(monkeypatch, tmp_path):
    toolkit(tmp_path / "usr" / "local" / "cuda")
    (tmp_path / "usr" / "local" / "cuda" / "targets" / "include" / "cuda_runtime.h").unlink()


OBSTACLES = [
    (no_cuda_torch, ["torch 2.13.0+cpu is built without CUDA", "install a CUDA build of torch"]),
    (a_rocm_torch, ["torch 2.13.0+cu130 is built for ROCm", "triton backend"]),
    (no_nvcc, ["no nvcc was found", "/empty)", "CUDA_PATH (not set)", "install the CUDA toolkit, version 13.x"]),
    (another_major, ["built for CUDA 13.0", "is of CUDA 12.8", "is of CUDA 14.1", "version 13.x, or set CUDA_HOME"]),
    (too_old, ["nvcc 11.8 (", "is too old, expected 12.1 or newer", "C++20"]),
    (a_compiler_nvcc_refuses, ["compiler 'g++'", "unsupported GNU version", "supports in CXX"]),
    (no_headers, ["no cuda_runtime.h beside it", "set CUDA_HOME to a complete toolkit"]),
]


@pytest.mark.parametrize("obstacle, words", OBSTACLES, ids=lambda value: getattr(value, "__name__", ""))
def test_auto_goes_on_without_cuda_and_cuda_fails(obstacle, words, monkeypatch, tmp_path, capfd):
    obstacle(monkeypatch, tmp_path)
    toolchain, _ = build_cpp.decide()
    assert toolchain.cuda is None and all(word in toolchain.cuda_skipped for word in words), toolchain.cuda_skipped
    assert f"without its CUDA kernels: {toolchain.cuda_skipped}" in capfd.readouterr().err
    assert toolchain.describe()["cuda_skipped"] == toolchain.cuda_skipped and "cuda" not in toolchain.describe()
    monkeypatch.setenv("LOMIX_FAST_BUILD", "cuda")
    with pytest.raises(build_cpp.BuildError) as caught:
        build_cpp.decide()
    said = str(caught.value)
    assert said == f"LOMIX_FAST_BUILD=cuda: {toolchain.cuda_skipped}. LOMIX_FAST_BUILD=cpu builds the extension for " \
        "CPU tensors alone"  # fmt: skip


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_cuda_is_built_where_everything_is_there(asked, monkeypatch, tmp_path):
    nvcc = toolkit(tmp_path / "usr" / "local" / "cuda")
    monkeypatch.setenv("LOMIX_FAST_BUILD", asked)
    monkeypatch.setattr("torch.cuda.is_available", lambda: pytest.fail("looked for a GPU"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: pytest.fail("looked for GPUs"))
    toolchain, skipped = build_cpp.decide()
    assert skipped == "" and toolchain.cuda.nvcc == nvcc
    assert toolchain.cuda.include == (str(tmp_path / "usr" / "local" / "cuda" / "targets" / "include"),)
    record = toolchain.describe()
    assert record["cuda"] == "13.0" and record["cuda_archs"] == "7.5 8.0 8.6 8.9 9.0 10.0 12.0+PTX"
    assert "cuda_skipped" not in record


def test_cpu_leaves_cuda_out(monkeypatch, tmp_path):
    toolkit(tmp_path / "usr" / "local" / "cuda")
    monkeypatch.setenv("LOMIX_FAST_BUILD", "cpu")
    monkeypatch.setattr(build_cuda, "find", lambda cxx: pytest.fail("looked"))
    toolchain, _ = build_cpp.decide()
    assert toolchain.cuda is None and toolchain.cuda_skipped == "LOMIX_FAST_BUILD=cpu was set when it was installed"


def test_the_first_nvcc_of_the_right_major_version_is_taken(monkeypatch, tmp_path):
    last = toolkit(tmp_path / "usr" / "local" / "cuda", "13.1")
    assert found().nvcc == last and found().version == "13.1"
    on_path = toolkit(tmp_path, "13.2")
    assert found().nvcc == on_path
    for name in ("CUDA_PATH", "CUDA_HOME"):
        nvcc = toolkit(tmp_path / name)
        monkeypatch.setenv(name, str(tmp_path / name))
        assert found().nvcc == nvcc
    toolkit(tmp_path / "CUDA_HOME", "12.9")
    assert found().nvcc == str(tmp_path / "CUDA_PATH" / "bin" / "nvcc")


def test_the_runtime_is_the_one_torch_has_loaded(monkeypatch, tmp_path):
    monkeypatch.undo()
    maps = tmp_path / "maps"
    monkeypatch.setattr(build_cuda, "_MAPS", maps)
    maps.write_text("7f00-7f01 r--p 0 00:00 0 /a b/libcudart-1f2e.so.13.0.96\n7f02-7f03 r--p 0 00:00 0 /c/libc.so.6\n")
    assert build_cuda._find_cudart(()) == "/a b/libcudart-1f2e.so.13.0.96"
    maps.write_text("7f02-7f03 r--p 0 00:00 0 /c/libc.so.6\n")
    with pytest.raises(build_cpp.CannotBuild, match=r"libcudart.so was not found \(looked in /nowhere\)"):
        build_cuda._find_cudart(("/nowhere",))
    (tmp_path / "libcudart.so").touch()
    assert build_cuda._find_cudart(("/nowhere", str(tmp_path))) == str(tmp_path / "libcudart.so")


# ---- TORCH_CUDA_ARCH_LIST ----


def architectures(tmp_path: Path, known: tuple[int, ...] = ALL) -> tuple[str, ...]:
    return build_cuda.choose_architectures(toolkit(tmp_path / "kit", known=known), "13.0")


@pytest.mark.parametrize(
    "known, expected",
    [
        (ALL, ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX")),
        ((50, 60, 70, 75, 80, 86, 87, 89, 90), ("7.5", "8.0", "8.6", "8.9", "9.0+PTX")),
    ],
)
def test_default_is_what_nvcc_knows_with_ptx_of_the_newest(known, expected, monkeypatch, tmp_path):
    for nothing in (None, "", " ; "):
        if nothing is not None:
            monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", nothing)
        assert architectures(tmp_path, known) == expected


@pytest.mark.parametrize(
    "given, expected",
    [
        ("8.0;9.0+PTX", ("8.0", "9.0+PTX")),
        ("9.0 8.6", ("8.6", "9.0")),
        ("10.0; 9.0a ;8.0+PTX", ("8.0+PTX", "9.0a", "10.0")),
        ("9.0;9.0+PTX;9.0", ("9.0+PTX",)),
        ("Ampere", ("8.0", "8.6+PTX")),
        ("Hopper;8.0", ("8.0", "9.0+PTX")),
    ],
)
def test_torch_grammar(given, expected, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    assert architectures(tmp_path) == expected
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == given


@pytest.mark.parametrize(
    "given, words",
    [
        ("7.0;8.0", "the kernels need 7.5 or newer; take 7.0 out of it"),
        ("Pascal", "the kernels need 7.5 or newer; take 6.0 out of it"),
        ("8.0;10.3", "nvcc 13.0 (NVCC) does not know 10.3, expected out of 7.5, 8.0, 9.0"),
        ("sm_80", "expected numbers such as '8.0;9.0+PTX', names that torch knows, or native (torch says: Unknown"),
        ("8.0,9.0", "expected numbers such as '8.0;9.0+PTX'"),
        ("natives", "expected numbers such as '8.0;9.0+PTX'"),
    ],
)
def test_what_cannot_be_built_for_is_refused(given, words, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    with pytest.raises(build_cpp.CannotBuild) as caught:
        architectures(tmp_path, (75, 80, 90))
    said = str(caught.value).replace(str(tmp_path / "kit" / "bin" / "nvcc"), "NVCC")
    assert said.startswith(f"TORCH_CUDA_ARCH_LIST: got {given!r}") and words in said, said


def test_names_need_a_torch_that_knows_them(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Ampere")
    monkeypatch.setitem(sys.modules, "torch.utils.cpp_extension", None)
    with pytest.raises(build_cpp.CannotBuild, match="got 'Ampere', expected numbers such as"):
        architectures(tmp_path)


def gpus(monkeypatch, *capabilities: tuple[int, int]) -> None:
    """Make these the GPUs that torch sees; the name of each tells its place."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(capabilities))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capabilities[device])
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: f"GPU number {device}")


@pytest.mark.parametrize(
    "given, present, expected",
    [
        ("native", [(9, 0)], ("9.0",)),
        ("native", [(9, 0), (8, 0), (9, 0)], ("8.0", "9.0")),
        ("native", [(12, 0), (8, 9)], ("8.9", "12.0")),
        ("native;8.0+PTX", [(9, 0)], ("8.0+PTX", "9.0")),
        ("9.0+PTX native", [(9, 0)], ("9.0+PTX",)),
        ("Ampere;native", [(9, 0)], ("8.0", "8.6+PTX", "9.0")),
    ],
)
def test_native_is_every_gpu_that_is_visible(given, present, expected, monkeypatch, tmp_path):
    gpus(monkeypatch, *present)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    assert architectures(tmp_path) == expected
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == given


def test_native_without_a_gpu_is_refused(monkeypatch, tmp_path):
    gpus(monkeypatch)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "native;8.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    says = r"^TORCH_CUDA_ARCH_LIST: got 'native;8.0', but torch sees no GPU here; see .*nvidia-smi.* name compute capa"
    with pytest.raises(build_cpp.CannotBuild, match=says):
        architectures(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(build_cpp.CannotBuild, match=r"no GPU here \(CUDA_VISIBLE_DEVICES is '7'\); see"):
        architectures(tmp_path)


@pytest.mark.parametrize("broken", ["device_count", "get_device_capability"])
def test_native_with_a_broken_driver_is_refused(broken, monkeypatch, tmp_path):
    def fail(*arguments: int) -> None:
        raise RuntimeError("driver too old\nand more")

    gpus(monkeypatch, (9, 0))
    monkeypatch.setattr(f"torch.cuda.{broken}", fail)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "native")
    with pytest.raises(
        build_cpp.CannotBuild, match=r"'native', but torch cannot ask .* \(RuntimeError: driver too old\);"
    ):
        architectures(tmp_path)


def test_native_with_a_gpu_that_is_too_old_or_too_new_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "native")
    gpus(monkeypatch, (9, 0), (7, 0))
    with pytest.raises(build_cpp.CannotBuild) as caught:
        architectures(tmp_path)
    assert "GPU number 1 of this machine has compute capability 7.0, and the kernels need 7.5" in str(caught.value)
    assert "hide it with CUDA_VISIBLE_DEVICES" in str(caught.value)
    gpus(monkeypatch, (10, 3))
    with pytest.raises(build_cpp.CannotBuild, match=r"does not know 10\.3, expected out of 7\.5, 8\.0, 9\.0"):
        architectures(tmp_path, (75, 80, 90))


# ---- sources and flags ----


@pytest.fixture
def tree(monkeypatch, tmp_path) -> Path:
    """A source tree with a file of every kind."""
    kernels = ("cuda/few.cu", "cuda/few_general.cu", "cuda/many.cu")
    for name in ("register.cpp", "cpu/call.cpp", "cpu/kernel_x.cpp", "cuda/device.cpp", *kernels):
        path = tmp_path / "tree" / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr(build_cpp, "ROOT", tmp_path / "tree")
    return tmp_path / "tree"


def test_every_source_is_compiled_in_link_order(tree):
    cpu = [("csrc/cpu/kernel_x.cpp", name) for name in TOOLCHAIN.capabilities]
    glue = [("csrc/cpu/call.cpp", None), ("csrc/register.cpp", None)]
    assert build_cpp.units(TOOLCHAIN) == [*glue, *cpu]
    few = [(f"csrc/cuda/{stem}.cu", str(n)) for stem in ("few", "few_general") for n in range(1, 17)]
    assert build_cpp.units(WITH_CUDA) == [
        *glue, ("csrc/cuda/device.cpp", None), *few, ("csrc/cuda/many.cu", None), *cpu
    ]  # fmt: skip


@pytest.mark.parametrize("lost", ["few.cu", "few_general.cu", "device.cpp"])
def test_an_incomplete_tree_is_named(lost, tree):
    (tree / "csrc" / "cuda" / lost).unlink()
    with pytest.raises(build_cpp.BuildError, match=r"no CUDA sources under .*csrc/cuda; the source tree is incomplete"):
        build_cpp.units(WITH_CUDA)
    assert build_cpp.units(TOOLCHAIN)


def ninja(toolchain: build_cpp.Toolchain, tree: Path) -> dict[str, tuple[str, list[str]]]:
    """Object -> (rule and inputs, flags) of the file that is written."""
    script, _ = build_cpp.write_ninja(toolchain)
    directory = f"{script.parent}/"
    edges, lines = {}, (tree / script).read_text().splitlines()
    for line, after in pairwise(lines):
        if line.startswith("build "):
            out, _, rest = line.removeprefix("build ").replace(directory, "").partition(": ")
            edges[out] = (rest, shlex.split(after.removeprefix("  flags = ")))
    return edges


def test_ninja_runs_nvcc_once_for_each_number_of_classes(tree):
    edges = ninja(WITH_CUDA, tree)
    few = set()
    for stem in ("few", "few_general"):
        own = {f"csrc/cuda/{stem}.{n}.o" for n in range(1, 17)}
        assert {out for out, (rest, _) in edges.items() if rest == f"nvcc csrc/cuda/{stem}.cu"} == own
        for n in range(1, 17):
            assert f"-DLOMIX_CLASSES={n}" in edges[f"csrc/cuda/{stem}.{n}.o"][1]
        few |= own
    rest, flags = edges["csrc/cuda/many.cu.o"]
    assert rest == "nvcc csrc/cuda/many.cu" and not [flag for flag in flags if flag.startswith("-DLOMIX_CLASSES")]
    linked, link_flags = edges["_C.so"]
    assert few | {"csrc/cuda/many.cu.o", "csrc/cuda/device.o"} < set(linked.split())
    assert {"-lc10_cuda", "-ltorch_cuda", CUDA.cudart} < set(link_flags)
    assert not [flag for flag in link_flags if "rpath" in flag]


def test_what_takes_longest_is_begun_first_and_linked_in_order(tree):
    edges = ninja(WITH_CUDA, tree)
    few = [f"csrc/cuda/{stem}.{n}.o" for n in range(16, 0, -1) for stem in ("few", "few_general")]
    assert list(edges)[: len(few)] == few
    linked = [out for out in edges["_C.so"][0].split() if out.endswith(".o")]
    suffixes = [
        Path(source).stem + (f".{variant}" if variant else "") for source, variant in build_cpp.units(WITH_CUDA)
    ]
    assert [Path(out).name.removesuffix(".o").removesuffix(".cu") for out in linked] == suffixes


def test_without_cuda_nothing_of_it_is_built(tree):
    edges = ninja(TOOLCHAIN, tree)
    assert not [out for out in edges if "cuda" in out]
    words = {word for _, flags in edges.values() for word in flags}
    assert not [word for word in words if "cuda" in word.lower()]


def test_glue_knows_what_was_built(tree):
    edges = ninja(WITH_CUDA, tree)
    define = '-DLOMIX_CUDA_ARCHITECTURES="8.0 9.0+PTX"'
    for name in ("csrc/register.o", "csrc/cuda/device.o"):
        assert define in edges[name][1] and "/toolkit/include" in edges[name][1]
    assert define not in edges["csrc/cpu/call.o"][1]  # another list of GPUs must not rebuild the CPU part


def test_nvcc_flags(monkeypatch):
    flags = build_cuda.nvcc_flags(CUDA, ("g++",), True, None)
    assert {"-std=c++20", "-O3", "-DNDEBUG", "-ftz=true", "-Icsrc", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"} < set(
        flags
    )
    assert flags[flags.index("-ccbin") + 1] == "g++"
    assert [flag for flag in flags if flag.startswith("-gencode")] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=[sm_90,compute_90]",
    ]
    assert not {"--use_fast_math", "-use_fast_math", "-prec-div=false", "-Werror", "-isystem"} & set(flags)
    monkeypatch.setenv("LOMIX_FAST_WERROR", "1")
    monkeypatch.setenv("DEBUG", "1")
    flags = build_cuda.nvcc_flags(CUDA, ("ccache", "/opt/g++", "-m64"), True, "3")
    assert flags[flags.index("-Werror") + 1] == "all-warnings" and "-Xcompiler=-m64" in flags
    assert {"-O1", "-g", "-DLOMIX_CLASSES=3"} < set(flags) and not {"-O3", "-G", "-DNDEBUG"} & set(flags)
    assert flags[flags.index("-ccbin") + 1] == "/opt/g++"


def test_headers_of_the_system_are_not_named_again(monkeypatch):
    answer = '#$ INCLUDES="-I/usr/include"\n#$ LIBRARIES= "-L/usr/lib"\n'
    monkeypatch.setattr(build_cuda, "_output", lambda command: answer)
    monkeypatch.setattr(Path, "is_file", lambda path: str(path) == "/usr/include/cuda_runtime.h")
    assert build_cuda._directories("nvcc") == ((), ("/usr/lib",))


@pytest.mark.parametrize(
    "check, optional", [(check_cuda, "CHECK_CUDA_OPTIONAL"), (check_versions, "VERSIONS_OPTIONAL")]
)
def test_the_checks_need_nvcc_unless_told_otherwise(check, optional, monkeypatch, capsys):
    ran: list[tuple[str, ...]] = []
    monkeypatch.setattr(check_versions, "python312", lambda: sys.executable)
    monkeypatch.setattr(Check, "make_environment", lambda check: None)
    monkeypatch.setattr(Check, "run", lambda check, command, **variables: ran.append(tuple(command[1:])))
    for name in (optional, "VERSIONS_SAMPLE"):
        monkeypatch.delenv(name, raising=False)
    assert check.main() == 1 and not ran
    assert "no nvcc was found in CUDA_HOME" in capsys.readouterr().err
    monkeypatch.setenv(optional, "1")
    assert check.main() == 0
    assert "no nvcc was found in CUDA_HOME" in capsys.readouterr().err
    without = [("-c", check_versions._STAGE), ("-m", "benchmarks.gpu_day.compile_triton")]
    assert ran[:2] == (without if check is check_versions else [])
    monkeypatch.setenv("VERSIONS_SAMPLE", "1")
    assert check.main() == 0
    assert ran[-2:-1] == ([(*without[1], *sorted(PATHS))] if check is check_versions else [])


def test_versions_takes_a_python_312_that_runs(monkeypatch, tmp_path, capsys):
    def python(path: Path, status: int) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\nexit {status}\n")
        path.chmod(0o755)
        return str(path)

    monkeypatch.delenv("PYTHON312", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    on_path = python(tmp_path / "bin" / "python3.12", 127)  # as a shim of pyenv that has none
    assert check_versions.python312() == sys.executable
    assert f"no Python 3.12 runs here (PYTHON312, PATH, ~/.pyenv), taking {sys.executable}" in capsys.readouterr().out
    for version in ("3.12.1", "3.12.3", "3.13.0"):
        of_pyenv = python(tmp_path / ".pyenv" / "versions" / version / "bin" / "python3.12", 0)
    assert check_versions.python312() == of_pyenv.replace("3.13.0", "3.12.3")
    python(Path(on_path), 0)
    assert check_versions.python312() == on_path
    monkeypatch.setenv("PYTHON312", python(tmp_path / "mine", 0))
    assert check_versions.python312() == str(tmp_path / "mine")
    assert not capsys.readouterr().out


def test_the_way_to_build_anew():
    command = "LOMIX_FAST_BUILD=cuda pip install --no-build-isolation --no-deps --force-reinstall . in its sources"
    assert _build_info.reinstall("cuda", "8.6") == f"run TORCH_CUDA_ARCH_LIST=8.6 {command}"
    assert _build_info.reinstall("cuda") == f"run {command}"
