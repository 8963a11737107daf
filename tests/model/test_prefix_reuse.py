"""A prompt that begins with stored blocks gives what it gives without a store, and is refused where it could not."""

import copy

import pytest
import small_calibration
import torch
import transformers

from pikv_core.cache import PiKVCache
from pikv_core.cache.prefix.identity import identity, least_fed
from pikv_core.cache.prefix.store import PrefixStore
from pikv_core.errors import UsageError
from pikv_core.model.prefix_reuse import PrefixReuse, measure
from pikv_core.schema import PrefixSettings

LENGTH, NEW_TOKENS = 70, 6
SNAPKV = {"name": "snapkv", "window": 8}
QUEST = {"name": "quest", "dense_layers": 0}
EXACT = [
    {},
    {"policy": SNAPKV, "budget": 0.4, "allocation": "ada-kv"},
    {"policy": "keydiff", "budget": 0.4},
    {"policy": QUEST, "budget": 32},
]
EXACT_TOO = [
    {"policy": "streaming-llm", "budget": 24},
    {"policy": "streaming-llm", "budget": 24, "rerotate": True},
    {"policy": "window", "budget": 24},
    {"policy": "knorm", "budget": 0.4},
    {"policy": "tova", "budget": 0.4},
    {"policy": "lru", "budget": 0.4},
    {"policy": SNAPKV, "budget": 0.4},
    {"policy": "fastv", "budget": 0.8},
    {"policy": "random", "budget": 0.5},
    {"policy": "keydiff", "budget": 0.4, "allocation": "pyramid"},
    {"policy": "keydiff", "budget": 0.4, "allocation": {"name": "entropy", "queries": 8}},
]
INT8 = {"name": "int8", "group": 8}
CODECS = [{"codec": INT8}, {"policy": SNAPKV, "budget": 0.5, "codec": INT8}]
CODECS_TOO = [
    {"codec": {"name": "int4", "group": 8, "residual": 0}},
    {"codec": {"name": "fp8", "page": 8}},
    {"policy": "keydiff", "budget": 0.5, "codec": {"name": "int4", "group": 8}},
    {"policy": QUEST, "budget": 32, "codec": INT8},
]


def quick_and_slow(quick, slow):
    """Return the parameters of a test, some of which take longer than a quick run has."""
    return [pytest.param(x, id=str(x)) for x in quick] + [
        pytest.param(x, id=str(x), marks=pytest.mark.slow) for x in slow
    ]


def store_of(model, folder, recipe, block_tokens=8):
    settings = PrefixSettings(bytes="1MiB", block_tokens=block_tokens)
    cache = PiKVCache.for_model(model, recipe)
    least_fed(cache, model.config)
    return PrefixStore(
        str(folder), settings, identity(model, cache.recipe), lambda: measure(model, cache.recipe, block_tokens)
    )


def generate(model, recipe, ids, store=None):
    """Return the tokens that follow, the logits [T,V] they were chosen by, the cache, and the hits."""
    cache = PiKVCache.for_model(model, recipe)
    reuse = None if store is None else PrefixReuse(store, model, cache, ids)
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        stopping_criteria=transformers.StoppingCriteriaList([] if reuse is None else [reuse]),
    )
    if reuse is not None:
        reuse.finish(NEW_TOKENS)
    return found.sequences[0, ids.shape[1] :], torch.cat(found.logits), cache, reuse and reuse.block_hits


def prompts(length=LENGTH):
    """Return a prompt, one that begins with its first 40 tokens, and one whose blocks both of them know."""
    first, other = torch.randint(1, 97, (2, 1, length), generator=torch.Generator().manual_seed(3))
    return first, torch.cat([first[:, :40], other[:, 40:]], dim=1), first[:, :64]


@pytest.mark.parametrize("recipe", quick_and_slow(EXACT, EXACT_TOO))
def test_tokens_and_logits_are_those_without_a_store(small_model, tmp_path, recipe):
    model = small_model("llama")
    first, second, third = prompts()
    with store_of(model, tmp_path, recipe) as store:
        for ids, hits in ((first, 0), (second, 5), (third, 8)):
            expected, logits, plain, _ = generate(model, recipe, ids)
            tokens, ours, cache, found = generate(model, recipe, ids, store)
            assert found == hits
            assert tokens.tolist() == expected.tolist()
            torch.testing.assert_close(ours, logits, rtol=0, atol=1e-5 * max(1.0, logits.abs().max().item()))
            for mine, theirs in zip(cache.positions, plain.positions):
                assert mine.sort(-1).values.tolist() == theirs.sort(-1).values.tolist()
            assert cache.resident_bytes == plain.resident_bytes
        report = store.report()
    assert report.block_hits == 13
    assert report.lost_blocks == 0
    least = least_fed(PiKVCache.for_model(model, recipe), model.config)
    assert report.reused_tokens == 40 + 64 - least


@pytest.mark.parametrize("arch", quick_and_slow(["mistral", "pikv"], ["qwen3", "gemma2", "gpt_oss"]))
def test_architectures_give_what_they_give_without_a_store(small_model, tmp_path, arch):
    model = small_model(arch)
    first, second, _ = prompts()
    with store_of(model, tmp_path, {}) as store:
        generate(model, {}, first, store)
        expected, logits, _, _ = generate(model, {}, second)
        tokens, ours, _, hits = generate(model, {}, second, store)
    assert hits == 5
    assert tokens.tolist() == expected.tolist()
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-5 * max(1.0, logits.abs().max().item()))


