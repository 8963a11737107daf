"""In mode native the layers share one budget by what their strategies stand for: to the token, by row, for good."""

import math

import pytest
import torch
from small_calibration import write
from thread_ranks import Board, ThreadWire

from pikv_core.cache import PiKVCache, calibration
from pikv_core.cache.snapshot import restore, take
from pikv_core.errors import UsageError
from pikv_core.model.steps import feed, step
from pikv_core.scheduling.moe_router import GIVEN, WEIGHTS, MoERouter, num_features

T, L = 120, 3
IDS = torch.randint(1, 97, (2, T), generator=torch.Generator().manual_seed(5))
PADDED = torch.arange(T) >= torch.tensor([[0], [37]])
NATIVE = {"aggressive": 0.3, "moderate": 0.5, "conservative": 0.8}


@pytest.fixture
def fitted(tmp_path):
    """Write routers, random or of weights given, as a calibration; return its folder."""

    def make(model, seed=0, weight=None):
        head_dim = model.config.hidden_size // model.config.num_attention_heads
        generator, F = torch.Generator().manual_seed(seed), num_features(head_dim)
        weight = 4 * torch.randn(L, 6, F, generator=generator) if weight is None else weight
        tensors = {"feature_mean": torch.zeros(L, F), "feature_scale": torch.ones(L, F), "router/weight": weight}
        member = calibration.Member("moe-router", "policy", {"mode": "native"}, tensors)
        return write(model, tmp_path / f"fitted-{seed}", [member])

    return make


def native(model, folder, budget, weights=None, **recipe):
    """Return a native cache; weights [L,B,E] that its layers are given, or those of the routers."""
    cache = PiKVCache.for_model(model, {"policy": "moe-router", "budget": budget, "calibration": [folder], **recipe})
    for layer, own in zip(cache.own_layers, [] if weights is None else weights):
        layer.run.own[GIVEN] = own
    return cache


def kept(cache):
    """Return how many tokens each head holds, [B,G,L]."""
    return torch.stack([(layer.positions() >= 0).sum(dim=-1) for layer in cache.own_layers], dim=-1)


def asked(cache, mean, num_seen):
    """Return the tokens [B,L] that the layers' strategies stand for by themselves."""
    names = MoERouter().strategies
    shares = [[NATIVE.get(name, int(m) / int(n)) for name in names] for m, n in zip(mean, num_seen)]
    weights = torch.stack([layer.run.own[WEIGHTS] for layer in cache.own_layers], dim=1).double()
    return (weights * torch.tensor(shares, dtype=torch.float64)[:, None]).sum(-1) * num_seen[:, None]


def scaled(wish, total, most):
    """Return `wish` [L] times what brings it, from 1 to `most`, to the total; by halving."""
    low, high = 0.0, 1e6
    for _ in range(200):
        factor = (low + high) / 2
        if (wish * factor).clamp(1, most).sum() < total:
            low = factor
        else:
            high = factor
    return (wish * high).clamp(1, most)


def check(cache, budget, num_seen):
    """Check the total to the token, and every layer's part to less than a token."""
    per_head, mean = kept(cache), torch.tensor([_tokens(budget, n) for n in num_seen.tolist()])
    assert torch.equal(per_head, per_head[:, :1].expand_as(per_head))
    assert torch.equal(per_head[:, 0].sum(dim=-1), mean * L)
    wish = asked(cache, mean, num_seen)
    for row, (total, most) in enumerate(zip((mean * L).tolist(), num_seen.tolist())):
        assert (per_head[row, 0] - scaled(wish[row], total, most)).abs().max() < 1


def _tokens(budget, num_seen):
    return max(1, int(budget * num_seen + 1e-6)) if isinstance(budget, float) else min(budget, num_seen)


def one_hot(*strategies):
    """Return weights [L,B,E] that are one strategy's in each layer, by name, for every row or by row."""
    names = MoERouter().strategies
    index = [[names.index(name) for name in ([own] * 2 if isinstance(own, str) else own)] for own in strategies]
    return torch.nn.functional.one_hot(torch.tensor(index), len(names)).float()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("budget", [0.1, 0.35, 0.6, 0.9, 24])
