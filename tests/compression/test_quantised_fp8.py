"""fp8 against a search through all e4m3 numbers in float64."""

import pytest
import torch

from pikv_core.components import Component, build
from pikv_core.compression import CODECS
from pikv_core.errors import PiKVError


def e4m3_numbers():
    """Return all 253 finite values of e4m3, by its definition: 1 sign, 4 exponent bits of bias 7, 3 of mantissa."""
    positive = [2.0**-6 * m / 8 for m in range(8)]
    positive += [2.0 ** (e - 7) * (1 + m / 8) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    return torch.tensor(sorted({sign * x for x in positive for sign in (1, -1)}), dtype=torch.float64)


@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [1e-6, 1.0, 300.0])
def test_numbers_are_the_nearest_of_the_format_under_one_scale_a_page(page, dtype, spread):
    codec = build(CODECS, Component("fp8", {"page": page}))
    generator = torch.Generator().manual_seed(0)
    keys, values = (spread * torch.randn(2, 1, 2, 2 * page, 16, generator=generator)).to(dtype).unbind(0)
    position = torch.arange(2 * page).expand(1, 2, 2 * page)
    encoded = codec.encode(keys, values, position)
    numbers = e4m3_numbers()
    assert len(numbers) == 253 and float(numbers.max()) == 448
    for x, found in zip((keys, values), codec.decode(encoded, position, torch.float32)):
        for g in range(2):
            for unit in range(2):
                part = slice(unit * page, (unit + 1) * page)
                exact = x[0, g, part].double()
                scale = exact.abs().max() / 448
                nearest = (exact[..., None] / scale - numbers).abs().min(-1).values * scale
                error = (found[0, g, part].double() - exact).abs()
                torch.testing.assert_close(error, nearest, rtol=1e-4, atol=float(2**-20 * exact.abs().max()))


def test_a_page_of_zeros_and_the_sign_of_the_largest_are_kept():
    codec = build(CODECS, Component("fp8"))
    keys, values = torch.zeros(1, 1, 128, 16), torch.zeros(1, 1, 128, 16)
    values[0, 0, 70, 3] = -7.0
    position = torch.arange(128).view(1, 1, 128)
    found = codec.decode(codec.encode(keys, values, position), position, torch.float32)
    torch.testing.assert_close(found, (keys, values), rtol=1e-6, atol=0)


def test_bytes_are_one_a_number_and_a_scale_for_keys_and_values_each():
    codec = build(CODECS, Component("fp8"))
    encoded = codec.encode(torch.randn(1, 2, 128, 80), torch.randn(1, 2, 128, 80), torch.arange(128).expand(1, 2, 128))
    assert sum(x.numel() * x.element_size() for x in encoded.values()) == 2 * 2 * (128 * 80 + 2 * 4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_refused(value):
    codec = build(CODECS, Component("fp8"))
    keys, values = torch.zeros(1, 1, 64, 16), torch.zeros(1, 1, 64, 16)
    values[0, 0, 5, 5] = value
    with pytest.raises(PiKVError, match="the values hold NaN"):
        codec.encode(keys, values, torch.arange(64).view(1, 1, 64))
