"""What policies declare to go by is what they go by, and a trace that has it not refuses them by name."""

import dataclasses

import pytest
import torch
from scheduling.synthetic import NUM_LAYERS, World, make_tokens, show
from simulation.attention.recorded import NUM_PROMPT, record
from small_calibration import networks, routers

from pikv_core.cache.rotary import Rotary
from pikv_core.components import Component, build
from pikv_core.errors import UsageError
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.allocation.entropy import Entropy
from pikv_core.scheduling.allocation.uniform import Uniform
from pikv_core.scheduling.base import Evictor
from pikv_core.scheduling.knorm import KNorm
from pikv_core.schema import CacheRecipe
from pikv_core.simulation.attention.needs import check_needs
from pikv_core.simulation.attention.replay import Replay


class Undeclared(AssertionError):
    pass


def score(policy, told, small_model):
    """Observe and score in a world that has of keys, values, rotary and calibration what is `told`."""
    world = World(head_dim=16)
    world.rotary = Rotary.of(small_model("llama")) if "rotary" in told else None
    gates = torch.rand(NUM_LAYERS, world.num_heads)
    shape = NUM_LAYERS, world.num_heads, 16
    fitted = {"gates": gates, **networks(*shape), **routers(NUM_LAYERS, 16)}
    world.fitted = fitted if "calibration" in told else {}
    for run in world.layer_runs():
        columns = show(policy, world, run)

    def refuse():
        raise Undeclared

    tokens = make_tokens(world, run, columns)
    policy.capacity(torch.tensor([30, 30]), torch.tensor([31, 31]), run)
    return policy.score(
        dataclasses.replace(
            tokens,
            keys=tokens.keys if "keys" in told else refuse,
            values=tokens.values if "values" in told else refuse,
        )
    )


@pytest.mark.parametrize("name", [name for name in POLICIES.names() if issubclass(POLICIES[name], Evictor)])
def test_a_policy_asks_for_all_that_it_declares_and_nothing_else(name, small_model):
    policy = build(POLICIES, Component(name))
    score(policy, policy.needs, small_model)
    for declared in policy.needs & {"keys", "values", "rotary", "calibration"}:
        with pytest.raises(Exception):  # noqa: B017
            score(policy, policy.needs - {declared}, small_model)


def test_refusals_name_every_policy_and_what_the_trace_holds(small_model, tmp_path):
    trace, _ = record(small_model("llama"), tmp_path / "a.safetensors", vectors=False)
    policies = [build(POLICIES, Component(name)) for name in ("knorm", "h2o", "quest", "kvzip")]
    with pytest.raises(UsageError) as caught:
        check_needs(trace, policies, Uniform())
    assert "policy 'knorm' goes by keys;" in caught.value.message
    assert "policy 'quest' goes by keys, queries;" in caught.value.message
    assert "'kvzip' goes by the attention of a repeated prompt" in caught.value.message
    assert "h2o" not in caught.value.message and "h2o" in caught.value.hint
    assert caught.value.message.endswith("the trace holds attention")
    check_needs(trace, [policies[1]], Entropy())


def test_a_trace_of_a_prompts_end_serves_those_who_look_no_further_back(small_model, tmp_path):
    trace, _ = record(small_model("llama"), tmp_path / "a.safetensors", num_queries=8)
    for name in ("tova", "lru", "window", "oracle", "snapkv"):
        options = {"window": 8} if name == "snapkv" else {}
        policy = Component(name, options)
        check_needs(trace, [build(POLICIES, policy)], Uniform())
        Replay(trace, CacheRecipe(policy=policy, budget=12)).run(4)
    for name in ("h2o", "lfu", "snapkv"):
        with pytest.raises(UsageError, match=rf"policy '{name}' goes by the attention of .* prompt queries.*newest 8"):
            check_needs(trace, [build(POLICIES, Component(name))], Uniform())
    with pytest.raises(UsageError, match="allocation 'entropy'"):
        check_needs(trace, [], Entropy())
    assert trace.header.first_query == NUM_PROMPT - 8


def test_a_policy_that_does_not_say_it_reads_keys_is_refused_them(small_model, tmp_path, monkeypatch):
    trace, _ = record(small_model("llama"), tmp_path / "a.safetensors", vectors=False)
    monkeypatch.setattr(KNorm, "reads", ())
    check_needs(trace, [KNorm()], Uniform())
    with pytest.raises(UsageError, match="policy 'knorm' goes by keys, which the trace does not hold"):
        Replay(trace, CacheRecipe(policy=Component("knorm"), budget=12)).prefill()
