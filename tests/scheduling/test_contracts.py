"""What every policy owes the cache, whatever it does."""

import pytest
import torch
from scheduling.synthetic import NUM_LAYERS, World, observe_and_score
from small_calibration import networks, routers

from pikv_core.cache.rotary import Rotary
from pikv_core.components import Component, build
from pikv_core.observation import Observer
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Evictor, Policy, Selector


@pytest.fixture
def world(small_model):
    """A run with what calibrated policies and those that need the model's rotations are given."""
    world = World(head_dim=16)
    world.rotary = Rotary.of(small_model("llama"))
    gates = torch.rand(NUM_LAYERS, world.num_heads, generator=torch.Generator().manual_seed(0))
    shape = NUM_LAYERS, world.num_heads, 16
    world.fitted = {"gates": gates, **networks(*shape), **routers(NUM_LAYERS, 16)}
    return world


def evictors():
    return [name for name in POLICIES.names() if issubclass(POLICIES[name], Evictor)]


@pytest.mark.parametrize("name", POLICIES.names())
def test_is_a_documented_policy(name):
    policy = build(POLICIES, Component(name))
    assert isinstance(policy, Policy) and policy.name == name and type(policy).__doc__
    assert isinstance(policy, Evictor | Selector) or type(policy).__mro__[1] is Policy


@pytest.mark.parametrize("name", evictors())
def test_observes_if_and_only_if_it_can(name):
    policy = build(POLICIES, Component(name))
    assert (policy.observes > 0) == (type(policy).observe is not Observer.observe)
    assert policy.sees_queries == (type(policy).observe_queries is not Evictor.observe_queries)


@pytest.mark.parametrize("name", evictors())
def test_score_is_the_same_twice_and_whatever_the_slot(name, world):
    policy = build(POLICIES, Component(name))
    score = observe_and_score(policy, world)
    assert score.shape == (2, 2, world.shape[3]) and score.dtype == torch.float32 and not score.isnan().any()
    assert torch.equal(observe_and_score(policy, world), score)
    slots = torch.randperm(world.shape[3], generator=torch.Generator().manual_seed(1))
    shuffled = observe_and_score(policy, world, slots=slots)
    real = (world.position >= 0)[:, None].expand_as(score)
    torch.testing.assert_close(shuffled[real[:, :, slots]], score[:, :, slots][real[:, :, slots]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", evictors())
def test_a_padded_row_keeps_what_it_would_keep_alone(name, world):
    policy = build(POLICIES, Component(name))
    together = observe_and_score(policy, world)
    for row, pad in enumerate(world.padding):
        alone = observe_and_score(policy, world.row(row))[0]
        order = together[row, :, pad:].argsort(dim=-1, descending=True, stable=True)
        assert torch.equal(order, alone.argsort(dim=-1, descending=True, stable=True)), f"row {row}"


@pytest.mark.parametrize("name", evictors())
def test_a_head_can_be_shown_alone(name, world):
    policy = build(POLICIES, Component(name))
    score = observe_and_score(policy, world.row(0, heads=slice(1, 2)), heads=torch.ones(1, 1, dtype=torch.int64))
    assert score.shape == (1, 1, world.shape[3]) and not score.isnan().any()
