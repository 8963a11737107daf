"""What every policy owes the cache, whatever it does."""

import pytest
import torch

from pikv_core.components import Component, build
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Evictor, Policy, Tokens


def tokens_of(policy, S=32, capacity=8):
    generator = torch.Generator().manual_seed(0)
    columns = {name: torch.rand(2, 2, S, generator=generator) for name in policy.columns}
    position = torch.arange(S, dtype=torch.int32).expand(2, 2, S).clone()
    return Tokens(position, columns, torch.full((2,), S), torch.full((2,), capacity))


@pytest.mark.parametrize("name", POLICIES.names())
def test_policy_contract(name):
    policy = build(POLICIES, Component(name))
    assert isinstance(policy, Policy) and policy.name == name and type(policy).__doc__
    if not isinstance(policy, Evictor):
        return
    tokens = tokens_of(policy)
    score = policy.score(tokens)
    assert score.shape == tokens.position.shape and not score.isnan().any()
    shuffle = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    mixed = Tokens(
        tokens.position[:, :, shuffle],
        {column: x[:, :, shuffle] for column, x in tokens.columns.items()},
        tokens.num_seen,
        tokens.capacity,
    )
    assert torch.equal(policy.score(mixed), score[:, :, shuffle]), "a score must not depend on the slot"
    assert policy.needs_mass == (type(policy).observe is not Evictor.observe)