@pytest.mark.parametrize("arch", ["llama", "mixtral"])
def test_the_layers_hold_the_budget_together_whatever_the_routers_choose(small_model, fitted, arch, budget, padded):
    model = small_model(arch)
    is_token = PADDED if padded else None
    num_seen = PADDED.sum(dim=1) if padded else torch.tensor([T, T])
    unlike = 0
    for seed in range(3):
        cache = native(model, fitted(model, seed), budget)
        feed(model, cache, IDS, is_token)
        check(cache, budget, num_seen)
        unlike += int(kept(cache)[0, 0].unique().numel() > 1)
        assert_bytes(cache, budget, num_seen)
    assert unlike


def assert_bytes(cache, budget, num_seen):
    """Check that what is resident is the budget's, to 3 % or a slot a head."""
    layer = cache.own_layers[0]
    _, heads, head_dim = layer.dimensions
    slot = 2 * head_dim * 4 + 8  # key and value, position and score
    asked = L * heads * slot * sum(_tokens(budget, n) for n in num_seen.tolist())
    most_off = max(0.03 * asked, L * heads * len(num_seen) * slot)
    assert abs(cache.resident_bytes - asked) <= most_off


def mixtures(seed):
    """Return weights [L,B,E] of two strategies in each layer and row."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(L, 2, 6, generator=generator)
    weights = weights.masked_fill(weights < weights.topk(2, dim=-1).values[..., 1:], 0)
    return weights / weights.sum(dim=-1, keepdim=True)


@pytest.mark.parametrize("is_token", [None, PADDED])
@pytest.mark.parametrize("budget", [0.2, 0.5, 40])
def test_a_mixture_asks_for_the_mean_of_its_strategies_shares(small_model, fitted, budget, is_token):
    model = small_model("llama")
    num_seen = torch.tensor([T, T]) if is_token is None else is_token.sum(dim=1)
    for seed in range(4):
        cache = native(model, fitted(model), budget, mixtures(seed))
        feed(model, cache, IDS, is_token)
        check(cache, budget, num_seen)
        assert_bytes(cache, budget, num_seen)


def test_strategies_by_hand_part_the_budget_as_their_shares_are(small_model, fitted):
    model = small_model("llama")
    cache = native(model, fitted(model), 0.4, one_hot("aggressive", "moderate", "conservative"))
    feed(model, cache, IDS)
    assert kept(cache)[0, 0].tolist() == [27, 45, 72]  # 0.3, 0.5 and 0.8 of 90, which are 144 = 3 * 0.4 * 120
    other = native(model, fitted(model), 0.8, one_hot("snapkv", "aggressive", "conservative"))
    feed(model, other, IDS)
    assert kept(other)[0, 0].tolist() == [120, 48, 120]  # 0.8, 0.3, 0.8; no more than there are
    unlike = native(
        model, fitted(model), 0.4, one_hot(["aggressive", "conservative"], "moderate", ["snapkv", "moderate"])
    )
    feed(model, unlike, IDS)
    check(unlike, 0.4, torch.tensor([T, T]))
    assert kept(unlike)[:, 0].tolist() == [[36, 60, 48], [64, 40, 40]]


def test_one_strategy_everywhere_is_what_it_is_by_itself(small_model, fitted):
    model = small_model("llama")
    for name in MoERouter().strategies:
        cache = native(model, fitted(model), 0.3, one_hot(name, name, name))
        alone = PiKVCache.for_model(model, {"policy": name, "budget": 0.3})
        for one in (cache, alone):
            feed(model, one, IDS)
        for found, expected in zip(cache.positions, alone.positions):
            assert torch.equal(found.sort(dim=-1).values, expected.sort(dim=-1).values)


@pytest.mark.parametrize("budget", [0.3, 40])
@pytest.mark.parametrize("is_token", [None, PADDED])
def test_decoding_keeps_the_total_and_the_parts(small_model, fitted, budget, is_token):
    model = small_model("llama")
    weights = one_hot(["aggressive", "conservative"], "moderate", ["snapkv", "aggressive"])
    cache = native(model, fitted(model), budget, weights)
    num_seen = torch.tensor([T, T]) if is_token is None else is_token.sum(dim=1)
    feed(model, cache, IDS, is_token)
    before = [layer.run.own[WEIGHTS] for layer in cache.own_layers]
    wish = asked(cache, *_means(budget, num_seen))
    for new in range(1, 31):
        step(model, cache, torch.tensor([new, new + 1]))
        seen = num_seen + new
        mean, _ = _means(budget, seen)
        for row in range(2):
            share = wish[row] / num_seen[row] * seen[row]
            total, own = int(mean[row]) * L, kept(cache)[row, 0]
            assert total - L <= int(own.sum()) <= total
            assert (own - scaled(share, total, int(seen[row]))).abs().max() < 2
    assert all(torch.equal(one, layer.run.own[WEIGHTS]) for one, layer in zip(before, cache.own_layers))


def _means(budget, num_seen):
    return torch.tensor([_tokens(budget, n) for n in num_seen.tolist()]), num_seen


def test_a_budget_above_the_prompt_is_parted_once_there_is_more(small_model, fitted):
    model = small_model("llama")
    cache = native(model, fitted(model), 30, one_hot("aggressive", "conservative", "conservative"))
    feed(model, cache, IDS[:, :20])
    assert kept(cache)[0, 0].tolist() == [20, 20, 20]
    for token in IDS[:, 20:60].T:
        step(model, cache, token)
    assert kept(cache)[0, 0].tolist() == [14, 38, 38]


def test_a_row_of_padding_alone_has_the_same_everywhere_later(small_model, fitted):
    model = small_model("llama")
    cache = native(model, fitted(model), 0.3)
    feed(model, cache, IDS, torch.tensor([[True], [False]]).expand(2, T))
    assert kept(cache)[0, 0].sum() == 3 * 36
    for token in IDS[:, :20].T:
        step(model, cache, token)
    assert kept(cache)[1].tolist() == [[6, 6, 6]] * 2 and 3 * 41 < kept(cache)[0, 0].sum() <= 3 * 42


def test_rows_that_grow_apart_hold_what_they_hold_alone(small_model, fitted):
    model = small_model("llama")
    folder, ids = fitted(model), torch.randint(1, 97, (3, 80), generator=torch.Generator().manual_seed(7))
    ends = ("conservative", "conservative")
    weights = torch.cat([one_hot(name, *ends)[:, :1] for name in ("conservative", "aggressive", "moderate")], dim=1)
    together = native(model, folder, 30, weights)
    alone = [native(model, folder, 30, weights[:, row : row + 1]) for row in range(3)]
    feed(model, together, ids[:, :20])
    for row, cache in enumerate(alone):
        feed(model, cache, ids[row : row + 1, :20])
    for token in ids[:, 20:].T:
        step(model, together, token)
        for row, cache in enumerate(alone):
            step(model, cache, token[row : row + 1])
    assert [len(layer.lanes) for layer in together.own_layers] == [3, 3, 3]
    for layer, positions in enumerate(together.positions):
        for row, cache in enumerate(alone):
            held = positions[row].sort(dim=-1).values
            own = cache.positions[layer][0].sort(dim=-1).values
            assert torch.equal(held[held >= 0].view(2, -1), own)


def test_the_parts_of_a_first_prompt_stay_once_tokens_are_gone(small_model, fitted):
    model = small_model("llama")
    cache = native(model, fitted(model), 0.5)
    feed(model, cache, IDS[:, :60])
    shares = kept(cache)[0, 0] / 90
    before = [layer.run.own[WEIGHTS].clone() for layer in cache.own_layers]
    feed(model, cache, IDS[:, 60:])
    assert all(torch.equal(one, layer.run.own[WEIGHTS]) for one, layer in zip(before, cache.own_layers))
    assert int(kept(cache)[0, 0].sum()) == 180
    assert (kept(cache)[0, 0] / 180 - shares).abs().max() < 0.02


def test_as_long_as_nothing_is_gone_every_prompt_is_asked_anew(small_model, fitted):
    model = small_model("llama")
    names, weight = MoERouter().strategies, torch.zeros(L, 6, num_features(16))
    weight[:, :, -1] = torch.tensor([0.0 if name in ("aggressive", "conservative") else -1e4 for name in names])
    weight[:, names.index("conservative"), -3] = 100.0  # times the logarithm of the length
    weight[:, names.index("conservative"), -1] = -100 * math.log(90)
    folder = fitted(model, weight=weight)
    for budget, last in ((70, "conservative"), (50, "aggressive")):
        cache = native(model, folder, budget)
        for ids, name in ((IDS[:, :60], "aggressive"), (IDS[:, 60:], last)):
            feed(model, cache, ids)
            assert all(torch.equal(layer.run.own[WEIGHTS], one_hot(name)[0]) for layer in cache.own_layers)


def test_a_held_prompt_in_parts_and_a_first_token_alone_come_to_the_same_budget(small_model, fitted):
    model = small_model("llama")
    whole, held, late = (native(model, fitted(model), 0.5) for _ in range(3))
    feed(model, whole, IDS)
    held.hold()
    feed(model, held, IDS[:, :50])
    feed(model, held, IDS[:, 50:])
    held.compress()
    assert torch.equal(kept(whole), kept(held))
    step(model, late, IDS[:, 0])
    feed(model, late, IDS[:, 1:])
    check(late, 0.5, torch.tensor([T, T]))


def test_forks_states_and_rows_go_on_as_the_cache_does(small_model, fitted):
    model, folder = small_model("llama"), fitted(small_model("llama"))
    weights = one_hot(["aggressive", "conservative"], "moderate", ["conservative", "aggressive"])
    cache = native(model, folder, 0.4, weights)
    feed(model, cache, IDS, PADDED)
    fork, swapped, restored = cache.fork(), cache.fork(), native(model, folder, 0.4)
    restore(restored, take(cache.fork()), model.device)
    swapped.batch_select_indices(torch.tensor([1, 0, 1]))
    for token in IDS[:, :20].T:
        outputs = [step(model, one, token) for one in (cache, fork, restored)]
        rows = step(model, swapped, token[[1, 0, 1]])
    assert all(torch.equal(kept(one), kept(cache)) for one in (fork, restored))
    assert torch.equal(kept(swapped), kept(cache)[[1, 0, 1]])
    for one in outputs:
        torch.testing.assert_close(one, outputs[0])
    torch.testing.assert_close(rows, outputs[0][[1, 0, 1]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_codes_hold_the_total_too(small_model, fitted, codec):
    model = small_model("llama")
    ids = torch.randint(1, 97, (1, 600), generator=torch.Generator().manual_seed(6))
    weights = one_hot("aggressive", "moderate", "conservative")[:, :1]
    cache = native(model, fitted(model), 0.4, weights, codec=codec)
    feed(model, cache, ids)
    for token in ids[:, :20].T:
        step(model, cache, token)
    assert abs(int(kept(cache)[0, 0].sum()) - 3 * 248) <= 3 * 64


@pytest.mark.parametrize(
    ("recipe", "message", "hint"),
    [
        ({"allocation": "pyramid"}, "allocation 'pyramid' does not go with it", "leave out the allocation"),
        ({"allocation": "ada-kv"}, "allocation 'ada-kv' does not go with it", "leave out the allocation"),
        ({"allocation": "entropy"}, "allocation 'entropy' does not go with it", "leave out the allocation"),
        ({"tiers": {"device": "1MiB"}}, "drops tokens, and tiers", "cache.tiers"),
    ],
)
def test_recipes_that_cannot_be_are_refused(small_model, fitted, recipe, message, hint):
    model = small_model("llama")
    with pytest.raises(UsageError, match=message) as caught:
        native(model, fitted(model), 0.4, **recipe)
    assert hint in caught.value.hint and "'moe-router'" in str(caught.value)


def test_windows_ranks_and_graphs_are_refused(small_model, fitted):
    model = small_model("mistral")
    with pytest.raises(UsageError, match=r"'moe-router' spreads one budget over .* sliding window"):
        native(model, fitted(model), 0.4)
    model = small_model("llama")
    for split in ("heads", "tokens"):
        with pytest.raises(UsageError, match="'moe-router' spreads one budget by what the layers ask for") as caught:
            native(model, fitted(model), 40).share(split, ThreadWire(0, Board(2)), model)
        assert "--split" in caught.value.hint
    with pytest.raises(UsageError, match="'moe-router' spreads budgets by how much was seen"):
        native(model, fitted(model), 40).check_static()


def test_a_layer_alone_is_refused(small_model, fitted):
    model = small_model("llama")
    cache = native(model, fitted(model), 0.4)
    cache.hold()
    feed(model, cache, IDS)
    with pytest.raises(UsageError, match="'moe-router' in mode native sizes a layer when all") as caught:
        cache.own_layers[0].compress()
    assert "PiKVCache" in caught.value.hint


def test_the_mode_is_that_of_the_routers(small_model, fitted):
    model = small_model("llama")
    assert native(model, fitted(model), 0.4).own_layers[0].policy.mode == "native"
    with pytest.raises(UsageError, match="was fitted with mode native, not budget"):
        PiKVCache.for_model(
            model, {"policy": {"name": "moe-router", "mode": "budget"}, "calibration": [fitted(model)], "budget": 0.4}
        )
