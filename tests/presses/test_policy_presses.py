"""Presses inside kvpress keep what our policies keep on the same model, and never padding."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
import transformers
from small_calibration import write
from small_models import CONFIGS, SMALL

from pikv_core import presses
from pikv_core.cache import PiKVCache
from pikv_core.cache.calibration import Member
from pikv_core.errors import UsageError
from pikv_core.observation import ALL
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Evictor

pytestmark = pytest.mark.kvpress

SERVED = [name for name in POLICIES.names() if presses.unfit(POLICIES[name]) is None and not POLICIES[name].calibrated]
OPTIONS = {"fastv": {"first_layer": 1}}
LENGTH = 90


@pytest.fixture
def stock(small_model):
    """Return a function: architecture → a small random model under transformers' own SDPA."""

    def make(arch):
        model = small_model(arch)
        model.set_attn_implementation("sdpa")
        return model

    return make


def prompt(rows=2, length=LENGTH, seed=1):
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(*lengths):
    """Return ids and mask of rows of so many tokens, padded on the left."""
    mask = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    return prompt(len(lengths), max(lengths)) * mask, mask


def press_of(name, ratio, **options):
    return presses.press_for(name)(compression_ratio=ratio, **OPTIONS.get(name, {}), **options)


@torch.no_grad()
def pressed(model, press, ids, **inputs):
    """Return the stock cache after a prompt under a press."""
    cache = transformers.DynamicCache(config=model.config)
    with press(model):
        model(ids, past_key_values=cache, **inputs)
    return cache


@torch.no_grad()
def ours(model, name, budget, ids, **inputs):
    """Return positions, sorted, and keys in their order of each layer, after a prompt through PiKVCache."""
    recipe = {"policy": {"name": name, **OPTIONS.get(name, {})}, "budget": budget}
    cache = PiKVCache.for_model(model, recipe)
    model(ids, past_key_values=cache, **inputs)
    model.set_attn_implementation("sdpa")
    layers = []
    for layer in range(len(cache.layers)):
        keys, _, position = cache.retrieve(layer)
        position, order = position.sort(dim=-1)
        layers.append((position, keys.gather(2, order[..., None].expand_as(keys))))
    return layers


def generated(model, ids, press=None, **inputs):
    settings = {"max_new_tokens": 12, "do_sample": False}
    if press is None:
        return model.generate(ids, **inputs, **settings)[:, ids.shape[1] :]
    with press(model):
        return model.generate(ids, **inputs, **settings)[:, ids.shape[1] :]


@pytest.mark.parametrize("ratio", [0.5, 0.7])
@pytest.mark.parametrize("arch", ["llama", "qwen3_moe", "pikv"])
@pytest.mark.parametrize("name", SERVED)
def test_a_press_keeps_what_its_policy_keeps(stock, name, arch, ratio):
    if name == "fastv" and ratio > 0.6:
        ratio = 0.6  # its first layer alone is a third of the cache
    model, press = stock(arch), press_of(name, ratio)
    cache = pressed(model, press, prompt())
    budget = int(LENGTH * (1 - ratio))
    num_stored = []
    for layer, (position, keys) in enumerate(ours(model, name, budget, prompt())):
        assert torch.equal(press.positions[layer], position)
        torch.testing.assert_close(cache.layers[layer].keys, keys)
        num_stored.append(cache.layers[layer].keys.shape[2])
    assert sum(num_stored) <= len(num_stored) * budget < 1.05 * sum(num_stored)


@pytest.mark.parametrize("name", SERVED)
def test_padding_is_never_kept(stock, name):
    """A row has less room than the others where it has fewer tokens, and keeps what it keeps in our cache."""
    model = stock("llama")
    ids, mask = padded(LENGTH, 60, 20)
    position_ids = (mask.cumsum(dim=1) - 1).clamp(min=0)
    press = press_of(name, 0.6)
    inputs = {"attention_mask": mask, "position_ids": position_ids}
    pressed(model, press, ids, **inputs)
    for layer, (position, _) in enumerate(ours(model, name, 36, ids, **inputs)):
        assert torch.equal(press.positions[layer], position)
    per_row = [90, 60, 20] if name == "fastv" else [36, 36, 20]
    assert (press.positions[0] >= 0).sum(dim=-1).tolist() == [[count] * 2 for count in per_row]
    stats = press.get_stats()
    assert stats["seen_tokens"] == 3 * 2 * int(mask.sum())
    assert stats["kept_tokens"] == sum(int((position >= 0).sum()) for position in press.positions.values())


@pytest.mark.parametrize("attention", ["sdpa", "eager", "pikv"])
@pytest.mark.parametrize("name", ["snapkv", "keydiff", "h2o", "streaming-llm"])
def test_a_padded_batch_generates_what_its_rows_generate_alone(stock, name, attention):
    model = stock("llama")
    model.set_attn_implementation(attention)
    ids, mask = padded(LENGTH, 60, 20)
    num_kept = 36
    together = generated(model, ids, press_of(name, 1 - (num_kept + 0.5) / LENGTH), attention_mask=mask)
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        press = press_of(name, max(0.0, 1 - (num_kept + 0.5) / length))
        assert torch.equal(generated(model, ids[row : row + 1, -length:], press)[0], together[row]), f"row {row}"
        assert press.positions[0].shape[2] == min(length, num_kept)


