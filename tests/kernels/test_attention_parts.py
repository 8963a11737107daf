"""Partial attentions, merged, equal attention over everything; rows that see nothing give zero."""

import pytest
import torch

from pikv_kernels.merge_partials import join_partials, merge_partials
from pikv_kernels.partial_attention import causal_attention, partial_attention
from pikv_kernels.prefill_rows import prefill_rows

pytestmark = pytest.mark.usefixtures("nan_memory")
B, G, N, D = 2, 3, 5, 16


@pytest.mark.parametrize("sizes", [[1], [64, 1], [63, 65, 1000]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_parts_equal_float64(sizes, dtype):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(B, G, N, D, generator=generator).to(dtype)
    parts = [torch.randn(2, B, G, size, D, generator=generator).to(dtype) for size in sizes]
    found, shares = merge_partials([partial_attention(query, k, v, None, 0.3) for k, v in parts])
    keys, values = torch.cat(parts, dim=3).double().unbind(0)
    weights = (query.double() @ keys.mT * 0.3).softmax(-1)
    error = (found.double() - weights @ values).abs()
    assert error.max() < (1e-5 if dtype is torch.float32 else 2e-2), f"max {error.max()}, mean {error.mean()}"
    for share, part in zip(shares, weights.split(sizes, dim=-1)):
        assert (share - part.sum(-1)).abs().max() < (1e-5 if dtype is torch.float32 else 2e-2)


def test_rows_that_see_nothing_are_zero_and_finite():
    query, keys, values = torch.randn(B, G, N, D), torch.randn(B, G, 7, D), torch.randn(B, G, 7, D)
    visible = torch.zeros(B, 1, N, 7, dtype=torch.bool)
    visible[:, :, 1:, :3] = True
    part = partial_attention(query, keys, values, visible, 1.0, with_probs=True)
    output, _ = merge_partials([part])
    assert (output[:, :, 0] == 0).all() and output.isfinite().all()
    assert (part.probs[..., 3:] == 0).all()


def test_no_tokens_give_zeros():
    part = partial_attention(torch.randn(B, G, N, D), *torch.randn(2, B, G, 0, D), None, 1.0, with_probs=True)
    assert part.output.shape == (B, G, N, D) and (part.output == 0).all()
    assert (part.lse == -torch.inf).all() and part.probs.shape == (B, G, N, 0)


def test_softcap_and_sinks_equal_the_definition():
    query, keys, values = torch.randn(B, G, N, D), torch.randn(B, G, 9, D), torch.randn(B, G, 9, D)
    sinks = torch.randn(G, N)
    logits = 5 * torch.tanh(query @ keys.mT / 5)
    with_sink = torch.cat([logits, sinks[None, :, :, None].expand(B, G, N, 1)], -1).softmax(-1)
    found, _ = merge_partials([partial_attention(query, keys, values, None, 1.0, softcap=5.0)], sinks)
    assert (found - with_sink[..., :-1] @ values).abs().max() < 1e-5


def test_causal_attention_equals_the_masked_definition():
    query, keys, values = torch.randn(B, 2 * G, N, D), torch.randn(B, G, N, D), torch.randn(B, G, N, D)
    keys_h, values_h = keys.repeat_interleave(2, 1), values.repeat_interleave(2, 1)
    logits = (query @ keys_h.mT * 0.25).masked_fill(~torch.ones(N, N).tril().bool(), -torch.inf)
    assert (causal_attention(query, keys, values, 0.25) - logits.softmax(-1) @ values_h).abs().max() < 1e-5


@pytest.mark.parametrize("num_shown", [1, 7, 64, 1000])
@pytest.mark.parametrize("T", [1, 15, 16, 17, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefill_shows_the_rows_of_the_attention_matrix(T, dtype, num_shown):
    generator = torch.Generator().manual_seed(T)
    query = torch.randn(B, 2 * G, T, D, generator=generator).to(dtype)
    keys, values = torch.randn(2, B, G, T, D, generator=generator).to(dtype).unbind(0)
    shown = torch.full((B, G, 2, T, T), torch.nan)

    def show(new, probs):
        shown[:, :, :, new, : probs.shape[-1]] = probs
        shown[:, :, :, new, probs.shape[-1] :] = 0

    output = prefill_rows(query, keys, values, 0.25, num_shown, show)
    keys_h, values_h = (x.double().repeat_interleave(2, 1) for x in (keys, values))
    logits = query.double() @ keys_h.mT * 0.25
    weights = logits.masked_fill(~torch.ones(T, T).tril().bool(), -torch.inf).softmax(-1)
    first = max(0, T - num_shown)
    assert shown[:, :, :, :first].isnan().all()
    error = (shown - weights.view(B, G, 2, T, T))[:, :, :, first:].abs()
    assert error.max() < (1e-5 if dtype is torch.float32 else 1e-2), f"max {error.max()}, mean {error.mean()}"
    assert (output - weights @ values_h).abs().max() < (1e-5 if dtype is torch.float32 else 3e-2)


@pytest.mark.parametrize("with_probs", [True, False])
@pytest.mark.parametrize("piece", [1, 7, 20, 64])
def test_pieces_join_to_the_attention_over_all_of_them(piece, with_probs):
    generator = torch.Generator().manual_seed(piece)
    query = torch.randn(B, G, 5, D, generator=generator)
    keys, values = torch.randn(2, B, G, 20, D, generator=generator).unbind(0)
    visible = torch.rand(B, G, 5, 20, generator=generator) < 0.5
    visible[:, :, 0] = False  # a row that sees nothing
    visible[:, :, 1, 7:] = False  # one that sees nothing of some pieces
    parts = []
    for start in range(0, 20, piece):
        tokens = slice(start, start + piece)
        own = keys[:, :, tokens], values[:, :, tokens], visible[..., tokens]
        parts.append(partial_attention(query, *own, 0.25, None, with_probs))
    found, whole = join_partials(parts), partial_attention(query, keys, values, visible, 0.25, None, with_probs)
    torch.testing.assert_close(found.output, whole.output)
    torch.testing.assert_close(found.lse, whole.lse)
    assert (found.probs is None) == (not with_probs)
    if found.probs is not None:
        torch.testing.assert_close(found.probs, whole.probs)
