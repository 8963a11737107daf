"""One new token by numba over e4m3, float16 and codes of any width: against float64, or number by number."""

import pytest
import torch
from test_attend_newest import assert_equal, expect, random_codes, random_tokens, roomy

from pikv_core.cache.store import Store
from pikv_core.compression.fp8 import Float8
from pikv_core.compression.int2 import Int2
from pikv_core.compression.int8 import Int8
from pikv_core.compression.levels import Levels
from pikv_kernels import backends
from pikv_kernels.attend_codes import attend_codes, decode, define_attend_codes
from pikv_kernels.attend_float8 import attend_float8
from pikv_kernels.attend_float8 import decode as decode_float8
from pikv_kernels.attend_tokens import attend_alone, attend_pages, attend_tokens
from pikv_kernels.page_scores import page_scores

SLOW = [pytest.param(*shape, marks=pytest.mark.slow) for shape in ((1, 64), (8, 80), (3, 96), (4, 128), (1, 256))]
SHAPES = [(4, 64), *SLOW]  # query rows of a group, head dim; a shape takes seconds to compile


def random_float8(U, T, D, B=1, G=2, room=0):
    keys, values = random_tokens(U * T, D, B, G)
    codes = Float8(page=T).encode(keys, 30 * values, torch.arange(U * T).expand(B, G, U * T))
    return {name: roomy(x, room) for name, x in codes.items()}


