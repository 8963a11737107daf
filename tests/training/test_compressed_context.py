"""A pass through a compressed context against the cache itself, fed what comes later, and what its gradients reach."""

import pytest
import torch
from small_models import use_stock_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pikv_core.cache import PiKVCache
from pikv_core.components import Component
from pikv_core.errors import PiKVError
from pikv_core.model.steps import prefill, step
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Evictor
from pikv_core.schema import CacheRecipe
from pikv_core.training.compressed_context import ENTRY, CompressedContext, compressed_attention

ARCHITECTURES = ["llama", "qwen2", "qwen3", "mixtral", "qwen3_moe", "pikv"]
C, T = 70, 79  # tokens of context, and in all
INT4 = ("int4", {"group": 8, "residual": 0})
EVICTORS = [
    name
    for name in POLICIES.names()
    if issubclass(POLICIES[name], Evictor) and POLICIES[name].looks != "future" and not POLICIES[name].calibrated
]


def draw_ids(seed=1):
    return torch.randint(97, (2, T), generator=torch.Generator().manual_seed(seed))


def recipe(policy="random", budget=0.25, **options):
    members = {name: Component(*x) if isinstance(x, tuple) else x for name, x in options.items()}
    return CacheRecipe(policy=Component(policy), budget=budget, **members)


def logits_through(model, cache_recipe, ids):
    """Return the logits [B,T,V] of a pass that knows of its context, and the statistics."""
    with torch.no_grad(), compressed_attention(model, cache_recipe) as context:
        context.read(ids[:, :C])
        return model(input_ids=ids, use_cache=False).logits.float(), context.statistics


@torch.no_grad()
def logits_one_by_one(model, cache_recipe, ids):
    """Return the logits [B,T-C,V] of the later tokens, fed one at a time behind a compressed context that stays."""
    cache = PiKVCache.for_model(model, cache_recipe)
    prefill(model, cache, ids[:, :C])
    cache.hold()
    logits = torch.stack([step(model, cache, token) for token in ids[:, C:].unbind(1)], dim=1)
    use_stock_attention(model)
    return logits, cache


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_full_cache_changes_nothing(small_model, arch):
    model, ids = small_model(arch), draw_ids()
    use_stock_attention(model)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    found, statistics = logits_through(model, CacheRecipe(), ids)
    assert torch.allclose(found, expected, atol=1e-4)
    assert statistics.kept_share == 1
    with torch.no_grad(), compressed_attention(model, recipe()) as context:
        assert torch.allclose(model(input_ids=ids, use_cache=False).logits, expected, atol=1e-4), "no context was read"
        context.read(ids[:, :C])
        compressed = model(input_ids=ids, use_cache=False).logits
        assert torch.allclose(model(input_ids=ids, use_cache=False).logits, expected, atol=1e-4), "it is for one pass"
    assert torch.allclose(compressed[:, :C], expected[:, :C], atol=1e-4)
    assert not torch.allclose(compressed[:, C:], expected[:, C:], atol=1e-1)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("policy", ["random", "h2o", "snapkv"])
def test_later_tokens_see_what_the_cache_holds(small_model, arch, policy):
    model, ids = small_model(arch), draw_ids()
    expected, _ = logits_one_by_one(model, recipe(policy), ids)
    found, _ = logits_through(model, recipe(policy), ids)
    assert torch.allclose(found[:, C:], expected, atol=2e-4)


@pytest.mark.parametrize("policy", EVICTORS)
def test_with_every_policy(small_model, policy):
    model, ids = small_model("llama"), draw_ids()
    expected, _ = logits_one_by_one(model, recipe(policy, 0.75), ids)
    found, _ = logits_through(model, recipe(policy, 0.75), ids)
    assert torch.allclose(found[:, C:], expected, atol=2e-4)


@pytest.mark.parametrize("policy", ["random", "h2o", "snapkv", "tova", "kvzip"])
@pytest.mark.parametrize(
    "options",
    [
        {"budget": 17},
        {"budget": "36KiB"},
        {"allocation": ("ada-kv",)},
        {"allocation": ("entropy",)},
        {"codec": INT4},
        {"allocation": ("ada-kv",), "codec": ("int8", {"group": 8, "residual": 0})},
    ],
    ids=str,
)
def test_with_every_budget_allocation_and_codec(small_model, policy, options):
    model, ids = small_model("llama"), draw_ids()
    expected, cache = logits_one_by_one(model, recipe(policy, **options), ids)
    found, statistics = logits_through(model, recipe(policy, **options), ids)
    assert torch.allclose(found[:, C:], expected, atol=2e-3)
    kept = [((held >= 0) & (held < C)).float().sum() for held in cache.positions]
    assert statistics.kept_share == pytest.approx(sum(kept) / (len(kept) * 2 * 2 * C))
    assert 0.1 < statistics.kept_share < 0.5
    assert 0 < statistics.resident_bytes < statistics.full_bytes == 3 * 2 * 2 * 2 * C * 16 * 4


