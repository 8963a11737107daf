"""Attention over the first tokens and a moving window equals the masked definition, and makes nothing of T×T."""

import pytest
import torch
from largest_made import largest_made

from pikv_kernels.streaming_attention import streaming_attention


def definition(query, keys, values, scale, sinks, recent):
    """Return float64 attention [B,H,T,D] under the mask, written out."""
    T, group = query.shape[2], query.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in (keys, values))
    token = torch.arange(T)
    ahead = token[:, None] - token
    sees = (ahead >= 0) & ((token < sinks) | (ahead < recent))
    logits = (query.double() @ keys.mT * scale).masked_fill(~sees, -torch.inf)
    return logits.softmax(dim=-1) @ values


@pytest.mark.parametrize("sinks, recent", [(0, 1), (4, 12), (1, 128), (64, 1), (7, 1000)])
@pytest.mark.parametrize("T", [1, 5, 127, 129, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_equals_the_masked_definition(T, sinks, recent, dtype):
    generator = torch.Generator().manual_seed(T)
    query = torch.randn(2, 6, T, 16, generator=generator).to(dtype)
    keys, values = torch.randn(2, 2, 3, T, 16, generator=generator).to(dtype).unbind(0)
    found = streaming_attention(query, keys, values, 0.3, sinks, recent)
    error = (found - definition(query, keys, values, 0.3, sinks, recent)).abs()
    assert error.max() < (1e-5 if dtype is torch.float32 else 3e-2), f"max {error.max()}, mean {error.mean()}"


def test_what_it_makes_grows_with_the_window_and_not_with_the_prompt():
    query, keys, values = (torch.randn(1, 2, 4096, 16) for _ in range(3))
    assert largest_made(lambda: streaming_attention(query, keys, values, 0.3, 8, 64)) == query.numel()


def test_gradients_are_those_of_the_definition():
    query, keys, values = (torch.randn(1, 2, 200, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    weight = torch.randn(1, 2, 200, 8, dtype=torch.float64)
    found = torch.autograd.grad((streaming_attention(query, keys, values, 0.3, 4, 12) * weight).sum(), [query, keys])
    expected = torch.autograd.grad((definition(query, keys, values, 0.3, 4, 12) * weight).sum(), [query, keys])
    for own, other in zip(found, expected):
        torch.testing.assert_close(own, other)
