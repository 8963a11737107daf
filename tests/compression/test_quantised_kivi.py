"""KIVI against a float64 reference: which numbers share a scale, half a step of error, and the bytes of a token."""

import math

import pytest
import torch

from pikv_core.cache.store import EMPTY
from pikv_core.components import Component, build
from pikv_core.compression import CODECS
from pikv_core.compression.kivi import group_channels
from pikv_core.errors import PiKVError

BITS = {"int8": 8, "int4": 4, "int2": 2}


def codec_of(name, **options):
    return build(CODECS, Component(name, options))


def tokens(N, head_dim, dtype=torch.float32, offset=0.0, spread=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys, values = (offset + spread * torch.randn(2, 1, 2, N, head_dim, generator=generator)).to(dtype).unbind(0)
    keys[..., 3] *= 20  # the outlier channel that per-channel scales are for
    values[:, :, 5] *= 20
    return keys, values, torch.arange(N).expand(1, 2, N)


def worst_step(groups, bits):
    """Return the widest step that float16 scale and zero can force on groups [...,g] in float64."""
    low, high = groups.amin(-1), groups.amax(-1)
    zero_slack = 2**-10 * low.abs() + 2**-24
    return ((high - low + zero_slack) / (2**bits - 1)).clamp(min=2**-24) * (1 + 2**-10) + 2**-24


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128])
@pytest.mark.parametrize(
    "dtype, offset, spread",
    [
        (torch.float32, 0.0, 1.0),
        (torch.float32, 50.0, 1e-3),
        (torch.float32, -3.0, 100.0),
        (torch.bfloat16, 0.5, 2.0),
        (torch.float16, 0.5, 2.0),
    ],
)
def test_error_is_within_half_the_step_of_the_right_group(name, group, head_dim, dtype, offset, spread):
    bits, codec = BITS[name], codec_of(name, group=group)
    keys, values, position = tokens(3 * group, head_dim, dtype, offset, spread)
    found = codec.decode(codec.encode(keys, values, position), position, torch.float32)
    channels = max(c for c in range(1, group + 1) if head_dim % c == 0)
    for exact, decoded, per_channel in zip((keys.double(), values.double()), found, (True, False)):
        error = (decoded.double() - exact).abs()
        for b, g in ((0, 0), (0, 1)):
            if per_channel:
                groups = exact[b, g].view(3, group, head_dim).transpose(1, 2)
                grouped = error[b, g].view(3, group, head_dim).transpose(1, 2)
            else:
                groups = exact[b, g].view(3 * group, -1, channels)
                grouped = error[b, g].view(3 * group, -1, channels)
            bound = worst_step(groups, bits) / 2 + 2**-21 * groups.abs().amax(-1)
            assert (grouped.amax(-1) <= bound).all(), f"{(grouped.amax(-1) / bound).max():.3f} of the bound"


@pytest.mark.parametrize("head_dim", [64, 128])
def test_fewer_bits_err_more_and_halving_steps_halves_the_error(head_dim):
    keys, values, position = tokens(256, head_dim)
    errors = []
    for name in BITS:
        codec = codec_of(name)
        found = codec.decode(codec.encode(keys, values, position), position, torch.float32)
        errors.append([float((x - y).square().mean().sqrt()) for x, y in zip(found, (keys, values))])
    for int8, int4, int2 in zip(*errors):
        assert 14 < int4 / int8 < 20  # steps of 255 / 15 = 17
        assert 4 < int2 / int4 < 6  # steps of 15 / 3 = 5


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize("group, head_dim", [(64, 128), (64, 64), (32, 128), (64, 80), (64, 96), (64, 16), (128, 64)])
def test_bytes_per_token_follow_the_formula(name, group, head_dim):
    codec, bits = codec_of(name, group=group), BITS[name]
    N = 4 * group
    encoded = codec.encode(*tokens(N, head_dim))
    per_token = {key: x.numel() * x.element_size() / (2 * N) for key, x in encoded.items()}
    keys = sum(x for key, x in per_token.items() if key.startswith("key"))
    values = sum(x for key, x in per_token.items() if key.startswith("value"))
    assert 8 * keys / head_dim == bits + 32 / group
    channels = {80: 40, 96: 48}.get(head_dim, min(group, head_dim))
    assert math.isclose(8 * values / head_dim, bits + 32 / channels)
    assert len(per_token) == len([key for key in per_token if key.startswith(("key", "value"))])


@pytest.mark.parametrize("name", BITS)
def test_codes_lie_channel_major_in_packed_halves(name):
    """Keys [U,D,tokens] and values [U,tokens,D]: token t and t + half, or channel d and d + half, share a byte."""
    bits, codec = BITS[name], codec_of(name)
    levels, per_byte = 2**bits - 1, 8 // bits
    codes = torch.randint(0, levels + 1, (64, 128), generator=torch.Generator().manual_seed(0))
    token = torch.arange(64)
    for group in (0, 64):  # every channel, and every group of a token's channels, spans all codes: scale 1, zero 0
        codes[token, group + token] = 0
        codes[token, group + (token + 1) % 64] = levels
    x = codes.float()[None, None]
    encoded = codec.encode(x, x, torch.arange(64).view(1, 1, 64))
    by_channel = (encoded["key_codes"][0, 0, 0], codes.T)
    by_token = (encoded["value_codes"][0, 0, 0], codes)
    for packed, expected in (by_channel, by_token):
        width = expected.shape[1] // per_byte
        assert packed.shape[1] == width
        for run in range(per_byte):
            found = packed.long() >> run * bits & levels
            assert torch.equal(found, expected[:, run * width : (run + 1) * width])


@pytest.mark.parametrize("name", BITS)
def test_padding_does_not_widen_the_steps_of_the_tokens_beside_it(name):
    codec = codec_of(name)
    keys, values, position = tokens(64, 64, offset=5.0)
    position = position.clone()
    position[..., :20] = EMPTY
    encoded = codec.encode(keys, values, position)
    only = keys[:, :, 20:].double()
    ideal = (only.amax(2) - only.amin(2)) / (2 ** BITS[name] - 1)
    assert torch.allclose(encoded["key_scale"][:, :, 0].double(), ideal, rtol=0.02)


def test_numbers_that_codes_cannot_represent_are_refused():
    for value in (torch.nan, torch.inf, 1e6, -1e6):
        for at, kind in ((0, "keys"), (1, "values")):
            codec = codec_of("int4")
            both = list(tokens(64, 64))
            both[at][0, 1, 7, 9] = value
            with pytest.raises(PiKVError, match=f"the {kind} hold NaN"):
                codec.encode(*both)


def test_a_head_dim_that_does_not_fill_bytes_is_refused_by_name():
    with pytest.raises(PiKVError, match="multiple of 4, got 18"):
        codec_of("int2").encode(*tokens(64, 18))
    assert codec_of("int4").encode(*tokens(64, 18))["value_codes"].shape[-1] == 9


def test_value_groups_divide_the_head_dim():
    for head_dim in (1, 16, 50, 64, 80, 96, 112, 128, 256):
        for most in (8, 32, 64):
            channels = group_channels(head_dim, most)
            assert head_dim % channels == 0 and channels <= most
            assert not any(head_dim % more == 0 for more in range(channels + 1, min(most, head_dim) + 1))
