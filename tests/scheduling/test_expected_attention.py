"""Expected attention against its formula in float64, with rotations written out as matrices."""

import dataclasses
import math

import pytest
import torch
import transformers
from scheduling.synthetic import World, make_tokens, observe_and_score, show
from small_models import use_stock_attention

from pikv_core.cache import PiKVCache
from pikv_core.cache.rotary import Rotary
from pikv_core.components import Component
from pikv_core.errors import PiKVError
from pikv_core.scheduling.expected_attention import ExpectedAttention
from pikv_core.schema import CacheRecipe


def rotations(position, head_dim, base):
    """Return matrices [N,D,D] float64 that turn a key, in halves as llama does, to each position [N]."""
    half = head_dim // 2
    matrices = torch.zeros(len(position), head_dim, head_dim, dtype=torch.float64)
    for n, at in enumerate(position.tolist()):
        for i in range(half):
            angle = at * base ** (-i / half)
            matrices[n, i, i] = matrices[n, i + half, i + half] = math.cos(angle)
            matrices[n, i, i + half], matrices[n, i + half, i] = -math.sin(angle), math.sin(angle)
    return matrices


def reference(queries, keys, values, num_seen, policy, base):
    """Return the score [S] of one key/value head: queries [R,N,D] un-rotated, keys, values [S,D] of all positions."""
    D = keys.shape[-1]
    turn = rotations(torch.arange(num_seen, num_seen + policy.future), D, base).mean(0)
    expected = torch.zeros(len(keys) - policy.sinks, dtype=torch.float64)
    for query in queries:
        mean = turn @ query.mean(0)
        covariance = turn @ torch.cov(query.T, correction=0) @ turn.T
        logits = [mean @ k / math.sqrt(D) + k @ covariance @ k / (2 * D) for k in keys[policy.sinks :]]
        expected += torch.stack(logits).softmax(0) / len(queries)
    score = (expected + policy.epsilon) * values[policy.sinks :].norm(dim=-1)
    return torch.cat((torch.full((policy.sinks,), torch.inf, dtype=torch.float64), score))


@pytest.fixture
def world(small_model):
    return World(steps=(24, 1, 9, 1), rotary=Rotary.of(small_model("llama")))


@pytest.mark.parametrize("policy", [ExpectedAttention(), ExpectedAttention(sinks=1, future=7, epsilon=0.0)])
def test_score_is_the_formula(policy, world):
    score = observe_and_score(policy, world)
    _, G, R, S, D = world.shape
    for row, pad in enumerate(world.padding):
        position = world.position[row, pad:]
        back = rotations(-position, D, 10000.0)
        queries = torch.einsum("nij,hnj->hni", back, world.queries[row, :, pad:])[:, policy.sinks :]
        for head in range(G):
            expected = reference(
                queries[head * R : (head + 1) * R],
                world.keys[row, head, pad:],
                world.values[row, head, pad:],
                S - pad,
                policy,
                10000.0,
            )
            torch.testing.assert_close(score[row, head, pad:].double(), expected, rtol=1e-3, atol=1e-6)


def test_score_is_the_same_however_the_prompt_was_parted(world):
    together = World(steps=(35,), rotary=world.rotary)
    parted = World(steps=(7, 1, 12, 15), rotary=world.rotary)
    policy = ExpectedAttention()
    torch.testing.assert_close(
        observe_and_score(policy, parted), observe_and_score(policy, together), rtol=1e-4, atol=1e-6
    )


def test_constant_queries_have_no_covariance(world):
    world.padding, world.queries = (0, 0), torch.zeros_like(world.queries)
    world.position = torch.arange(world.shape[3]).expand(2, -1)
    score = observe_and_score(ExpectedAttention(epsilon=0.0), world)
    S = world.shape[3]
    torch.testing.assert_close(score[:, :, 4:].double(), world.values[:, :, 4:].norm(dim=-1) / (S - 4))


def test_a_prompt_of_sinks_alone_is_kept(world):
    short = World(padding=(0, 2), steps=(4,), rotary=world.rotary)
    real = (short.position >= 0)[:, None].expand(-1, 2, -1)
    assert torch.isinf(observe_and_score(ExpectedAttention(), short)[real]).all()


def test_without_the_models_rotations_it_says_what_to_call(world):
    world.rotary = None
    with pytest.raises(PiKVError, match="needs the rotary embedding") as error:
        observe_and_score(ExpectedAttention(), world)
    assert "cache.attach(model)" in error.value.hint


def parted(tokens):
    """Return the same tokens, each row's heads as rows of one head."""
    by_pair = {name: getattr(tokens, name).flatten(0, 1)[:, None] for name in ("position", "capacity", "head")}
    num_heads = tokens.position.shape[1]
    return dataclasses.replace(
        tokens,
        **by_pair,
        num_seen=tokens.num_seen.repeat_interleave(num_heads),
        row=tokens.row.repeat_interleave(num_heads),
        keys=lambda: tokens.keys().flatten(0, 1)[:, None],
        values=lambda: tokens.values().flatten(0, 1)[:, None],
    )


def test_heads_of_a_batch_may_be_scored_apart(world):
    run = world.layer_runs()[0]
    tokens = make_tokens(world, run, show(ExpectedAttention(), world, run))
    score = ExpectedAttention().score(parted(tokens))
    torch.testing.assert_close(score[:, 0], ExpectedAttention().score(tokens).flatten(0, 1))


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
@torch.no_grad()
def test_a_models_cache_keeps_what_its_queries_say(arch, small_model):
    model = small_model(arch)
    ids = torch.randint(1, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    policy = ExpectedAttention(future=64)
    recipe = CacheRecipe(policy=Component("expected-attention", {"future": 64}), budget=12)
    cache = PiKVCache.for_model(model, recipe)
    model(ids, attention_mask=mask, past_key_values=cache)

    use_stock_attention(model)
    queries = {}
    attentions = [module for module in model.modules() if hasattr(module, "q_proj")]
    hooks = [
        (getattr(x, "q_norm", None) or x.q_proj).register_forward_hook(
            lambda _, inputs, out, index=x.layer_idx: queries.update({index: out})
        )
        for x in attentions
    ]
    for row, pad in enumerate((0, 9)):
        stock = transformers.DynamicCache()
        model(ids[row : row + 1, pad:], past_key_values=stock)
        for index, layer in enumerate(stock.layers):
            keys, values = layer.keys[0].double(), layer.values[0].double()
            own = queries[index].view(40 - pad, 2, 2, keys.shape[-1]).double()
            for head in range(2):
                query = own[policy.sinks :, head].transpose(0, 1)
                score = reference(query, keys[head], values[head], 40 - pad, policy, 10000.0)
                best = sorted(range(40 - pad), key=lambda s: score[s], reverse=True)[:12]
                position = cache.positions[index][row, head]
                assert position[position >= 0].sort().values.tolist() == sorted(best), (row, index, head)
    for hook in hooks:
        hook.remove()
