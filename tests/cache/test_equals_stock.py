"""A cache that loses nothing is transformers' own cache: same greedy tokens, logits to 1e-5."""

import pytest
import torch
from small_calibration import policies, write
from small_models import CONFIGS, use_stock_attention

from pikv_core.cache import PiKVCache
from pikv_core.scheduling import POLICIES

NEW_TOKENS = 24
STRATEGIES = ("aggressive", "moderate", "conservative", "semantic", "temporal")  # as moe-router has them everywhere


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 97, (3, 40), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    mask[2, :20] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, inputs, cache=None):
    output = model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences, torch.stack(output.logits)


@pytest.mark.parametrize(
    ("arch", "policy"),
    [(arch, policy) for arch in CONFIGS for policy in POLICIES.names() if arch == "llama" or policy not in STRATEGIES],
)
def test_full_budget_equals_the_stock_cache(small_model, batch, arch, policy, tmp_path):
    model = small_model(arch)
    calibration = [write(model, tmp_path / "fitted", policies(model))] if POLICIES[policy].calibrated else []
    for rows in (slice(0, 1), slice(0, 3)):
        inputs = {name: x[rows] for name, x in batch.items()}
        use_stock_attention(model)
        tokens, logits = generate(model, inputs)
        cache = PiKVCache.from_recipe(model.config, {"policy": policy, "calibration": calibration})
        our_tokens, our_logits = generate(model, inputs, cache)
        assert torch.equal(our_tokens, tokens)
        error = ((our_logits - logits).abs().max() / logits.abs().max()).item()
        assert error <= 1e-5, f"relative error {error}"


@pytest.mark.parametrize("arch", ["llama", "mistral", "gpt_oss"])
def test_second_turn_equals_the_stock_cache(small_model, batch, arch):
    model = small_model(arch)
    more = torch.randint(1, 97, (3, 9), generator=torch.Generator().manual_seed(2))
    outputs = []
    for ours in (False, True):
        use_stock_attention(model)
        cache = PiKVCache(model.config) if ours else None
        if cache is None:
            from transformers import DynamicCache

            cache = DynamicCache(config=model.config)
        first, _ = generate(model, batch, cache)
        ids = torch.cat([first, more], dim=1)
        padding = batch["attention_mask"]
        mask = torch.cat([padding, torch.ones(3, ids.shape[1] - padding.shape[1], dtype=torch.int64)], dim=1)
        outputs.append(generate(model, {"input_ids": ids, "attention_mask": mask}, cache))
    (tokens, logits), (our_tokens, our_logits) = outputs
    assert torch.equal(our_tokens, tokens)
    assert ((our_logits - logits).abs().max() / logits.abs().max()).item() <= 1e-5


@pytest.mark.parametrize("arch", ["llama", "mixtral"])
def test_beam_search_equals_the_stock_cache(small_model, batch, arch):
    model = small_model(arch)
    use_stock_attention(model)
    expected = model.generate(**batch, max_new_tokens=12, num_beams=3, do_sample=False)
    cache = PiKVCache(model.config)
    found = model.generate(**batch, max_new_tokens=12, num_beams=3, do_sample=False, past_key_values=cache)
    assert torch.equal(found, expected)


def test_a_stock_cache_works_under_our_attention_entry(small_model, batch):
    model = small_model("llama")
    use_stock_attention(model)
    tokens, logits = generate(model, batch)
    PiKVCache(model.config)
    our_tokens, our_logits = generate(model, batch)
    assert model.config._attn_implementation == "pikv"
    assert torch.equal(our_tokens, tokens)
    assert torch.allclose(our_logits, logits, rtol=1e-5, atol=1e-5)
