"""The press of the router over strategies: what it keeps, and what it tells of its routers, beside a sum by hand."""

import copy
import dataclasses
import pickle

import pytest
import torch
import transformers
from small_calibration import routers, write
from test_policy_presses import LENGTH, padded, pressed, prompt, stock  # noqa: F401

from pikv_core import presses
from pikv_core.cache import PiKVCache
from pikv_core.cache.calibration import Member
from pikv_core.errors import UsageError
from pikv_core.presses import PRESSES
from pikv_core.scheduling import POLICIES, moe_router

pytestmark = pytest.mark.kvpress

FOUR = ("aggressive", "snapkv", "keydiff", "conservative")
LENGTHS = (LENGTH, 60, 20, 75, 41)
HIT_WEIGHT = 1.0  # of pikv, by default


def learnt(router):
    """Return routers [3 layers, 4 strategies] that are sure of nothing; pikv's with hit rates from 0 to 1."""
    tensors = routers(3, 16, len(FOUR))
    tensors["router/weight"] *= 0.03
    if router == "pikv":
        hits = torch.tensor([[0.0, 7, 1, 2], [6, 0, 0, 7], [1, 2, 7, 0]])
        tensors |= {"router/hits": hits, "router/accesses": torch.full((3, len(FOUR)), 7.0)}
        tensors |= {f"router/latency_{name}": torch.zeros(3, len(FOUR)) for name in ("sum_s", "count")}
    return tensors


@pytest.fixture
def calibrated(stock, tmp_path):  # noqa: F811
    """Return a function: kind of router → a small model and the folder of routers over FOUR that are its own."""

    def make(router):
        model = stock("llama")
        options = {"strategies": list(FOUR), "router": router}
        member = Member("moe-router", "policy", options, learnt(router))
        return model, write(model, tmp_path / router, [member])

    return make


