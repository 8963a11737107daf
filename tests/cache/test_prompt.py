"""A prompt's attention: its statistics are those of the whole matrix, which is never made, and heads that stream."""

import math

import pytest
import torch
from largest_made import largest_made
from single_layer import single_layer

from pikv_core.components import Component, build
from pikv_core.observation import LayerRun
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.duo_attention import DuoAttention

B, G, R, D = 2, 2, 2, 16
SCALE = D**-0.5
DUO = DuoAttention(sinks=3, recent=9, streaming_prefill=True)


def tokens(T, seed=0):
    """Return queries [B,H,T,D], and keys and values [B,G,T,D]."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(B, G * R, T, D, generator=generator)
    return query, *torch.randn(2, B, G, T, D, generator=generator)


def padded(T, *lengths):
    """Return which of T tokens are no padding, bool [B,T], given each row's number."""
    return torch.arange(T) >= T - torch.tensor(lengths)[:, None]


def matrix(query, keys, visible):
    """Return the attention [B,G,R,N,S] in float64 under the mask [B,1|G,N,S], 0 where a query sees nothing."""
    logits = query.double().unflatten(1, (G, R)) @ keys.double().mT[:, :, None] * SCALE
    return logits.masked_fill(~visible[:, :, None], -torch.inf).softmax(dim=-1).nan_to_num(0.0)


def causal(T, is_token=None):
    visible = torch.ones(T, T, dtype=torch.bool).tril().expand(B, 1, T, T)
    return visible if is_token is None else visible & is_token[:, None, None] & is_token[:, None, :, None]


def fed(policy, budget, query, keys, values, is_token=None, run=None, held=False):
    """Return a layer after its first prompt, and what it returned."""
    layer = single_layer(policy, budget, run=run or LayerRun(0, 1))
    if held:
        layer.hold()
    layer.update(keys, values)
    return layer, layer.attend(query, SCALE, is_token)


STATISTICS = {
    "h2o": ("mass", lambda rows: rows.mean(dim=2).sum(dim=2)),
    "snapkv": ("votes", lambda rows: rows.mean(dim=2)[:, :, -64:].sum(dim=2)),
    "tova": ("attention", lambda rows: rows[:, :, :, -1].mean(dim=(1, 2))[:, None].expand(B, G, -1)),
    "lfu": ("num_uses", lambda rows: (rows.mean(dim=2) > rows.mean(dim=2).count_nonzero(-1)[..., None] ** -1.0).sum(2)),
}