@pytest.mark.parametrize("recipe", quick_and_slow(CODECS, CODECS_TOO))
def test_runs_from_stored_codes_are_equal_to_the_bit(small_model, tmp_path, recipe):
    model = small_model("llama")
    first, second, _ = prompts()
    with store_of(model, tmp_path, recipe) as store:
        cold, _, _, _ = generate(model, recipe, first, store)
        assert cold.tolist() == generate(model, recipe, first)[0].tolist()
        generate(model, recipe, second, store)
        once, again = (generate(model, recipe, second, store) for _ in range(2))
    with store_of(model, tmp_path, recipe) as store:
        later = generate(model, recipe, second, store)
    assert once[3] == again[3] == later[3] == 8
    for other in (again, later):
        assert torch.equal(once[1], other[1])
        for layer in range(3):
            for mine, theirs in zip(once[2].retrieve(layer), other[2].retrieve(layer)):
                assert torch.equal(mine, theirs)


def test_stored_keys_and_values_are_those_of_the_prompt_to_the_bit(small_model, tmp_path):
    model = copy.deepcopy(small_model("llama")).to(torch.bfloat16)
    first, _, _ = prompts()
    with store_of(model, tmp_path, {}) as store:
        _, _, cache, _ = generate(model, {}, first, store)
        _, _, warm, hits = generate(model, {}, first, store)
    assert hits == 8
    for layer in range(3):
        for mine, theirs in zip(warm.retrieve(layer)[:2], cache.retrieve(layer)[:2]):
            assert mine.dtype == torch.bfloat16
            assert torch.equal(mine[:, :, :64], theirs[:, :, :64])


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        ({"policy": "h2o", "budget": 0.5}, "policy 'h2o'"),
        ({"policy": "lfu", "budget": 0.5}, "policy 'lfu'"),
        ({"policy": "expected-attention", "budget": 0.5}, "policy 'expected-attention'"),
        ({"policy": "kvzip", "budget": 0.5}, "policy 'kvzip'"),
        ({"policy": "switch:h2o+tova", "budget": 0.5}, "policy 'switch'"),
        ({"codec": "levels"}, "codec 'levels'"),
    ],
)
def test_what_goes_by_all_of_a_prompts_attention_is_refused_by_name(small_model, recipe, named):
    model = small_model("llama")
    with pytest.raises(UsageError, match=named):
        least_fed(PiKVCache.for_model(model, recipe), model.config)


def test_rotations_by_the_length_of_the_prompt_are_refused(small_model):
    config = small_model("llama").config.__class__.from_dict(small_model("llama").config.to_dict())
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UsageError, match="length of the whole prompt"):
        least_fed(PiKVCache(config), config)


def test_blocks_are_whole_units_of_the_codec(small_model, tmp_path):
    with pytest.raises(UsageError, match="64 tokens at once, and a block would have 48"):
        store_of(small_model("llama"), tmp_path, {"codec": "int4"}, block_tokens=48)


def test_one_changed_weight_is_another_model(small_model, tmp_path):
    model = small_model("llama")
    store_of(model, tmp_path, {}).close()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[5, 7] += 1e-3
    with pytest.raises(UsageError, match="another model"):
        store_of(other, tmp_path, {})
    with pytest.raises(UsageError, match="another codec"):
        store_of(model, tmp_path, {"codec": {"name": "int8", "group": 8}})
    with pytest.raises(UsageError, match="another"):
        store_of(copy.deepcopy(model).to(torch.bfloat16), tmp_path, {})


@pytest.mark.slow
def test_what_is_fitted_to_a_model_goes_along(small_model, tmp_path):
    model = small_model("llama")
    fitted = small_calibration.write(
        model, tmp_path / "fitted", [small_calibration.gates(model), *small_calibration.codecs(model)]
    )
    first, second, _ = prompts()
    duo = {"policy": {"name": "duo-attention", "sinks": 4, "recent": 8}, "budget": 0.5, "calibration": [fitted]}
    with store_of(model, tmp_path / "duo", duo) as store:
        generate(model, duo, first, store)
        expected, logits, _, _ = generate(model, duo, second)
        tokens, ours, _, hits = generate(model, duo, second, store)
    assert hits == 5
    assert tokens.tolist() == expected.tolist()
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-5 * max(1.0, logits.abs().max().item()))
    for codec in ("svd", "lora", "lora-int8", "auto"):
        recipe = {"codec": codec, "calibration": [fitted]}
        with store_of(model, tmp_path / codec, recipe, block_tokens=64) as store:
            generate(model, recipe, first, store)
            once, again = (generate(model, recipe, first, store) for _ in range(2))
        assert once[3] == again[3] == 1
        assert torch.equal(once[1], again[1])


def test_gates_that_change_the_prompt_are_refused(small_model, tmp_path):
    model = small_model("llama")
    fitted = small_calibration.write(model, tmp_path / "fitted", [small_calibration.gates(model)])
    duo = {"policy": {"name": "duo-attention", "streaming_prefill": True}, "budget": 0.5, "calibration": [fitted]}
    with pytest.raises(UsageError, match="changes what a prompt computes"):
        least_fed(PiKVCache.for_model(model, duo), model.config)
