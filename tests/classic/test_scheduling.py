"""Schedulers against brute force: what stays, what is attended to, what is counted."""

import numpy as np
import pytest
import torch

from pikv_core.classic import CacheSchedulingManager, H2OScheduler, LRUScheduler, QUESTScheduler, SchedulingPolicy
from pikv_core.errors import PiKVError, RecipeError, UsageError
from pikv_core.scheduling import POLICIES

B, HIDDEN = 2, 24


def draw(num_tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, num_tokens, HIDDEN, generator=generator) for _ in range(3)]


def attention(query, keys):
    """Return softmax [T,S] of one row in float64, causal over the last T of S tokens."""
    logits = query.double().numpy() @ keys.double().numpy().T / np.sqrt(HIDDEN)
    T, S = logits.shape
    logits[np.arange(S)[None] > np.arange(S - T, S)[:, None]] = -np.inf
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def test_every_policy_of_the_registry_has_a_name():
    assert {policy.value for policy in SchedulingPolicy} == {*POLICIES.names()}
    assert SchedulingPolicy.STREAMING_LLM.value == "streaming-llm" and SchedulingPolicy.NONE is SchedulingPolicy.FULL


@pytest.mark.parametrize("policy", list(SchedulingPolicy), ids=lambda policy: policy.value)
def test_a_policy_keeps_the_cache_size_or_says_why_not(policy):
    keys, values, queries = draw(40)
    try:
        manager = CacheSchedulingManager(16, HIDDEN, policy)
        manager.update_cache(keys, values, {"queries": queries})
    except PiKVError as error:
        assert policy.value in {
            "duo-attention",
            "expected-attention",
            "fastv",
            "flexgen",
            "kvzip",
            "learned-scorer",
            "moe-router",
            "oracle",
        }
        assert policy.value in error.message and error.hint
        return
    for step in range(5):
        manager.update_cache(*(x[:, :1] for x in draw(1, step)[:2]), {"queries": queries[:, :1]})
    stats = manager.get_cache_stats()
    num_kept = 45 if policy.value in ("full", "quest", "expert-shards") else 16
    assert stats["current_size"] == num_kept and stats["evictions"] == B * (45 - num_kept)
    assert stats["full_bytes"] == 2 * B * 45 * HIDDEN * 4 and stats["policy"] == policy.value
    assert stats["events"] == []
    held, _ = manager.get_cached_data()
    places = manager.get_cached_positions()[:, 0]
    assert held.shape == (B, num_kept, HIDDEN) and (places.diff(dim=-1) > 0).all()
    seen = torch.cat([keys, *(draw(1, step)[0] for step in range(5))], dim=1)
    assert torch.equal(held, seen.gather(1, places.long()[..., None].expand_as(held)))
    least = 2 * B * num_kept * HIDDEN * 4
    assert least <= stats["resident_bytes"] < least * 1.7


def test_lru_without_queries_keeps_the_newest():
    manager = LRUScheduler(cache_size=8, hidden_size=HIDDEN)
    keys, values, _ = draw(30)
    for token in range(30):
        assert manager.update_cache(keys[:, token : token + 1], values[:, token : token + 1]) is None
    assert torch.equal(manager.get_cached_data()[0], keys[:, 22:])
    assert torch.equal(manager.get_cached_data()[1], values[:, 22:])
    asked, hits = sum(range(1, 31)), sum(min(token, 9) for token in range(1, 31))
    assert manager.get_cache_stats()["hit_rate"] == pytest.approx(hits / asked)


def test_lru_keeps_what_attention_used_last():
    keys = torch.eye(HIDDEN)[None, :10] * 20
    manager = LRUScheduler(cache_size=6, hidden_size=HIDDEN)
    for token in range(10):
        wanted = keys[:, 1:2] if token > 1 else keys[:, token : token + 1]  # from the third step on, token 1
        one = keys[:, token : token + 1]
        manager.update_cache(one, one, {"queries": wanted})
    assert manager.get_cached_positions()[0, 0].tolist() == [1, 5, 6, 7, 8, 9]


def test_h2o_keeps_heavy_hitters_and_the_newest_by_brute_force():
    keys, values, queries = draw(40, 4)
    manager = H2OScheduler(cache_size=15, hidden_size=HIDDEN, heavy_ratio=0.2, recent_ratio=0.1)
    output = manager.update_cache(keys, values, {"queries": queries})
    for row in range(B):
        weights = attention(queries[row], keys[row])
        mass = weights.sum(axis=0)
        heavy = np.argsort(-mass[:35])[:10]
        assert manager.get_cached_positions()[row, 0].tolist() == sorted([*heavy, *range(35, 40)])
        np.testing.assert_allclose(output[row], weights @ values[row].double().numpy(), rtol=1e-4, atol=1e-5)
    kept = manager.get_cached_data()
    step = draw(1, 5)
    output = manager.update_cache(*step[:2], {"queries": step[2]})
    for row in range(B):
        held, read = (torch.cat([x[row], new[row]]) for x, new in zip(kept, step))
        expected = attention(step[2][row], held) @ read.double().numpy()
        np.testing.assert_allclose(output[row], expected, rtol=1e-4, atol=1e-5)


