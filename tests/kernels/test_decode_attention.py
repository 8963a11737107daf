"""The kernels that decode one token equal their definitions, and the definition equals attention in float64."""

import pytest
import torch
from kernel_checks import DTYPES, TOLERANCE, assert_near, seeded

from pikv_kernels.attend_tokens import attend_tokens
from pikv_kernels.decode_attention import Float8KV, FullKV, attend_on_gpu, decode_attention, to_float32
from pikv_kernels.partial_attention import Partial, partial_attention
from pikv_kernels.split_tokens import count_splits

pytestmark = pytest.mark.usefixtures("nan_memory")
B, G, SCALE = 2, 2, 0.11
GROUPS = [(64, 1), (80, 4), (96, 8), (128, 4), (128, 16), (256, 8)]


def attend_exactly(query, store, scale, lengths=None, mask=None):
    """Attend in float64, head by head and over the seen tokens alone."""
    keys, values = (x.double().cpu() for x in to_float32(store))
    query = query.double().cpu()
    (batch, heads, _), (groups, S, V) = query.shape, values.shape[1:]
    output, lse = torch.zeros(batch, heads, V).double(), torch.full((batch, heads), -torch.inf).double()
    mass = torch.zeros(batch, groups, S).double()
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // groups)
            seen = torch.ones(S, dtype=torch.bool) if lengths is None else torch.arange(S) < lengths[b, g].cpu()
            if mask is not None:
                seen &= mask[b, g if mask.shape[1] > 1 else 0].cpu()
            if not seen.any():
                continue
            logits = keys[b, g, seen] @ query[b, h] * scale
            lse[b, h] = logits.logsumexp(0)
            output[b, h] = logits.softmax(0) @ values[b, g, seen]
            mass[b, g, seen] += logits.softmax(0)
    return output, lse, mass


def full_store(S, D, dtype, where, seed=0, groups=G):
    return FullKV(
        seeded(B, groups, S, D, dtype=dtype, device=where, seed=seed),
        seeded(B, groups, S, D, dtype=dtype, device=where, seed=seed + 1),
    )


