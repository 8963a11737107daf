"""A cache that is split over ranks, by heads or by tokens, is the whole one: its logits, tokens, bytes."""

import pytest
import small_calibration
import torch
from thread_ranks import on_ranks

from pikv_core.cache import PiKVCache
from pikv_core.cache.ranks.split import Turns, Wire
from pikv_core.compression import CODECS
from pikv_core.errors import UsageError
from pikv_core.model.steps import feed, prefill, step
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Evictor

PROMPT, STEPS = 72, 16
INT8 = {"name": "int8", "group": 32, "residual": 16}
APART = [name for name in POLICIES.names() if POLICIES[name].heads_apart]


def decode(model, cache, ids, num_steps=STEPS):
    """Return the logits of a prompt [B,T] and of greedy steps, and the tokens [B,steps]."""
    logits, tokens = [prefill(model, cache, ids)], []
    for _ in range(num_steps):
        tokens.append(logits[-1].argmax(dim=-1))
        logits.append(step(model, cache, tokens[-1]))
    return torch.stack(logits), torch.stack(tokens, dim=1)


def check(model, recipe, split, count, rows=1):
    """Assert that ranks decode as one process does; return their caches, wires, and the whole cache."""
    ids = torch.randint(1, 97, (rows, PROMPT), generator=torch.Generator().manual_seed(1))
    whole = PiKVCache.for_model(model, recipe)
    with torch.no_grad():
        logits, tokens = decode(model, whole, ids)
    wires = []

    def work(wire):
        wires.append(wire)
        cache = PiKVCache.for_model(model, recipe).share(split, wire, model)
        return cache, *decode(model, cache, ids)

    found = on_ranks(count, work)
    for _, own_logits, own_tokens in found:
        assert torch.equal(own_tokens, tokens)
        torch.testing.assert_close(own_logits, logits, atol=2e-4, rtol=2e-4)
        assert torch.equal(own_logits, found[0][1])  # to the bit, so that sampling draws the same everywhere
    caches = [cache for cache, *_ in found]
    assert_same_tokens_held(whole, caches, split)
    assert all(cache.full_bytes == whole.full_bytes for cache in caches)
    return caches, wires, whole


def assert_same_tokens_held(whole, caches, split):
    for layer, positions in enumerate(whole.positions):
        parts = [cache.positions[layer] for cache in caches if cache.own_layers[layer].num_stored]
        if split == "heads":
            longest = max(part.shape[2] for part in parts)
            parts = [torch.nn.functional.pad(part, (0, longest - part.shape[2]), value=-1) for part in parts]
        held = torch.cat(parts, dim=1 if split == "heads" else 2)
        for one, other in zip(held.flatten(0, 1), positions.flatten(0, 1), strict=True):
            assert one[one >= 0].sort().values.tolist() == other[other >= 0].sort().values.tolist()


def recipe_of(policy, codec="none"):
    budget = {"full": 1.0, "quest": 48}.get(policy, 40)
    return {"policy": policy, "budget": budget, "codec": codec}


@pytest.mark.parametrize("codec", ["none", pytest.param(INT8, marks=pytest.mark.slow)], ids=["none", "int8"])
@pytest.mark.parametrize("policy", APART)
def test_by_heads_every_policy_that_keeps_them_apart_is_as_alone(small_model, fitted_policies, policy, codec):
    recipe = recipe_of(policy, codec)
    if POLICIES[policy].calibrated:
        recipe["calibration"] = [fitted_policies]
    if policy == "quest":
        recipe["policy"] = {"name": "quest", "dense_layers": 1}
    check(small_model("llama"), recipe, "heads", 2)


@pytest.fixture(scope="module")
def fitted_policies(small_model, tmp_path_factory):
    model = small_model("llama")
    members = small_calibration.policies(model)
    return small_calibration.write(model, tmp_path_factory.mktemp("made") / "policies", members)


ENDS = [name for name in POLICIES.names() if getattr(POLICIES[name], "ends", Evictor.ends) is not Evictor.ends]
TOKENS = [
    ("full", 1.0, "none"),
    ("full", 1.0, {"name": "int4", "group": 32, "residual": 20}),
    ("full", 1.0, {"name": "fp8", "page": 8}),
    *((name, 53, "none") for name in ENDS),
]


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("policy", "budget", "codec"), TOKENS)
def test_by_tokens_ranks_are_as_one(small_model, policy, budget, codec, count):
    check(small_model("llama"), {"policy": policy, "budget": budget, "codec": codec}, "tokens", count)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["mistral", "gpt_oss", "gemma2"])
@pytest.mark.parametrize("split", ["heads", "tokens"])
def test_windows_sinks_and_caps_are_kept(small_model, arch, split):
    check(small_model(arch), {}, split, 2)


