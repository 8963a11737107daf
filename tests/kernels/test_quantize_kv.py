"""Quantising in one pass equals quantising plainly, and a number comes back to within half a step."""

import pytest
import torch
from kernel_checks import DTYPES, seeded

from pikv_kernels.pack_bits import unpack
from pikv_kernels.quantize_kv import _rounded, dequantize_kv, quantize_kv

pytestmark = pytest.mark.usefixtures("nan_memory")
B, G = 2, 1


def numbers(S, D, dtype, device):
    """Return keys with channels of unlike sizes and offsets, and values."""
    keys, values = (seeded(B, G, S, D, seed=seed) for seed in (0, 1))
    keys = keys * torch.logspace(-3, 1, D) + torch.linspace(-5, 5, D)
    return keys.to(dtype).to(device), values.to(dtype).to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("S", "D"), [(64, 64), (128, 80), (64, 96), (64, 128), (64, 256)])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_kernel_equals_the_definition(bits, S, D, dtype, device):
    keys, values = numbers(S, D, dtype, device)
    found, expected = (quantize_kv(keys, values, bits, backend=name) for name in ("triton", "torch"))
    assert found.bits == bits
    for name in ("key_scale", "key_zero", "value_scale", "value_zero"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for name in ("key_codes", "value_codes"):
        codes, others = (unpack(getattr(store, name), bits).int() for store in (found, expected))
        apart = (codes - others).abs()
        assert apart.max() <= 1, f"{name}: {apart.max()} apart"
        # Only where a number lies halfway between two codes.
        assert (apart > 0).float().mean() < 0.002, f"{name}: {(apart > 0).float().mean():.3g} differ"
    for exact, back, scale in zip(
        (keys, values),
        dequantize_kv(found, torch.float32),
        (found.key_scale.repeat_interleave(64, 2), found.value_scale.repeat_interleave(D // 2, 3)),
    ):
        error = (back - exact.float()).abs() / scale.float()
        # Numbers of 5 in steps of 3e-5 are themselves only known to a hundredth of a step.
        assert error.max() < 0.52, f"steps: max {error.max()}, mean {error.mean()}"


def test_a_group_of_a_single_number_comes_back_exactly(device):
    keys, values = torch.full((2, 1, 1, 64, 64), 0.5, device=device).unbind(0)
    for backend in ("torch", "triton"):
        for back in dequantize_kv(quantize_kv(keys, values, 4, backend=backend), torch.float32):
            assert torch.equal(back, keys)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_scale_or_zero_tells_of_numbers_that_are_not_finite(backend, bad, device):
    keys, values = numbers(64, 64, torch.float32, device)
    keys[1, 0, 5, 40] = bad
    values[0, 0, 63, 3] = bad
    store = quantize_kv(keys, values, 8, backend=backend)
    keys_finite = store.key_scale.isfinite() & store.key_zero.isfinite()
    assert (~keys_finite).nonzero().tolist() == [[1, 0, 0, 40]]
    values_finite = store.value_scale.isfinite() & store.value_zero.isfinite()
    assert (~values_finite).nonzero().tolist() == [[0, 0, 63, 0]]


def test_numbers_within_larger_buffers_are_read_in_place(device):
    keys, values = numbers(192, 64, torch.float16, device)
    found = quantize_kv(keys[:, :, 64:128], values.transpose(1, 2)[:, 64:128].transpose(1, 2), 4, backend="triton")
    expected = quantize_kv(keys[:, :, 64:128].clone(), values[:, :, 64:128].clone(), 4, backend="triton")
    assert all(torch.equal(x, y) for x, y in zip(found, expected))


@pytest.mark.parametrize("towards", [torch.inf, -torch.inf])
def test_rounding_in_one_direction_equals_nextafter(towards):
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    halves = halves[halves.isfinite()]
    for factor in (1.0, 1.0 + 2.0**-14, 1.0 - 2.0**-14):
        exact = halves.float() * factor
        near = exact.half()
        beyond = near.float() < exact if towards > 0 else near.float() > exact
        expected = torch.where(beyond, torch.nextafter(near, torch.full_like(near, towards)), near)
        assert torch.equal(_rounded(exact, towards), expected)
    tiny = torch.tensor([1e-9, -1e-9])
    assert _rounded(tiny, towards).tolist() == ([2.0**-24, 0.0] if towards > 0 else [0.0, -(2.0**-24)])
