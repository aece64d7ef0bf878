"""The machine that runs CUDA kernels on the CPU: it orders what CUDA orders, nothing else, and says what went wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

HOST = Path(__file__).parent / "cuda_host"
COMPILE = ["g++", "-std=c++20", "-x", "c++", f"-I{HOST / 'include'}", f"-I{HOST}", "-Wall", "-Wextra", "-Werror"]
SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SEEDS = range(1, 9)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile the machine with")


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cuda_host") / "kernels"
    parts = []
    for source in ("kernels_for_test.cu", "machine.cpp", "launch.cpp"):
        target = path.parent / f"{source}.o"
        parts.append((target, subprocess.Popen([*COMPILE, *SANITIZE, "-c", str(HOST / source), "-o", str(target)])))
    assert all([part.wait() == 0 for _, part in parts])
    subprocess.run(["g++", *SANITIZE, *(str(target) for target, _ in parts), "-o", str(path)], check=True)
    return path


def outcome(program: Path, check: str, option: int, seed: int, asan: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_HOST_SEED": str(seed), "ASAN_OPTIONS": asan}
    command = [str(program), check, str(option)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def said(program: Path, check: str, option: int = 0, seed: int = 1, asan: str = "") -> str:
    """What a check printed; it must not have failed in any other way."""
    done = outcome(program, check, option, seed, asan)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("check", ["over_the_block", "over_the_warp"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_barrier_orders_what_its_absence_does_not(program: Path, check: str, seed: int) -> None:
    assert said(program, check, 0, seed) == "right"
    assert said(program, check, 1, seed) == "wrong"


@pytest.mark.parametrize(
    "check",
    ["some_leave", "barrier_votes", "warp_votes", "shuffles", "places", "unwritten", "codes", "arithmetic"],
)
def test_small_kernels_are_right(program: Path, check: str) -> None:
    for seed in (1, 2, 3):
        assert said(program, check, seed=seed) == "right"


def test_fibers_do_not_confuse_the_watch_over_used_stacks(program: Path) -> None:
    """With every frame on a fake stack, switching has to hand those over as well."""
    watch = "detect_stack_use_after_return=1"
    assert said(program, "shuffles", asan=watch) == "right"
    assert said(program, "goes_wrong", 0, asan=watch).endswith("right")
    assert said(program, "keeps_nothing", asan=watch) == "right"


@pytest.mark.parametrize(
    "option,message",
    [
        (0, "deadlock: threads 0-15 wait at __syncthreads; threads 16-31 wait at __syncwarp with mask 0xffffffff;"),
        (1, "deadlock: threads 0-7 wait at __syncthreads; threads 8-31 wait at __syncthreads_or;"),
        (2, "16-31 wait at __shfl_down_sync with mask 0xffffffff of 4 bytes; threads 32-47 wait at __shfl_up_sync"),
        (3, "a thread has ended for which others wait: thread"),
        (4, "the mask does not name the lane itself in block"),
        (5, "the mask names lanes that have ended or never were in block"),
        (6, "lane 8 is read, but not in the mask in block"),
        (7, "__shfl_sync has a width of 12 in block"),
        (8, "thrown by thread 9"),
        (9, "threads 0-15 wait at __shfl_sync with mask 0xffffffff of 8 bytes; threads 16-31 wait at __shfl_sync"),
    ],
)
def test_what_cuda_leaves_undefined_is_an_error(program: Path, option: int, message: str) -> None:
    """It ends, it says why, and the next launch works."""
    for seed in (1, 2, 3):
        lines = said(program, "goes_wrong", option, seed).splitlines()
        assert message in lines[0]
        assert lines[1:] == ["right"]


@pytest.mark.parametrize(
    "option,caught", [(0, False), (100, False), (101, True), (50000, True), (232448, True), (-1, True)]
)
def test_reaching_out_of_memory_is_caught(program: Path, option: int, caught: bool) -> None:
    """Dynamic shared memory of 101 bytes, and for -1 an array of the kernel's own."""
    done = outcome(program, "reaches_out", option, 1)
    assert ("AddressSanitizer" in done.stderr) == caught
    assert (done.returncode != 0) == caught


def test_the_order_follows_from_the_seed(program: Path) -> None:
    orders = [said(program, "order", seed=seed) for seed in SEEDS]
    assert orders == [said(program, "order", seed=seed) for seed in SEEDS]
    assert len(set(orders)) == len(orders)
    blocks, rounds = set(), []
    for order in orders:
        count, *who = (int(word) for word in order.split()[:-1])
        assert count == len(who)
        assert Counter(who) == {100 * block + thread: 3 for block in range(4) for thread in range(32)}
        blocks.add(tuple(dict.fromkeys(number // 100 for number in who)))
        # Blocks do not overlap, and each round of a warp ends before the next begins.
        for first in range(0, len(who), 32):
            assert len({number // 100 for number in who[first : first + 32]}) == 1
            rounds.append(tuple(number % 100 for number in who[first : first + 32]))
            assert len(set(rounds[-1])) == 32
    assert len(blocks) > 1
    assert len(set(rounds)) == len(rounds)


LAUNCH = (
    "struct S {{ char c[{}]; }}; void k(S); void f() {{ cudaLaunchConfig_t c{{}}; cudaLaunchKernelEx(&c, k, S{{}}); }}"
)


@pytest.mark.parametrize(
    "text,complaint",
    [
        ("void f(float* x) { atomicAdd(x, 1.0F); }", "no matching function for call to"),
        ("bool f() { return __shfl_sync(1U, true, 0); }", "constraints not satisfied"),
        (LAUNCH.format(32765), "32764 bytes of parameters at most"),
        (LAUNCH.format(32764), None),
    ],
)
def test_some_sources_do_not_compile(tmp_path: Path, text: str, complaint: str | None) -> None:
    source = tmp_path / "source.cu"
    source.write_text(f"#include <cuda_runtime.h>\n{text}\n")
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run([*COMPILE, "-fsyntax-only", str(source)], env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == (complaint is None), done.stderr
    assert complaint is None or complaint in done.stderr
