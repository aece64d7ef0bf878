"""The CUDA part of the extension: which nvcc, for which GPUs, from which sources, with which flags; see build_cpp.py.

Nothing here looks for a GPU, which a machine that builds need not have, unless native is asked for. Environment
variables:

    CUDA_HOME, CUDA_PATH   where the CUDA toolkit is; then the nvcc on PATH, then /usr/local/cuda
    TORCH_CUDA_ARCH_LIST   the GPUs to build for as torch's own extensions take it, such as "8.0;9.0+PTX" or "Hopper";
                           native stands for those that are visible on this machine;
                           default: DEFAULT_ARCHITECTURES as far as nvcc knows them, with PTX of the newest
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from build_tools import BuildError, CannotBuild, complaint, debug, werror

OLDEST_CUDA = (12, 1)  # the first nvcc whose kernels take more than 4 KiB of arguments; it knows C++20
OLDEST_ARCHITECTURE = (7, 5)
DEFAULT_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
DEFAULT_HOME = "/usr/local/cuda"
# The kernels for few classes hold a class in a register each, so each number of classes is compiled on its own.
FEW_SOURCE = "csrc/cuda/few.cu"
FEW_SOURCES = (FEW_SOURCE, "csrc/cuda/few_general.cu")
FEW_CLASSES = range(1, 17)

_MAPS = Path("/proc/self/maps")  # the files this process has loaded
_LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")
_PROBE = """
#include <cuda_runtime.h>
#include <concepts>
template <std::integral T> __global__ void twice(T* x) { x[threadIdx.x] *= 2; }
void probe(int* x) { twice<<<1, 32>>>(x); }
"""


@dataclass(frozen=True)
class Cuda:
    """Everything found on this machine that a build of the CUDA part needs.

    Attributes:
        nvcc: the compiler.
        version: of CUDA, such as "13.0".
        architectures: GPUs to build for, such as "8.0" or, with PTX for newer ones as well, "9.0+PTX".
        include: directories of CUDA's headers that the C++ compiler does not search by itself.
        cudart: file of the CUDA runtime to link with, the one that torch loads.
    """

    nvcc: str
    version: str
    architectures: tuple[str, ...]
    include: tuple[str, ...]
    cudart: str


def find(cxx: tuple[str, ...]) -> Cuda:
    """Look for everything the CUDA part needs beside torch and a C++ compiler, and try nvcc on a small C++20 file.

    Args:
        cxx: the C++ compiler, which nvcc calls for the host's half of its files.

    Raises:
        CannotBuild: something is missing; the message names it and the remedy.
    """
    import torch

    if torch.version.hip:
        raise CannotBuild(
            f"torch {torch.__version__} is built for ROCm, the CUDA kernels are for NVIDIA GPUs alone; the triton "
            "backend runs on AMD GPUs"
        )
    if not torch.version.cuda:
        raise CannotBuild(
            f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch "
            "(https://pytorch.org/get-started/locally), then build beside it"
        )
    nvcc, version = _find_nvcc(str(torch.version.cuda), str(torch.__version__))
    architectures = choose_architectures(nvcc, version)
    include, libraries = _directories(nvcc)
    trouble = _try_nvcc(nvcc, cxx, architectures)
    if trouble is not None:
        raise CannotBuild(
            f"nvcc {version} ({nvcc}) with the C++ compiler {shlex.join(cxx)!r} cannot build C++20 ({trouble}); name a "
            "C++ compiler that this nvcc supports in CXX, or another toolkit in CUDA_HOME"
        )
    return Cuda(nvcc, version, architectures, include, _find_cudart(libraries))


# ---- what this machine has ----


def installed() -> list[str]:
    """Paths of every nvcc in the places that are looked at, the first one first."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [*(str(Path(home, "bin", "nvcc")) for home in homes if home), shutil.which("nvcc") or ""]
    candidates.append(str(Path(DEFAULT_HOME, "bin", "nvcc")))
    return [one for one in dict.fromkeys(candidates) if os.access(one, os.X_OK)]


