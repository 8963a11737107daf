"""Recall, perplexity, agreement, attention error and mass, against the same quantities computed without our cache."""

import copy
import math

import numpy as np
import pytest
import torch
import transformers
from small_models import CONFIGS, use_stock_attention

from pikv_core.cache import PiKVCache
from pikv_core.evaluation.attention_error import AttentionError
from pikv_core.evaluation.continuation import divergence, measure_continuation
from pikv_core.evaluation.prompts import TextWindows, recall_prompts
from pikv_core.evaluation.recall import measure_recall
from pikv_core.evaluation.speed import NUM_STEPS, measure_cost


def cache_of(model, **recipe):
    return lambda: PiKVCache.for_model(model, recipe)


def drawn(rows, length, seed=0):
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def stock_logits(model, ids):
    use_stock_attention(model)
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("question", ["after", "inside"])
def test_recall_of_the_full_cache_is_the_models_own(loaded, question):
    (prompts,) = groups = recall_prompts(loaded, None, 64, 96, seed=1)
    found = measure_recall(loaded.model, cache_of(loaded.model), groups, question, batch_size=3)
    C, Q = prompts.context.shape[1], prompts.questions.shape[1]
    if question == "after":
        ids = prompts.joined(len(prompts.context))
        logits = stock_logits(loaded.model, ids)[:, torch.arange(Q) * 2 + C]
    else:  # each alone behind the context
        alone = [torch.cat([prompts.context, prompts.questions[:, index]], dim=1) for index in range(Q)]
        logits = torch.stack([stock_logits(loaded.model, ids)[:, -1] for ids in alone], dim=1)
    answers = prompts.answers[..., 0]
    right = (logits.argmax(-1) == answers).float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
    assert found.share == pytest.approx(right.mean().item())
    assert found.by_needles == {str(prompts.num_needles): pytest.approx(right.mean().item())}
    assert found.answer_perplexity == pytest.approx(loss.exp().item(), rel=1e-4)
    assert found.num_queries == right.numel()
    fifths = (prompts.depth * 5).long().clamp(max=4)
    for index, share in enumerate(found.by_depth):
        if share is not None:
            assert share == pytest.approx(right[fifths == index].mean().item())


def test_recall_joins_groups_by_their_queries(loaded):
    short, long = (recall_prompts(loaded, None, 40, length, seed=1)[0] for length in (60, 96))
    alone = [measure_recall(loaded.model, cache_of(loaded.model), [one], "after", 8) for one in (short, long)]
    both = measure_recall(loaded.model, cache_of(loaded.model), [short, long], "after", 8)
    hits = sum(one.share * one.num_queries for one in alone)
    assert both.num_queries == sum(one.num_queries for one in alone)
    assert both.share == pytest.approx(hits / both.num_queries)
    assert set(both.by_needles) == {str(short.num_needles), str(long.num_needles)}


def test_seeing_the_question_changes_what_h2o_keeps_and_nothing_else(loaded, monkeypatch):
    groups = recall_prompts(loaded, None, 64, 96, seed=2)
    caches = []

    def new_cache():
        caches.append(PiKVCache.for_model(loaded.model, {"policy": "h2o", "budget": 0.25}))
        return caches[-1]

    def fork(cache):
        caches.append(whole_fork(cache))
        return caches[-1]

    whole_fork = PiKVCache.fork
    monkeypatch.setattr(PiKVCache, "fork", fork)
    for question in ("after", "inside"):
        measure_recall(loaded.model, new_cache, groups[:1], question, batch_size=100)
    after, held, *inside = caches
    context, num_questions = groups[0].context.shape[1], groups[0].questions.shape[1]
    each = (96 - context) // num_questions
    assert len(inside) == num_questions and held.get_seq_length() == max(0, context - 64)
    assert after.get_seq_length() == 96
    for cache in inside:
        assert cache.get_seq_length() == context + each
        assert cache.num_stored == [(context + each) // 4] * len(cache.num_stored)
    kept = [cache.positions[0] for cache in inside]
    assert not all(torch.equal(kept[0], other) for other in kept[1:])


@pytest.mark.parametrize("policy", ["kvzip", "oracle"])
@pytest.mark.parametrize("question", ["after", "inside"])
def test_a_policy_that_looks_is_shown_its_tokens_and_asked_all_the_same(loaded, policy, question):
    groups = recall_prompts(loaded, None, 64, 96, seed=2)
    found = measure_recall(loaded.model, cache_of(loaded.model, policy=policy, budget=0.5), groups, question, 3)
    whole = measure_recall(loaded.model, cache_of(loaded.model, policy=policy, budget=1.0), groups, question, 3)
    full = measure_recall(loaded.model, cache_of(loaded.model), groups, question, 3)
    assert whole.share == full.share and whole.answer_perplexity == pytest.approx(full.answer_perplexity, rel=1e-4)
    assert found.answer_perplexity != pytest.approx(full.answer_perplexity, rel=1e-4)


def test_perplexity_of_the_full_cache_is_the_models_own_and_it_agrees_with_itself(loaded):
    ids = drawn(5, 60)
    full = cache_of(loaded.model)
    found = measure_continuation(loaded.model, full, TextWindows(ids, "drawn"), 40, 2, full)
    logits = stock_logits(loaded.model, ids)
    loss = torch.nn.functional.cross_entropy(logits[:, 40:-1].flatten(0, 1), ids[:, 41:].flatten())
    assert found.perplexity == pytest.approx(loss.exp().item(), rel=1e-4)
    assert found.agreement == 1 and found.agreement_kl == 0
    alone = measure_continuation(loaded.model, full, TextWindows(ids, "drawn"), 40, 2)
    assert alone.perplexity == found.perplexity and alone.agreement is alone.agreement_kl is None


def test_agreement_is_with_the_stock_models_distributions(loaded):
    """In float64 and from the model's own logits of the whole text at once."""
    ids, model = drawn(3, 50), loaded.model
    streaming = cache_of(model, policy="streaming-llm", budget=12)
    found = measure_continuation(model, streaming, TextWindows(ids, "drawn"), 30, 2, cache_of(model))
    cache, given = streaming(), []
    with torch.no_grad():
        model(ids[:, :30], past_key_values=cache)
        given = [model(token[:, None], past_key_values=cache).logits[:, 0] for token in ids[:, 30:-1].unbind(1)]
    q = torch.stack(given, 1).double().numpy()
    p = stock_logits(model, ids)[:, 30:-1].double().numpy()
    p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in (p, q))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    assert found.agreement_kl == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-3)
    assert found.agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    assert 0 < found.agreement < 1


