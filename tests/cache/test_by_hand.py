"""Tokens handed to a cache without a model: the same as through one, in every shape, and refused where it cannot be."""

import pytest
import torch

from pikv_core.cache import PiKVCache
from pikv_core.errors import UsageError
from pikv_core.model.steps import feed, step


def recorded(model, recipe, ids, num_prompt):
    """Run the model; return its cache, and per layer a list of (query, keys, values, scale, output [B,H,T,D])."""
    cache = PiKVCache.for_model(model, recipe)
    seen = [[] for _ in cache.own_layers]
    for layer in cache.own_layers:

        def attend(query, scale, *args, layer=layer, attend=layer.attend):
            given = (query, *layer.arrived, scale)
            output = attend(query, scale, *args)
            seen[layer.index].append((*given, output))
            return output

        layer.attend = attend
    feed(model, cache, ids[:, :num_prompt])
    for token in ids[:, num_prompt:].T:
        step(model, cache, token)
    return cache, seen


@pytest.mark.parametrize(
    "recipe",
    [
        {"policy": "h2o", "budget": 12, "codec": "none"},
        {"policy": "lru", "budget": 0.5},
        {"policy": "quest", "budget": 16},
        {"policy": "snapkv", "budget": 20, "allocation": "ada-kv"},
        {"policy": "tova", "budget": 0.5, "codec": {"name": "int8", "group": 8, "residual": 8}},
        {"policy": "h2o", "budget": 20, "allocation": "entropy"},
    ],
    ids=lambda recipe: recipe["policy"] + recipe.get("allocation", ""),
)
def test_by_hand_is_as_through_a_model(small_model, recipe):
    model = small_model("llama")
    ids = torch.randint(1, 97, (2, 60), generator=torch.Generator().manual_seed(0))
    through, seen = recorded(model, recipe, ids, 30)
    by_hand = PiKVCache.for_model(model, recipe)
    token_id = 0
    for number, (first, *_) in enumerate(seen[0]):
        for layer, steps in enumerate(seen):
            query, keys, values, scale, expected = steps[number]
            one = number % 3 == 1  # one token without its dimension
            given = [x[:, :, 0] if one else x for x in (keys, values, query)]
            output = by_hand.append(layer, token_id, *given, scale=scale)
            assert output.shape == given[2].shape
            torch.testing.assert_close(output.reshape(expected.shape), expected)
        token_id += first.shape[2]
    assert by_hand.num_stored == through.num_stored and by_hand.resident_bytes == through.resident_bytes
    for layer in range(3):
        for found, expected in zip(by_hand.retrieve(layer), through.retrieve(layer)):
            torch.testing.assert_close(found, expected)


def test_single_heads_without_queries(small_model):
    cache = PiKVCache.from_recipe(small_model("llama").config, {"policy": "streaming-llm", "budget": 8})
    keys, values = torch.randn(2, 2, 20, 16, generator=torch.Generator().manual_seed(0))
    for token in range(20):
        assert cache.append(1, token, keys[:, token], values[:, token]) is None
    held_keys, held_values, position = cache.retrieve(1)
    order = position.argsort(dim=-1)
    assert position.gather(2, order)[0].tolist() == [[0, 1, 2, 3, 16, 17, 18, 19]] * 2
    for found, given in ((held_keys, keys), (held_values, values)):
        assert torch.equal(found[0], given.gather(1, position[0].long()[..., None].expand(-1, -1, 16)))
    assert cache.num_stored == [0, 8, 0] and cache.full_bytes == 2 * 2 * 20 * 16 * 4


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_what_nothing_attended_to_goes_by_age(small_model, policy):
    cache = PiKVCache.from_recipe(small_model("llama").config, {"policy": policy, "budget": 5})
    x = torch.randn(2, 16)
    for token in range(9):
        cache.append(0, token, x, x)
    assert sorted(cache.retrieve(0)[2][0, 0].tolist()) == [4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    "recipe, who",
    [
        ({"policy": "h2o", "budget": 8}, "policy 'h2o'"),
        ({"policy": "snapkv", "budget": 8}, "policy 'snapkv'"),
        ({"policy": "expected-attention", "budget": 8}, "policy 'expected-attention'"),
        ({"policy": "keydiff", "budget": 8, "allocation": "entropy"}, "allocation 'entropy'"),
        ({"codec": "levels"}, "codec 'levels'"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_what_goes_by_attention_asks_for_queries(small_model, recipe, who, num_tokens):
    cache = PiKVCache.for_model(small_model("llama"), recipe)
    x = torch.randn(1, 2, num_tokens, 16)
    with pytest.raises(UsageError, match=f"{who} goes by attention, and the tokens came without queries"):
        cache.append(0, 0, x, x)
    cache.append(0, 0, x, x, x)  # nothing was taken
    assert cache.get_seq_length(0) == num_tokens


def test_tokens_out_of_order_and_wrong_shapes_are_refused(small_model):
    cache = PiKVCache.for_model(small_model("llama"), {"policy": "window", "budget": 8})
    x = torch.randn(2, 2, 16)
    cache.append(0, 0, x, x)
    for arguments, message in (
        ((0, 0, x, x), "layer 0 has seen 1 tokens, so the next is 1, not 0"),
        ((0, 2, x, x), "so the next is 1, not 2"),
        ((3, 0, x, x), "no layer 3"),
        ((-1, 0, x, x), "no layer -1"),
        ((0, 1, x[:1], x[:1]), "2 rows of 2 heads of 16 channels"),
        ((0, 1, x[..., :8], x[..., :8]), "2 rows of 2 heads of 16 channels"),
        ((0, 1, x, x[:, :1]), r"keys are \[2, 2, 16\] and values \[2, 1, 16\]"),
        ((0, 1, x, x, torch.randn(2, 3, 16)), r"queries are \[2, 3, 16\]"),
        ((0, 1, x, x, torch.randn(2, 2, 1, 16)), r"queries are \[2, 2, 1, 16\]"),
        ((0, 1, x[0, 0], x[0, 0]), "expected keys, values and queries"),
    ):
        with pytest.raises(UsageError, match=message):
            cache.append(*arguments)
    cache.append(0, 1, x, x)
    cache.reset()
    cache.append(0, 0, x, x)
    assert cache.get_seq_length(0) == 1