def float8_store(S, D, where, unit_tokens=64):
    codes, scales = [], []
    for seed in (0, 1):
        x = seeded(B, G, S // unit_tokens, unit_tokens, D, seed=seed)
        scale = x.abs().amax((-1, -2)) / 448
        codes.append((x / scale[..., None, None]).to(torch.float8_e4m3fn).view(torch.uint8).flatten(2, 3).to(where))
        scales.append(scale.to(where))
    return Float8KV(codes[0], scales[0], codes[1], scales[1])


def check(query, store, tolerance, lengths=None, mask=None):
    """Compare both backends' output, log-sum-exp and mass with float64; fresh memory is NaN."""
    output, lse, mass = attend_exactly(query, store, SCALE, lengths, mask)
    for backend in ("torch", "triton"):
        found = decode_attention(query, store, SCALE, lengths, mask, with_mass=True, backend=backend)
        assert found.output.dtype == query.dtype
        assert_near(found.output, output, tolerance, f"{backend} output")
        assert_near(found.lse, lse, tolerance, f"{backend} lse")
        assert_near(found.mass, mass, tolerance, f"{backend} mass")
        plain = decode_attention(query, store, SCALE, lengths, mask, backend=backend)
        assert plain.mass is None
        assert_near(plain.output, found.output, 0, f"{backend} output without mass")


@pytest.mark.usefixtures("three_splits")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("S", [1, 63, 64, 65, 200])
def test_full_precision_at_odd_sizes(S, dtype, device):
    check(seeded(B, 4 * G, 64, dtype=dtype, device=device, seed=9), full_store(S, 64, dtype, device), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("D", "R"), GROUPS)
def test_groups_and_head_dims(D, R, dtype, device):
    query = seeded(B, R * G, D, dtype=dtype, device=device, seed=9)
    check(query, full_store(70, D, dtype, device), TOLERANCE[dtype])


@pytest.mark.usefixtures("three_splits")
@pytest.mark.parametrize(("D", "unit_tokens"), [(64, 64), (128, 64), (64, 16), (80, 48)])
def test_8_bit_floats(D, unit_tokens, device):
    check(seeded(B, 4 * G, D, device=device, seed=9), float8_store(192, D, device, unit_tokens), 4e-3)


def test_pages_of_8_bit_floats(device):
    store, page = float8_store(192, 64, device, 48), 32
    query = seeded(B, G, 4, 64, device=device, seed=9)
    pages = torch.tensor([[[5, 0], [1, 3]], [[2, 4], [0, 1]]], device=device)
    seen = torch.zeros(B, G, 6, dtype=torch.bool, device=device).scatter_(2, pages, True).repeat_interleave(page, 2)
    found = attend_on_gpu(query, store, None, SCALE, pages=pages, page_tokens=page)
    expected = partial_attention(query, *to_float32(store), seen[:, :, None], SCALE)
    assert_near(found.output, expected.output, 4e-3)
    assert_near(found.lse, expected.lse, 4e-3)


def store_with_nan_beyond(lengths, S, D, where):
    beyond = (torch.arange(S, device=where) >= lengths[:, :, None])[..., None]
    return FullKV(*(x.masked_fill(beyond, torch.nan) for x in full_store(S, D, torch.bfloat16, where)))


@pytest.mark.usefixtures("three_splits")
def test_lengths_with_nan_beyond_them(device):
    lengths = torch.tensor([[0, 1], [65, 192]], device=device)
    query = seeded(B, 4 * G, 64, dtype=torch.bfloat16, device=device, seed=9)
    check(query, store_with_nan_beyond(lengths, 192, 64, device), 3e-2, lengths)


@pytest.mark.usefixtures("three_splits")
@pytest.mark.parametrize("mask_heads", [1, G])
def test_masks_alone_and_with_lengths(mask_heads, device):
    mask = (torch.rand(B, mask_heads, 192, generator=torch.Generator().manual_seed(0)) < 0.3).to(device)
    mask[0, :, :100] = False  # whole tiles of a split, the first split of all
    mask[1, 0] = False  # and a row that sees nothing
    lengths = torch.tensor([[150, 192], [70, 101]], device=device)
    query = seeded(B, 4 * G, 64, dtype=torch.bfloat16, device=device, seed=9)
    check(query, full_store(192, 64, torch.bfloat16, device), 3e-2, None if mask_heads == 1 else lengths, mask)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_empty_stores_give_zeros(backend, device):
    query = seeded(B, 4 * G, 64, device=device)
    found = decode_attention(query, full_store(0, 64, torch.float32, device), 1.0, with_mass=True, backend=backend)
    assert (found.output == 0).all() and (found.lse == -torch.inf).all() and found.mass.shape == (B, G, 0)


@pytest.mark.usefixtures("three_splits")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_rows_and_soft_caps_of_what_the_cache_asks_for(softcap, dtype, device):
    store = full_store(150, 64, dtype, device)
    visible = (torch.rand(B, 1, 1, 150, generator=torch.Generator().manual_seed(0)) < 0.6).to(device)
    query = seeded(B, G, 4, 64, dtype=dtype, device=device, seed=9)
    found, expected = (
        attend_tokens(query, *store, visible, SCALE, softcap, True, backend=backend) for backend in ("triton", "torch")
    )
    for name, x, y in zip(Partial._fields, found, expected):
        assert_near(x, y, TOLERANCE[dtype], name)


def test_slices_of_larger_buffers_are_read_in_place(device):
    buffers = full_store(100, 64, torch.float16, device)
    for x in buffers:
        x[:, :, 70:] = torch.nan
    by_token = FullKV(*(x[:, :, :70].transpose(1, 2).contiguous().transpose(1, 2) for x in buffers))
    query = seeded(B, 4 * G, 64, dtype=torch.float16, device=device, seed=9)
    check(query, FullKV(*(x[:, :, :70] for x in buffers)), 4e-3)
    check(query, by_token, 4e-3)


@pytest.mark.usefixtures("three_splits")
@pytest.mark.parametrize(("D", "V"), [(44, 64), (64, 20), (16, 96), (128, 256)])
def test_values_of_other_channels_than_keys(D, V, device):
    keys, values = full_store(70, D, torch.float32, device).keys, full_store(70, V, torch.float32, device).values
    check(seeded(B, 4 * G, D, device=device, seed=9), FullKV(keys, values), 1e-5)


def test_a_query_of_another_dtype_than_the_store(device):
    check(seeded(B, 4 * G, 64, device=device, seed=9), full_store(70, 64, torch.float16, device), 4e-3)


def test_splits_fill_the_multiprocessors():
    assert count_splits(1, 1, 132) == 1
    assert count_splits(128, 512, 264) * 128 <= 264
    for heads in (1, 8, 40, 128, 1000):
        for tiles in (1, 3, 64, 512):
            splits = count_splits(heads, tiles, 132)
            assert 1 <= splits <= tiles
    assert 120 <= count_splits(8, 512, 132) * 8 <= 132  # few heads: one wave that leaves few places free