class Layer(torch.nn.Module):
    """What an attention module tells of itself."""

    layer_idx = 0


def draw_qkv():
    draw = torch.Generator().manual_seed(3)
    return [torch.randn(2, heads, T, 16, generator=draw, requires_grad=True) for heads in (4, 2, 2)]


def attend(context, query, key, value):
    context.read(draw_ids()[:, :C])
    return context(Layer(), query, key, value, None, scaling=0.5)[0].transpose(1, 2)


def later_output(query, key, value, visible):
    """Softmax attention of queries [B,H,N,D] over key and value [B,G,S,D] where `visible` [B,G,N,S] lets them."""
    key, value, visible = (x.repeat_interleave(2, 1) for x in (key, value, visible))
    scores = (query @ key.mT * 0.5).masked_fill(~visible, float("-inf"))
    return scores.softmax(-1) @ value


def test_gradients_reach_what_was_kept_and_nothing_that_was_dropped(small_model):
    model, (query, key, value) = small_model("llama"), draw_qkv()
    attend(CompressedContext(model, recipe("streaming-llm")), query, key, value)[:, :, C:].square().sum().backward()
    capacity = int(C * 0.25)
    dropped, kept = slice(4, C - (capacity - 4)), [*range(4), *range(C - (capacity - 4), T)]
    for x in (key, value):
        assert bool((x.grad[:, :, dropped] == 0).all())
        assert bool((x.grad[:, :, kept].abs().sum(-1) > 0).all())
    assert bool((query.grad[:, :, :C] == 0).all())


@pytest.mark.parametrize("options", [{}, {"codec": INT4}, {"allocation": ("ada-kv",), "codec": INT4}], ids=str)
def test_what_is_held_is_read_and_gradients_go_straight_through_the_codec(small_model, options):
    model, (query, key, value) = small_model("llama"), draw_qkv()
    weight = torch.randn(2, 4, T - C, 16, generator=torch.Generator().manual_seed(4))
    output = attend(CompressedContext(model, recipe("h2o", **options)), query, key, value)[:, :, C:]
    (output * weight).sum().backward()

    cache = PiKVCache.for_model(model, recipe("h2o", **options))
    with torch.no_grad():
        cache.append(0, 0, *(x[:, :, :C] for x in (key, value, query)), scale=0.5)
    held_key, held_value, position = cache.retrieve(0)
    is_coded = not torch.equal(
        held_key, key.detach().gather(2, position.clamp(min=0)[..., None].expand_as(held_key).long())
    )
    assert is_coded == ("codec" in options)
    held = [x.clone().requires_grad_() for x in (held_key, held_value)]
    later = [x.detach()[:, :, C:].clone().requires_grad_() for x in (key, value)]
    is_held = (position >= 0)[:, :, None].expand(-1, -1, T - C, -1)
    causal = torch.ones(2, 2, T - C, T - C, dtype=torch.bool).tril()
    both = [torch.cat(pair, 2) for pair in zip(held, later, strict=True)]
    expected = later_output(query.detach()[:, :, C:], *both, torch.cat([is_held, causal], -1))
    assert torch.allclose(output, expected, atol=1e-5)

    (expected * weight).sum().backward()
    for x, own, new in zip((key, value), held, later, strict=True):
        index = position.clamp(min=0)[..., None].expand_as(own).long()
        gradient = torch.zeros_like(x[:, :, :C]).scatter_add_(2, index, own.grad)
        assert torch.allclose(x.grad[:, :, :C], gradient, atol=1e-5)
        assert torch.allclose(x.grad[:, :, C:], new.grad, atol=1e-5)


