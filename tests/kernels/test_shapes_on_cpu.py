"""numba's kernels equal their definitions at every group, head dim and dtype, in fresh memory that is NaN.

What they read lies in larger buffers of NaN.
"""

import pytest
import torch
from kernel_checks import TOLERANCE, assert_near
from kernel_shapes import BFLOAT16, FLOAT32, B, G, assert_parts_near, normal, some_lengths, some_mask, stored, within

from pikv_kernels.attend_codes import attend_codes
from pikv_kernels.attend_tokens import attend_pages, attend_tokens
from pikv_kernels.pack_bits import pack
from pikv_kernels.page_scores import page_scores
from pikv_kernels.partial_attention import partial_attention
from pikv_kernels.quantize_kv import quantize

pytestmark = pytest.mark.usefixtures("nan_memory")
# Each compiles for seconds, once: what no other test compiles is slow.
SLOW = [(80, 8, FLOAT32), (96, 4, BFLOAT16), (256, 8, BFLOAT16), (64, 1, BFLOAT16), (128, 4, FLOAT32)]
SHAPES = [(64, 1, FLOAT32), (128, 4, BFLOAT16), *(pytest.param(*shape, marks=pytest.mark.slow) for shape in SLOW)]
SHAPES_OF_FLOAT32 = [(64, 1), (128, 4), *(pytest.param(*shape[:2], marks=pytest.mark.slow) for shape in SLOW[:3])]


def seen(tokens):
    """Return a mask bool [B,G,1,tokens] of which a head sees nothing, and one a single token."""
    visible = some_mask(tokens, "cpu") & (torch.arange(tokens) < some_lengths(tokens, "cpu")[..., None])
    visible[0, 1, 0] = True
    return visible[:, :, None]


@pytest.mark.parametrize(("D", "R", "dtype"), SHAPES)
@pytest.mark.parametrize("tokens", [0, 1, 199])
def test_tokens(tokens, D, R, dtype):
    query, store = normal(B, G, R, D, dtype=dtype, device="cpu"), stored(tokens, D, dtype, "cpu")
    for visible in (None, seen(max(1, tokens))[..., :tokens]):
        found, expected = (
            attend_tokens(query, *store, visible, D**-0.5, with_probs=True, backend=backend)
            for backend in ("numba", "torch")
        )
        assert_parts_near(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize(("D", "R", "dtype"), SHAPES)
def test_pages(D, R, dtype):
    query, (keys, values) = normal(B, G, R, D, dtype=dtype, device="cpu"), stored(199, D, dtype, "cpu")
    pages = torch.tensor([[[2, 0], [3, 1]], [[1, 3], [0, 2]]])
    visible = seen(199)
    listed = torch.zeros(B, G, 4, dtype=torch.bool).scatter_(2, pages, True).repeat_interleave(64, 2)[:, :, None, :199]
    found = attend_pages(query, keys, values, pages, 64, visible, D**-0.5, None)
    expected = partial_attention(query, keys, values, visible & listed, D**-0.5)
    assert_parts_near(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("D", "R"), SHAPES_OF_FLOAT32)
@pytest.mark.parametrize("units", [0, 1, 3])
def test_codes(units, D, R, bits):
    query = normal(B, G, R, D, dtype=FLOAT32, device="cpu")
    keys, values = (x.unflatten(2, (units, 64)) for x in stored(64 * units, D, FLOAT32, "cpu"))
    channels = next(c for c in range(64, 0, -1) if D % c == 0)
    codes = {}
    for name, x in {"key": keys.mT, "value": values.unflatten(-1, (-1, channels))}.items():
        code, scale, zero = quantize(x, -1, bits)
        code = code if name == "key" else code.flatten(-2)
        parts = {"codes": pack(code, bits), "scale": scale[..., 0], "zero": zero[..., 0]}
        codes |= {f"{name}_{part}": ahead_of_nan(tensor) for part, tensor in parts.items()}
    for visible in (None, seen(max(1, 64 * units))[..., : 64 * units]):
        found, expected = (
            attend_codes(query, codes, bits, visible, D**-0.5, with_probs=True, backend=backend)
            for backend in ("numba", "torch")
        )
        assert_parts_near(found, expected, 1e-5)


def ahead_of_nan(x):
    """Return x [B,G,U,...] as the start of a buffer of more units."""
    return within(x, (0, 0, 2, *[0] * (x.dim() - 3)))


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("D", [64, *(pytest.param(D, marks=pytest.mark.slow) for D in (96, 128, 256))])
@pytest.mark.parametrize("num_pages", [0, 1, 45])
def test_scores_of_pages(num_pages, D, dtype):
    query, (lowest, highest) = normal(B, G, 8, D, dtype=dtype, device="cpu"), stored(num_pages, D, dtype, "cpu")
    positive, negative = (part.sum(2, keepdim=True).float() for part in (query.clamp(min=0), query.clamp(max=0)))
    exact = (positive * highest.float() + negative * lowest.float()).sum(-1)
    assert_near(page_scores(query, lowest, highest, "numba"), exact, 1e-4 * D**0.5)
