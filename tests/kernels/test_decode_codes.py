"""The kernel that attends over KIVI's codes equals attention in float64 over what they stand for."""

import pytest
import torch
from kernel_checks import DTYPES, TOLERANCE, assert_near, seeded

from pikv_kernels.attend_codes import attend_codes, choose_for_codes, decode
from pikv_kernels.quantize_kv import quantize_kv

pytestmark = pytest.mark.usefixtures("nan_memory")
B, G, SCALE = 2, 2, 0.11
# Query rows of a head's group, head dim, tokens of a unit, channels of a value group.
SHAPES = [(1, 64, 64, 64), (4, 80, 64, 40), (8, 96, 32, 24), (16, 128, 128, 128), (3, 256, 16, 64), (4, 16, 64, 16)]


def codes_of(U, D, T, channels, bits, where, room=0):
    """Return codes of U units in buffers with room behind them that holds NaN and large codes."""
    keys, values = (seeded(B, G, U * T, D, device=where, seed=seed) for seed in (0, 1))
    codes = quantize_kv(keys, values, bits, T, channels, backend="torch")
    return {name: roomy(x, room) for name, x in codes.items()}


def roomy(x, room):
    wide = x.new_full((*x.shape[:2], x.shape[2] + room, *x.shape[3:]), torch.nan if x.is_floating_point() else 255)
    wide[:, :, : x.shape[2]] = x
    return wide[:, :, : x.shape[2]]


def expect(query, codes, bits, visible=None, softcap=None):
    """Return output, log-sum-exp and probabilities in float64, of what is seen."""
    keys, values = (x.double() for x in decode(codes, bits, torch.float32))
    logits = query.double() @ keys.mT * SCALE
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if visible is not None:
        logits = logits.masked_fill(~visible, -torch.inf)
    probs = logits.softmax(-1).nan_to_num(0.0)
    return probs @ values, logits.logsumexp(-1), probs


def check(found, expected, tolerance=1e-2, dtype=torch.float32):
    assert found.output.dtype == dtype
    for name, x, y in zip(("output", "lse", "probs"), found, expected):
        if x is not None:
            assert_near(x, y, tolerance, name)


@pytest.mark.usefixtures("three_splits")
@pytest.mark.parametrize(
    ("bits", "R", "D", "T", "channels"),
    [(bits, *shape) for bits in (2, 4, 8) for shape in SHAPES if bits > 2 or shape[0] <= 8],
)
def test_every_shape(bits, R, D, T, channels, device):
    codes = {name: x[:1] for name, x in codes_of(3, D, T, channels, bits, device, room=2).items()}
    query = seeded(1, G, R, D, device=device, seed=9)
    found = attend_codes(query, codes, bits, None, SCALE, None, True, backend="triton")
    check(found, expect(query, codes, bits))


