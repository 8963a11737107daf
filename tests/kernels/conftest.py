"""Run a kernel's tests on the CPU and the GPU, with fresh memory that is not zero."""

import pytest
from checked_memory import checked_memory, why_unchecked
from guarded_memory import guarded_memory
from kernel_checks import DEVICES

from pikv_kernels.backends import INTERPRETED


@pytest.fixture(autouse=True)
def checked_kernels():
    """Check every access of the kernels that these tests interpret; the list of their names."""
    if INTERPRETED and why_unchecked() is None:
        with checked_memory() as kernels:
            yield kernels
    else:
        yield []


@pytest.fixture(params=DEVICES)
def device(request):
    """The CPU under Triton's interpreter, and the GPU where there is one."""
    return request.param


@pytest.fixture
def nan_memory():
    """Fill fresh memory with NaN, so that what nobody wrote is seen, and watch what lies beside it."""
    with guarded_memory():
        yield


@pytest.fixture
def three_splits(monkeypatch):
    """Split tokens as a GPU with many multiprocessors would."""
    monkeypatch.setattr("pikv_kernels.split_tokens.count_splits", lambda heads, tiles, slots: min(3, tiles))
