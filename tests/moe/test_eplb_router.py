"""Balance by copies: replication is optimal, placement near it, and choices spread evenly over copies."""

import itertools

import numpy as np
import pytest
import torch

from pikv_core.errors import UsageError
from pikv_core.moe import create_moe_router
from pikv_core.moe.routers.eplb import place, replicate, spread

E, K, D = 6, 2, 16


def loads(num, seed):
    """Return [num] float64 loads, skewed as those of real routers."""
    return torch.from_numpy(np.random.default_rng(seed).pareto(1.2, num) + 0.01)


@pytest.mark.parametrize("seed", range(12))
def test_replication_has_the_lowest_highest_load_of_all(seed):
    num_experts, num_slots = 4, 4 + seed % 5
    load = loads(num_experts, seed)
    experts = replicate(load, num_slots)
    assert len(experts) == num_slots and set(experts.tolist()) == set(range(num_experts))
    best = min(
        max(value / copies for value, copies in zip(load.tolist(), counts))
        for counts in itertools.product(range(1, num_slots), repeat=num_experts)
        if sum(counts) == num_slots
    )
    assert (load / experts.bincount()).max().item() == pytest.approx(best)


def optimal_placement(load, num_ranks):
    """Return the lowest highest load of a rank over all placements with as many slots on each."""
    slots = range(len(load))
    if num_ranks == 1:
        return sum(load)
    per_rank, best = len(load) // num_ranks, float("inf")
    for first in itertools.combinations(slots, per_rank):
        rest = [load[slot] for slot in slots if slot not in first]
        best = min(best, max(sum(load[slot] for slot in first), optimal_placement(rest, num_ranks - 1)))
    return best


@pytest.mark.parametrize(("num_slots", "num_ranks"), [(6, 2), (8, 2), (6, 3), (8, 4), (4, 4), (5, 1)])
@pytest.mark.parametrize("seed", range(4))
def test_placement_is_within_a_third_of_the_optimum(num_slots, num_ranks, seed):
    load = loads(num_slots, seed)
    ranks = place(load, num_ranks)
    assert ranks.bincount(minlength=num_ranks).tolist() == [num_slots // num_ranks] * num_ranks
    highest = torch.zeros(num_ranks, dtype=load.dtype).index_add_(0, ranks, load).max().item()
    assert highest <= 4 / 3 * optimal_placement(load.tolist(), num_ranks) + 1e-12


def test_placement_of_a_known_case():
    assert place(torch.tensor([1.0, 9.0, 4.0, 6.0]), 2).tolist() == [0, 0, 1, 1]


def test_choices_are_spread_evenly_over_the_copies_of_their_expert():
    torch.manual_seed(0)
    chosen = torch.rand(301, E).topk(K).indices
    experts_of_slot = torch.tensor([3, 0, 1, 3, 2, 4, 3, 5, 0])
    slots = spread(chosen, experts_of_slot)
    assert torch.equal(experts_of_slot[slots], chosen)
    counts = slots.reshape(-1).bincount(minlength=9)
    for expert in range(E):
        of_expert = counts[experts_of_slot == expert]
        assert of_expert.max() - of_expert.min() <= 1
    assert spread(chosen[:0], experts_of_slot).shape == (0, K)


def test_it_routes_as_base():
    torch.manual_seed(0)
    eplb, base = create_moe_router("eplb", D, E, K), create_moe_router("base", D, E, K)
    base.weight.data.copy_(eplb.weight)
    x = torch.randn(3, 7, D)
    got, expected = eplb(x), base(x)
    assert torch.equal(got.weights, expected.weights) and torch.equal(got.experts, expected.experts)
    assert torch.equal(got.loss, expected.loss)


def test_the_measured_load_is_a_decayed_count_of_real_tokens():
    torch.manual_seed(0)
    router = create_moe_router("eplb", D, E, K, decay=0.5)
    expected = np.zeros(E)
    for num_tokens in (5, 40, 0, 9):
        x, mask = torch.randn(num_tokens, D), torch.rand(num_tokens) < 0.8
        with torch.inference_mode():
            routing = router(x, mask=mask)
        expected = 0.5 * expected + routing.experts[mask].reshape(-1).bincount(minlength=E).double().numpy()
    np.testing.assert_allclose(router.load.numpy(), expected, rtol=1e-6)
    assert router.get_stats()["measured_load"] == pytest.approx((expected / expected.sum()).tolist())


def test_copies_balance_the_ranks_of_a_skewed_router():
    torch.manual_seed(0)
    router = create_moe_router("eplb", D, E, K, num_slots=12, num_ranks=4)
    router.load.copy_(torch.tensor([80.0, 30, 10, 4, 2, 2]))
    plan, plain = router.plan(12, 4), router.plan(6, 3)
    assert plan.load.sum().item() == pytest.approx(1)
    assert plain.load_max_over_mean == pytest.approx(3 * 82 / 128)  # one copy each: the hot expert and a light one
    assert plan.load_max_over_mean < 1.2
    stats = router.get_stats()
    assert stats["slot_experts"] == plan.experts.tolist() and stats["slot_ranks"] == plan.ranks.tolist()
    assert stats["rank_load_max_over_mean"] == pytest.approx(plan.load_max_over_mean)


def test_before_anything_is_measured_copies_are_even():
    plan = create_moe_router("eplb", D, E, K).plan(2 * E, 2)
    assert plan.experts.bincount().tolist() == [2] * E and plan.load_max_over_mean == pytest.approx(1)


def test_the_load_is_saved_and_stays_float32():
    torch.manual_seed(0)
    router = create_moe_router("eplb", D, E, K)
    router(torch.randn(300, D))
    other = create_moe_router("eplb", D, E, K)
    other.load_state_dict(router.state_dict())
    assert torch.equal(other.load, router.load)
    moved = other.to(torch.bfloat16)
    assert moved.weight.dtype == torch.bfloat16 and torch.equal(moved.load, router.load)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_slots": 5}, "num_slots: 5 slots do not hold 6 experts"),
        ({"num_slots": 9, "num_ranks": 2}, "num_ranks: 9 slots do not divide evenly by 2 ranks"),
        ({"num_ranks": 0}, "num_ranks: 6 slots do not divide evenly by 0 ranks"),
        ({"decay": 1.5}, "decay: expected a number from 0 to 1, got 1.5"),
    ],
)
def test_impossible_plans_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        create_moe_router("eplb", D, E, K, **options)