def test_quest_drops_nothing_and_reads_the_best_pages_by_brute_force():
    keys, values, queries = draw(160, 6)
    manager = QUESTScheduler(cache_size=32, hidden_size=HIDDEN, page_tokens=8)
    manager.update_cache(keys, values, {"queries": queries})
    step = draw(1, 7)
    output = manager.update_cache(*step[:2], {"queries": step[2]})
    for row in range(B):
        held, read = (torch.cat([x[row], new[row]]).double() for x, new in zip((keys, values), step))
        query = step[2][row].double()
        pages = [range(start, min(start + 8, 161)) for start in range(0, 161, 8)]
        bounds = [(held[page].amin(0), held[page].amax(0)) for page in pages]
        promise = [float(torch.maximum(query[0] * low, query[0] * high).sum()) for low, high in bounds]
        best = sorted(token for number in np.argsort(promise)[-4:] for token in pages[number])
        logits = (held[best] @ query[0]) / np.sqrt(HIDDEN)
        np.testing.assert_allclose(output[row, 0], logits.softmax(0) @ read[best], rtol=1e-4, atol=1e-5)
    stats = manager.get_cache_stats()
    assert stats["evictions"] == 0 and stats["hit_rate"] == 1.0 and stats["current_size"] == 161


def test_the_hit_rate_counts_the_positions_asked_for():
    manager = CacheSchedulingManager(8, HIDDEN, SchedulingPolicy.STREAMING_LLM)
    keys, values, _ = draw(20)
    manager.update_cache(keys, values, {"positions": []})
    assert manager.get_cache_stats()["hit_rate"] == 0.0
    one = keys[:, :1]
    manager.update_cache(one, one, {"positions": [0, 3, 4, 15, 16, 20]})  # held: 0-3 and 16-19, and 20 itself
    assert manager.get_cache_stats()["hit_rate"] == pytest.approx(4 / 6)
    manager.update_cache(one, one, {"positions": torch.tensor([5, 6])})
    assert manager.get_cache_stats()["hit_rate"] == pytest.approx(4 / 8)
    for wrong in (23, -1):
        with pytest.raises(UsageError, match="positions are 0 to 22, got"):
            manager.update_cache(one, one, {"positions": [0, wrong]})
    manager.update_cache(one, one, {"positions": [22]})


def test_layers_and_heads_are_kept_apart():
    manager = CacheSchedulingManager(6, HIDDEN, "streaming-llm", sinks=1)
    keys, values, _ = draw(10)
    heads = [x.unflatten(2, (3, 8)).transpose(1, 2) for x in (keys, values)]
    manager.update_cache(*heads, {"layer_idx": 4})
    manager.update_cache(2 * heads[0][:, :, :3], heads[1][:, :, :3], {"layer_idx": 1})
    assert manager.get_cached_data()[0].shape == (B, 3, 3, 8)
    assert torch.equal(manager.get_cached_data(1)[0], 2 * heads[0][:, :, :3])
    assert torch.equal(manager.get_cached_data(4)[0], heads[0][:, :, [0, 5, 6, 7, 8, 9]])
    stats = manager.get_cache_stats()
    assert stats["current_size"] == 4.5 and stats["evictions"] == B * 3 * 4
    assert stats["full_bytes"] == 2 * 4 * B * HIDDEN * 13


KEYS = torch.randn(B, 5, HIDDEN)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: CacheSchedulingManager(8, HIDDEN, "h3o"), "did you mean 'h2o'"),
        (lambda: CacheSchedulingManager(0, HIDDEN, "h2o"), "a whole number of tokens of at least 1"),
        (lambda: CacheSchedulingManager(8, HIDDEN, "h2o", heavy=1), "has no option 'heavy'"),
        (lambda: H2OScheduler(8, HIDDEN, 0.0, 0.0), "are no proportion"),
        (lambda: H2OScheduler(8, HIDDEN).update_cache(KEYS, KEYS), "policy 'h2o' goes by attention"),
        (lambda: LRUScheduler(8, HIDDEN).update_cache(KEYS, KEYS, {"querys": KEYS}), "no key 'querys'"),
        (lambda: LRUScheduler(8, HIDDEN).update_cache(KEYS[0], KEYS[0]), "keys are [5, 24]"),
        (lambda: LRUScheduler(8, HIDDEN).update_cache(KEYS, KEYS[:, :2]), "in the same shape"),
        (lambda: LRUScheduler(8, HIDDEN).update_cache(KEYS, KEYS, {"queries": KEYS[:, :2]}), "queries are"),
        (lambda: LRUScheduler(8, HIDDEN).get_cached_data(), "holds no tokens yet"),
    ],
)
def test_mistakes_are_told(make, message):
    with pytest.raises((UsageError, RecipeError)) as error:
        make()
    assert message in f"{error.value.message}; {error.value.hint}"
