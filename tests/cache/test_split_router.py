"""A cache of `moe-router` that is split by heads: every rank makes the choice that one process makes, to the bit."""

import pytest
import small_calibration
import torch
import transformers
from small_models import SMALL
from thread_ranks import on_ranks

from pikv_core.cache import PiKVCache, calibration, stream
from pikv_core.cache.ranks.log import Follower, RankChanges
from pikv_core.cache.ranks.snapshot import part_of
from pikv_core.cache.ranks.split import Wire
from pikv_core.cache.snapshot import restore
from pikv_core.errors import UsageError
from pikv_core.model.steps import prefill, step
from pikv_core.scheduling.moe_router import WEIGHTS, num_features

L, H, G, D, F = 3, 8, 4, 16, num_features(16)
ROWS, PROMPT, MIDDLE, LATER, END = 2, 72, 80, 90, 96  # tokens
IDS = torch.randint(1, 97, (ROWS, PROMPT), generator=torch.Generator().manual_seed(1))
IS_TOKEN = torch.arange(PROMPT) >= torch.tensor([[0], [9]])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {**SMALL, "hidden_size": H * D, "num_attention_heads": H, "num_key_value_heads": G}
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**sizes)).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.15)
    return model


@pytest.fixture(scope="module")
def recipe(model, tmp_path_factory):
    """Return a function: strategies and options of the policy → a recipe with random routers over them."""

    def recipe(*strategies, budget=40, **options):
        own = {**options, **({"strategies": list(strategies)} if strategies else {})}
        tensors = small_calibration.routers(L, D, len(strategies) or 6)
        folder = tmp_path_factory.mktemp("routers") / "fitted"
        small_calibration.write(model, folder, [calibration.Member("moe-router", "policy", own, tensors)])
        return {"policy": {"name": "moe-router", **own}, "budget": budget, "calibration": [str(folder)]}

    return recipe


def begin(model, cache):
    """Feed the prompts, one of which is padded; return the logits behind them."""
    return prefill(model, cache, IDS, is_token=IS_TOKEN)


def go_on(model, cache, logits, num_steps):
    """Return the tokens [B,N] of greedy steps, and the logits behind the last of them."""
    tokens = []
    for _ in range(num_steps):
        tokens.append(logits.argmax(dim=-1))
        logits = step(model, cache, tokens[-1])
    return torch.stack(tokens, dim=1), logits


def weights(cache):
    return torch.stack([layer.run.own[WEIGHTS] for layer in cache.own_layers])


def kept(position):
    """Return the tokens of each row and head of positions [B,G,S]."""
    return [own[own >= 0].sort().values.tolist() for own in position.flatten(0, 1)]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}], ids=["one", "mixed"])
def test_ranks_choose_and_keep_as_one_process(model, recipe, count, options):
    given = recipe(**options)
    whole = PiKVCache.for_model(model, given)
    with torch.no_grad():
        logits = begin(model, whole)
        chosen, at_once = weights(whole), whole.positions
        tokens, _ = go_on(model, whole, logits, END - PROMPT)

    def work(wire):
        cache = PiKVCache.for_model(model, given).share("heads", wire, model)
        own_logits = begin(model, cache)
        came = wire.received_bytes
        own_chosen, own_at_once = weights(cache), cache.positions
        own_tokens, _ = go_on(model, cache, own_logits, END - PROMPT)
        return own_chosen, own_at_once, cache.positions, own_tokens, came, wire.received_bytes - came

    found = on_ranks(count, work)
    for own_chosen, _, _, own_tokens, came, later in found:
        assert torch.equal(own_chosen, chosen)
        assert torch.equal(own_tokens, tokens)
        attended = L * ROWS * H * D * 4 * (count - 1) // count  # a token
        looked_at = L * ROWS * G * (2 * D + 4) * 4 * (count - 1) // count  # once
        assert came == attended * PROMPT + looked_at
        assert later == attended * (END - PROMPT)
    for moment, expected in ((1, at_once), (2, whole.positions)):
        for layer, position in enumerate(expected):
            parts = torch.cat([rank[moment][layer] for rank in found], dim=1)
            assert parts.shape == position.shape
            assert kept(parts) == kept(position)
    assert len({tuple(row.tolist()) for row in chosen.flatten(0, 1)}) > 1  # not one choice for all


def test_a_state_goes_from_two_ranks_to_one_and_back(model, recipe, tmp_path):
    given = recipe(top_k=2)
    alone = PiKVCache.for_model(model, given)
    with torch.no_grad():
        logits = begin(model, alone)
        chosen = weights(alone)
        tokens, _ = go_on(model, alone, logits, END - PROMPT)

    def save(cache, writer, fed, logits, at):
        with writer:
            writer.save(cache, torch.cat([IDS, fed], dim=1), {}, {"logits": logits})
        assert cache.own_layers[0].seen_length == at

    def first(wire):
        cache = PiKVCache.for_model(model, given).share("heads", wire, model)
        fed, logits = go_on(model, cache, begin(model, cache), MIDDLE - PROMPT)
        changes = RankChanges(wire, "heads")
        writer = Follower(changes) if wire.rank else stream.Writer(str(tmp_path / "of-ranks"), {}, None, changes)
        save(cache, writer, fed, logits, MIDDLE)
        return fed

    parts = [on_ranks(2, first)[0]]
    saved = stream.read(str(tmp_path / "of-ranks"))
    cache = PiKVCache.for_model(model, given)
    restore(cache, saved.cache, model.device)
    assert torch.equal(weights(cache), chosen)
    with torch.no_grad():
        fed, logits = go_on(model, cache, saved.tensors["logits"], LATER - MIDDLE)
    parts.append(fed)
    save(cache, stream.Writer(str(tmp_path / "of-one"), {}, None), torch.cat(parts, dim=1), logits, LATER)
    again = stream.read(str(tmp_path / "of-one"))

    def last(wire):
        cache = PiKVCache.for_model(model, given).share("heads", wire, model)
        restore(cache, part_of(again.cache, cache.own_layers[0].split, wire.count), model.device)
        assert torch.equal(weights(cache), chosen)
        return go_on(model, cache, again.tensors["logits"], END - LATER)[0]

    for end in on_ranks(2, last):
        assert torch.equal(torch.cat([*parts, end], dim=1), tokens)


def test_a_strategy_that_mixes_heads_is_refused_by_name(model, recipe):
    cache = PiKVCache.for_model(model, recipe("snapkv", "tova"))
    with pytest.raises(
        UsageError, match="policy 'tova', which 'moe-router' chooses among, does not judge each"
    ) as refused:
        cache.share("heads", Wire(0, 2), model)
    assert "let it choose among aggressive, " in refused.value.hint
    assert "tova" not in refused.value.hint and "quest" not in refused.value.hint


def test_by_tokens_it_is_refused_by_name(model, recipe):
    with pytest.raises(UsageError, match="policy 'moe-router' compares tokens by more than their positions"):
        PiKVCache.for_model(model, recipe()).share("tokens", Wire(0, 2), model)
