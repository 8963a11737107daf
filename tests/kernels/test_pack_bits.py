"""Packing loses nothing, takes exactly the bits it says, and equals packing bit by bit."""

import pytest
import torch

from pikv_kernels.pack_bits import grain, pack, unpack
from pikv_kernels.quantize_kv import dequantize, quantize


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("length", [8, 16, 64, 80, 1000])
def test_round_trip_and_bytes(bits, length):
    codes = torch.randint(0, 2**bits, (3, 5, length), generator=torch.Generator().manual_seed(bits))
    codes[0, 0], codes[0, 1] = 0, 2**bits - 1
    packed = pack(codes.to(torch.uint8 if bits <= 8 else torch.int32), bits)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 5, length * bits // 8)
    found = unpack(packed, bits)
    assert found.dtype == (torch.uint8 if bits <= 8 else torch.int32)
    assert torch.equal(found.long(), codes)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_bytes_hold_the_codes_of_evenly_spaced_runs(bits):
    codes = torch.randint(0, 2**bits, (32,), generator=torch.Generator().manual_seed(bits)).tolist()
    per_byte = 8 // bits
    expected = [sum(codes[d + run * 32 // per_byte] << run * bits for run in range(per_byte)) for d in range(4 * bits)]
    assert pack(torch.tensor(codes, dtype=torch.uint8), bits).tolist() == expected


def test_a_length_that_does_not_fill_its_bytes_is_refused():
    assert [grain(bits) for bits in (1, 2, 3, 4, 6, 8, 12, 16)] == [8, 4, 8, 2, 4, 1, 2, 1]
    with pytest.raises(AssertionError):
        pack(torch.zeros(6, dtype=torch.uint8), 2)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 7, 8, 9, 12, 16])
@pytest.mark.parametrize("offset", [0.0, 50.0, -3.0, 1000.0])
@pytest.mark.parametrize("spread", [1e-4, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_error_is_at_most_half_a_step(bits, offset, spread, dtype):
    x = (offset + spread * torch.randn(7, 64, generator=torch.Generator().manual_seed(0))).to(dtype)
    codes, scale, zero = quantize(x, dim=-1, bits=bits)
    assert scale.dtype == zero.dtype == torch.float16
    assert codes.dtype == (torch.uint8 if bits <= 8 else torch.int32) and int(codes.max()) < 2**bits
    exact, step = x.double(), scale.double()
    error = (codes.double() * step + zero.double() - exact).abs()
    rounding = 2**-22 * exact.abs().max()  # of float32 inside
    assert (error <= step / 2 + rounding).all()
    found = dequantize(codes, scale, zero, torch.float32)
    assert ((found.double() - exact).abs() <= step / 2 + 2 * rounding).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_steps_are_as_fine_as_float16_scales_allow(bits):
    """(highest - lowest) / (2^bits - 1), up to the rounding of scale and zero to float16."""
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1)).double()
    _, scale, _ = quantize(x, dim=-1, bits=bits)
    ideal = (x.amax(-1) - x.amin(-1)) / (2**bits - 1)
    slack = 2**-10 * (ideal + x.abs().amax(-1) / (2**bits - 1))
    assert (scale[:, 0].double() >= ideal - 1e-7).all() and (scale[:, 0].double() <= ideal + slack).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("value", [0.0, 3.25, -1000.0, 1e-6, 0.1, 65504.0, -65504.0])
def test_constant_groups_are_kept(bits, value):
    codes, scale, zero = quantize(torch.full((1, 32), value), dim=-1, bits=bits)
    found = dequantize(codes, scale, zero, torch.float32)
    assert (found - value).abs().max() <= max(2**-10 * abs(value), 2**-24)


def test_a_group_that_float16_cannot_hold_shows():
    for value in (torch.nan, torch.inf, -torch.inf, 1e6):
        x = torch.zeros(1, 8)
        x[0, 3] = value
        _, scale, zero = quantize(x, dim=-1, bits=1)
        assert not (scale.isfinite() & zero.isfinite()).all()
