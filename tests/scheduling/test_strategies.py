"""What the router's own strategies keep, by plain counting."""

import dataclasses

import pytest
import torch
from scheduling.synthetic import World, make_tokens

from pikv_core.components import Component, build
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.semantic import Semantic
from pikv_core.scheduling.temporal import Temporal


def tokens_with(keys, capacity):
    """Return the tokens of one row of one head with these keys [S,D]."""
    world = World((0,), (len(keys),), num_heads=1, head_dim=keys.shape[1])
    tokens = make_tokens(world, world.layer_runs()[0], {}, capacity)
    return dataclasses.replace(tokens, keys=lambda: keys[None, None])


def kept(policy, tokens):
    return sorted(policy.score(tokens)[0, 0].topk(int(tokens.capacity)).indices.tolist())


@pytest.mark.parametrize(("name", "num_first"), [("aggressive", 8), ("moderate", 7), ("conservative", 7)])
def test_the_ends_are_parted_as_the_shares_say(name, num_first):
    tokens = tokens_with(torch.randn(40, 4), 12)
    expected = [*range(num_first), *range(40 - 12 + num_first, 40)]
    assert kept(build(POLICIES, Component(name)), tokens) == expected


def test_each_cluster_is_stood_for_and_what_is_like_nothing_stays():
    one, two, odd = torch.eye(8)[:3]
    keys = torch.stack([one] * 10 + [two] * 10)
    keys = keys + 0.01 * torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    keys[6], keys[17] = odd, -odd
    stays = kept(Semantic(clusters=2), tokens_with(keys, 4))
    assert stays == [0, 6, 10, 17]


def test_segments_stay_whole_by_recency_and_repetition():
    a, b = torch.eye(4)[:2]
    keys = torch.stack([a] * 4 + [b] * 4 + [b] * 4 + [a] * 4)  # the end comes back to the beginning
    stays = kept(Temporal(segment=4), tokens_with(keys, 8))
    assert stays == [0, 1, 2, 3, 12, 13, 14, 15]
    assert kept(Temporal(segment=4), tokens_with(torch.stack([a] * 16), 6)) == list(range(10, 16))