def by_hand(x, tensors, layer, top_k):
    """Return weights [B,E] and the balance loss, in float64, of features [B,F]."""
    net = {name: value[layer].double() for name, value in tensors.items()}
    normal = (x.double() - net["feature_mean"]) * net["feature_scale"]
    normal[:, -1] = 1
    logits = normal @ net["router/weight"].T
    probs = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    wish = logits + HIT_WEIGHT * net["router/hits"] / net["router/accesses"] if "router/hits" in net else logits
    chosen = torch.zeros_like(probs)
    for row, values in enumerate(wish.tolist()):
        best = sorted(range(len(values)), key=lambda expert: -values[expert])[:top_k]
        chosen[row, best] = 1
    weights = probs * chosen / (probs * chosen).sum(dim=1, keepdim=True)
    return weights, float(len(FOUR) * (chosen.mean(dim=0) / top_k * probs.mean(dim=0)).sum())


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("router", ["base", "pikv"])
def test_what_stays_is_the_policys_and_what_is_told_is_true(calibrated, router, top_k, monkeypatch):
    model, folder = calibrated(router)
    ids, mask = padded(*LENGTHS)
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}
    options = {"strategies": FOUR, "top_k": top_k}
    press = presses.MoERouterPress(0.6, num_experts=4, router_type=router, calibration=[folder], **options)
    seen, features = [], moe_router.features

    def spied(tokens):
        seen.append(features(tokens))
        return seen[-1]

    with monkeypatch.context() as patched:
        patched.setattr(moe_router, "features", spied)
        pressed(model, press, ids, **inputs)
    recipe = {"policy": {"name": "moe-router", "router": router, **options}, "budget": 36, "calibration": [folder]}
    cache = PiKVCache.for_model(model, recipe)
    with torch.no_grad():
        model(ids, past_key_values=cache, **inputs)
    stats, tensors = press.get_stats(), learnt(router)
    losses, used = [], torch.zeros(len(FOUR))
    for layer, one in stats["layer_stats"].items():
        position = press.positions[layer]
        assert torch.equal(position, cache.retrieve(layer)[2].sort(dim=-1).values)
        per_row = (position >= 0).sum(dim=(1, 2)).double()
        assert per_row.tolist() == [72, 72, 40, 72, 72]  # in 2 heads, and no padding among them

        weights, loss = by_hand(seen[layer], tensors, layer, top_k)
        losses.append(loss)
        used += weights.sum(dim=0) > 0
        assert one["aux_loss"] == pytest.approx(loss, rel=1e-5)
        told = one["expert_compression_stats"]
        assert tuple(told["expert_usage"]) == tuple(told["kept_tokens"]) == FOUR
        assert list(told["expert_usage"].values()) == pytest.approx(weights.sum(dim=0).tolist(), abs=1e-5)
        assert list(told["kept_tokens"].values()) == pytest.approx((per_row @ weights).tolist(), abs=1e-3)
        assert sum(told["expert_usage"].values()) == pytest.approx(len(LENGTHS))
        assert sum(told["kept_tokens"].values()) == pytest.approx(one["kept_tokens"])
        in_cache = cache.own_layers[layer].run.own[moe_router.WEIGHTS].sum(dim=0)
        assert list(told["expert_usage"].values()) == pytest.approx(in_cache.tolist(), abs=1e-5)
    assert len(losses) == 3 and (used > 0).sum() > 2 and max(losses) - min(losses) > 0.01  # a case that can fail
    assert stats["avg_aux_loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_generation_under_it_and_a_copy_of_it(calibrated):
    model, folder = calibrated("pikv")
    moe_press = presses.MoERouterPress(num_experts=4, top_k=2, router_type="pikv", calibration=[folder])
    with moe_press(model):
        model.generate(prompt(), max_new_tokens=5, do_sample=False)
    stats = moe_press.get_stats()
    assert 0 < stats["avg_aux_loss"] < 4
    assert sum(stats["layer_stats"][0]["expert_compression_stats"]["expert_usage"].values()) == pytest.approx(2)
    assert stats["kept_tokens"] == 3 * 2 * 2 * 45  # half stays
    again = pickle.loads(pickle.dumps(copy.deepcopy(moe_press)))
    assert again == moe_press and again.get_stats() == stats
    stats["layer_stats"][0]["expert_compression_stats"]["expert_usage"].clear()
    assert again.get_stats() == moe_press.get_stats()


def test_it_tells_of_the_last_prompt_alone(calibrated):
    from kvpress import AdaKVPress

    model, folder = calibrated("base")
    press = presses.MoERouterPress(0.5, calibration=[folder])
    found = []
    for ids in (prompt(2), prompt(3, seed=4)):
        pressed(model, press, ids)
        other = presses.MoERouterPress(0.5, calibration=[folder])
        pressed(model, other, ids)
        assert press.get_stats() == other.get_stats()
        found.append(press.get_stats()["avg_aux_loss"])
    assert found[0] != found[1]

    with AdaKVPress(press)(model):  # asks for scores, and decides itself
        model(prompt())
    press.compression_ratio = 0.0
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad(), press(model):
        model(prompt(), past_key_values=cache)
    stats = press.get_stats()
    assert stats["kept_tokens"] == stats["seen_tokens"] and stats["avg_aux_loss"] is None
    for one in stats["layer_stats"].values():
        told = one["expert_compression_stats"]
        assert one["aux_loss"] is None
        assert told == {"expert_usage": dict.fromkeys(FOUR, 0.0), "kept_tokens": dict.fromkeys(FOUR, 0.0)}


def test_a_wrong_number_of_experts_is_refused(calibrated):
    with pytest.raises(UsageError, match="num_experts: there are 2 strategies, snapkv, keydiff, not 3") as error:
        presses.MoERouterPress(strategies=("snapkv", "keydiff"), num_experts=3)
    assert "drop num_experts" in error.value.hint
    model, folder = calibrated("base")
    with pytest.raises(UsageError, match=f"there are 4 strategies, {', '.join(FOUR)}, not 6") as error:
        pressed(model, presses.MoERouterPress(num_experts=6, calibration=[folder]), prompt())
    assert "drop num_experts" in error.value.hint
    assert not any(layer.self_attn._forward_hooks for layer in model.model.layers)


def test_a_wrong_router_is_refused_by_the_presses_own_name(calibrated):
    message = r"^MoERouterPress: router_type: expected 'base' or 'pikv', got 'fast'$"
    with pytest.raises(UsageError, match=message) as error:
        presses.MoERouterPress(router_type="fast")
    assert "moe-router" in error.value.hint
    model, folder = calibrated("base")
    with pytest.raises(UsageError, match="was fitted with router base, not pikv"):
        pressed(model, presses.MoERouterPress(router_type="pikv", calibration=[folder]), prompt())


@pytest.mark.parametrize("name", PRESSES.names())
def test_presses_of_their_own_class_are_those_of_policies_and_take_all_their_options(name):
    policy, press = POLICIES[name], presses.press_for(name)
    assert issubclass(press, PRESSES[name]) and press.__name__ == presses.press_name(policy)
    names = {one.name for one in dataclasses.fields(press)}
    options = [one.name for one in dataclasses.fields(policy)]
    assert list(press.options) == options and {press.called.get(option, option) for option in options} <= names
