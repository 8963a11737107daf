"""How budgets are spread: sums are exact, bounds hold, and the numbers are the papers'."""

import pytest
import torch
from scheduling import references
from scheduling.synthetic import World, show

from pikv_core.components import Component, build
from pikv_core.observation import LayerRun, Observer
from pikv_core.scheduling.allocation import ALLOCATIONS
from pikv_core.scheduling.allocation.ada_kv import AdaKV
from pikv_core.scheduling.allocation.base import Allocation
from pikv_core.scheduling.allocation.entropy import Entropy
from pikv_core.scheduling.allocation.pyramid import Pyramid
from pikv_core.scheduling.allocation.shares import share_out

MEAN_AND_SEEN = [(1, 1), (1, 50), (7, 9), (64, 1000), (100, 129), (250, 1000), (777, 1000), (1000, 1000), (99, 32_000)]


def layers(allocation, mean, num_seen, num_layers, shared=None):
    rows = allocation.layers(torch.tensor([mean]), torch.tensor([num_seen]), num_layers, shared or {})
    assert rows.shape == (1, num_layers)
    return rows[0].tolist()


@pytest.mark.parametrize("name", ALLOCATIONS.names())
@pytest.mark.parametrize("num_layers", [1, 2, 32, 80])
def test_layers_share_the_budget_exactly(name, num_layers):
    allocation = build(ALLOCATIONS, Component(name))
    assert isinstance(allocation, Allocation) and type(allocation).__doc__
    assert (allocation.observes > 0) == (type(allocation).observe is not Observer.observe)
    generator = torch.Generator().manual_seed(0)
    for mean, num_seen in MEAN_AND_SEEN:
        entropy = torch.rand(num_layers, 1, generator=generator, dtype=torch.float64) * 5
        budgets = layers(allocation, mean, num_seen, num_layers, {"entropy": dict(enumerate(entropy))})
        assert sum(budgets) == mean * num_layers
        assert min(budgets) >= 1 and max(budgets) <= max(mean, num_seen)


@pytest.mark.parametrize("name", ALLOCATIONS.names())
def test_heads_share_the_budget_exactly(name):
    allocation = build(ALLOCATIONS, Component(name))
    score = torch.rand(3, 4, 50, generator=torch.Generator().manual_seed(0))
    score[1, :, :20] = -torch.inf
    score[:, :, -3:] = torch.inf
    for mean in ([1, 1, 1], [10, 20, 5], [30, 30, 50]):
        heads = allocation.heads(score, torch.tensor(mean))
        assert heads.shape == (3, 4) and (heads.sum(1) == torch.tensor(mean) * 4).all() and heads.min() >= 1
        assert allocation.splits_heads or (heads == heads[:, :1]).all()


@pytest.mark.parametrize("num_layers", [2, 32, 80])
@pytest.mark.parametrize("beta", [1, 5, 20])
def test_pyramidkv_is_the_papers(num_layers, beta):
    sloping = 0
    for window in (0, 16, 64):
        for mean, num_seen in [
            (256, 4096),
            (512, 1000),
            (128, 300),
            (2048, 8192),
            (40, 4000),
            (700, 1000),
            (900, 1000),
        ]:
            budgets = layers(Pyramid(window=window, beta=beta), mean, num_seen, num_layers)
            wish = references.pyramidkv(mean, num_seen, num_layers, window, beta)
            assert all(abs(x - y) <= 0.5 + 1e-9 for x, y in zip(budgets, wish)), (mean, num_seen, window)
            assert budgets == sorted(budgets, reverse=True) and min(budgets) >= min(window, mean)
            sloping += budgets[0] > budgets[-1]
    assert sloping >= 6 or beta == 1


@pytest.mark.parametrize("num_layers", [2, 32, 80])
def test_the_kvpress_form_gives_its_very_integers(num_layers):
    sloping = 0
    for window in (8, 64):
        for mean in range(10, 1000, 7):
            budgets = layers(Pyramid("kvpress", window=window), mean, 1000, num_layers)
            assert budgets == references.kvpress_pyramid(mean, 1000, num_layers, window, 20), mean
            sloping += budgets[0] > budgets[-1]
    assert sloping > 50


@pytest.mark.parametrize("slope", [0.0, 0.5, 0.9])
def test_the_linear_form_falls_in_equal_steps(slope):
    budgets = layers(Pyramid("linear", slope=slope), 300, 1000, 32)
    for layer, budget in enumerate(budgets):
        assert abs(budget - 300 * (1 + slope - 2 * slope * layer / 31)) <= 0.5
    capped = layers(Pyramid("linear", slope=slope), 900, 1000, 32)
    assert max(capped) <= 1000 and sum(capped) == 900 * 32