@pytest.mark.parametrize("T", [2, 63, 300, 1100])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_are_those_of_the_matrix(name, is_padded, T):
    query, keys, values = tokens(T)
    is_token = padded(T, T, T // 2 + 1) if is_padded else None
    layer, _ = fed(build(POLICIES, Component(name)), 0.5, query, keys, values, is_token, held=True)
    column, definition = STATISTICS[name]
    found = layer.lanes[0].tail.columns()[column]
    expected = definition(matrix(query, keys, causal(T, is_token)))
    error = (found - expected).abs()
    assert error.max() < 1e-4, f"max {error.max():.3g}, mean {error.mean():.3g}"


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("policy", ["h2o", "kvzip", "snapkv", "tova", "lfu", "duo-attention"])
def test_no_matrix_of_all_queries_and_tokens_is_made(policy, is_padded):
    T = 2048
    own = DUO if policy == "duo-attention" else build(POLICIES, Component(policy))
    run = LayerRun(0, 1, fitted={"gates": torch.tensor([[0.1, 0.9]])})
    given = (*tokens(T), padded(T, T, T - 9) if is_padded else None, run, own.looks is not None)
    assert largest_made(lambda: fed(own, 0.5, *given)) < T * T  # of one head; the matrix has B·H times as many


def test_gradients_pass_through_a_prompt_that_is_observed():
    query, keys, values = (x.requires_grad_() for x in tokens(40))
    layer, output = fed(build(POLICIES, Component("h2o")), 1.0, query, keys, values)
    found = torch.autograd.grad(output.square().sum(), [query, keys, values])
    attended = matrix(query, keys, causal(40)) @ values.double()[:, :, None]
    expected = torch.autograd.grad(attended.square().sum(), [query, keys, values])
    for own, other in zip(found, expected):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
    assert not any(column.requires_grad for column in layer.lanes[0].tail.columns().values())


def reaches(gates, num_seen, budget):
    """Return sinks and newest tokens [B,G] that the policy leaves after `num_seen` [B] tokens."""
    run = LayerRun(0, 1, num_kv_heads=G, fitted={"gates": gates})
    mean = torch.tensor([math.floor(budget * n + 1e-6) for n in num_seen])
    held = DUO.capacity(mean, torch.tensor(num_seen), run)
    sinks = (held * DUO.sinks // (DUO.sinks + DUO.recent)).clamp(max=DUO.sinks)
    return sinks, held - sinks


def sees(position, held, sinks, recent):
    """Return bool [B,G,N,S]: queries at `position` [B,N] and tokens at `held` [B,G,S], -1 for none."""
    ahead = position[:, None, :, None] - held[:, :, None]
    near = (held[:, :, None] < sinks[..., None, None]) | (ahead < recent[..., None, None])
    return near & (ahead >= 0) & (held[:, :, None] >= 0)


@pytest.mark.parametrize("gates", [[[0.2, 0.7]], [[0.7, 0.7]]])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("budget", [0.1, 0.55])
def test_streaming_heads_see_sinks_and_window(gates, is_padded, held, budget):
    T = 200
    query, keys, values = tokens(T)
    gates, num_seen = torch.tensor(gates), [T, 150] if is_padded else [T, T]
    is_token = padded(T, *num_seen) if is_padded else None
    run = LayerRun(0, 1, fitted={"gates": gates})
    layer, output = fed(DUO, budget, query, keys, values, is_token, run, held)
    position = (torch.arange(T) - T + torch.tensor(num_seen)[:, None]).clamp(min=-1)
    visible = sees(position, position[:, None].expand(B, G, T), *reaches(gates, num_seen, budget))
    if held:
        layer.compress()
    rows = matrix(query, keys, visible)
    expected = (rows @ values.double()[:, :, None]).flatten(1, 2)
    real = position[:, None, :, None] >= 0
    error = ((output - expected) * real).abs()
    assert error.max() < 1e-5, f"max {error.max():.3g}, mean {error.mean():.3g}"
    read, stored = rows[:, :, 0, -1] > 0, layer.positions()
    for row in range(B):
        for head in range(G):  # what stays is what the newest query saw
            kept = stored[row, head][stored[row, head] >= 0].sort().values
            assert torch.equal(kept, position[row][read[row, head]].to(kept.dtype))


def test_a_second_prompt_streams_over_what_is_left_of_the_first():
    gates, budget = torch.tensor([[0.2, 0.7]]), 0.55
    run = LayerRun(0, 1, fitted={"gates": gates})
    layer, _ = fed(DUO, budget, *tokens(120), run=run)
    held = layer.positions()
    old_keys, old_values, _ = layer.retrieve()
    query, keys, values = tokens(30, seed=1)
    layer.update(keys, values)
    output = layer.attend(query, SCALE)
    new = torch.arange(120, 150)
    position = torch.cat([held, new.to(held.dtype).expand(B, G, -1)], dim=2)
    visible = sees(new.expand(B, -1), position, *reaches(gates, [150, 150], budget))
    rows = matrix(query, torch.cat([old_keys, keys], dim=2), visible)
    expected = (rows @ torch.cat([old_values, values], dim=2).double()[:, :, None]).flatten(1, 2)
    assert (output - expected).abs().max() < 1e-5


def test_prompts_are_attended_to_in_full_unless_they_are_to_stream():
    query, keys, values = tokens(100)
    run = LayerRun(0, 1, fitted={"gates": torch.tensor([[0.2, 0.7]])})
    _, output = fed(DuoAttention(sinks=3, recent=9), 0.55, query, keys, values, run=run)
    expected = (matrix(query, keys, causal(100)) @ values.double()[:, :, None]).flatten(1, 2)
    assert (output - expected).abs().max() < 1e-5