@pytest.mark.parametrize(("policy", "num_observed"), [("tova", 1), ("snapkv", 64), ("h2o", C)])
def test_the_selection_loss_compares_what_is_observed_with_what_is_read_later(small_model, policy, num_observed):
    (query, key, value), context = draw_qkv(), CompressedContext(small_model("llama"), recipe(policy))
    attend(context, query, key, value)
    loss = context.selection_loss
    loss.backward()
    assert bool((query.grad[:, :, C:] == 0).all() and (key.grad[:, :, C:] == 0).all()) and value.grad is None
    assert bool((query.grad[:, :, C - 1] != 0).all() and (key.grad[:, :, :C] != 0).all())
    assert bool((query.grad[:, :, : C - num_observed] == 0).all())

    causal = torch.ones(C, C, dtype=torch.bool).tril().masked_fill(torch.arange(C)[:, None] < C - num_observed, False)
    scores = query.double()[:, :, :, None] @ key.double().repeat_interleave(2, 1)[:, :, None, :C].mT * 0.5
    found = scores[:, :, :C, 0][..., :C].masked_fill(~causal, float("-inf"))[:, :, C - num_observed :].softmax(-1)
    wanted = scores[:, :, C:, 0].softmax(-1)
    found, wanted = (x.unflatten(1, (2, 2)).mean((2, 3)) for x in (found, wanted))
    assert loss.item() == pytest.approx(
        (wanted * (wanted / found.clamp(min=1e-9)).log()).sum(-1).mean().item(), rel=1e-4
    )


@pytest.mark.parametrize("policy", ["random", "kvzip"])
def test_policies_that_do_not_go_by_the_attention_of_the_context_have_no_selection_loss(small_model, policy):
    model, ids = small_model("llama"), draw_ids()
    use_stock_attention(model)
    with compressed_attention(model, recipe(policy)) as context:
        context.read(ids[:, :C])
        model(input_ids=ids, use_cache=False)
        assert context.selection_loss == 0


@pytest.mark.parametrize("arch", ["llama", "mixtral", "qwen3_moe", "pikv"])
@pytest.mark.parametrize("options", [{}, {"codec": INT4}, {"allocation": ("entropy",)}], ids=str)
def test_every_weight_learns_under_autocast(small_model, arch, options):
    model, ids = small_model(arch), draw_ids()
    use_stock_attention(model)
    model.train()
    try:
        with compressed_attention(model, recipe("h2o", **options)) as context, torch.autocast("cpu", torch.bfloat16):
            context.read(ids[:, :C])
            logits = model(input_ids=ids, use_cache=False).logits[:, C:]
            (logits.float().square().mean() + context.selection_loss).backward()
        assert model.training
        assert all(weight.grad is None or bool(weight.grad.isfinite().all()) for weight in model.parameters())
        attention = [weight.grad for name, weight in model.named_parameters() if "self_attn" in name]
        assert all(bool((gradient != 0).any()) for gradient in attention)
        assert context.statistics.full_bytes == 3 * 2 * 2 * 2 * C * 16 * 2, (
            "two bytes a channel, as in a bfloat16 model"
        )
    finally:
        model.eval()
        model.zero_grad()


@pytest.mark.parametrize("before", ["sdpa", "eager", "pikv"])
def test_the_model_attends_as_before_even_after_an_error(small_model, before):
    model = small_model("llama")
    model.set_attn_implementation(before)
    entries = set(ALL_ATTENTION_FUNCTIONS)
    with pytest.raises(KeyError), compressed_attention(model, recipe("kvzip")) as context:
        context.read(draw_ids()[:, :C])
        assert model.config._attn_implementation == ENTRY
        raise KeyError
    assert model.config._attn_implementation == before
    assert set(ALL_ATTENTION_FUNCTIONS) == entries
    assert ENTRY not in entries


@pytest.mark.parametrize(
    ("arch", "options", "match"),
    [
        ("llama", {"policy": "quest"}, "drops nothing"),
        ("llama", {"policy": "oracle"}, "yet to come"),
        ("llama", {"rerotate": True}, "rerotate"),
        ("mistral", {}, "sliding window"),
        ("gemma2", {}, "sliding window"),
        ("gpt_oss", {}, "sliding window"),
    ],
)
def test_what_it_cannot_do_is_refused(small_model, arch, options, match):
    model = small_model(arch)
    use_stock_attention(model)
    before = model.config._attn_implementation
    with pytest.raises(PiKVError, match=match), compressed_attention(model, recipe(**options)):
        pass
    assert model.config._attn_implementation == before


def test_soft_caps_and_checkpointed_layers_are_refused(small_model, monkeypatch):
    model = small_model("llama")
    with pytest.raises(PiKVError, match="soft caps"):
        CompressedContext(model, recipe())(Layer(), *draw_qkv(), None, softcap=3.0)
    use_stock_attention(model)
    monkeypatch.setattr(model.model.layers[0], "gradient_checkpointing", True)
    with pytest.raises(PiKVError, match="checkpointing"), compressed_attention(model, recipe()):
        pass
