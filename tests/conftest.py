"""What every test gets: fixed seeds, memory poisoned with NaN, and gpu tests skipped where there is no GPU."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

import dgm_kernels

pytest.register_assert_rewrite("tests.autoregressive_checks", "tests.contract", "tests.gradients", "tests.model_checks")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked gpu where PyTorch sees no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """The same random numbers in every run, whichever tests run before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fills uninitialised tensors with NaN (integers: the largest value), so that an unwritten element shows.

    PyTorch's own switch is used because it sits below the dispatcher: it reaches torch.empty, empty_like, new_empty,
    empty_strided and at::empty of the C++ kernels alike. It acts only together with deterministic algorithms.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@pytest.fixture
def thread_counts() -> Iterator[tuple[int, ...]]:
    """Numbers of threads to try; the one before is set again."""
    before = torch.get_num_threads()
    yield 1, 2, 3
    torch.set_num_threads(before)


@pytest.fixture
def on_triton() -> Iterator[None]:
    """Every op runs its Triton kernels; a test that cannot is skipped."""
    state = dgm_kernels.backends()["triton"]
    if not state.startswith("available"):
        pytest.skip(state)
    with dgm_kernels.use_backend("triton"):
        yield
