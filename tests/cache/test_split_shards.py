"""A cache that is split over ranks by shards is the whole one: its logits, tokens, bytes, states."""

import copy

import pytest
import small_calibration
import torch
from test_split_cache import decode
from thread_ranks import on_ranks

from pikv_core.cache import PiKVCache, stream
from pikv_core.cache.ranks.log import Follower, RankChanges
from pikv_core.cache.ranks.snapshot import part_of
from pikv_core.cache.ranks.split import Wire
from pikv_core.cache.snapshot import restore
from pikv_core.errors import UsageError
from pikv_core.model.steps import feed, prefill, step

PROMPT, STEPS = 160, 24
CLOSE = {"atol": 2e-4, "rtol": 2e-4}


def of_shards(budget=1.0, codec="none", **options):
    policy = {"name": "expert-shards", "shards": 8, "sinks": 4, "newest": 24, "page_tokens": 8, **options}
    return {"policy": policy, "budget": budget, "codec": codec}


def prompts(rows, length, seed=1):
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def held(cache, layer):
    """Return the tokens in shards, (row, head, position), and those in none."""
    (lane,) = cache.own_layers[layer].lanes
    empty = torch.full((1, 1, 0), -1)
    stores = [store.position if store.num_slots else empty for store in (lane.body, lane.tail)]
    return [sorted((b, g, int(x[b, g, s])) for b, g, s in (x >= 0).nonzero().tolist()) for x in stores]


CASES = [
    ("llama", of_shards(top_shards=2), 4),
    ("llama", of_shards(0.4), 2),
    ("qwen3_moe", of_shards(0.3, by="router", shards=5), 2),
]
SLOW = [
    ("llama", of_shards(top_shards=2), 2),
    ("llama", of_shards(top_shards=8), 4),
    ("llama", of_shards(80, promise="centroid", top_shards=4), 2),
    ("llama", of_shards(0.4), 4),
    ("qwen3_moe", of_shards(0.3, by="router", shards=5), 4),
    ("llama", of_shards(top_shards=3, slow_shards=2, latency=10.0, latency_weight=0.5), 3),
]


