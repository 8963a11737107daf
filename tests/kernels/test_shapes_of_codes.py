"""The Triton kernels that make and read codes equal their definitions at every dtype, group and head dim.

Tensors are views into larger buffers of NaN, fresh memory is NaN, and accesses are checked.
"""

import pytest
import torch
from kernel_checks import TOLERANCE
from kernel_shapes import SHAPES, SHAPES_OF_ONE_HEAD, B, G, assert_parts_near, normal, some_lengths, some_mask, stored

from pikv_kernels.decode_attention import decode_attention
from pikv_kernels.quantize_kv import dequantize_kv, quantize_kv

pytestmark = pytest.mark.usefixtures("nan_memory", "three_splits")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("D", "R", "dtype"), SHAPES)
def test_decoding_codes(D, R, dtype, bits, device):
    query, store = normal(B, R * G, D, dtype=dtype, device=device), stored(64, D, dtype, device)
    codes, limits = quantize_kv(*store, bits, backend="torch"), (some_lengths(64, device), some_mask(64, device))
    found, expected = (
        decode_attention(query, codes, D**-0.5, *limits, with_mass=True, backend=backend)
        for backend in ("triton", "torch")
    )
    assert_parts_near(found, expected, max(1e-2, TOLERANCE[dtype]))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("D", "dtype"), SHAPES_OF_ONE_HEAD)
def test_quantising(D, dtype, bits, device):
    numbers = stored(64, D, dtype, device)
    found, expected = (
        dequantize_kv(quantize_kv(*numbers, bits, backend=backend), torch.float32) for backend in ("triton", "torch")
    )
    for exact, x, y in zip(numbers, found, expected):
        apart, step = (x - y).abs(), (exact.max() - exact.min()).item() / (2**bits - 1)
        assert apart.max() <= 1.01 * step, f"{apart.max()} apart, in steps of at most {step}"
        # Only where a number lies halfway between two codes.
        assert (apart > 1e-3 * step).float().mean() < 0.002
