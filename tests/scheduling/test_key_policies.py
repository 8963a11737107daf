"""Policies that look at keys, at positions alone, or at nothing."""

import math

import pytest
import torch
from scheduling import references
from scheduling.synthetic import World, make_tokens, observe_and_score

from pikv_core.observation import LayerRun
from pikv_core.scheduling.keydiff import KeyDiff
from pikv_core.scheduling.knorm import KNorm
from pikv_core.scheduling.random import Random
from pikv_core.scheduling.window import Window


@pytest.mark.parametrize(("policy", "reference"), [(KNorm(), references.knorm), (KeyDiff(), references.keydiff)])
def test_equals_plain_loops_over_real_tokens_alone(policy, reference):
    world = World(padding=(0, 9))
    score = observe_and_score(policy, world)
    for row, pad in enumerate(world.padding):
        for head in range(world.num_heads):
            expected = torch.tensor(reference(world.keys[row, head, pad:].tolist()), dtype=torch.float64)
            torch.testing.assert_close(score[row, head, pad:].double(), expected, rtol=1e-5, atol=1e-6)


def test_keydiff_bears_empty_slots_and_zero_keys():
    world = World()
    world.keys[:, :, :3] = 0
    assert not observe_and_score(KeyDiff(), world).isnan().any()


def test_window_keeps_the_newest():
    world = World()
    score = observe_and_score(Window(), world)
    assert torch.equal(score.topk(6).indices.sort().values[1, 0], torch.arange(world.shape[3] - 6, world.shape[3]))


def random_scores(seed=0, layer=0, num_heads=4, num_tokens=4096):
    world = World(padding=(0,), steps=(1,), num_heads=num_heads)
    tokens = make_tokens(world, LayerRun(layer, 32), {})
    tokens = type(tokens)(**{**vars(tokens), "position": torch.arange(num_tokens).expand(1, num_heads, -1)})
    return Random(seed).score(tokens)[0]


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
@pytest.mark.parametrize("layer", [0, 7])
def test_random_is_even(seed, layer):
    score = random_scores(seed, layer)
    assert score.min() >= 0 and score.max() < 1
    for head in score:
        counts = torch.histc(head, bins=64, min=0, max=1)
        chi_square = ((counts - 64) ** 2 / 64).sum().item()
        assert abs(chi_square - 63) < 5 * math.sqrt(2 * 63), f"{chi_square} of 63 degrees of freedom"


def test_random_differs_by_head_layer_and_seed_and_not_by_call():
    score = random_scores()
    assert torch.equal(random_scores(), score)
    others = torch.cat((score, random_scores(layer=1), random_scores(seed=1)))
    correlation = torch.corrcoef(others) - torch.eye(len(others))
    assert correlation.abs().max() < 5 / math.sqrt(score.shape[1])


def test_random_knows_a_head_that_is_shown_alone():
    world = World()
    together = observe_and_score(Random(), world)
    alone = observe_and_score(Random(), world.row(0, heads=slice(1, 2)), heads=torch.ones(1, 1, dtype=torch.int64))
    assert torch.equal(alone[0, 0], together[0, 1])