@pytest.mark.usefixtures("three_splits")
@pytest.mark.parametrize(("D", "V"), [(44, 64), (64, 20), (16, 96)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_of_other_channels_than_keys(bits, D, V, device):
    keys, values = seeded(B, G, 96, D, device=device), seeded(B, G, 96, V, device=device, seed=1)
    codes = quantize_kv(keys, values, bits, 32, V // 2, backend="torch")
    query = seeded(B, G, 4, D, device=device, seed=9)
    found = attend_codes(query, codes, bits, None, SCALE, None, True, backend="triton")
    assert found.output.shape == (B, G, 4, V)
    check(found, expect(query, codes, bits))


@pytest.mark.usefixtures("three_splits")
@pytest.mark.parametrize("mask_heads", [1, G])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_masks_and_soft_caps(bits, mask_heads, device):
    codes = codes_of(4, 64, 32, 32, bits, device)
    visible = (torch.rand(B, mask_heads, 1, 128, generator=torch.Generator().manual_seed(0)) < 0.3).to(device)
    visible[0, :, :, :40] = False  # a whole unit, the first split of all
    visible[1, 0] = False  # and a row that sees nothing
    nothing = ~visible.expand(B, G, 1, 128)[:, :, 0].unflatten(-1, (4, 32))
    for part in ("scale", "zero"):
        codes[f"value_{part}"].masked_fill_(nothing[..., None], torch.nan)  # of tokens not seen
    query = seeded(B, G, 4, 64, device=device, seed=9)
    seen = {name: x.nan_to_num(0.0) if x.is_floating_point() else x for name, x in codes.items()}
    for softcap in (None, 2.0):
        found = attend_codes(query, codes, bits, visible, SCALE, softcap, True, backend="triton")
        check(found, expect(query, seen, bits, visible, softcap))


@pytest.mark.usefixtures("three_splits")
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_listed_units_are_read_alone(bits, device):
    codes = codes_of(5, 64, 16, 64, bits, device, room=1)
    query = seeded(B, G, 4, 64, device=device, seed=9)
    units = torch.stack([torch.randperm(5, generator=torch.Generator().manual_seed(n))[:3] for n in range(B * G)])
    units = units.view(B, G, 3).to(device)
    some = (torch.rand(B, 1, 1, 80, generator=torch.Generator().manual_seed(0)) < 0.6).to(device)
    listed = torch.zeros(B, G, 5, dtype=torch.bool, device=device).scatter_(2, units, True)
    listed = listed.repeat_interleave(16, dim=2)[:, :, None]
    found = attend_codes(query, codes, bits, some, SCALE, units=units, backend="triton")
    check(found, expect(query, codes, bits, listed & some))
    beyond = units.clone()
    beyond[:, :, -1] = 5  # a page may end behind what is stored
    listed.scatter_(3, units[:, :, -1:, None] * 16 + torch.arange(16, device=device), False)
    found = attend_codes(query, codes, bits, None, SCALE, units=beyond, backend="triton")
    check(found, expect(query, codes, bits, listed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_queries_of_every_dtype(bits, dtype, device):
    codes = codes_of(2, 128, 64, 64, bits, device)
    query = seeded(B, G, 4, 128, dtype=dtype, device=device, seed=9)
    found = attend_codes(query, codes, bits, None, SCALE, with_probs=True, backend="triton")
    check(found, expect(query, codes, bits), max(1e-2, TOLERANCE[dtype]), dtype)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [1e-3, 300.0])
def test_small_and_large_values(size, bits, device):
    keys, values = (seeded(B, G, 128, 64, device=device, seed=seed) for seed in (0, 1))
    codes = quantize_kv(keys, values * size, bits, 64, 32, backend="torch")
    query = seeded(B, G, 4, 64, device=device, seed=9)
    found = attend_codes(query, codes, bits, None, SCALE, backend="triton").output
    assert_near(found / size, expect(query, codes, bits)[0] / size, 1e-2)


def test_heads_that_lie_elsewhere_are_copied(device):
    codes = codes_of(3, 64, 64, 32, 4, device)
    apart = {name: x.transpose(0, 1).contiguous().transpose(0, 1) for name, x in codes.items()}
    apart["key_scale"] = roomy(codes["key_scale"], 1)
    query = seeded(B, G, 4, 64, device=device, seed=9)
    found, expected = (attend_codes(query, x, 4, None, SCALE, None, True, backend="triton") for x in (apart, codes))
    check(found, expected, 0)


def test_no_units_give_zeros(device):
    codes = {name: x[:, :, :0] for name, x in codes_of(1, 64, 64, 32, 8, device).items()}
    found = attend_codes(seeded(B, G, 4, 64, device=device), codes, 8, None, SCALE, None, True, backend="triton")
    assert (found.output == 0).all() and (found.lse == -torch.inf).all() and found.probs.shape == (B, G, 4, 0)


def test_what_the_kernel_cannot_read_is_refused_with_the_reason(device):
    query = seeded(B, G, 17, 64, device=device)
    with pytest.raises(ValueError, match="backend 'triton': no kernel for more than 16 query rows"):
        choose_for_codes(query, codes_of(1, 64, 64, 32, 8, device), 8, "triton")
    with pytest.raises(ValueError, match="units of 48 tokens"):
        choose_for_codes(query, codes_of(1, 64, 48, 32, 8, device), 8, "triton")
    with pytest.raises(ValueError, match="codes of 3 bits"):
        choose_for_codes(query, codes_of(1, 64, 64, 32, 3, device), 3, "triton")
