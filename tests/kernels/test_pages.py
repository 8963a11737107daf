"""Scoring pages and attending over some of them equal their definitions; a bound is no lower than any logit."""

import pytest
import torch
from kernel_checks import DTYPES, TOLERANCE, assert_near, seeded

from pikv_kernels.attend_pages import attend_pages
from pikv_kernels.decode_attention import FullKV, decode_attention
from pikv_kernels.page_scores import page_scores, page_topk

pytestmark = pytest.mark.usefixtures("nan_memory")
B, G, PAGE = 2, 2, 16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("P", "R", "D"), [(1, 1, 64), (31, 4, 80), (33, 8, 96), (65, 4, 128), (5, 2, 256)])
def test_scores(P, R, D, dtype, device):
    query = seeded(B, G, R, D, dtype=dtype, device=device)
    keys = seeded(B, G, P, PAGE, D, dtype=dtype, device=device, seed=1)
    lowest, highest = keys.amin(3), keys.amax(3)
    found = page_scores(query, lowest, highest, backend="triton")
    bounds = torch.maximum(
        query.double()[:, :, :, None] * highest.double()[:, :, None],
        query.double()[:, :, :, None] * lowest.double()[:, :, None],
    )
    assert_near(found, bounds.sum((2, 4)), 1e-3 * D**0.5 * R)
    plain = page_scores(query, lowest, highest, backend="torch")
    assert_near(plain, found, TOLERANCE[dtype] * found.abs().max().item())
    logits = torch.einsum("bgrd,bgptd->bgptr", query.double(), keys.double()).sum(-1)
    assert (found[..., None] >= logits - 1e-3 * R).all()


def test_topk_names_the_pages_of_the_highest_scores(device):
    scores = seeded(B, G, 40, device=device)
    pages = page_topk(scores, 7)
    assert torch.equal(
        scores.gather(2, pages).sort(descending=True).values, scores.sort(descending=True).values[..., :7]
    )
    assert page_topk(scores, 99).shape == (B, G, 40)


@pytest.mark.usefixtures("three_splits")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("S", "R", "D"), [(1, 4, 64), (200, 1, 80), (333, 8, 96), (700, 4, 128), (100, 4, 256)])
@pytest.mark.parametrize("page_tokens", [16, 24])
def test_attending_over_pages(S, R, D, dtype, page_tokens, device):
    query = seeded(B, R * G, D, dtype=dtype, device=device)
    store = FullKV(*(seeded(B, G, S, D, dtype=dtype, device=device, seed=seed) for seed in (1, 2)))
    num_pages = -(-S // page_tokens)
    generator = torch.Generator().manual_seed(0)
    pages = torch.stack([torch.randperm(num_pages, generator=generator)[:7] for _ in range(B * G)]).to(device)
    pages = pages.view(B, G, -1)
    pages[0, 0, 0] = -1
    lengths = torch.tensor([[S, max(0, S - 20)], [S // 2, 1]], device=device)
    beyond = (torch.arange(S, device=device) >= lengths[:, :, None])[..., None]
    spoilt = FullKV(*(x.masked_fill(beyond, torch.nan) for x in store))
    for kept, limit in ((store, None), (spoilt, lengths)):
        ends = torch.full((B, G), S, device=device) if limit is None else limit
        token = torch.arange(S, device=device)
        listed = (token[:, None] // page_tokens == pages[:, :, None]).any(-1)
        exact = FullKV(*(x.double().masked_fill(beyond, 0) if limit is not None else x.double() for x in kept))
        expected = by_mask(query.double(), exact, 0.2, listed & (token < ends[:, :, None]))
        for backend in ("torch", "triton"):
            found = attend_pages(query, kept, pages, page_tokens, 0.2, limit, backend)
            assert found.mass is None and found.output.dtype == dtype
            assert_near(found.output, expected[0], TOLERANCE[dtype], f"{backend} output")
            assert_near(found.lse, expected[1], TOLERANCE[dtype], f"{backend} lse")


def by_mask(query, store, scale, seen):
    """Attend in float64 over the tokens of a mask [B,G,S]."""
    (batch, heads, D), groups = query.shape, store.keys.shape[1]
    rows = query.view(batch, groups, heads // groups, D)
    logits = (rows @ store.keys.mT * scale).masked_fill(~seen[:, :, None], -torch.inf)
    weights = logits.softmax(-1).nan_to_num(0)
    return (weights @ store.values).view(batch, heads, D), logits.logsumexp(-1).view(batch, heads)


def test_all_pages_are_the_whole_store(device):
    query = seeded(B, 4 * G, 64, device=device)
    store = FullKV(*(seeded(B, G, 128, 64, device=device, seed=seed) for seed in (1, 2)))
    pages = torch.arange(8, device=device).flip(0).expand(B, G, -1)
    found = attend_pages(query, store, pages, PAGE, 0.2, backend="triton")
    whole = decode_attention(query, store, 0.2, backend="triton")
    assert_near(found.output, whole.output, 1e-6)
    assert_near(found.lse, whole.lse, 1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_pages_give_zeros(backend, device):
    query = seeded(B, 4 * G, 64, device=device)
    store = FullKV(*seeded(2, B, G, 32, 64, device=device).unbind(0))
    found = attend_pages(query, store, torch.zeros(B, G, 0, dtype=torch.int64, device=device), PAGE, 0.2, None, backend)
    assert (found.output == 0).all() and (found.lse == -torch.inf).all()