def _find_nvcc(wanted: str, torch_version: str) -> tuple[str, str]:
    """Path and version of the first nvcc whose CUDA has the major version of torch's."""
    found = {nvcc: _version(nvcc) for nvcc in installed()}
    major = wanted.partition(".")[0]
    remedy = f"install the CUDA toolkit, version {major}.x, or set CUDA_HOME to where it is"
    for nvcc, version in found.items():
        if version.partition(".")[0] != major:
            continue
        if tuple(int(n) for n in version.split(".")) < OLDEST_CUDA:
            oldest = ".".join(map(str, OLDEST_CUDA))
            raise CannotBuild(
                f"nvcc {version} ({nvcc}) is too old, expected {oldest} or newer, which knows C++20 and lets a kernel "
                f"have more than 4 KiB of arguments; install a torch and a CUDA toolkit of version {oldest} or newer"
            )
        return nvcc, version
    if found:
        seen = ", ".join(f"{nvcc} is of CUDA {version or 'of no version it tells'}" for nvcc, version in found.items())
        raise CannotBuild(f"torch {torch_version} is built for CUDA {wanted}, but {seen}; {remedy}")
    given = ", ".join(f"{name} ({os.environ.get(name) or 'not set'})" for name in ("CUDA_HOME", "CUDA_PATH"))
    raise CannotBuild(f"no nvcc was found, looked in {given}, PATH and {DEFAULT_HOME}; {remedy}")


def _version(nvcc: str) -> str:
    """Version of CUDA that an nvcc belongs to, "" when it does not run."""
    found = re.search(r"release (\d+\.\d+)", _output([nvcc, "--version"]))
    return found[1] if found else ""


