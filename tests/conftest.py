"""What every test runs under: fixed seeds, poisoned fresh memory, and a hypothesis profile that CI can repeat."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from triton_paths import PATHS

# Without a GPU the Triton kernels run in triton's interpreter, which has to be asked for before triton is imported. Not
# where tests of a GPU are rehearsed, in which others stand in for them.
if not torch.cuda.is_available() and os.environ.get("LOMIX_FAST_REHEARSE") != "1":
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1":
    from interpreter import spare_repeated_patching

    spare_repeated_patching()

# Before any test asks which backends there are.
if os.environ.get("CUDA_HOST_LIBRARY"):
    from cuda_host_backend import register

    register()

# The same examples every time, unless HYPOTHESIS_PROFILE=explore goes looking for new ones.
_COMMON = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
settings.register_profile("repeat", derandomize=True, max_examples=25, **_COMMON)
settings.register_profile("explore", max_examples=300, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs in triton's interpreter as slow, but for one case of each path.

    The interpreter takes seconds where a kernel takes milliseconds.
    """
    for item in items:
        chosen = item.callspec.params if hasattr(item, "callspec") else {}
        path = item.name.startswith("test_forward_and_backward[") and chosen["one"].name in PATHS
        if chosen.get("impl") == "triton" and not path:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is NaN (or the largest integer), so an element nobody wrote cannot pass for a zero."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def fixed_seed_and_threads() -> None:
    """The same global random numbers for every test, and one thread unless a test asks for more.

    On tensors this small, two threads on a busy machine spend all their time waiting for each other.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
