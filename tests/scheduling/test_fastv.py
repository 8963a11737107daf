"""FastV: whole first layers, and later ones by what the last query saw in the last of those."""

import pytest
import torch
from scheduling.synthetic import NUM_LAYERS, World, make_tokens, show
from small_models import use_stock_attention

from pikv_core.cache import PiKVCache
from pikv_core.components import Component
from pikv_core.errors import UsageError
from pikv_core.observation import LayerRun
from pikv_core.scheduling.fastv import FastV
from pikv_core.schema import CacheRecipe


@pytest.mark.parametrize("slots", [torch.arange(32), torch.randperm(32, generator=torch.Generator().manual_seed(1))])
def test_later_layers_score_by_an_earlier_ones_last_query_wherever_tokens_lie(slots):
    worlds = [World(seed=index) for index in range(NUM_LAYERS)]
    policy, runs = FastV(first_layer=2), worlds[0].layer_runs()
    for world, run in zip(worlds, runs):
        columns = show(policy, world, run, slots=slots)
    score = policy.score(make_tokens(worlds[-1], runs[-1], columns, slots=slots))
    newest = worlds[1].attention[:, :, :, -1].mean(dim=(1, 2))  # [B,S]
    for row in range(2):
        real = worlds[0].position[row, slots] >= 0
        for head in range(2):
            torch.testing.assert_close(score[row, head, real].double(), newest[row, slots][real])


@pytest.mark.parametrize("num_layers, first_layer", [(2, 1), (3, 2), (32, 2), (32, 31)])
def test_all_layers_together_have_the_budget(num_layers, first_layer):
    num_seen = torch.tensor([1000, 40])
    least = (first_layer * num_seen + num_layers - first_layer) / num_layers
    for mean in (least.ceil().long(), (num_seen + least.long()) // 2, num_seen, num_seen + 50):
        runs = [LayerRun(index, num_layers, num_kv_heads=2) for index in range(num_layers)]
        capacity = torch.stack([FastV(first_layer=first_layer).capacity(mean, num_seen, run) for run in runs])
        assert capacity.shape == (num_layers, 2, 2) and (capacity >= 1).all()
        assert (capacity[:first_layer] == num_seen[:, None]).all()
        total = num_layers * torch.minimum(mean, num_seen)
        short = total - capacity[:, :, 0].sum(0)
        assert (short >= 0).all() and (short < num_layers - first_layer).all()


def test_a_budget_that_the_first_layers_exceed_is_refused_with_the_least_one():
    policy, run = FastV(first_layer=2), LayerRun(0, 4, num_kv_heads=2)
    num_seen = torch.tensor([100, 40])
    with pytest.raises(
        UsageError, match=r"first 2 of 4 layers whole: after 100 tokens .* budget of 50 tokens"
    ) as error:
        policy.capacity(torch.tensor([50, 21]), num_seen, run)
    assert error.value.hint == "give a budget of at least 51 tokens, or a share of 0.510"
    assert policy.capacity(torch.tensor([51, 21]), num_seen, run).tolist() == [[100, 100], [40, 40]]


def test_a_model_without_later_layers_is_refused():
    with pytest.raises(UsageError, match="the first 2 layers whole, and the model has 2"):
        FastV(first_layer=2).capacity(torch.tensor([50]), torch.tensor([100]), LayerRun(1, 2, num_kv_heads=2))


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
@torch.no_grad()
def test_a_models_cache_keeps_what_its_own_attention_says(arch, small_model):
    model = small_model(arch)
    ids = torch.randint(1, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    cache = PiKVCache.for_model(model, CacheRecipe(policy=Component("fastv"), budget=0.8))
    model(ids, attention_mask=mask, past_key_values=cache)
    use_stock_attention(model)
    model.set_attn_implementation("eager")
    for row, pad in enumerate((0, 9)):
        num_tokens = 40 - pad
        newest = model(ids[row : row + 1, pad:], output_attentions=True).attentions[1][0, :, -1].double().mean(0)
        best = newest.topk(3 * (num_tokens * 8 // 10) - 2 * num_tokens).indices.sort().values.tolist()
        for layer, expected in enumerate((list(range(num_tokens)), list(range(num_tokens)), best)):
            for held in cache.positions[layer][row]:
                assert held[held >= 0].sort().values.tolist() == expected, (row, layer)
