"""Quantised caches under a model: what bits cost in its predictions, what they free, and batches equal to rows."""

import pytest
import torch

from pikv_core.cache import PiKVCache
from pikv_core.components import Component
from pikv_core.schema import CacheRecipe

CODECS = ["int8", "int4", "int2", "fp8", "levels"]
C, T = 400, 6


def codec(name):
    return Component(name, {"residual": 8, **({"num_levels": 2} if name == "levels" else {})})


@torch.inference_mode()
def log_probs(model, recipe, ids, mask=None):
    """Feed a prompt of C tokens, then T more one by one; return log probabilities [B,T+1,V] and the cache."""
    cache = PiKVCache.for_model(model, recipe)
    ones = torch.ones_like(ids) if mask is None else mask
    logits = [model(ids[:, :C], past_key_values=cache, attention_mask=ones[:, :C]).logits[:, -1]]
    for stop in range(C + 1, C + T + 1):
        logits.append(
            model(ids[:, stop - 1 : stop], past_key_values=cache, attention_mask=ones[:, :stop]).logits[:, -1]
        )
    return torch.stack(logits, 1).log_softmax(-1), cache


def some_ids(B=2):
    return torch.randint(1, 97, (B, C + T), generator=torch.Generator().manual_seed(0))


def test_predictions_drift_more_the_fewer_the_bits(small_model):
    model, ids = small_model("llama"), some_ids()
    exact, _ = log_probs(model, CacheRecipe(), ids)
    drift, share = {}, {}
    for name in CODECS:
        found, cache = log_probs(model, CacheRecipe(codec=codec(name)), ids)
        torch.testing.assert_close(
            found[:, 0], exact[:, 0], atol=1e-4, rtol=0
        )  # a prompt is attended in full precision
        drift[name] = (exact.exp() * (exact - found)).sum(-1)[:, 1:].mean().item()
        share[name] = cache.resident_bytes / cache.full_bytes
    assert 0 < drift["int8"] < drift["int4"] / 8 < drift["int2"] / 32
    assert 2 * drift["int8"] < drift["fp8"] < drift["int4"] * 2
    assert 0 < drift["levels"] < drift["int4"]
    assert share["int2"] < share["int4"] < share["int8"] < 1 and share["levels"] < 1


@pytest.mark.parametrize("name", CODECS)
def test_left_padded_rows_stay_near_themselves_alone(small_model, name):
    """Units begin at other tokens in a padded row, so it is only as near as the codec is to full precision."""
    model, ids = small_model("llama"), some_ids()
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    exact, _ = log_probs(model, CacheRecipe(), ids, mask)
    found, _ = log_probs(model, CacheRecipe(codec=codec(name)), ids, mask)
    drift = (exact.exp() * (exact - found)).sum(-1)[:, 1:].mean(-1)
    assert found.isfinite().all()
    assert drift[1] < 4 * drift[0] + 1e-6


def test_the_most_attended_tokens_of_levels_get_the_most_bits(small_model):
    """In each unit of a layer, every token of the first level has had more attention than any of the last."""
    model, ids = small_model("llama"), some_ids(1)
    cache = PiKVCache.for_model(model, CacheRecipe(codec=codec("levels")))
    sums = PiKVCache.for_model(model, CacheRecipe(policy=Component("h2o"), budget=10 * C))  # drops nothing
    with torch.inference_mode():
        output = model(ids[:, :C], past_key_values=cache)
        model(ids[:, :C], past_key_values=sums)
    assert output.logits.isfinite().all()
    for layer, reference in zip(cache.layers, sums.layers):
        mass = reference.lanes[0].tail.columns()["mass"]
        for lane in layer.lanes:
            importance = mass.gather(2, lane.body.position.long()).unflatten(2, (-1, 2, 64))
            assert (importance[:, :, :, 0].amin(dim=(2, 3)) >= importance[:, :, :, 1].amax(dim=(2, 3)) - 1e-4).all()
            kept = torch.cat([lane.body.position, lane.tail.position], dim=2).sort(-1).values
            assert torch.equal(kept, torch.arange(C, dtype=torch.int32).expand_as(kept))