@pytest.mark.parametrize(
    ("arch", "recipe", "count"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_ranks_are_as_one(small_model, arch, recipe, count):
    model, ids = small_model(arch), prompts(2, PROMPT)
    whole = PiKVCache.for_model(model, recipe)
    with torch.no_grad():
        logits, tokens = decode(model, whole, ids, STEPS)

    def work(wire):
        own = copy.deepcopy(model)  # whose routers tell the caches of one rank
        cache = PiKVCache.for_model(own, recipe).share("shards", wire, own)
        return cache, *decode(own, cache, ids, STEPS)

    found = on_ranks(count, work)
    for _, own_logits, own_tokens in found:
        assert torch.equal(own_tokens, tokens)
        torch.testing.assert_close(own_logits, logits, **CLOSE)
        assert torch.equal(own_logits, found[0][1])
    for layer in range(3):
        body, tail = held(whole, layer)
        parts = [held(cache, layer) for cache, *_ in found]
        assert sorted(token for own, _ in parts for token in own) == body and len(body) > 100
        assert all(own == tail for _, own in parts)


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["svd", "lora"])
def test_codecs_of_one_token_a_unit_are_split(small_model, tmp_path, codec):
    model, ids = small_model("llama"), prompts(1, PROMPT)
    folder = small_calibration.write(model, tmp_path / "fitted", small_calibration.codecs(model))
    recipe = {**of_shards(top_shards=2, codec=codec), "calibration": [folder]}
    with torch.no_grad():
        logits, _ = decode(model, PiKVCache.for_model(model, recipe), ids, STEPS)

    def work(wire):
        return decode(model, PiKVCache.for_model(model, recipe).share("shards", wire, model), ids, STEPS)[0]

    for found in on_ranks(4, work):
        torch.testing.assert_close(found, logits, **CLOSE)


@pytest.mark.parametrize("by", [pytest.param("keys", marks=pytest.mark.slow), "router"])
def test_padded_rows_and_second_prompts_are_split_too(small_model, by):
    model, recipe, ids = small_model("qwen3_moe"), of_shards(top_shards=2, by=by), prompts(2, 150, 3)
    is_token = torch.ones(2, 90, dtype=torch.bool)
    is_token[1, :41] = False

    def work(wire=None):
        own = copy.deepcopy(model)
        cache = PiKVCache.for_model(own, recipe)
        if wire is not None:
            cache.share("shards", wire, own)
        logits = [prefill(own, cache, ids[:, :90], is_token=is_token)]
        logits += [step(own, cache, ids[:, column]) for column in range(90, 100)]
        logits += [feed(own, cache, ids[:, 100:140]), *(step(own, cache, ids[:, column]) for column in range(140, 150))]
        return torch.stack(logits)

    with torch.no_grad():
        whole = work()
    for found in on_ranks(3, work):
        torch.testing.assert_close(found, whole, **CLOSE)


@pytest.mark.parametrize("length", [1, 45])
def test_ranks_whose_shards_are_empty_take_part(small_model, length):
    """Four experts fill the first four of five shards; behind one token no shard has any for a while."""
    model, recipe = small_model("qwen3_moe"), of_shards(top_shards=1, by="router", shards=5, newest=8, sinks=1)
    ids = prompts(1, length, 4)
    with torch.no_grad():
        logits, _ = decode(model, PiKVCache.for_model(model, recipe), ids, 20)

    def work(wire):
        own = copy.deepcopy(model)
        cache = PiKVCache.for_model(own, recipe).share("shards", wire, own)
        return decode(own, cache, ids, 20)[0], cache.own_layers[0].lanes[0].body.num_slots

    found = on_ranks(5, work)
    for own, _ in found:
        torch.testing.assert_close(own, logits, **CLOSE)
    assert found[4][1] == 0 < max(num_slots for _, num_slots in found)


@pytest.mark.parametrize("count", [2, 4])
def test_bytes_are_those_of_the_formula(small_model, count):
    """What comes to a rank, and what it holds: its shards' pages, the tail and what all know of all shards."""
    model, recipe, (L, H, D), rows = small_model("llama"), of_shards(top_shards=2), (3, 4, 16), 2
    ids = prompts(rows, 300, 5)

    def work(wire=None):
        cache = PiKVCache.for_model(model, recipe)
        if wire is not None:
            cache.share("shards", wire, model)
        prefill(model, cache, ids[:, :-1])
        before = 0 if wire is None else wire.received_bytes
        step(model, cache, ids[:, -1])
        pages = sum(layer.lanes[0].body.nbytes for layer in cache.own_layers)
        known = sum(layer.run.nbytes + layer.lanes[0].tail.nbytes for layer in cache.own_layers)
        assert cache.resident_bytes == pages + known
        return pages, known, before, 0 if wire is None else wire.received_bytes - before

    with torch.no_grad():
        whole, known, *_ = work()
    found = on_ranks(count, work)
    assert {(prompt, token) for *_, prompt, token in found} == {(0, L * rows * H * (D * 4 + 4) * (count - 1))}
    assert all(own == known for _, own, *_ in found)
    assert max(pages for pages, *_ in found) < 1.5 * whole / count


@pytest.mark.parametrize("slow_shards", [3, 8])
def test_ranks_read_the_pages_of_one_process_each_once(small_model, slow_shards):
    """Pages of slow shards are counted, which may be all of them."""
    model, ids = small_model("llama"), prompts(1, 160, 6)
    recipe = of_shards(0.4, slow_shards=slow_shards)

    def work(wire=None):
        cache = PiKVCache.for_model(model, recipe)
        if wire is not None:
            cache.share("shards", wire, model)
        prefill(model, cache, ids[:, :150])
        reads = cache.count_reads()
        for column in range(150, 160):
            step(model, cache, ids[:, column])
        return reads.slow_bytes

    with torch.no_grad():
        whole = work()
    found = on_ranks(3, work)
    assert sum(found) == whole > 0


SAVED, END = 126, 150


def go_on(model, cache, ids, start, writer=None):
    """Feed ids [1,T] from `start` on, save every 7 tokens; return the logits of each token."""
    logits = []
    if start == 0:
        logits.append(prefill(model, cache, ids[:, :80]))
        start = 80
    for end in range(start + 1, ids.shape[1] + 1):
        logits.append(step(model, cache, ids[:, end - 1]))
        if writer is not None and end % 7 == 0:
            writer.save(cache, ids[:, :end], {}, {})
    return torch.cat(logits)


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_ranks_goes_on(small_model, tmp_path, count):
    """A state that one process saved, or some ranks, is read as one process's, and dealt out anew."""
    model, recipe, ids = small_model("llama"), of_shards(top_shards=2, newest=16), prompts(1, END, 2)
    with torch.no_grad():
        whole_cache = PiKVCache.for_model(model, recipe)
        go_on(model, whole_cache, ids[:, :SAVED], 0)
        whole = go_on(model, PiKVCache.for_model(model, recipe), ids, 0)

    def save(wire):
        cache = PiKVCache.for_model(model, recipe)
        changes = None
        if count > 1:
            cache.share("shards", wire, model)
            changes = RankChanges(wire, "shards")
        writer = Follower(changes) if wire.rank else stream.Writer(str(tmp_path / "state"), {}, None, changes)
        with writer:
            go_on(model, cache, ids[:, : SAVED + 5], 0, writer)

    on_ranks(count, save)
    saved = stream.read(str(tmp_path / "state"))
    assert saved.tokens.shape == (1, SAVED)
    alone = PiKVCache.for_model(model, recipe)
    restore(alone, saved.cache, model.device)
    for one, other in zip(alone.own_layers, whole_cache.own_layers):
        assert torch.equal(one.lanes[0].body.position, other.lanes[0].body.position)  # slot for slot
    with torch.no_grad():
        torch.testing.assert_close(go_on(model, alone, ids, SAVED), whole[SAVED - END :], **CLOSE)

    def work(wire):
        cache = PiKVCache.for_model(model, recipe).share("shards", wire, model)
        restore(cache, part_of(saved.cache, cache.own_layers[0].split, wire.count), model.device)
        return go_on(model, cache, ids, SAVED)

    for logits in on_ranks(2 if count == 3 else 4, work):
        torch.testing.assert_close(logits, whole[SAVED - END :], **CLOSE)


@pytest.mark.parametrize(
    ("arch", "recipe", "message"),
    [
        ("llama", {"policy": "h2o", "budget": 30}, "policy 'h2o' puts no tokens in shards"),
        ("llama", of_shards(), "reads everything under a budget of 1.0"),
        ("llama", of_shards(top_shards=2, shards=3), "4 ranks share 3 shards"),
        ("llama", of_shards(top_shards=2, dense_layers=1), "the first 1 layers make no shards"),
        ("gemma2", of_shards(top_shards=2), "layers with a sliding window make no shards"),
    ],
)
def test_what_cannot_be_split_is_refused_by_name(small_model, arch, recipe, message):
    model = small_model(arch)
    with pytest.raises(UsageError, match=message) as refused:
        PiKVCache.for_model(model, recipe).share("shards", Wire(0, 4), model)
    assert refused.value.hint


@pytest.mark.parametrize("split", ["heads", "tokens"])
def test_another_split_points_to_this_one(small_model, split):
    model = small_model("llama")
    with pytest.raises(UsageError) as refused:
        PiKVCache.for_model(model, of_shards(top_shards=2)).share(split, Wire(0, 2), model)
    assert "--split shards" in refused.value.hint
