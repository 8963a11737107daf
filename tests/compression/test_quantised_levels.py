"""levels: bits fall with importance, bytes meet the ratio, and importance is attention mass."""

import itertools

import pytest
import torch

from pikv_core.components import Component, build
from pikv_core.compression import CODECS
from pikv_core.compression.levels import level_bits
from pikv_core.observation import ALL, LayerRun, Rows


@pytest.mark.parametrize("num_levels", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("decay", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.25, 0.4, 0.5, 0.75, 1.0])
def test_no_first_level_comes_nearer_to_the_ratio(num_levels, decay, ratio):
    bits = level_bits(num_levels, decay, ratio)
    assert len(bits) == num_levels and list(bits) == sorted(bits, reverse=True) and bits[0] <= 16 and bits[-1] >= 1

    def mean(first):
        return sum(min(16, max(1, round(first * decay**level))) for level in range(num_levels)) / num_levels

    target = max(1.0, 16 * ratio - 0.5)
    best = min(abs(mean(first / 50) - target) for first in range(1, 50 * 40))
    exact = target * num_levels / sum(decay**level for level in range(num_levels))
    within = [abs(mean(exact * k / 500) - target) for k in range(250, 1001)]
    assert abs(sum(bits) / num_levels - target) <= min(within) + 1e-9
    if exact <= 16 and exact * decay ** (num_levels - 1) >= 1:  # neither end of 1..16 cuts in
        assert abs(sum(bits) / num_levels - target) <= best + 1e-9


def test_the_default_has_three_different_levels_at_half_the_bytes():
    codec = build(CODECS, Component("levels"))
    assert codec.bits == (9, 7, 6) and codec.unit_tokens == 192 and codec.observes == ALL
    N = 2 * codec.unit_tokens
    keys, values = torch.randn(2, 1, 2, N, 128, generator=torch.Generator().manual_seed(0)).unbind(0)
    encoded = codec.encode(keys, values, torch.arange(N).expand(1, 2, N))
    bits = 8 * sum(x.numel() * x.element_size() for x in encoded.values()) / (keys.numel() + values.numel())
    assert bits == pytest.approx((9 + 7 + 6) / 3 + 0.5) and bits / 16 == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("num_levels, ratio", [(1, 0.3), (2, 0.5), (3, 0.5), (4, 0.3)])
def test_each_block_of_64_tokens_of_a_unit_has_the_steps_of_its_level(num_levels, ratio):
    codec = build(CODECS, Component("levels", {"num_levels": num_levels, "compression_ratio": ratio, "decay": 0.7}))
    N = 3 * codec.unit_tokens
    keys, values = torch.randn(2, 1, 2, N, 64, generator=torch.Generator().manual_seed(0)).unbind(0)
    position = torch.arange(N).expand(1, 2, N)
    found = codec.decode(codec.encode(keys, values, position), position, torch.float32)
    for unit, (level, bits) in itertools.product(range(3), enumerate(codec.bits)):
        start = unit * codec.unit_tokens + level * 64
        for x, y, dim in zip((keys, values), found, (2, 3)):
            exact, error = x[:, :, start : start + 64].double(), (x - y)[:, :, start : start + 64].double().abs()
            span = exact.amax(dim, keepdim=True) - exact.amin(dim, keepdim=True)
            step = (span + 2**-8) / (2**bits - 1) * 1.002 + 2**-22
            assert (error <= step / 2).all()
            assert error.max() > 0.3 * (span / (2**bits - 1)).max() / 2  # no finer than the level's


def test_importance_is_the_attention_that_a_token_has_had():
    codec = build(CODECS, Component("levels"))
    generator = torch.Generator().manual_seed(0)
    columns = {"importance": torch.rand(2, 3, 10, generator=generator)}
    expected = columns["importance"].double().clone()
    for is_last in (False, True):
        probs = torch.rand(2, 3, 4, 6, 10, generator=generator)
        rows = Rows(
            probs=probs,
            query_position=torch.arange(6).expand(2, 6),
            position=torch.arange(10).expand(2, 3, 10),
            num_visible=torch.full((2, 3, 6), 10),
            is_first=not is_last,
            num_after=0 if is_last else 1,
            layer=LayerRun(0, 1),
        )
        codec.observe(columns, rows)
        for b, g, r, n, s in itertools.product(*(range(size) for size in probs.shape)):
            expected[b, g, s] += float(probs[b, g, r, n, s]) / 4
    torch.testing.assert_close(columns["importance"].double(), expected, rtol=1e-5, atol=1e-6)
