"""What tests of Triton kernels share: the devices they run on, inputs, and a comparison that says how far off it is."""

import pytest
import torch

from pikv_kernels.backends import INTERPRETED

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CPU = pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is off")
DEVICES = [pytest.param("cpu", marks=CPU), pytest.param("cuda", marks=GPU)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Of outputs around 1 with operands rounded to the dtype: float32's sums differ in order alone.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def seeded(*shape, dtype=torch.float32, device="cpu", seed=0):
    """Return normal numbers that are the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def assert_near(found, expected, tolerance, what=""):
    """Compare in float64; NaN and infinities must be where they are expected."""
    found, expected = found.double().cpu(), expected.double().cpu()
    assert found.shape == expected.shape, f"{what}: {tuple(found.shape)}, not {tuple(expected.shape)}"
    finite = expected.isfinite()
    assert torch.equal(found.isfinite(), finite), f"{what}: {(found.isfinite() != finite).sum()} of {finite.numel()}"
    assert torch.equal(found[~finite], expected[~finite]), f"{what}: other infinities"
    error = (found - expected)[finite].abs()
    if error.numel():
        assert error.max() <= tolerance, f"{what}: max {error.max():.3g}, mean {error.mean():.3g} > {tolerance}"