def test_divergence_of_masked_tokens_is_finite_and_of_lost_ones_is_not():
    minus = -math.inf
    expected = torch.tensor([[0.0, 0.0, minus], [0.0, minus, 0.0]])
    given = torch.tensor([[0.0, 0.0, minus], [0.0, 0.0, minus]])
    same, lost = divergence(expected, given).tolist()
    assert same == 0 and lost == math.inf


def measured_errors(model, ids, context_tokens, **recipe):
    errors = AttentionError(model.config)
    cache = errors.watch(PiKVCache.for_model(model, recipe))
    with torch.no_grad():
        model(ids[:, :context_tokens], past_key_values=cache)
        for token in ids[:, context_tokens:].unbind(1):
            model(token[:, None], past_key_values=cache)
    return errors


def test_nothing_is_lost_by_a_full_cache_and_more_as_the_budget_shrinks(loaded):
    found = [
        measured_errors(loaded.model, drawn(2, 80), 60, policy="streaming-llm", budget=share)
        for share in (1.0, 0.5, 0.1)
    ]
    assert found[0].error_by_layer == [0, 0, 0] and found[0].mass_by_layer == pytest.approx([1, 1, 1])
    for layer in range(3):
        assert 0 < found[1].error_by_layer[layer] < found[2].error_by_layer[layer] < 2
        assert 1 > found[1].mass_by_layer[layer] > found[2].mass_by_layer[layer] > 0


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_the_attention_mass_of_the_first_layer_is_the_stock_models(arch):
    """The first layer's queries do not depend on the cache: its rows of the stock model's attention are the truth."""
    config = CONFIGS[arch]()
    config.layer_types = ["full_attention"] * 3
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    ids, C, budget, sinks = drawn(2, 60), 40, 12, 4
    found = measured_errors(model, ids, C, policy="streaming-llm", budget=budget)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        attention = eager(ids, output_attentions=True).attentions[0].double()
    shares = []
    for query in range(C, 60):
        held = [*range(sinks), *range(query - (budget - sinks), query + 1)]  # what the step before left, and itself
        shares.append(attention[:, :, query, held].sum(-1).mean().item())
    assert found.mass_by_layer[0] == pytest.approx(np.mean(shares), rel=1e-4)


def test_a_selector_holds_all_the_mass_and_a_look_leaves_the_twin_alone(loaded):
    quest = measured_errors(loaded.model, drawn(1, 80), 60, policy={"name": "quest", "dense_layers": 0}, budget=0.2)
    assert quest.mass_by_layer == pytest.approx([1, 1, 1]) and min(quest.error_by_layer) > 0
    errors = AttentionError(loaded.model.config)
    windows = TextWindows(drawn(2, 60), "drawn")
    recipe = {"policy": "kvzip", "budget": 1.0}
    new_cache = lambda: errors.watch(PiKVCache.for_model(loaded.model, recipe))  # noqa: E731
    measure_continuation(loaded.model, new_cache, windows, 40, 2)
    assert errors.mass_by_layer == pytest.approx([1, 1, 1]) and max(errors.error_by_layer) < 1e-5


def test_cost_is_of_the_prompt_and_the_tokens_after_it(loaded):
    ids = drawn(1, 80)
    full = measure_cost(loaded.model, cache_of(loaded.model), ids[:, :60], ids[:, 60:])
    half = measure_cost(loaded.model, cache_of(loaded.model, policy="oracle", budget=0.5), ids[:, :60], ids[:, 60:])
    heads, layers, head_dim = 2, 3, 16
    assert full.full_bytes == half.full_bytes == 2 * 4 * heads * layers * head_dim * (60 + NUM_STEPS)
    assert full.resident_bytes >= full.full_bytes and half.resident_bytes < 0.65 * full.resident_bytes
    assert full.ms_per_token > 0 and full.prefill_ms > 0 and full.events == []
    read = 2 * 4 * heads * layers * head_dim * (60 + NUM_STEPS + (NUM_STEPS + 1) / 2)  # each step's own token too
    assert full.read_bytes_per_token == round(read) and full.slow_read_share == 0
    assert 0.45 * read < half.read_bytes_per_token < 0.65 * read