@pytest.mark.parametrize("split", ["heads", "tokens"])
@pytest.mark.parametrize("codec", ["none", INT8], ids=["none", "int8"])
def test_padded_rows_and_second_prompts_are_split_too(small_model, split, codec):
    model, recipe = small_model("llama"), {"codec": codec}
    ids = torch.randint(1, 97, (2, 90), generator=torch.Generator().manual_seed(3))
    is_token = torch.ones(2, 60, dtype=torch.bool)
    is_token[1, :21] = False

    def work(wire=None):
        cache = PiKVCache.for_model(model, recipe)
        if wire is not None:
            cache.share(split, wire, model)
        logits = [prefill(model, cache, ids[:, :60], is_token=is_token)]
        logits += [step(model, cache, ids[:, column]) for column in range(60, 66)]
        logits += [feed(model, cache, ids[:, 66:86]), step(model, cache, ids[:, 86])]
        return torch.stack(logits)

    with torch.no_grad():
        whole = work()
    for found in on_ranks(2, work):
        torch.testing.assert_close(found, whole, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("length", [1, 5, 20])
def test_a_rank_without_tokens_takes_part(small_model, length):
    model = small_model("llama")
    ids = torch.randint(1, 97, (1, length), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        logits, _ = decode(model, PiKVCache.for_model(model, {}), ids, 20)

    def work(wire):
        cache = PiKVCache.for_model(model, {}).share("tokens", wire, model)
        return decode(model, cache, ids, 20)[0], cache.resident_bytes

    found = on_ranks(3, work)
    for own, _ in found:
        torch.testing.assert_close(own, logits, atol=2e-4, rtol=2e-4)
    assert (found[2][1] == 0) == (length + 20 <= 32)


@pytest.mark.parametrize(("split", "count"), [("heads", 2), ("tokens", 2), ("tokens", 4)])
def test_bytes_that_come_are_those_of_the_formula(small_model, split, count):
    model, (L, H, D), rows = small_model("llama"), (3, 4, 16), 2
    ids = torch.randint(1, 97, (rows, 40), generator=torch.Generator().manual_seed(5))

    def work(wire):
        cache = PiKVCache.for_model(model, {}).share(split, wire, model)
        prefill(model, cache, ids[:, :-1])
        prompt = wire.received_bytes
        step(model, cache, ids[:, -1])
        return prompt, wire.received_bytes - prompt, cache.resident_bytes

    for prompt, token, _ in on_ranks(count, work):
        if split == "heads":
            assert (prompt, token) == tuple(L * rows * H * D * 4 * (count - 1) // count * T for T in (39, 1))
        else:
            assert (prompt, token) == (0, L * rows * H * (D * 4 + 4) * (count - 1))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("block", [16, 48])
def test_turns_deal_every_column_once(count, block):
    columns = torch.arange(700)
    turns = [Turns(rank, count, block) for rank in range(count)]
    assert (torch.stack([each.among(columns) for each in turns]).sum(0) == 1).all()
    for each in turns:
        held = [0, *each.among(columns).cumsum(0).tolist()]
        assert [each.before(column) for column in range(701)] == held


@pytest.mark.parametrize(
    ("split", "recipe", "message"),
    [
        ("heads", {"policy": "tova", "budget": 30}, "policy 'tova' does not judge each head by itself"),
        ("heads", {"policy": "h2o", "budget": 30, "allocation": "ada-kv"}, "allocation 'ada-kv' goes by the attention"),
        (
            "heads",
            {"policy": "h2o", "budget": 30, "allocation": "entropy"},
            "allocation 'entropy' goes by the attention",
        ),
        ("tokens", {"policy": "h2o", "budget": 30}, "policy 'h2o' compares tokens by more than their positions"),
        ("tokens", {"policy": {"name": "quest", "dense_layers": 1}, "budget": 30}, "policy 'quest' chooses pages"),
        ("tokens", {"policy": "window", "budget": 0.5}, "a budget of 0.5, a share of the tokens seen"),
        ("tokens", {"policy": "window", "budget": 30, "allocation": "pyramid"}, "allocation 'pyramid' does not go"),
        ("tokens", {"policy": "window", "budget": 30, "codec": "int8"}, "codec 'int8' drops whole units"),
        ("tokens", {"policy": "window", "budget": 30, "rerotate": True}, "rerotate counts the tokens that are left"),
        ("tokens", {"codec": "levels"}, "codec 'levels' sorts tokens by their attention"),
    ],
)
def test_what_cannot_be_split_is_refused_by_name(small_model, split, recipe, message):
    model = small_model("llama")
    with pytest.raises(UsageError, match=message) as refused:
        PiKVCache.for_model(model, recipe).share(split, Wire(0, 2), model)
    assert refused.value.hint


def test_keys_that_are_read_at_other_positions_are_split_by_heads(small_model):
    check(small_model("llama"), {"policy": "streaming-llm", "budget": 40, "rerotate": True}, "heads", 2)


def test_tokens_by_hand_come_with_queries(small_model):
    model = small_model("llama")
    cache = PiKVCache.for_model(model, {}).share("heads", Wire(0, 2), model)
    with pytest.raises(UsageError, match="takes tokens with their queries"):
        cache.append(0, 0, torch.zeros(2, 16), torch.zeros(2, 16))


def test_heads_that_do_not_divide_are_refused(small_model):
    model = small_model("llama")
    with pytest.raises(UsageError, match="2 key/value heads do not divide evenly by 3 ranks"):
        PiKVCache.for_model(model, {}).share("heads", Wire(0, 3), model)


@pytest.fixture(scope="module")
def fitted(small_model, tmp_path_factory):
    model = small_model("llama")
    return small_calibration.write(model, tmp_path_factory.mktemp("made") / "fitted", small_calibration.codecs(model))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("codec", "split"),
    [
        (codec, split)
        for codec in CODECS.names()
        for split in ("heads", "tokens")
        if (codec, split) != ("levels", "tokens")
    ],
)
def test_every_codec_is_split(small_model, fitted, codec, split):
    check(small_model("llama"), {"codec": codec, "calibration": [fitted]}, split, 2)
