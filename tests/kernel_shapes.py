"""What tests of kernels over many shapes share: which shapes, and inputs that lie in larger buffers of NaN.

Shapes: B batch, G key/value heads, R query heads of a group, D head dim.
"""

import itertools

import pytest
import torch
from kernel_checks import DTYPES, assert_near, seeded

B, G = 2, 2
FLOAT16, BFLOAT16, FLOAT32 = torch.float16, torch.bfloat16, torch.float32
# (D, R, dtype): each value of each, and what takes the most registers. All of them together are slow.
COVERING = [(64, 8, FLOAT16), (80, 1, BFLOAT16), (96, 4, FLOAT32), (128, 8, BFLOAT16), (256, 4, FLOAT16)]
ALL = list(itertools.product((64, 80, 96, 128, 256), (1, 4, 8), DTYPES))
SHAPES = COVERING + [pytest.param(*shape, marks=pytest.mark.slow) for shape in ALL if shape not in COVERING]
_ONE_HEAD = [(D, dtype) for D, _, dtype in COVERING]
SHAPES_OF_ONE_HEAD = _ONE_HEAD + [
    pytest.param(D, dtype, marks=pytest.mark.slow) for D, R, dtype in ALL if R == 1 and (D, dtype) not in _ONE_HEAD
]


def within(x, rooms=(1, 2, 3, 8)):
    """Return x as a view into a larger buffer, where all else is NaN, or 0xFF."""
    rooms = rooms[-x.dim() :]
    shape = [size + 2 * room for size, room in zip(x.shape, rooms)]
    wide = x.new_full(shape, torch.nan if x.is_floating_point() else 255)
    return wide[tuple(slice(room, room + size) for size, room in zip(x.shape, rooms))].copy_(x)


def normal(*shape, dtype, device, seed=0):
    return within(seeded(*shape, dtype=dtype, device=device, seed=seed))


def stored(tokens, D, dtype, device):
    """Return keys and values [B,G,tokens,D]."""
    return [normal(B, G, tokens, D, dtype=dtype, device=device, seed=seed) for seed in (1, 2)]


def some_lengths(tokens, device):
    return torch.tensor([[0, 1], [tokens // 2 | 1, tokens]], device=device)


def some_mask(tokens, device):
    mask = torch.rand(B, G, tokens, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[1, 0] = False  # sees nothing
    return within(mask.to(device))


def assert_parts_near(found, expected, tolerance):
    """Compare named tuples of tensors."""
    for name, x, y in zip(found._fields, found, expected):
        assert (x is None) == (y is None), name
        if x is not None:
            assert_near(x, y, tolerance, name)