def random_query(R, D, B=1, G=2):
    return torch.randn(B, G, R, D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("R, D", SHAPES)
def test_float8_of_every_shape_equals_float64(R, D):
    query = random_query(R, D)
    for num_units in (1, 3):
        codes = random_float8(num_units, 64, D, room=2)
        found = attend_float8(query, codes, None, D**-0.5, None, True, "numba")
        expected = expect(query, *decode_float8(codes, torch.float64), None, D**-0.5)
        assert_near(found, expected)


@pytest.mark.parametrize("num_units", [0, 1, 3])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_float8_under_a_mask(num_units, softcap):
    codes = random_float8(num_units, 64, 64, B=3, room=1) if num_units else empty_float8()
    visible = torch.rand(3, 2, 1, num_units * 64, generator=torch.Generator().manual_seed(2)) < 0.5
    visible[0] = False
    query = random_query(4, 64, B=3)
    found = attend_float8(query, codes, visible, 0.3, softcap, True, "numba")
    assert_near(found, expect(query, *decode_float8(codes, torch.float64), visible, 0.3, softcap))
    assert (found.output[0] == 0).all() and (found.lse[0] == -torch.inf).all()


def assert_near(found, expected):
    """Compare what has values 30 times as large."""
    assert_equal(found._replace(output=found.output / 30), (expected[0] / 30, *expected[1:]), True)


def empty_float8():
    return {name: x[:, :, :0] for name, x in random_float8(1, 64, 64, B=3).items()}


def test_every_number_of_e4m3_is_itself():
    byte = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    values = byte.view(1, -1, 1, 1, 1).expand(1, -1, 1, 64, 64).contiguous()
    scale = torch.full((1, len(byte), 1), 0.5)
    codes = {"key_codes": values, "key_scale": scale, "value_codes": values, "value_scale": scale}
    found = attend_float8(torch.zeros(1, len(byte), 4, 64), codes, None, 1.0, backend="numba").output
    assert torch.equal(
        found, values[0, :, :, :1].view(torch.float8_e4m3fn).float().mul(0.5)[None, :, 0].expand(found.shape)
    )


def test_every_number_of_float16_is_itself():
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    values = bits.view(torch.float16).view(1, -1, 1, 64)
    found = attend_tokens(
        torch.zeros(1, values.shape[1], 4, 64), 0 * values.nan_to_num(), values, None, 1.0, backend="numba"
    )
    expected = values.float().expand(found.output.shape)
    torch.testing.assert_close(found.output, expected, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("R, D", SHAPES)
def test_float16_of_every_shape_equals_float64(R, D):
    query = random_query(R, D)
    for num_tokens in (0, 1, 63, 200):
        keys, values = (roomy(x.half(), 7) for x in random_tokens(num_tokens, D))
        visible = torch.rand(1, 1, 1, num_tokens, generator=torch.Generator().manual_seed(2)) < 0.7
        for seen in (None, visible):
            found = attend_tokens(query, keys, values, seen, D**-0.5, None, True, "numba")
            assert_equal(found, expect(query, keys, values, seen, D**-0.5), True)


def test_a_model_in_float16_gets_float16():
    keys, values = (x.half() for x in random_tokens(1000, 64))
    query = random_query(4, 64).half()
    found = attend_alone(query, keys, values, None, 0.3)
    expected = expect(query, keys, values, None, 0.3)[0]
    assert found.dtype is torch.float16 and (found - expected).abs().max() < 1e-3
    assert ("float16", "numba") in {(choice.dtype, choice.backend) for choice in backends.backend_report()}


def test_pages_and_their_scores_in_float16():
    keys, values = (roomy(x.half(), 9) for x in random_tokens(300, 64))
    pages = torch.tensor([[[4, 0, 5], [1, 3, 4]]])  # the last of five is broken, and 5 is none
    query = random_query(4, 64)
    found = attend_pages(query, keys, values, pages, 64, None, 0.3, None)
    picked = torch.zeros(1, 2, 6, dtype=torch.bool).scatter_(2, pages, True).repeat_interleave(64, dim=2)
    assert_equal(found, expect(query, keys, values, picked[:, :, None, :300], 0.3), False)
    lowest, highest = (f(keys[:, :, :64].unflatten(2, (4, 16)), dim=3) for f in (torch.amin, torch.amax))
    scores = page_scores(query, lowest, highest, "numba")
    low, high = (query.double()[:, :, :, None] * x.double()[:, :, None] for x in (lowest, highest))
    assert (scores - torch.maximum(low, high).sum((2, 4))).abs().max() < 1e-4


@pytest.mark.parametrize(
    "bits", [2, 7, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (1, 3, 5, 6, 9, 12, 16))]
)
def test_codes_of_any_width_equal_float64(bits):
    codes = random_codes(3, 64, 64, 64, bits, room=1)
    query = random_query(4, 64)
    found = attend_codes(query, codes, bits, None, 0.2, None, True, backend="numba")
    assert_equal(found, expect(query, *decode(codes, bits, torch.float64), None, 0.2), True)


@pytest.mark.slow
@pytest.mark.parametrize("R, D", [(1, 128), (8, 80), (4, 96), (1, 256)])
@pytest.mark.parametrize("group", [8, 24, 64, 128])
def test_int2_of_every_group_equals_float64(group, R, D):
    codec, N = Int2(group), 3 * group
    encoded = codec.encode(*random_tokens(N, D), torch.arange(N).expand(1, 2, N))
    query = random_query(R, D)
    found = attend_codes(query, encoded, 2, None, D**-0.5, None, True, backend="numba")
    assert_equal(found, expect(query, *decode(encoded, 2, torch.float64), None, D**-0.5), True)


@pytest.mark.parametrize("codec", [Int8(group=8), Float8(), Levels(num_levels=1)], ids=lambda codec: codec.name)
@pytest.mark.parametrize("masked", [True, False])
def test_pages_of_several_units_whose_last_is_broken(codec, masked):
    page_tokens, N = 2 * codec.unit_tokens, 7 * codec.unit_tokens
    store = Store(codec, grain_slots=page_tokens)
    store.append(*random_tokens(N, 64), torch.arange(N).expand(1, 2, N))
    pages = torch.tensor([[[3, 0], [1, 2]]])
    visible = torch.rand(1, 2, 1, N, generator=torch.Generator().manual_seed(2)) < 0.7 if masked else None
    query = random_query(4, 64)
    with backends.forced("numba"):
        found = store.attend_pages(query, visible, pages, page_tokens, 0.3, None)
    picked = torch.zeros(1, 2, 4, dtype=torch.bool).scatter_(2, pages, True).repeat_interleave(page_tokens, dim=2)
    seen = picked[:, :, None, :N] if visible is None else picked[:, :, None, :N] & visible
    assert_equal(found, expect(query, *store.decoded(), seen, 0.3), False)


def test_the_definition_leaves_out_units_beyond_the_last():
    codes = random_codes(3, 64, 64, 64, 8, room=1)
    query, units = random_query(4, 64), torch.tensor([[[3, 0], [2, 1]]])
    visible = torch.rand(1, 1, 1, 3 * 64, generator=torch.Generator().manual_seed(2)) < 0.7
    for seen in (None, visible):
        by_numba = attend_codes(query, codes, 8, seen, 0.3, units=units, backend="numba")
        for one, two in zip(by_numba[:2], define_attend_codes(query, codes, 8, seen, 0.3, units=units)[:2]):
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("with_probs", [True, False])
def test_levels_merge_to_the_attention_over_all(with_probs):
    codec = Levels(num_levels=2)
    N = 3 * codec.unit_tokens
    encoded = codec.encode(*random_tokens(N, 64), torch.arange(N).expand(1, 2, N))
    visible = torch.rand(1, 2, 1, N, generator=torch.Generator().manual_seed(2)) < 0.7
    visible[:, 0] = False
    query = random_query(4, 64)
    keys, values = codec.decode(encoded, torch.arange(N).expand(1, 2, N), torch.float64)
    for seen in (None, visible):
        with backends.forced("numba"):
            found = codec.attend(query, encoded, torch.arange(N).expand(1, 2, N), seen, 0.3, None, with_probs)
        assert_equal(found, expect(query, keys, values, seen, 0.3), with_probs)