def test_layers_of_unequal_length_decode_under_masks_of_their_own(stock):
    model, tokens = stock("llama"), []
    for attention in ("sdpa", "eager"):  # SDPA needs no mask for single tokens, eager attention always has one
        model.set_attn_implementation(attention)
        press = press_of("fastv", 0.4)
        tokens.append(generated(model, prompt(), press))
        assert [press.positions[layer].shape[2] for layer in range(3)] == [90, 36, 36]
    assert torch.equal(*tokens)


def test_a_second_turn_sees_no_future(stock):
    """Several tokens after a pressed prompt give what they give one at a time."""
    model, press, more = stock("llama"), press_of("snapkv", 0.5), prompt(2, 5, seed=2)
    found = []
    for sizes in ([5], [1] * 5):
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad(), press(model):
            model(prompt(), past_key_values=cache)
            logits = []
            for start in range(0, 5, sizes[0]):
                at = torch.arange(start, start + sizes[0]) + LENGTH
                out = model(
                    more[:, start : start + sizes[0]], past_key_values=cache, cache_position=at, position_ids=at[None]
                )
                logits.append(out.logits)
        found.append(torch.cat(logits, dim=1))
    torch.testing.assert_close(*found)


def test_stats_are_those_of_the_cache(stock):
    model, press = stock("llama"), press_of("h2o", 0.75)
    with pytest.raises(UsageError, match="compressed no prompt"):
        press.get_stats()
    cache = pressed(model, press, prompt())
    stats = press.get_stats()
    held = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    assert stats["resident_bytes"] == sum(x.untyped_storage().nbytes() for x in held)
    assert stats["full_bytes"] == sum(2 * LENGTH * x.shape[0] * x.shape[1] * x.shape[3] * 4 for x in held[::2])
    assert stats["kept_tokens"] == 3 * 2 * 2 * 22 and stats["seen_tokens"] == 3 * 2 * 2 * LENGTH
    assert [one["kept_tokens"] for one in stats["layer_stats"].values()] == [88] * 3
    assert list(stats["layer_stats"]) == [0, 1, 2]


def test_nothing_is_dropped_at_a_ratio_of_zero(stock):
    model, press = stock("llama"), press_of("snapkv", 0.0)
    assert torch.equal(generated(model, prompt(), press), generated(model, prompt()))
    assert press.get_stats()["kept_tokens"] == press.get_stats()["seen_tokens"]


def test_a_press_may_be_used_again_with_other_fields(stock):
    model, press = stock("llama"), press_of("snapkv", 0.5, window=8)
    for ratio, window in ((0.5, 8), (0.75, 20), (0.75, 8)):
        press.compression_ratio, press.window = ratio, window
        pressed(model, press, prompt())
        other = press_of("snapkv", ratio, window=window)
        pressed(model, other, prompt())
        assert all(torch.equal(press.positions[layer], other.positions[layer]) for layer in range(3))
    assert not any(layer.self_attn._forward_pre_hooks for layer in model.model.layers)


def test_our_cache_and_kvpress_live_in_one_process(stock):
    """kvpress wraps every attention function on its import; ours is handed layers in place of tensors."""
    import kvpress

    kvpress.patch_attention_functions()
    model = stock("llama")
    expected = generated(model, prompt())
    cache = PiKVCache.for_model(model, {})
    assert torch.equal(generated(model, prompt(), past_key_values=cache), expected)
    press, other = (kvpress.AdaKVPress(press_of("keydiff", 0.5)) for _ in range(2))
    entry = generated(model, prompt(), press)  # a stock cache through our entry
    model.set_attn_implementation("sdpa")
    assert torch.equal(entry, generated(model, prompt(), other))
    assert not torch.equal(entry, expected)


@pytest.mark.parametrize("name", [name for name in POLICIES.names() if presses.unfit(POLICIES[name])])
def test_what_a_press_cannot_do_is_refused_by_name(name):
    with pytest.raises(UsageError, match=f"policy '{name}' has no press: it ") as error:
        presses.press_for(name)
    assert "snapkv" in error.value.hint
    with pytest.raises(UsageError, match=name):
        getattr(presses, presses.press_name(POLICIES[name]))


def test_wrong_fields_are_usage_errors():
    with pytest.raises(UsageError, match="window"):
        press_of("snapkv", 0.5, window=0)
    with pytest.raises(UsageError, match="compression_ratio"):
        press_of("snapkv", 1.0)
    with pytest.raises(AttributeError, match="NoSuchPress"):
        _ = presses.NoSuchPress


def test_a_layer_with_a_sliding_window_is_refused(stock):
    with pytest.raises(UsageError, match="sliding window"):
        pressed(stock("mistral"), press_of("keydiff", 0.5), prompt())


