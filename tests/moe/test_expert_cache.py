"""Hits of a memory of experts against an ordered dictionary, and a router that learns from them."""

from collections import OrderedDict

import pytest
import torch

from pikv_core.errors import UsageError
from pikv_core.moe import create_moe, create_moe_router
from pikv_core.moe.expert_cache import lru_hits
from pikv_core.moe.latency import measure_latencies


def replay(experts_SK, capacity, mask_S):
    held, hits = OrderedDict(), []
    for experts, real in zip(experts_SK.tolist(), mask_S.tolist()):
        row = []
        for expert in experts:
            row.append(real and expert in held)
            if real:
                held[expert] = True
                held.move_to_end(expert)
                if len(held) > capacity:
                    held.popitem(last=False)
        hits.append(row)
    return hits


@pytest.mark.parametrize("num_experts", [1, 3, 8])
@pytest.mark.parametrize("padded", [False, True])
def test_hits_are_those_of_an_ordered_dictionary(num_experts, padded):
    generator = torch.Generator().manual_seed(num_experts)
    for capacity in range(1, num_experts + 1):
        experts = torch.randint(num_experts, (4, 17, 2), generator=generator)
        mask = torch.rand(4, 17, generator=generator) < 0.7 if padded else None
        found = lru_hits(experts, num_experts, capacity, mask)
        real = torch.ones(4, 17, dtype=torch.bool) if mask is None else mask
        assert found.tolist() == [replay(row, capacity, real_S) for row, real_S in zip(experts, real)]


def test_a_memory_of_all_experts_misses_each_once():
    experts = torch.randint(5, (1, 200, 2), generator=torch.Generator().manual_seed(0))
    assert int((~lru_hits(experts, 5, 5)).sum()) == 5


def test_the_router_learns_its_hits_after_a_step_and_tells_them():
    torch.manual_seed(0)
    router, x = create_moe_router("pikv", 8, 6, 2, cache_experts=2), torch.randn(3, 20, 8)
    routing = router(x)
    hits = lru_hits(routing.experts.view(3, 20, 2), 6, 2)
    assert router.get_stats()["expert_hit_rate"] == pytest.approx(float(hits.float().mean()))
    assert router.hits.sum() == 0
    router.end_step()
    per_expert = [int(hits[routing.experts.view(3, 20, 2) == expert].sum()) for expert in range(6)]
    assert router.hits.tolist() == per_expert and router.accesses.tolist() == routing.expert_tokens.tolist()
    router.end_step()
    assert router.hits.tolist() == per_expert
    router.eval()(x)
    router.end_step()
    assert router.hits.tolist() == per_expert
    router.reset_stats()
    assert router.get_stats()["expert_hit_rate"] is None


def test_preferring_hits_raises_them():
    torch.manual_seed(0)
    x, rates = torch.randn(4, 64, 8), {}
    for weight in (0.0, 8.0):
        torch.manual_seed(1)
        router = create_moe_router("pikv", 8, 8, 2, cache_experts=3, hit_weight=weight, latency_weight=0.0)
        for _ in range(10):
            router(x)
            router.end_step()
        router.reset_stats()
        router.eval()(x)
        rates[weight] = router.get_stats()["expert_hit_rate"]
    assert rates[8.0] > rates[0.0] + 0.1


def test_a_memory_larger_than_the_layer_is_refused():
    with pytest.raises(UsageError, match="cache_experts: expected from 1 to the 4 experts, got 5"):
        create_moe_router("pikv", 8, 4, 2, cache_experts=5)


@pytest.mark.parametrize("rank", [None, 2])
def test_latencies_are_measured_for_every_expert(rank):
    moe = create_moe("pikv", 8, 4, 2, rank=rank)
    latencies = measure_latencies(moe, num_tokens=4, repeats=3)
    assert len(latencies) == 4 and min(latencies) > 0
    moe.gate.observe_latency(latencies)
    assert moe.gate.get_stats()["latency_s"] == pytest.approx(latencies, rel=1e-4)
