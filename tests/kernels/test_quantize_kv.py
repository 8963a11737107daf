"""Quantising in one pass equals quantising plainly, and a number comes back to within half a step."""

import pytest
import torch
from kernel_checks import DTYPES, seeded

from pikv_kernels.attend_codes import decode
from pikv_kernels.pack_bits import unpack
from pikv_kernels.quantize_kv import _rounded, quantize_kv

pytestmark = pytest.mark.usefixtures("nan_memory")
B, G = 2, 1


def numbers(S, D, dtype, device):
    """Return keys with channels of unlike sizes and offsets, and values."""
    keys, values = (seeded(B, G, S, D, seed=seed) for seed in (0, 1))
    keys = keys * torch.logspace(-3, 1, D) + torch.linspace(-5, 5, D)
    return keys.to(dtype).to(device), values.to(dtype).to(device)


# Tokens of a unit, head dim, channels of a value group: one group, two, and several in a half.
SHAPES = [(64, 64, 64), (64, 80, 40), (32, 96, 24), (128, 128, 128), (16, 256, 64)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "D", "channels"), SHAPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_kernels_equal_the_definition(bits, T, D, channels, dtype, device):
    keys, values = numbers(2 * T, D, dtype, device)
    found, expected = (quantize_kv(keys, values, bits, T, channels, backend=name) for name in ("triton", "torch"))
    for name, ours in found.items():
        assert ours.shape == expected[name].shape, name
        if not name.endswith("codes"):
            assert torch.equal(ours, expected[name]), name
            continue
        apart = (unpack(ours, bits).int() - unpack(expected[name], bits).int()).abs()
        assert apart.max() <= 1, f"{name}: {apart.max()} apart"
        # Only where a number lies halfway between two codes.
        assert (apart > 0).float().mean() < 0.002, f"{name}: {(apart > 0).float().mean():.3g} differ"
    key_steps = found["key_scale"].repeat_interleave(T, 2)
    value_steps = found["value_scale"].flatten(2, 3).repeat_interleave(channels, 3)
    for exact, back, steps in zip((keys, values), decode(found, bits, torch.float32), (key_steps, value_steps)):
        error = (back - exact.float()).abs() / steps.float()
        # Numbers of 5 in steps of 3e-5 are themselves only known to a hundredth of a step.
        assert error.max() < 0.52, f"steps: max {error.max()}, mean {error.mean()}"


def test_a_group_of_a_single_number_comes_back_exactly(device):
    keys, values = torch.full((2, 1, 1, 64, 64), 0.5, device=device).unbind(0)
    for backend in ("torch", "triton"):
        for back in decode(quantize_kv(keys, values, 4, 64, 64, backend=backend), 4, torch.float32):
            assert torch.equal(back, keys)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("channels", [64, 32])
def test_scale_or_zero_tells_of_numbers_that_are_not_finite(channels, backend, bad, device):
    keys, values = numbers(64, 64, torch.float32, device)
    keys[1, 0, 5, 40] = bad
    values[0, 0, 63, 3] = bad
    codes = quantize_kv(keys, values, 8, 64, channels, backend=backend)
    keys_finite, values_finite = (
        codes[f"{kind}_scale"].isfinite() & codes[f"{kind}_zero"].isfinite() for kind in ("key", "value")
    )
    assert (~keys_finite).nonzero().tolist() == [[1, 0, 0, 40]]
    assert (~values_finite).nonzero().tolist() == [[0, 0, 0, 63, 0]]


def test_numbers_within_larger_buffers_are_read_in_place(device):
    keys, values = numbers(192, 64, torch.float16, device)
    within = keys[:, :, 64:128], values.transpose(1, 2)[:, 64:128].transpose(1, 2)
    found, expected = (
        quantize_kv(*x, 4, 64, 32, backend="triton") for x in (within, [part.clone() for part in within])
    )
    assert all(torch.equal(x, expected[name]) for name, x in found.items())


def test_values_of_other_channels_than_keys(device):
    keys, values = numbers(64, 64, torch.float32, device)[0], numbers(64, 96, torch.float32, device)[1]
    found, expected = (quantize_kv(keys, values, 4, 32, 24, backend=name) for name in ("triton", "torch"))
    for name, x in found.items():
        assert x.shape == expected[name].shape and (x != expected[name]).float().mean() < 0.002, name


def test_groups_across_the_halves_of_a_token_have_no_kernel(device):
    keys, values = numbers(64, 96, torch.float32, device)
    with pytest.raises(ValueError, match="no kernel for 3 groups of 96 channels"):
        quantize_kv(keys, values, 8, 64, 32, backend="triton")


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