def test_attention_that_cannot_be_told_is_refused():
    torch.manual_seed(0)
    config = CONFIGS["gemma2"]()
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UsageError, match="'gemma2' caps its logits"):
        pressed(model, press_of("snapkv", 0.5), prompt())
    assert pressed(model, press_of("keydiff", 0.5), prompt()).layers[0].keys.shape[2] == 45


def test_a_press_is_an_ordinary_dataclass():
    press = presses.SnapKVPress(0.5, window=7)
    assert press == copy.deepcopy(press) == pickle.loads(pickle.dumps(press))
    assert repr(press) == "SnapKVPress(compression_ratio=0.5, window=7, kernel=5, pooling='avg')"
    assert "SnapKVPress" in dir(presses) and "KVzipPress" not in dir(presses)


def test_a_policy_of_ones_own_has_a_press(stock):
    """Without a second place to edit."""

    class Peak(Evictor):
        columns = ("peak",)
        observes = ALL

        def observe(self, columns, rows):
            columns["peak"].copy_(columns["peak"].maximum(rows.probs.flatten(2, 3).amax(dim=2)))

        def score(self, tokens):
            return tokens.columns["peak"]

    POLICIES.register("peak-of-a-test")(dataclass(frozen=True)(Peak))
    try:
        model, press = stock("llama"), presses.PeakPress(compression_ratio=0.5)
        pressed(model, press, prompt())
        for layer, (position, _) in enumerate(ours(model, "peak-of-a-test", 45, prompt())):
            assert torch.equal(press.positions[layer], position)
    finally:
        del POLICIES._classes["peak-of-a-test"]


def other_models():
    """Fused projections, of all or half of whose channels a part is rotated; layers with windows among others."""
    half = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    text = {**SMALL, "head_dim": 16, "sliding_window": 24, "layer_types": kinds}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    return {
        "phi3": transformers.Phi3ForCausalLM(transformers.Phi3Config(**SMALL)),
        "phi3 in half": transformers.Phi3ForCausalLM(transformers.Phi3Config(**SMALL, rope_parameters=half)),
        "gemma3": transformers.Gemma3ForConditionalGeneration(
            transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        ),
    }


@pytest.mark.parametrize("name", ["snapkv", "expected-attention"])
@pytest.mark.parametrize("arch", ["phi3", "phi3 in half", "gemma3"])
def test_other_models_of_kvpress_are_pressed_alike(name, arch):
    torch.manual_seed(0)
    model, press = other_models()[arch].eval(), press_of(name, 0.5)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    pressed(model, press, prompt())
    assert list(press.positions) == ([1, 2] if arch == "gemma3" else [0, 1, 2])  # kvpress passes over its windows
    expected = ours(model, name, 45, prompt())
    assert all(torch.equal(position, expected[layer][0]) for layer, position in press.positions.items())


def test_beams_of_a_padded_batch_are_those_of_its_rows_alone(stock):
    model = stock("llama")
    ids, mask = padded(LENGTH, 60)
    settings = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    with press_of("snapkv", 1 - 36.5 / LENGTH)(model):
        together = model.generate(ids, attention_mask=mask, **settings)[:, LENGTH:]
    for row, length in enumerate((LENGTH, 60)):
        with press_of("snapkv", 1 - 36.5 / length)(model):
            assert torch.equal(model.generate(ids[row : row + 1, -length:], **settings)[0, length:], together[row])


def test_what_a_policy_has_learnt_is_of_its_model(stock, tmp_path):
    @dataclass(frozen=True)
    class Liked(Evictor):
        calibrated = True
        decides_once = True
        power: int = 1

        def score(self, tokens):
            liked = tokens.layer.fitted["direction"][tokens.layer.index]
            return (tokens.keys() @ liked) ** self.power

    POLICIES.register("liked-of-a-test")(Liked)
    try:
        model = stock("llama")
        direction = torch.randn(3, 16, generator=torch.Generator().manual_seed(4))
        member = Member("liked-of-a-test", "policy", {"power": 3}, {"direction": direction})
        folder = write(model, tmp_path / "learnt", [member])
        press = presses.LikedPress(compression_ratio=0.5, calibration=[folder])
        pressed(model, press, prompt())
        cache = PiKVCache.for_model(model, {"policy": "liked-of-a-test", "budget": 45, "calibration": [folder]})
        with torch.no_grad():
            model(prompt(), past_key_values=cache)
        model.set_attn_implementation("sdpa")
        for layer, position in press.positions.items():
            assert torch.equal(position, cache.retrieve(layer)[2].sort(dim=-1).values)
        for wrong, why, other in (
            ({}, "none is given", model),
            ({"calibration": [folder], "power": 2}, "was fitted with power 3, not 2", model),
            ({"calibration": [folder]}, "this model has other weights", stock("qwen2")),
        ):
            with pytest.raises(UsageError, match=why):
                pressed(other, presses.LikedPress(0.5, **wrong), prompt())
    finally:
        del POLICIES._classes["liked-of-a-test"]
