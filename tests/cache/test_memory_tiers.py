"""A cache over tiers is the cache in memory, and what it says of bytes and time is so."""

import copy
import gc
import itertools
import time
from pathlib import Path

import pytest
import torch
from small_models import use_stock_attention

from pikv_core.cache import PiKVCache
from pikv_core.cache.backend import attending_by
from pikv_core.cache.snapshot import restore, take
from pikv_core.cache.tiers import memory
from pikv_core.errors import PiKVError, UsageError
from pikv_core.model.steps import feed

PROMPT, STEPS = 300, 8
DISK = {"host": 0, "disk": "/tmp"}
QUEST = {"policy": {"name": "quest", "dense_layers": 0}, "budget": 64}
SLOT_BYTES = 2 * 16 * 4 * 2  # of the small models: keys and values of two heads of 16 float32 channels


def tokens(rows, length, seed=0):
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def run(model, recipe, rows=1, watch=lambda cache: None, padding=0):
    """Feed a prompt and single tokens; return the logits of every step and the cache."""
    cache = PiKVCache.for_model(model, recipe)
    ids = tokens(rows, PROMPT + STEPS)
    is_token = torch.ones_like(ids, dtype=torch.bool)
    is_token[-1, :padding] = False
    logits = [feed(model, cache, ids[:, :PROMPT], is_token[:, :PROMPT])]
    for at in range(PROMPT, PROMPT + STEPS):
        logits.append(feed(model, cache, ids[:, at : at + 1], is_token[:, at : at + 1]))
        watch(cache)
    return torch.stack(logits), cache


