"""One new token over keys rebuilt from coordinates and rotated, by numba and by the definition: against float64."""

import pytest
import torch
from test_attend_newest import assert_equal, expect, random_codes, random_tokens, roomy

from pikv_kernels.attend_codes import decode
from pikv_kernels.attend_rebuilt import Rotation, attend_rebuilt

SLOW = pytest.mark.slow


def random_rotation(D, P, position):
    """Return pairs of P among D channels, some of them in between."""
    generator = torch.Generator().manual_seed(3)
    pairs = torch.randperm(D, generator=generator)[:P].view(2, -1)
    angle = torch.rand(int(position.max()) + 1, P // 2, generator=generator) * 6.3
    return Rotation(pairs, torch.cat([angle.cos(), angle.sin()], dim=-1), position)


def rotated(x, rotation):
    """Rotate x [B,G,S,D] pair by pair."""
    found = x.clone()
    angle = rotation.turns[rotation.position.clamp(min=0).long()].double()
    half = angle.shape[-1] // 2
    for i, (a, b) in enumerate(rotation.pairs.T.tolist()):
        cos, sin = angle[..., i], angle[..., half + i]
        found[..., a] = x[..., a] * cos - x[..., b] * sin
        found[..., b] = x[..., b] * cos + x[..., a] * sin
    return found


def check(query, stored, bits, up, rotation, coordinates, visible, softcap):
    keys, values = (x.double() for x in coordinates)
    expected = expect(query, rotated(keys @ up.double().mT, rotation), values, visible, 0.2, softcap)
    for backend in ("numba", "torch") if keys.shape[2] else ("numba",):
        found = attend_rebuilt(query, stored, bits, up, rotation, visible, 0.2, softcap, True, backend)
        assert_equal(found, expected, True)


@pytest.mark.parametrize(
    "R, D, P, K, V, dtype",
    [
        (4, 64, 64, 20, 12, torch.float32),
        pytest.param(1, 128, 128, 64, 64, torch.bfloat16, marks=SLOW),
        pytest.param(8, 80, 40, 37, 33, torch.float16, marks=SLOW),
        pytest.param(2, 96, 96, 1, 96, torch.float32, marks=SLOW),
        pytest.param(1, 256, 64, 100, 5, torch.float32, marks=SLOW),
    ],
)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_numbers_equal_float64(R, D, P, K, V, dtype, softcap):
    generator = torch.Generator().manual_seed(1)
    query, up = torch.randn(2, 2, R, D, generator=generator), torch.randn(1, 2, D, K, generator=generator) / K
    for S, heads in ((0, 1), (1, 1), (63, 2), (64, 1), (200, 2)):
        keys, values = roomy(random_tokens(S, K, 2)[0].to(dtype), 5), roomy(random_tokens(S, V, 2)[1].to(dtype), 5)
        position = torch.randint(0, 500, (2, heads, S), generator=generator)
        position[..., :3] = -1
        visible = (torch.rand(2, heads, 1, S, generator=generator) < 0.7) & (position >= 0)[:, :, None]
        rotation = random_rotation(D, P, torch.cat([position, torch.full((2, heads, 1), 499)], dim=2))
        rotation = rotation._replace(position=position)
        for seen in (None, visible):
            check(query, {"keys": keys, "values": values}, None, up, rotation, (keys, values), seen, softcap)


@pytest.mark.slow
@pytest.mark.parametrize("bits, T, K, V", [(8, 64, 40, 40), (4, 64, 64, 24), (2, 32, 12, 20), (1, 8, 8, 16)])
@pytest.mark.parametrize("heads", [1, 2])
def test_codes_equal_float64(bits, T, K, V, heads):
    codes = random_codes(3, T, K, V, bits, room=1)
    generator = torch.Generator().manual_seed(1)
    query, up = torch.randn(1, 2, 4, 64, generator=generator), torch.randn(1, 2, 64, K, generator=generator) / K
    rotation = random_rotation(64, 64, torch.arange(3 * T).flip(0).expand(1, heads, -1))
    visible = torch.rand(1, heads, 1, 3 * T, generator=generator) < 0.7
    for seen in (None, visible):
        check(query, codes, bits, up, rotation, decode(codes, bits, torch.float64), seen, None)
