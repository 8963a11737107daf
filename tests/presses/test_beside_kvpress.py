"""Our presses beside kvpress's own of the same name, and inside kvpress's presses that compose others."""

import pytest
import torch
import transformers

from pikv_core import presses
from pikv_core.errors import UsageError

pytestmark = pytest.mark.kvpress

LENGTH = 140
PAIRS = {  # our fields, kvpress's class and fields
    "knorm": ({}, "KnormPress", {}),
    "keydiff": ({}, "KeyDiffPress", {}),
    "snapkv": ({"window": 16}, "SnapKVPress", {"window_size": 16}),
    "tova": ({}, "TOVAPress", {}),
    "streaming-llm": ({}, "StreamingLLMPress", {}),
    "expected-attention": ({}, "ExpectedAttentionPress", {"epsilon": 1e-2}),
}


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def model(small_model, request):
    model = small_model(request.param)
    model.set_attn_implementation("sdpa")
    return model


@pytest.fixture
def llama(small_model):
    model = small_model("llama")
    model.set_attn_implementation("sdpa")
    return model


def prompt(seed=1):
    return torch.randint(1, 97, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


def pair(name, ratio):
    """Return our press of a policy, and kvpress's."""
    import kvpress

    own, theirs, fields = PAIRS[name]
    return presses.press_for(name)(ratio, **own), getattr(kvpress, theirs)(ratio, **fields)


@torch.no_grad()
def kept_keys(model, press):
    """Return each layer's keys, in an order of their own content, after a prompt under a press."""
    cache = transformers.DynamicCache(config=model.config)
    with press(model):
        model(prompt(), past_key_values=cache)
    return [in_order(layer.keys) for layer in cache.layers]


def in_order(keys):
    order = keys[..., 0].argsort(dim=-1)
    return keys.gather(2, order[..., None].expand_as(keys))


def generated(model, press, ids=None):
    with press(model):
        return model.generate(prompt() if ids is None else ids, max_new_tokens=12, do_sample=False)[:, LENGTH:]


@pytest.mark.parametrize("ratio", [0.5, 0.75])
@pytest.mark.parametrize("name", PAIRS)
def test_the_same_tokens_are_kept(model, name, ratio):
    own, theirs = (kept_keys(model, press) for press in pair(name, ratio))
    for a, b in zip(own, theirs, strict=True):
        assert a.shape[2] == int(LENGTH * (1 - ratio)) and torch.equal(a, b)


def test_under_a_budget_below_its_window_only_ours_keeps_the_newest(llama):
    """kvpress's window ties, and top-k keeps any of it."""
    own = presses.SnapKVPress(0.9, window=32)
    kept_keys(llama, own)
    assert torch.equal(own.positions[0], torch.arange(LENGTH - 13, LENGTH).expand(2, 2, 13))


@pytest.mark.parametrize("name", ["keydiff", "snapkv", "expected-attention"])
def test_heads_share_a_budget_by_adakv(llama, name):
    import kvpress

    own, theirs = pair(name, 0.5)
    masked = []
    for press in (own, theirs):
        kept_keys(llama, kvpress.AdaKVPress(press))
        masked.append(
            [sorted(zip(*(x.tolist() for x in layer.self_attn.masked_key_indices))) for layer in layers(llama)]
        )
    assert masked[0] == masked[1] and len(masked[0][0]) == 2 * 2 * LENGTH // 2
    assert torch.equal(*(generated(llama, kvpress.AdaKVPress(press)) for press in (own, theirs)))


def layers(model):
    return model.model.layers


@pytest.mark.parametrize("name", ["keydiff", "snapkv"])
@pytest.mark.parametrize("kind", ["KeyRerotationPress", "CriticalKVPress", "CriticalAdaKVPress"])
def test_presses_that_go_by_scores_compose(llama, kind, name):
    import kvpress

    one = prompt()[:1]  # CriticalAdaKVPress adds up its rows' budgets
    assert torch.equal(*(generated(llama, getattr(kvpress, kind)(press), one) for press in pair(name, 0.5)))


def test_presses_that_go_by_hooks_compose(llama):
    import kvpress

    own, theirs = pair("snapkv", 0.5)
    ratios = [0.2, 0.5, 0.8]
    found = [kept_keys(llama, kvpress.PerLayerCompressionPress(press, ratios)) for press in (own, theirs)]
    for a, b, ratio in zip(*found, ratios, strict=True):
        assert a.shape[2] == int(LENGTH * (1 - ratio)) and torch.equal(a, b)
    composed = [kvpress.ComposedPress([press, kvpress.ThinKPress(0.25)]) for press in pair("snapkv", 0.5)]
    assert torch.equal(*(generated(llama, press) for press in composed))
    assert own.get_stats()["layer_stats"][2]["kept_tokens"] == 2 * 2 * 27


def test_policies_of_keys_serve_parts_and_decode_steps(llama):
    import kvpress

    for wrap in (
        lambda press: kvpress.ChunkPress(press, chunk_length=32),
        lambda press: kvpress.BlockPress(press, block_size=32),
        lambda press: kvpress.DecodingPress(press, compression_interval=4, target_size=100),
        lambda press: kvpress.PrefillDecodingPress(
            press, kvpress.DecodingPress(press, compression_interval=4, target_size=60)
        ),
    ):
        assert torch.equal(*(generated(llama, wrap(press)) for press in pair("keydiff", 0.5)))


@pytest.mark.parametrize("name", ["snapkv", "streaming-llm", "expected-attention"])
def test_policies_of_whole_prompts_refuse_parts(llama, name):
    import kvpress

    own, _ = pair(name, 0.5)
    for press in (kvpress.ChunkPress(own, 32), kvpress.DecodingPress(own, 4, 100)):
        with pytest.raises(UsageError, match=f"policy '{name}' goes by whole prompts"):
            generated(llama, press)


def test_a_policy_that_spreads_its_budget_is_not_composed(llama):
    import kvpress

    with pytest.raises(UsageError, match="policy 'fastv' spreads the budget itself"):
        kept_keys(llama, kvpress.AdaKVPress(presses.FastVPress(0.5, first_layer=1)))


def test_padding_goes_first_wherever_scores_are_used(llama):
    import kvpress

    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :40] = 0
    own, _ = pair("snapkv", 0.5)
    with torch.no_grad(), kvpress.AdaKVPress(own)(llama):
        llama(prompt() * mask, attention_mask=mask, use_cache=True)
    rows, heads, slots = llama.model.layers[0].self_attn.masked_key_indices
    for head in range(2):
        assert {*range(40)} <= {*slots[(rows == 1) & (heads == head)].tolist()}
    for press, why in (
        (kvpress.PerLayerCompressionPress(own, [0.25] * 3), "a batch with padding needs masks"),
        (kvpress.KeyRerotationPress(pair("snapkv", 0.25)[0]), "a row has fewer tokens than are to stay"),
    ):
        with pytest.raises(UsageError, match=why) as error, torch.no_grad(), press(llama):
            llama(prompt() * mask, attention_mask=mask, use_cache=True)
        assert "press itself" in error.value.hint
