"""The Triton kernels that make and read codes equal their definitions at every dtype, group and head dim.

Tensors are views into larger buffers of NaN, fresh memory is NaN, and accesses are checked.
"""

import pytest
import torch
from kernel_checks import TOLERANCE
from kernel_shapes import SHAPES, SHAPES_OF_ONE_HEAD, B, G, assert_parts_near, normal, some_mask, stored, within

from pikv_kernels.attend_codes import attend_codes, decode
from pikv_kernels.quantize_kv import quantize_kv

pytestmark = pytest.mark.usefixtures("nan_memory", "three_splits")


def channels(D):
    """Return a value group's channels: whole tokens, halves of them and quarters."""
    return {64: 64, 80: 40, 96: 24, 128: 64, 256: 64}[D]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("D", "R", "dtype"), SHAPES)
def test_decoding_codes(D, R, dtype, bits, device):
    query = normal(B, G, R, D, dtype=dtype, device=device)
    codes = quantize_kv(*stored(64, D, dtype, device), bits, 32, channels(D), backend="torch")
    codes = {name: within(x, (1, 1, 2, 0, 0)) for name, x in codes.items()}
    visible = some_mask(64, device)[:, :, None]
    found, expected = (
        attend_codes(query, codes, bits, visible, D**-0.5, None, True, backend=backend)
        for backend in ("triton", "torch")
    )
    assert_parts_near(found, expected, max(1e-2, TOLERANCE[dtype]))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("D", "dtype"), SHAPES_OF_ONE_HEAD)
def test_quantising(D, dtype, bits, device):
    numbers = stored(64, D, dtype, device)
    found, expected = (
        decode(quantize_kv(*numbers, bits, 32, channels(D), backend=backend), bits, torch.float32)
        for backend in ("triton", "torch")
    )
    for exact, x, y in zip(numbers, found, expected):
        apart, step = (x - y).abs(), (exact.max() - exact.min()).item() / (2**bits - 1)
        assert apart.max() <= 1.01 * step, f"{apart.max()} apart, in steps of at most {step}"
        # Only where a number lies halfway between two codes.
        assert (apart > 1e-3 * step).float().mean() < 0.002
