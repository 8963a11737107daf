"""Every Triton kernel over full precision equals its definition at every dtype, group and head dim.

Tensors are views into larger buffers of NaN (or 0xFF bytes), fresh memory is NaN, and accesses are checked.
"""

import pytest
import torch
from kernel_checks import TOLERANCE, assert_near, seeded
from kernel_shapes import (
    BFLOAT16,
    SHAPES,
    SHAPES_OF_ONE_HEAD,
    B,
    G,
    assert_parts_near,
    normal,
    some_lengths,
    some_mask,
    stored,
    within,
)

from pikv_kernels.attend_pages import attend_pages
from pikv_kernels.compact import compact
from pikv_kernels.decode_attention import Float8KV, FullKV, decode_attention
from pikv_kernels.page_scores import page_scores

pytestmark = pytest.mark.usefixtures("nan_memory", "three_splits")
S, PAGE = 70, 24


def float8_store(tokens, D, device):
    parts = []
    for seed in (1, 2):
        x = seeded(B, G, tokens // 64, 64, D, seed=seed)
        scale = x.abs().amax((-1, -2)) / 448
        codes = (x / scale[..., None, None]).to(torch.float8_e4m3fn).view(torch.uint8).flatten(2, 3)
        parts += [within(codes.to(device)), within(scale.to(device))]
    return Float8KV(*parts)


def compare_decoding(store, D, R, dtype, device, tolerance):
    query, tokens = normal(B, R * G, D, dtype=dtype, device=device), store[0].shape[2]
    limits = some_lengths(tokens, device), some_mask(tokens, device)
    found, expected = (
        decode_attention(query, store, D**-0.5, *limits, with_mass=True, backend=backend)
        for backend in ("triton", "torch")
    )
    assert_parts_near(found, expected, tolerance)


@pytest.mark.parametrize(("D", "R", "dtype"), SHAPES)
def test_decoding_full_precision(D, R, dtype, device):
    compare_decoding(FullKV(*stored(S, D, dtype, device)), D, R, dtype, device, TOLERANCE[dtype])


@pytest.mark.parametrize(("D", "R", "dtype"), SHAPES)
def test_decoding_8_bit_floats(D, R, dtype, device):
    compare_decoding(float8_store(64, D, device), D, R, dtype, device, max(4e-3, TOLERANCE[dtype]))


@pytest.mark.parametrize(("D", "R", "dtype"), SHAPES)
def test_attending_over_pages(D, R, dtype, device):
    query, store = normal(B, R * G, D, dtype=dtype, device=device), FullKV(*stored(S, D, dtype, device))
    pages = within(torch.tensor([[[2, 0], [-1, -1]], [[1, -1], [0, 2]]])).to(device)
    for lengths in (None, some_lengths(S, device)):
        found, expected = (
            attend_pages(query, store, pages, PAGE, D**-0.5, lengths, backend) for backend in ("triton", "torch")
        )
        assert_parts_near(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("num_pages", [0, 1, 45])
@pytest.mark.parametrize(("D", "R", "dtype"), SHAPES)
def test_scores_of_pages(D, R, dtype, num_pages, device):
    query = normal(B, G, R, D, dtype=dtype, device=device)
    lowest, highest = stored(num_pages, D, dtype, device)
    exact = query.float().clamp(min=0).sum(2, keepdim=True) * highest.float()
    exact += query.float().clamp(max=0).sum(2, keepdim=True) * lowest.float()
    assert_near(page_scores(query, lowest, highest, "triton"), exact.sum(-1), 1e-4 * D**0.5 * R)


@pytest.mark.parametrize("num_kept", [0, 1, 29, 200])
@pytest.mark.parametrize(("D", "dtype"), [*SHAPES_OF_ONE_HEAD, (24, torch.uint8)])
def test_compacting(D, dtype, num_kept, device):
    numbers = within((seeded(B, G, 200, D) * 50).to(dtype).to(device))
    generator = torch.Generator().manual_seed(0)
    chosen = [torch.randperm(200, generator=generator)[:num_kept].sort().values for _ in range(B * G)]
    keep = within(torch.stack(chosen).view(B, G, num_kept)).to(device)
    expected = numbers.gather(2, keep[..., None].expand(-1, -1, -1, D))
    assert torch.equal(compact(numbers, keep, "triton"), expected)


def test_a_split_for_each_tile(device, monkeypatch):
    monkeypatch.setattr("pikv_kernels.split_tokens.count_splits", lambda heads, tiles, slots: tiles)
    tokens = 64 * 66 + 5
    store = FullKV(*(seeded(1, 1, tokens, 64, dtype=BFLOAT16, device=device, seed=seed) for seed in (1, 2)))
    query = seeded(1, 2, 64, dtype=BFLOAT16, device=device)
    lengths = torch.tensor([[tokens - 200]], device=device)  # the last splits see nothing
    found, expected = (
        decode_attention(query, store, 0.3, lengths, with_mass=True, backend=backend) for backend in ("triton", "torch")
    )
    assert_parts_near(found, expected, 3e-2)