def test_share_out_is_the_fair_share_between_bounds():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        num_parts = int(torch.randint(1, 9, (1,), generator=generator))
        wish = torch.rand(2, num_parts, generator=generator, dtype=torch.float64) * 40
        wish[wish < 8] = 0
        least = torch.randint(0, 4, (2, num_parts), generator=generator)
        most = least + torch.randint(0, 60, (2, num_parts), generator=generator)
        share = torch.rand(2, generator=generator, dtype=torch.float64)
        total = least.sum(1) + ((most - least).sum(1) * share).long()
        given = share_out(wish, total, least, most)
        assert (given.sum(1) == total).all() and (given >= least).all() and (given <= most).all()
        for got, want, low, high, all_tokens in zip(given, wish.clamp(min=1e-9), least, most, total):
            # Bisection for the one factor, in place of the closed form.
            small, large = 0.0, 1e12
            for _ in range(200):
                factor = (small + large) / 2
                if (want * factor).clamp(low, high).sum() < all_tokens:
                    small = factor
                else:
                    large = factor
            assert ((want * large).clamp(low, high) - got).abs().max() <= 1 - 1e-6


def test_ada_kv_counts_the_layers_highest_scores():
    generator = torch.Generator().manual_seed(0)
    for num_heads in (1, 2, 5):
        for mean in (1, 2, 7, 12, 30):
            score = torch.randn(2, num_heads, 40, generator=generator) * torch.rand(
                2, num_heads, 1, generator=generator
            )
            score[1, :, :9] = -torch.inf
            score[:, :, 35:] = torch.inf
            counts = AdaKV(alpha=0.0).heads(score, torch.tensor([mean, mean]))
            for row in range(2):
                expected = references.ada_kv_counts(score[row].tolist(), mean)
                if min(expected) >= 1:
                    assert counts[row].tolist() == expected
                mixed = AdaKV(alpha=0.2).heads(score, torch.tensor([mean, mean]))[row].tolist()
                wish = [0.8 * count + 0.2 * mean for count in expected]
                assert sum(mixed) == mean * num_heads
                if max(wish) <= 31:
                    assert all(abs(got - x) < 1 for got, x in zip(mixed, wish)), (mixed, wish)


def test_ada_kv_is_uniform_at_alpha_one_and_where_all_must_stay():
    score = torch.rand(1, 4, 40, generator=torch.Generator().manual_seed(0))
    assert AdaKV(alpha=1.0).heads(score, torch.tensor([9])).tolist() == [[9] * 4]
    assert AdaKV(alpha=0.0).heads(torch.full((1, 4, 40), torch.inf), torch.tensor([9])).tolist() == [[9] * 4]


def test_ada_kv_drops_nothing_while_all_fits():
    score = torch.rand(1, 3, 20, generator=torch.Generator().manual_seed(0))
    score[0, 0, 4:] = -torch.inf
    score[0, 1, 12:] = -torch.inf
    held = torch.tensor([[4, 12, 20]])
    assert (AdaKV().heads(score, torch.tensor([12])) >= held).all()
    given = AdaKV().heads(score, torch.tensor([11]))
    assert (given <= held).all() and given.sum() == 33


@pytest.mark.parametrize("chunk", [3, 100])
def test_entropy_is_that_of_the_last_queries(chunk):
    world = World(padding=(0, 7), steps=(40, 1, 6))
    shared = {}
    runs = [LayerRun(index, 2, 2, shared=shared) for index in range(2)]
    for queries in (5, 33):
        shared.clear()
        for run in runs:
            show(Entropy(queries), world, run, chunk)
        for row, pad in enumerate(world.padding):
            expected = references.entropy(world.attention[row, :, :, pad:40, pad:40].tolist(), queries)
            assert abs(shared["entropy"][1][row].item() - expected) < 1e-5


def test_entropy_gives_flat_layers_more_in_proportion():
    entropy = torch.tensor([[4.0], [1.0], [3.0]], dtype=torch.float64)
    shared = {"entropy": dict(enumerate(entropy))}
    assert layers(Entropy(), 80, 1000, 3, shared) == [120, 30, 90]
    assert layers(Entropy(), 80, 100, 3, shared) == [100, 40, 100]
    assert layers(Entropy(least=0.5), 80, 1000, 3, shared)[1] == 40
    assert layers(Entropy(), 80, 1000, 3, {}) == [80] * 3
    assert layers(Entropy(), 80, 1000, 3, {"entropy": {0: entropy[0]}}) == [80] * 3
