"""Keys read at the positions 0, 1, 2, ... of what is left: in a model of one layer, a fresh run of the kept tokens."""

import pytest
import torch
import transformers
from small_models import CONFIGS, use_stock_attention

from pikv_core.cache import PiKVCache
from pikv_core.errors import PiKVError
from pikv_core.model.steps import feed


@pytest.fixture(scope="module", params=["llama", "qwen3", "gpt_oss"])
def shallow(request):
    torch.manual_seed(0)
    config = CONFIGS[request.param]()
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"]
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("codec", ["none", "int8"])
@pytest.mark.parametrize("policy", ["streaming-llm", "tova", "window"])  # all heads keep the same tokens
@torch.no_grad()
def test_a_step_sees_what_a_fresh_run_of_the_kept_tokens_sees(shallow, policy, codec):
    ids = torch.randint(1, 97, (2, 190), generator=torch.Generator().manual_seed(3))
    is_token = torch.ones_like(ids, dtype=torch.bool)
    is_token[1, :30] = False
    recipe = {"policy": policy, "budget": 60, "codec": codec, "rerotate": True}
    cache = PiKVCache.for_model(shallow, recipe)
    feed(shallow, cache, ids[:, :150], is_token[:, :150])
    found, expected = [], []
    for start, end in ((150, 151), (151, 152), (152, 160), (160, 161)):
        positions = cache.positions[0][:, 0]
        found.append(feed(shallow, cache, ids[:, start:end], is_token[:, start:end]))
        rows = []
        for row, held in enumerate(positions):
            real = ids[row][is_token[row]]
            at = held[held >= 0].sort().values.long()
            seen = end - int((~is_token[row]).sum())
            fresh = torch.cat([real[at], real[seen - (end - start) : seen]])
            use_stock_attention(shallow)
            rows.append(shallow(fresh[None]).logits[0, -1])
            cache.attach(shallow)
        expected.append(torch.stack(rows))
    error = (torch.stack(found) - torch.stack(expected)).abs().max() / torch.stack(expected).abs().max()
    assert error <= (1e-5 if codec == "none" else 2e-2), f"relative error {error}"


@torch.no_grad()
def test_a_cache_that_knows_no_rotary_embedding_says_so(small_model):
    model = small_model("llama")
    cache = PiKVCache.from_recipe(model.config, {"policy": "streaming-llm", "budget": 8, "rerotate": True})
    with pytest.raises(PiKVError, match="rerotate needs the model's rotary embedding"):
        model(torch.ones(1, 4, dtype=torch.int64), past_key_values=cache)