def live_bytes(cache):
    """Bytes of storage by memory, found without the tiers' help; what is mapped from files or in extents apart."""
    found = {"device": {}}
    for lane in (lane for layer in cache.own_layers for lane in layer.lanes):
        stores = [store for store in (lane.tail, lane.body) if store is not None]
        held = [x for store in stores for group in (store._encoded, store._columns) for x in group.values()]
        held += [] if lane.bounds is None or lane.bounds._bounds is None else [lane.bounds._bounds]
        for store in stores:
            if hasattr(store, "slow"):
                held += [] if store._cache._flat is None else [store._cache._flat]
                for extent in store.slow.extents:
                    for x in extent.tensors.values():
                        own = found.setdefault(extent.tier.name, {})
                        own[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        for x in [*held, *cache.tiers.transfers.buffers]:
            found["device"][x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return {name: sum(own.values()) for name, own in found.items()}


@pytest.mark.parametrize("arch", ["llama", "gpt_oss", "gemma2"])
@pytest.mark.parametrize("codec", ["none", {"name": "int8", "group": 16, "residual": 8}])
def test_shares_give_what_memory_gives_to_the_bit(small_model, arch, codec):
    model, tiers = small_model(arch), {"page_tokens": 16}
    expected, _ = run(model, {"codec": codec}, rows=2, padding=90)
    found, cache = run(model, {"policy": "flexgen", "codec": codec, "tiers": tiers}, rows=2, padding=90)
    assert torch.equal(found, expected)
    report = cache.tiers.report()
    for name, share in {"device": 0.3, "host": 0.5, "disk": 0.2}.items():
        assert abs(report["share_of_tokens"][name] - share) < 0.06
    assert {name: count for name, count in live_bytes(cache).items() if count} == report["bytes"]
    assert sum(report["bytes"].values()) == cache.resident_bytes <= cache.peak_bytes


def test_a_cache_of_four_times_the_device_decodes_the_same_tokens(small_model):
    model = small_model("llama")
    expected, memory = run(model, {})
    limit = (PROMPT + STEPS) * SLOT_BYTES * 3 // 4  # keys and values alone are four times as many
    most = []
    outputs = []
    for tiers in ({}, {"host": 0, "cxl": {"bandwidth_gb_s": 10.0}}, {"host": "40KiB", "disk": "/tmp"}):
        recipe = {"tiers": {"device": limit, "page_tokens": 8, **tiers}}
        found, cache = run(model, recipe, watch=lambda cache: most.append(live_bytes(cache)["device"]))
        outputs.append(found)
        assert max(most) <= cache.tiers.report()["device_peak_decoding_bytes"] <= limit < memory.resident_bytes / 4
        assert live_bytes(cache).get("host", 0) <= (40 * 1024 if tiers.get("host") else 2**30)
    for found in outputs:
        assert torch.equal(found, outputs[0])  # the same pieces, whatever memory they come from
        assert torch.equal(found.argmax(-1), expected.argmax(-1))
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("codec", ["none", {"name": "int8", "group": 16, "residual": 8}])
@pytest.mark.parametrize(("backend", "padding"), [("torch", 90), ("numba", 0)])
def test_quest_brings_no_more_than_it_reads_and_gives_the_same_to_the_bit(small_model, codec, backend, padding):
    model, brought, limit = small_model("llama"), [0], 310_000

    def watch(cache):
        brought.append(cache.tiers.report()["bytes_moved"])
        assert live_bytes(cache)["device"] <= limit

    with attending_by(backend, torch.device("cpu")):  # a kernel is chosen by how many tokens there are
        expected, memory = run(model, {**QUEST, "codec": codec}, 2, padding=padding)
        recipe = {**QUEST, "codec": codec, "tiers": {"device": limit, "staging": 8192, **DISK}}
        found, _ = run(model, recipe, 2, watch, padding)
    assert codec != "none" or memory.resident_bytes > 1.5 * limit
    assert torch.equal(found, expected)
    per_token = [after - before for before, after in itertools.pairwise(brought)]
    assert brought[-1] > 0 and max(per_token) <= 3 * 2 * 64 * SLOT_BYTES  # of three layers and two rows


def test_transfers_hide_behind_longer_work_and_show_where_they_are_longer(small_model):
    """A simulated memory, and layers that sleep instead of computing: neither depends on who else uses the cores."""
    model = small_model("llama")
    shares = []
    for work_s, transfer_s in ((0.03, 0.012), (0.005, 0.05)):
        per_layer = 2 * SLOT_BYTES * 256 / transfer_s / 1e9
        recipe = {
            "policy": {"name": "flexgen", "device": 0.0, "host": 0.0, "disk": 0.0, "cxl": 1.0},
            "tiers": {"cxl": {"bandwidth_gb_s": per_layer / 2}},
        }
        cache = PiKVCache.for_model(model, recipe)
        state = torch.randn(1, 2, 257, 16)
        for layer in cache.own_layers:
            layer.append(state, state)
        start = time.perf_counter()
        for _ in range(6):
            for layer in cache.own_layers:
                time.sleep(work_s)
                layer.update(state[:, :, :1], state[:, :, :1])
                layer.attend(torch.randn(1, 4, 1, 16), 0.25)
        wall_s = time.perf_counter() - start
        report = cache.tiers.report()
        assert report["simulated"] == ["cxl"]
        assert report["transfer_s"] >= 18 * transfer_s * 0.9
        assert report["hidden_s"] + report["waited_s"] >= report["transfer_s"] * 0.99
        assert wall_s >= 18 * work_s + report["waited_s"] * 0.9
        shares.append(report["share_hidden"])
    assert shares[0] >= 0.8 > 0.5 > shares[1]


def test_later_turns_beams_forks_and_resets(small_model):
    model = small_model("llama")
    recipe = {"tiers": {"device": 300_000, "page_tokens": 8, **DISK}}
    expected, memory = run(model, {}, rows=2)
    _, cache = run(model, recipe, rows=2)
    more = tokens(2, 9, seed=3)
    fork, copied = cache.fork(), copy.deepcopy(memory)
    for own in (cache, memory):
        own.reorder_cache(torch.tensor([1, 0]))
    outputs = []
    for own in (cache, memory, fork, copied):
        outputs.append(torch.stack([feed(model, own, more), *(feed(model, own, x[:, None]) for x in more.unbind(1))]))
    for found, exact in ((outputs[0], outputs[1]), (outputs[2], outputs[3])):
        assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()
    for one, other in zip(cache.retrieve(1), memory.retrieve(1)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    use_stock_attention(model)
    ids = tokens(2, 60)
    beams = model.generate(ids, max_new_tokens=10, num_beams=3, do_sample=False)
    ours = PiKVCache.for_model(model, {"policy": "flexgen", "tiers": {"page_tokens": 8}})
    assert torch.equal(
        model.generate(ids, max_new_tokens=10, num_beams=3, do_sample=False, past_key_values=ours), beams
    )
    repeated, copied = cache.fork(), memory.fork()
    for own in (repeated, copied):
        own.batch_repeat_interleave(3)
    one, other = (feed(model, own, tokens(6, 1)) for own in (repeated, copied))
    assert (one - other).abs().max() <= 1e-5 * other.abs().max()
    cache.reset()
    assert cache.resident_bytes == 0 and cache.get_seq_length() == 0
    again = feed(model, cache, tokens(2, PROMPT + STEPS)[:, :PROMPT])
    assert torch.equal(again, expected[0])


def test_what_comes_while_held_is_read_behind_the_pages_and_forgotten(small_model):
    model, ids = small_model("llama"), tokens(1, 60)
    recipes = ({}, {"policy": "flexgen", "tiers": {"page_tokens": 8}})
    caches = [PiKVCache.for_model(model, recipe) for recipe in recipes]
    for cache in caches:
        feed(model, cache, ids[:, :30])
        cache.hold()
    for at in range(30, 55):
        expected, found = (feed(model, cache, ids[:, at : at + 1]) for cache in caches)
        assert torch.equal(found, expected)
    for cache in caches:
        cache.rewind(25)
        cache.compress()
    expected, found = (feed(model, cache, ids[:, 55:56]) for cache in caches)
    assert torch.equal(found, expected)
    assert caches[1].tiers.report()["share_of_tokens"]["device"] < 0.5


def test_a_restored_cache_goes_on_exactly(small_model):
    model = small_model("llama")
    for recipe in ({"tiers": {"device": 80_000, "page_tokens": 8}}, {**QUEST, "tiers": {"device": 170_000, **DISK}}):
        _, cache = run(model, recipe)
        other = PiKVCache.for_model(model, recipe)
        restore(other, take(cache), model.device)
        assert live_bytes(other)["device"] <= recipe["tiers"]["device"]
        for token in tokens(1, 8, seed=2).unbind(1):
            assert torch.equal(feed(model, cache, token[:, None]), feed(model, other, token[:, None]))


def test_files_have_no_name_while_they_are_used(small_model, tmp_path):
    """So that nothing is left however the process ends, and nobody else's file is ever opened."""
    _, cache = run(
        small_model("llama"), {"tiers": {"device": 80_000, "page_tokens": 8, "host": 0, "disk": str(tmp_path)}}
    )
    assert cache.tiers.report()["bytes"]["disk"] > 150_000 and not list(tmp_path.iterdir())
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert mapped and all("(deleted)" in line for line in mapped)
    del cache
    late = time.monotonic() + 20  # a page may be on its way
    while str(tmp_path) in Path("/proc/self/maps").read_text():
        assert time.monotonic() < late
        gc.collect()


def test_full_tiers_and_full_disks_are_told(small_model, monkeypatch, tmp_path):
    model = small_model("llama")
    with pytest.raises(PiKVError, match="tiers behind the device are full: host 50,000 bytes"):
        run(model, {"tiers": {"device": 70_000, "page_tokens": 8, "host": 50_000}})
    with pytest.raises(PiKVError, match="a device limit of 20,000 bytes has no room"):
        run(model, {"tiers": {"device": 20_000, "page_tokens": 8}})
    with pytest.raises(PiKVError, match="too small for a page of 8 tokens"):
        run(model, {"tiers": {"device": 70_000, "page_tokens": 8, "staging": 4_000}})
    with pytest.raises(PiKVError, match=r"cannot keep .* bytes of the cache here: No such file"):
        run(model, {"tiers": {"device": 70_000, "page_tokens": 8, "host": 0, "disk": str(tmp_path / "none")}})

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(memory.os, "posix_fallocate", full)
    with pytest.raises(PiKVError, match=r"cannot keep .* bytes of the cache here: No space left"):
        run(model, {"tiers": {"device": 70_000, "page_tokens": 8, **DISK}})


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        ({"policy": "h2o", "budget": 0.5, "tiers": {"device": "1MiB"}}, "'h2o' drops tokens"),
        ({"rerotate": True, "tiers": {"device": "1MiB"}}, "rerotate moves keys"),
        ({"tiers": {"disk": "/tmp"}}, "without a limit of the device hold nothing under policy 'full'"),
        ({"policy": {"name": "flexgen", "cxl": 0.2, "host": 0.3}}, "no such memory is given"),
        ({"policy": {"name": "flexgen", "host": 0.3}}, "sum to 0.8, not to 1"),
        ({"policy": "flexgen", "rerotate": True}, "rerotate moves keys"),
        ({"policy": "flexgen", "budget": 0.5}, "'flexgen' keeps every token"),
    ],
)
def test_what_does_not_go_over_tiers_is_refused_by_name(small_model, recipe, text):
    with pytest.raises((UsageError, PiKVError), match=text):
        PiKVCache.for_model(small_model("llama"), recipe)
