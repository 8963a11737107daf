"""Evicted caches against a brute-force cache kept in plain lists, float64; bytes really freed; padding never kept."""

import pytest
import torch
from single_layer import single_layer
from small_models import CONFIGS, use_stock_attention

from pikv_core.cache import PiKVCache
from pikv_core.components import Component
from pikv_core.errors import PiKVError, UsageError
from pikv_core.model.steps import feed, step
from pikv_core.scheduling.h2o import H2O
from pikv_core.scheduling.streaming_llm import StreamingLLM
from pikv_core.schema import CacheRecipe

B, H, G, D = 2, 4, 2, 16


def layer_of(policy, budget, codec=None, window=None):
    return single_layer(policy, budget, codec, window=window)


def random_steps(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for T in lengths:
        yield (
            torch.randn(B, H, T, D, generator=generator),
            torch.randn(B, G, T, D, generator=generator),
            torch.randn(B, G, T, D, generator=generator),
        )


class ListCache:
    """One row and head in lists: tokens with positions and H2O's sums; the reference for attention and eviction."""

    def __init__(self, capacity, choose):
        self.capacity, self.choose = capacity, choose
        self.tokens = []
        self.num_seen = 0

    def attend(self, queries, keys, values):
        """queries [R,T,D], keys and values [T,D] → [R,T,D]."""
        T = len(keys)
        self.tokens += [
            {"position": self.num_seen + t, "key": keys[t].double(), "value": values[t].double(), "mass": 0.0}
            for t in range(T)
        ]
        output = torch.zeros(queries.shape, dtype=torch.float64)
        for r in range(len(queries)):
            for t in range(T):
                seen = [token for token in self.tokens if token["position"] <= self.num_seen + t]
                logits = torch.stack([token["key"] @ queries[r, t].double() for token in seen]) * D**-0.5
                weights = logits.softmax(0)
                output[r, t] = sum(w * token["value"] for w, token in zip(weights, seen))
                for w, token in zip(weights, seen):
                    token["mass"] += w.item() / len(queries)
        self.num_seen += T
        capacity = self.capacity(self.num_seen)
        if len(self.tokens) > capacity:
            self.tokens = self.choose(self.tokens, capacity, self.num_seen)
        return output


def choose_h2o(tokens, capacity, num_seen):
    recent = capacity - int(capacity * 0.5)
    newest = [token for token in tokens if token["position"] >= num_seen - recent]
    others = [token for token in tokens if token["position"] < num_seen - recent]
    return newest + sorted(others, key=lambda token: -token["mass"])[: capacity - len(newest)]


def choose_streaming(tokens, capacity, num_seen):
    sinks = min(4, capacity // 2)
    first = [token for token in tokens if token["position"] < sinks]
    others = sorted((token for token in tokens if token["position"] >= sinks), key=lambda token: -token["position"])
    return first + others[: capacity - len(first)]


@pytest.mark.parametrize("policy, choose", [(H2O(), choose_h2o), (StreamingLLM(), choose_streaming)])
@pytest.mark.parametrize("budget", [0.25, 0.5, 1, 3, 10])
def test_equals_lists(policy, choose, budget):
    layer = layer_of(policy, budget)
    capacity = (lambda seen: max(1, int(budget * seen))) if isinstance(budget, float) else (lambda seen: budget)
    lists = {(b, g): ListCache(capacity, choose) for b in range(B) for g in range(G)}
    for query, keys, values in random_steps([21, 1, 1, 1, 5, 1, 1, 8, 1]):
        layer.update(keys, values)
        output = layer.attend(query, D**-0.5)
        for (b, g), reference in lists.items():
            rows = query[b].view(G, H // G, -1, D)[g]
            expected = reference.attend(rows, keys[b, g], values[b, g])
            found = output[b].view(G, H // G, -1, D)[g].double()
            assert (found - expected).abs().max() < 1e-5
            kept = {int(p) for p in layer.retrieve()[2][b, g] if p >= 0}
            assert kept == {token["position"] for token in reference.tokens}
    assert layer.get_seq_length() == 40


@pytest.mark.parametrize("budget", [0.3, 6])
@pytest.mark.parametrize("policy", [H2O(), StreamingLLM()])
def test_left_padding_changes_nothing(policy, budget):
    """A padded row keeps the tokens, and gives the outputs, that it has on its own."""
    steps = list(random_steps([30, 1, 1, 4, 1]))
    padded = layer_of(policy, budget)
    alone = layer_of(policy, budget)
    num_pads = 11
    for index, (query, keys, values) in enumerate(steps):
        is_token = None
        start = 0
        if index == 0:
            is_token = torch.ones(B, 30, dtype=torch.bool)
            is_token[1, :num_pads] = False
            start = num_pads
        padded.update(keys, values)
        both = padded.attend(query, D**-0.5, is_token)
        alone.update(keys[1:, :, start:], values[1:, :, start:])
        one = alone.attend(query[1:, :, start:], D**-0.5)
        assert both.isfinite().all()
        assert (both[1:, :, start:] - one).abs().max() < 1e-5
        for g in range(G):
            kept = [{int(p) for p in layer.retrieve()[2][row, g] if p >= 0} for layer, row in ((padded, 1), (alone, 0))]
            assert kept[0] == kept[1]


@pytest.mark.parametrize("policy", ["h2o", "streaming-llm"])
@pytest.mark.parametrize("share", [0.5, 0.25, 0.1])
def test_bytes_are_freed(small_model, policy, share):
    """Resident bytes equal the live tensors' storage, and stay within 3 % or a page per head of the budget."""
    model = small_model("llama")
    cache = PiKVCache.from_recipe(model.config, {"policy": policy, "budget": share})
    ids = torch.randint(1, 97, (1, 512), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model(ids, past_key_values=cache)
        for token in ids[0, :40]:
            model(token.view(1, 1), past_key_values=cache)
    tensors = {}
    for layer in cache.own_layers:
        for store in (store for lane in layer.lanes for store in lane.stores):
            for tensor in (*store._encoded.values(), *store._columns.values()):
                tensors[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    assert cache.resident_bytes == sum(tensors.values())
    metadata = 8 if policy == "h2o" else 4
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    token_bytes = 2 * head_dim * 4
    heads = 3 * model.config.num_key_value_heads
    allowed = share * 552 * heads * (token_bytes + metadata) * 1.03 + 8 * heads * (token_bytes + metadata)
    assert cache.resident_bytes <= allowed
    assert cache.full_bytes == 552 * heads * token_bytes
    assert cache.peak_bytes < cache.full_bytes


@pytest.mark.parametrize("arch", CONFIGS)
@pytest.mark.parametrize("codec", ["none", "int8"])
def test_runs_on_every_architecture_at_a_tiny_budget(small_model, arch, codec):
    model = small_model(arch)
    quest = [] if arch == "mistral" else [{"name": "quest", "dense_layers": 1}]  # all its layers have windows
    for policy in ("h2o", "streaming-llm", *quest):
        cache = PiKVCache.from_recipe(model.config, {"policy": policy, "budget": 1, "codec": codec})
        output = model.generate(
            torch.randint(1, 97, (2, 70), generator=torch.Generator().manual_seed(4)),
            attention_mask=torch.ones(2, 70, dtype=torch.int64),
            past_key_values=cache,
            max_new_tokens=8,
            do_sample=False,
        )
        assert output.shape == (2, 78)
        for layer in range(3):
            assert (cache.retrieve(layer)[2] >= 0).sum(-1).min() >= 1


def test_a_byte_budget_is_kept(small_model):
    model = small_model("llama")
    for codec in ("none", "int8"):
        for text, limit in (("64KiB", 2**16), ("128KiB", 2**17)):
            cache = PiKVCache.from_recipe(model.config, {"policy": "h2o", "budget": text, "codec": codec})
            with torch.no_grad():
                model(torch.randint(1, 97, (2, 700)), past_key_values=cache)
                for _ in range(70):
                    model(torch.randint(1, 97, (2, 1)), past_key_values=cache)
            page = 8 if codec == "none" else 64
            token = 2 * 16 * 4 + 8 if codec == "none" else 2 * 16 + 8 + 8
            slack = 3 * 2 * 2 * page * token
            assert 0.7 * limit < cache.resident_bytes <= limit * 1.03 + slack


def test_sliding_window_layers_keep_their_window(small_model):
    model = small_model("mistral")
    cache = PiKVCache(model.config)
    with torch.no_grad():
        model(torch.randint(1, 97, (1, 200)), past_key_values=cache)
    assert cache.num_stored == [23, 23, 23]
    assert sorted(cache.retrieve(0)[2][0, 0].tolist()) == list(range(177, 200))


def test_hold_and_rewind_forget_exactly(small_model):
    model = small_model("llama")
    ids = torch.randint(1, 97, (2, 60), generator=torch.Generator().manual_seed(5))
    for policy in ("full", "quest", "streaming-llm"):
        logits = []
        for detour in (False, True):
            budget = 1.0 if policy == "full" else 0.5
            cache = PiKVCache.from_recipe(model.config, {"policy": policy, "budget": budget})
            with torch.no_grad():
                cache.hold()
                model(ids[:, :50], past_key_values=cache)
                if detour:
                    model(ids[:, 50:53], past_key_values=cache)
                    cache.rewind(3)
                cache.compress()
                logits.append(model(ids[:, 55:56], past_key_values=cache).logits)
        assert torch.equal(*logits)


def test_a_byte_budget_means_the_same_tokens_for_one_sequence(small_model):
    model = small_model("llama")
    recipe = CacheRecipe(policy=Component("h2o"), budget="64KiB", codec=Component("int8"))
    in_tokens = PiKVCache.in_tokens(model, recipe)
    cache = PiKVCache(model.config, recipe)
    with torch.no_grad():
        model(torch.randint(1, 97, (1, 700)), past_key_values=cache)
    assert {layer.budgets.budget.value for layer in cache.own_layers} == {in_tokens.budget}
    with pytest.raises(UsageError, match="drops nothing"):
        PiKVCache.from_recipe(model.config, {"policy": "quest", "budget": "64KiB"})


def test_misuse_is_told(small_model):
    model = small_model("llama")
    cache = PiKVCache(model.config)
    with pytest.raises(PiKVError, match="holds no tokens yet"):
        cache.retrieve(0)
    model.set_attn_implementation("sdpa")
    with pytest.raises(PiKVError, match="set to 'sdpa' after the cache was made"), torch.no_grad():
        model(torch.ones(1, 4, dtype=torch.int64), past_key_values=cache)
    cache.attach(model)
    with torch.no_grad():
        model(torch.ones(1, 4, dtype=torch.int64), past_key_values=cache)
    with pytest.raises(PiKVError, match="took the cache's layer for a tensor"):
        cache.own_layers[0].transpose(1, 2)
    with pytest.raises(PiKVError, match="take tokens back"):
        cache.crop(-1)
    for misused in (lambda: cache.rewind(2), cache.look):
        with pytest.raises(UsageError, match="fed while the cache was held"):
            misused()
    cache.hold()
    with torch.no_grad():
        model(torch.ones(1, 2, dtype=torch.int64), past_key_values=cache)
    with pytest.raises(UsageError, match="fed while the cache was held"):
        cache.rewind(3)
    cache.rewind(2)
    assert cache.get_seq_length() == 4


def test_steps_behind_padding_stand_where_their_row_does(small_model):
    model = small_model("llama")
    ids = torch.randint(1, 97, (2, 24), generator=torch.Generator().manual_seed(7))
    is_token = torch.ones(2, 20, dtype=torch.bool)
    is_token[1, :12] = False
    together, alone = (PiKVCache(model.config) for _ in range(2))
    feed(model, together, ids[:, :20], is_token)
    feed(model, alone, ids[1:, 12:20])
    for token in ids[:, 20:].unbind(1):
        both, one = step(model, together, token), step(model, alone, token[1:])
        torch.testing.assert_close(both[1:], one, rtol=1e-4, atol=1e-4)


def test_a_reordered_batch_forgets_its_own_tokens(small_model):
    model = small_model("llama")
    ids = torch.randint(1, 97, (2, 30), generator=torch.Generator().manual_seed(6))
    is_token = torch.ones(2, 20, dtype=torch.bool)
    is_token[1, :12] = False
    cache = PiKVCache.from_recipe(model.config, {"policy": "streaming-llm", "budget": 0.5})
    cache.hold()
    feed(model, cache, ids[:, :20], is_token)
    feed(model, cache, ids[:, 20:24], torch.ones(2, 4, dtype=torch.bool))
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    cache.rewind(4)
    assert [layer.num_seen.tolist() for layer in cache.own_layers] == [[8, 20, 8]] * 3
    cache.compress()
    assert [int((row[0] >= 0).sum()) for row in cache.positions[0]] == [4, 10, 4]


@pytest.mark.parametrize("arch, dense_layers", [("mistral", 0), ("gemma2", 2), ("llama", 3)])
def test_a_selector_that_would_select_nowhere_is_refused(arch, dense_layers):
    recipe = {"policy": {"name": "quest", "dense_layers": dense_layers}, "budget": 0.5}
    with pytest.raises(UsageError, match="would read everything in each of the model's 3 layers"):
        PiKVCache.from_recipe(CONFIGS[arch](), recipe)
    PiKVCache.from_recipe(CONFIGS[arch](), {**recipe, "budget": 1.0})


def test_reset_forgets_everything(small_model):
    model = small_model("llama")
    cache = PiKVCache.from_recipe(model.config, {"policy": "h2o", "budget": 0.5})
    ids = torch.randint(1, 97, (1, 40))
    for _ in range(2):
        cache.hold()
        cache.reset()
        assert cache.resident_bytes == cache.peak_bytes == cache.get_seq_length() == 0
        with torch.no_grad():
            model(ids, past_key_values=cache)
        assert cache.num_stored == [20, 20, 20]
        assert cache.peak_bytes >= cache.resident_bytes > 0


def test_architectures_that_cache_something_else_are_refused_by_name():
    from transformers import DeepseekV3Config, Gemma3nTextConfig

    for config, name in ((DeepseekV3Config(), "deepseek_v3"), (Gemma3nTextConfig(), "gemma3n")):
        with pytest.raises(PiKVError, match=name):
            PiKVCache(config)


@pytest.mark.parametrize("arch", CONFIGS)
def test_full_bytes_are_what_the_stock_cache_holds(small_model, arch):
    from transformers import DynamicCache

    model = small_model(arch)
    ids = torch.randint(1, 97, (2, 60), generator=torch.Generator().manual_seed(6))
    use_stock_attention(model)
    stock = DynamicCache(config=model.config)
    ours = PiKVCache(model.config)
    for cache in (ours, stock):
        if cache is stock:
            use_stock_attention(model)
        with torch.no_grad():
            model(ids[:, :50], past_key_values=cache)
            for token in ids[:, 50:].unbind(1):
                model(token[:, None], past_key_values=cache)
    held = sum(x.numel() * x.element_size() for layer in stock.layers for x in (layer.keys, layer.values))
    assert ours.full_bytes == held


@pytest.mark.parametrize("policy, allocation", [("h2o", "entropy"), ("h2o", "pyramid"), ("fastv", "uniform")])
def test_a_budget_for_all_layers_is_refused_where_some_have_windows(small_model, policy, allocation):
    model = small_model("gemma2")
    recipe = {"policy": policy, "allocation": allocation}
    with pytest.raises(UsageError, match="some of this model's have a sliding window"):
        PiKVCache.for_model(model, {**recipe, "budget": 0.5})
    assert PiKVCache.for_model(model, recipe)  # a whole budget is spread over nothing
    assert PiKVCache.for_model(small_model("mistral"), {**recipe, "budget": 0.5})  # all layers have the same
