"""Run a kernel's tests on the CPU and the GPU, with fresh memory that is not zero."""

import pytest
import torch
from checked_memory import checked_memory, why_unchecked
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
def nan_memory(monkeypatch):
    """Fill what `torch.empty`, `empty_like` and `new_empty` return with NaN, or 0xA5: what nobody wrote is seen."""

    def filled(make):
        def made(*arguments, **options):
            tensor = make(*arguments, **options)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else 0xA5)

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, filled(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))


@pytest.fixture
def three_splits(monkeypatch):
    """Split tokens as a GPU with many multiprocessors would."""
    monkeypatch.setattr("pikv_kernels.split_tokens.count_splits", lambda heads, tiles, slots: min(3, tiles))
