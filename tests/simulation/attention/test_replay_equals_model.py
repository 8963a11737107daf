"""In the first layer, which no eviction reaches from below, a replay holds what the model's own cache holds."""

import pytest
import torch
from simulation.attention.recorded import NUM_PROMPT, NUM_STEPS, held, record, run, tokens

from pikv_core.cache import PiKVCache
from pikv_core.cache.lane import Lane
from pikv_core.cache.recording import Recorder
from pikv_core.components import Component, build
from pikv_core.errors import UsageError
from pikv_core.model.steps import feed, step
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Selector
from pikv_core.schema import CacheRecipe
from pikv_core.simulation.attention.needs import missing
from pikv_core.simulation.attention.replay import Replay
from pikv_core.simulation.attention.trace import load
from pikv_core.simulation.attention.writer import AttentionWriter

REFUSED = {"duo-attention", "expected-attention", "expert-shards", "kvzip", "learned-scorer", "moe-router"}
OPTIONS = {"snapkv": {"window": 8}, "quest": {"page_tokens": 8, "dense_layers": 0}}


@pytest.fixture(scope="module")
def traces(small_model, tmp_path_factory):
    """Return a function: architecture → its trace, recorded whole in float32."""
    folder = tmp_path_factory.mktemp("traces")

    def trace(arch):
        path = folder / f"{arch}.safetensors"
        return load(path) if path.exists() else record(small_model(arch), path)[0]

    return trace


def replayable():
    return [name for name in POLICIES.names() if name not in REFUSED]


def test_what_a_trace_holds_decides_what_it_serves(traces):
    trace = traces("llama")
    assert trace.holds == {"attention", "keys", "queries"}
    assert {name for name in POLICIES.names() if missing(trace, build(POLICIES, Component(name)))} == REFUSED


@pytest.mark.parametrize("budget", [0.3, 14, 1])
@pytest.mark.parametrize("name", [name for name in replayable() if not issubclass(POLICIES[name], Selector)])
def test_the_first_layer_holds_the_same_tokens_after_every_step(name, budget, small_model, traces):
    takes_budget = POLICIES[name].takes_budget
    if not takes_budget and budget != 1:
        pytest.skip("it takes no budget")
    if name == "fastv":
        budget = {0.3: 0.8, 14: 60, 1: 50}[budget]
    if (name, budget) == ("keydiff", 1):
        pytest.skip("two keys are equally far from their mean")
    share = budget if takes_budget else 1.0
    recipe = CacheRecipe(policy=Component(name, OPTIONS.get(name, {})), budget=share)
    replay = Replay(traces("llama"), recipe)
    real = run(small_model("llama"), recipe)
    replay.prefill()
    assert held(replay.cache) == next(real)
    for position in range(NUM_PROMPT, NUM_PROMPT + NUM_STEPS):
        for layer in range(3):
            replay.step(layer, position)
        assert held(replay.cache) == next(real), position


@pytest.mark.parametrize("arch", ["gpt_oss", "gemma2", "qwen3", "pikv"])
@pytest.mark.parametrize("allocation", ["uniform", "ada-kv"])
def test_other_attentions_and_allocations_too(arch, allocation, small_model, traces):
    recipe = CacheRecipe(policy=Component("h2o"), budget=0.4, allocation=Component(allocation))
    replay = Replay(traces(arch), recipe)
    real = run(small_model(arch), recipe)
    replay.prefill()
    assert held(replay.cache) == next(real)
    for position in range(NUM_PROMPT, NUM_PROMPT + NUM_STEPS):
        replay.step(0, position)
        assert held(replay.cache) == next(real), position


@pytest.mark.parametrize("budget", [24, 0.6])
def test_quest_reads_the_pages_that_the_model_reads(budget, small_model, traces, monkeypatch):
    seen = []
    original = Lane._pages

    def pages(lane, store, *given):
        picked = original(lane, store, *given)
        if lane.plan.run.index == 0:
            read = store if picked is None else store.pages(picked, lane.plan.page)
            seen.append(sorted(at for at in read.position[0, 0].tolist() if at >= 0))
        return picked

    monkeypatch.setattr(Lane, "_pages", pages)
    recipe = CacheRecipe(policy=Component("quest", OPTIONS["quest"]), budget=budget)
    list(run(small_model("llama"), recipe))
    real = [*seen]
    replay = Replay(traces("llama"), recipe)
    replay.prefill()
    found = [replay.step(0, at)[1] for at in range(NUM_PROMPT, NUM_PROMPT + NUM_STEPS)]
    assert len(real) == NUM_STEPS
    assert [sorted(at for at in read[0].tolist() if at >= 0) for read in found] == real
    assert any(len(x) < NUM_PROMPT for x in real)


@pytest.mark.parametrize(
    ("mask", "message"), [([[1, 1, 1], [1, 1, 1]], "2 were fed"), ([[0, 1, 1]], "without padding")]
)
def test_batches_and_padding_are_not_recorded(mask, message, small_model):
    model = small_model("llama")
    cache, mask = PiKVCache.for_model(model, CacheRecipe()), torch.tensor(mask)
    cache.record(Recorder(AttentionWriter()))
    with pytest.raises(UsageError, match=message):
        model(input_ids=torch.ones_like(mask), attention_mask=mask, past_key_values=cache)


def test_a_model_that_could_learn_is_recorded_too(small_model):
    model, writer = small_model("llama"), AttentionWriter()
    cache = PiKVCache.for_model(model, CacheRecipe())
    cache.record(Recorder(writer))
    with torch.enable_grad():
        assert model(input_ids=torch.ones(1, 3, dtype=torch.long), past_key_values=cache).logits.requires_grad


@pytest.mark.parametrize("arch", ["llama", "gpt_oss"])
def test_recording_changes_nothing(arch, small_model, tmp_path):
    model = small_model(arch)
    _, logits = record(model, tmp_path / "trace.safetensors")
    ids, cache = tokens(model), PiKVCache.for_model(model, CacheRecipe())
    expected = [feed(model, cache, ids[:, :NUM_PROMPT])]
    expected += [step(model, cache, ids[:, at]) for at in range(NUM_PROMPT, ids.shape[1])]
    assert torch.equal(logits, torch.cat(expected))