def _directories(nvcc: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Directories of headers and of libraries, as nvcc itself knows them: every packaging lays them out otherwise."""
    includes, libraries = [], []
    for line in _output([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]).splitlines():
        name, _, value = line.removeprefix("#$ ").partition("=")
        if name == "INCLUDES":
            includes += [word.removeprefix("-I") for word in shlex.split(value)]
        elif name == "LIBRARIES":
            libraries += [word.removeprefix("-L") for word in shlex.split(value)]
    resolved = [str(Path(directory).resolve()) for directory in includes]
    if not any(Path(directory, "cuda_runtime.h").is_file() for directory in resolved):
        raise CannotBuild(
            f"{nvcc} has no cuda_runtime.h beside it (looked in {', '.join(resolved) or 'nothing it names'}); install "
            "the headers of the CUDA runtime, or set CUDA_HOME to a complete toolkit"
        )
    # Said once more, /usr/include would come before the C++ library's headers, which go on to find it themselves.
    return tuple(one for one in resolved if one != "/usr/include"), tuple(libraries)


def _find_cudart(libraries: tuple[str, ...]) -> str:
    """The CUDA runtime this process has loaded with torch; where that is not told, the one of the toolkit.

    A program has one state of CUDA for each runtime, so ours must be torch's.
    """
    try:
        mapped = _MAPS.read_text()
    except OSError:
        mapped = ""
    loaded = re.search(r"/.*/libcudart[^/\n]*\.so[^/\n]*$", mapped, re.MULTILINE)
    if loaded:
        return loaded[0]
    for directory in libraries:
        if Path(directory, "libcudart.so").is_file():
            return str(Path(directory, "libcudart.so").resolve())
    raise CannotBuild(
        f"libcudart.so was not found (looked in {', '.join(libraries)}); install the CUDA runtime library, or set "
        "CUDA_HOME to a complete toolkit"
    )


def _try_nvcc(nvcc: str, cxx: tuple[str, ...], architectures: tuple[str, ...]) -> str | None:
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "probe.cu")
        source.write_text(_PROBE)
        flags = ["-std=c++20", *_host_compiler(cxx), _gencode(architectures[0])]
        return complaint([nvcc, *flags, "-c", str(source), "-o", str(Path(scratch, "probe.o"))])


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout + done.stderr


# ---- GPUs to build for ----


def choose_architectures(nvcc: str, version: str) -> tuple[str, ...]:
    """Return the architectures to build for, in rising order, such as ("8.0", "9.0+PTX").

    Args:
        nvcc: the compiler, which is asked for those it knows.
        version: its version, for messages.

    Raises:
        CannotBuild: TORCH_CUDA_ARCH_LIST names one that there is none of, or that this nvcc or our kernels cannot do,
            or it says native and no GPU can be seen.
    """
    known = {int(n) for n in re.findall(r"compute_(\d+)", _output([nvcc, "--list-gpu-arch"]))}
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    asked = [word for word in re.split(r"[;\s]+", given) if word]
    if not asked:
        chosen = [one for one in DEFAULT_ARCHITECTURES if _number(one) in known]
        if not chosen:
            raise CannotBuild(f"nvcc {version} ({nvcc}) builds for none of {', '.join(DEFAULT_ARCHITECTURES)}")
        return (*chosen[:-1], f"{chosen[-1]}+PTX")
    says = f"TORCH_CUDA_ARCH_LIST: got {given!r}"
    if "native" in asked:
        asked = [word for word in asked if word != "native"] + _visible(says)
    if any(re.fullmatch(r"\d+\.\da?(\+PTX)?", word) is None for word in asked):
        asked = _ask_torch(says, asked)
    with_ptx = {word.removesuffix("+PTX") for word in asked if word.endswith("+PTX")}
    chosen = sorted({word.removesuffix("+PTX") for word in asked}, key=_parts)
    for one in chosen:
        if _parts(one)[:2] < OLDEST_ARCHITECTURE:
            oldest = ".".join(map(str, OLDEST_ARCHITECTURE))
            raise CannotBuild(f"{says}, but the kernels need {oldest} or newer; take {one} out of it")
        if _number(one) not in known:
            names = ", ".join(f"{n // 10}.{n % 10}" for n in sorted(known))
            raise CannotBuild(f"{says}, but nvcc {version} ({nvcc}) does not know {one}, expected out of {names}")
    return tuple(one + "+PTX" * (one in with_ptx) for one in chosen)


def _visible(says: str) -> list[str]:
    """The compute capabilities of the GPUs that torch sees here, such as ["8.0", "9.0"]."""
    import torch

    instead = "name compute capabilities, such as '8.0;9.0+PTX', to build for GPUs that are not here"
    try:
        count = torch.cuda.device_count()
        found = {torch.cuda.get_device_capability(n): torch.cuda.get_device_name(n) for n in range(count)}
    except Exception as error:  # what a broken driver makes torch raise is not documented
        reason = (str(error).splitlines() or ["no reason told"])[0]
        raise CannotBuild(
            f"{says}, but torch cannot ask for the GPUs of this machine ({type(error).__name__}: {reason}); "
            f"see what nvidia-smi says, or {instead}"
        ) from error
    if not found:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        visible = "" if hidden is None else f" (CUDA_VISIBLE_DEVICES is {hidden!r})"
        raise CannotBuild(f"{says}, but torch sees no GPU here{visible}; see what nvidia-smi says, or {instead}")
    for capability, name in found.items():
        if capability < OLDEST_ARCHITECTURE:
            has, oldest = (".".join(map(str, one)) for one in (capability, OLDEST_ARCHITECTURE))
            raise CannotBuild(
                f"{says}, but {name} of this machine has compute capability {has}, and the kernels need {oldest} or "
                f"newer; hide it with CUDA_VISIBLE_DEVICES, or {instead}"
            )
    return [f"{major}.{minor}" for major, minor in sorted(found)]


def _ask_torch(says: str, asked: list[str]) -> list[str]:
    """What is asked for in numbers; the names in it, such as Ampere, are torch's."""
    expected = f"{says}, expected numbers such as '8.0;9.0+PTX'"
    before = os.environ["TORCH_CUDA_ARCH_LIST"]
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(asked)  # the one place that torch reads them from
    try:
        from torch.utils.cpp_extension import _get_cuda_arch_flags

        flags = _get_cuda_arch_flags()
    except Exception as error:  # not a public function: it may go, or change
        raise CannotBuild(f"{expected}, names that torch knows, or native (torch says: {error})") from error
    finally:
        os.environ["TORCH_CUDA_ARCH_LIST"] = before
    codes = [code for flag in flags for code in re.findall(r"code=\[?(sm|compute)_(\d+a?)", flag)]
    return [re.sub(r"(\d)(a?)$", r".\1\2", number) + "+PTX" * (kind == "compute") for kind, number in codes]


def _parts(architecture: str) -> tuple[int, int, str]:
    """Major, minor and suffix of "9.0" or "9.0a"."""
    major, _, minor = architecture.partition(".")
    return int(major), int(minor[0]), minor[1:]


def _number(architecture: str) -> int:
    major, minor, _ = _parts(architecture)
    return 10 * major + minor


# ---- sources and flags ----


def sources(root: Path) -> tuple[list[str], list[tuple[str, str | None]]]:
    """Return the C++ files of the CUDA part, and (file, number of classes or None) for each run of nvcc.

    Raises:
        BuildError: there are none.
    """
    glue, kernels = (
        sorted(path.relative_to(root).as_posix() for path in root.glob(f"csrc/cuda/*.{suffix}"))
        for suffix in ("cpp", "cu")
    )
    if not glue or not set(FEW_SOURCES) <= set(kernels):
        raise BuildError(f"no CUDA sources under {root / 'csrc' / 'cuda'}; the source tree is incomplete")
    few: list[tuple[str, str | None]] = [(source, str(n)) for source in FEW_SOURCES for n in FEW_CLASSES]
    return glue, [*few, *((source, None) for source in kernels if source not in FEW_SOURCES)]


def nvcc_flags(cuda: Cuda, cxx: tuple[str, ...], cxx11_abi: bool, classes: str | None) -> list[str]:
    """Return all flags of one run of nvcc.

    Args:
        cuda: what was found on this machine.
        cxx: the C++ compiler.
        cxx11_abi: which std::string torch uses.
        classes: number of classes that FEW_SOURCES are compiled for, None for other files.
    """
    flags = ["-std=c++20", *_host_compiler(cxx), "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
    flags += ["-O1", "-g"] if debug() else ["-O3", "-DNDEBUG"]
    # Denormal numbers may become zero; nothing else of --use_fast_math, results keep IEEE meaning.
    flags.append("-ftz=true")
    if werror():
        flags += ["-Werror", "all-warnings", "-Xcompiler", "-Werror"]
    flags += [_gencode(one) for one in cuda.architectures]
    if classes is not None:
        flags.append(f"-DLOMIX_CLASSES={classes}")
    return [*flags, f"-D_GLIBCXX_USE_CXX11_ABI={int(cxx11_abi)}", "-Icsrc"]


def glue_flags(cuda: Cuda) -> list[str]:
    """Return what the C++ files around the kernels are compiled with in addition."""
    flags = [f'-DLOMIX_CUDA_ARCHITECTURES="{" ".join(cuda.architectures)}"']
    for directory in cuda.include:
        flags += ["-isystem", directory]
    return flags


def _gencode(architecture: str) -> str:
    number = architecture.removesuffix("+PTX").replace(".", "")
    code = f"[sm_{number},compute_{number}]" if architecture.endswith("+PTX") else f"sm_{number}"
    return f"-gencode=arch=compute_{number},code={code}"


def _host_compiler(cxx: tuple[str, ...]) -> list[str]:
    """Flags that make nvcc call the C++ compiler; it takes one program, so not a launcher such as ccache before it."""
    words = [word for word in cxx if Path(word).name not in _LAUNCHERS]
    rest = [f"-Xcompiler={word}" for word in words[1:]]
    return ["-ccbin", words[0], *rest] if words else []
