"""What every policy, codec, allocation and their pairs owe their users, found by registry name, on whole models."""

import copy
import gc
import os
import pickle
from pathlib import Path

import pytest
import torch
from small_calibration import codecs, policies, write

from pikv_core.cache import PiKVCache
from pikv_core.components import Component
from pikv_core.compression import CODECS
from pikv_core.errors import UsageError
from pikv_core.model.steps import feed, prefill
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.allocation import ALLOCATIONS
from pikv_core.scheduling.base import Evictor
from pikv_core.schema import CacheRecipe

ARCHS = ["llama", "mixtral", "qwen3_moe"]
EVICTORS = [name for name in POLICIES.names() if issubclass(POLICIES[name], Evictor)]
OPTIONS = {"fastv": {"first_layer": 1}}  # of three layers
PROMPT, STEPS = 600, 6
SHARE = {"fastv": 0.6}


@pytest.fixture(scope="module")
def calibration_of(small_model, tmp_path_factory):
    made = {}

    def make(arch):
        if arch not in made:
            model = small_model(arch)
            made[arch] = write(model, tmp_path_factory.mktemp(arch) / "calibration", [*codecs(model), *policies(model)])
        return made[arch]

    return make


@pytest.fixture
def cache_of(small_model, calibration_of):
    def make(arch, policy="full", codec="none", allocation="uniform", budget=1.0, **more):
        recipe = CacheRecipe(
            policy=Component(policy, OPTIONS.get(policy, {})),
            codec=Component(codec),
            allocation=Component(allocation),
            budget=budget,
            calibration=[calibration_of(arch)],
            **more,
        )
        return PiKVCache.for_model(small_model(arch), recipe)

    return make


def tokens(rows, length, seed=0):
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def run(model, cache, rows=1, seed=0):
    """Feed a prompt, single tokens, a turn of 8 tokens and a long one; return the logits of every step."""
    ids = tokens(rows, PROMPT + STEPS + 48, seed)
    logits = [prefill(model, cache, ids[:, :PROMPT], future=ids[:, PROMPT:])]
    for at in range(PROMPT, PROMPT + STEPS):
        logits.append(feed(model, cache, ids[:, at : at + 1]))
    logits.append(feed(model, cache, ids[:, PROMPT + STEPS : PROMPT + STEPS + 8]))
    logits.append(feed(model, cache, ids[:, PROMPT + STEPS + 8 :]))
    return torch.stack(logits)


def live_bytes(cache):
    """Bytes of the storage of all tensors that the cache's stores hold, found without their help."""
    found = {}
    for lane in (lane for layer in cache.own_layers for lane in layer.lanes):
        holders = [lane.tail, *([lane.body] if lane.body is not None else [])]
        tensors = [x for store in holders for group in (store._encoded, store._columns) for x in group.values()]
        tensors += [] if lane.bounds is None or lane.bounds._bounds is None else [lane.bounds._bounds]
        for x in tensors:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(found.values())


def check_bytes(cache, budget):
    """Compare resident bytes with a budget in bytes: at most 3 % or 9 slots a head over it, less than a unit under."""
    remembered = sum(layer.run.nbytes for layer in cache.own_layers)
    assert cache.resident_bytes == live_bytes(cache) + remembered
    plan = cache.own_layers[0].plan
    plain = 2 * 16 * 4 + 4 * (1 + len(plan.columns(scoring=False)))
    heads = sum(lane.head.numel() for layer in cache.own_layers for lane in layer.lanes)
    over = cache.resident_bytes - remembered - budget
    assert over <= max(0.03 * budget, 9 * plain * heads), f"{cache.resident_bytes} bytes for {budget}"
    holds_all = all((position >= 0).sum(-1).min() >= PROMPT for position in cache.positions)
    unit = max(8, *(layer.plan.codec.unit_tokens for layer in cache.own_layers))
    assert holds_all or -over <= max(0.03 * budget, unit * plain * heads), f"{cache.resident_bytes} bytes for {budget}"


def check_positions(cache, seen):
    for position in cache.positions:
        for head in position.flatten(0, 1):
            real = [p for p in head.tolist() if p >= 0]
            assert len(set(real)) == len(real) and max(real) < seen
    gc.collect()


def check_case(cache_of, model, arch, policy, codec, allocation):
    if owns_its_budget(policy, allocation):
        with pytest.raises(UsageError, match="spreads the budget itself"):
            cache_of(arch, policy, codec, allocation, "150KiB")
        return
    kib = 250 if policy == "fastv" else 80  # a full cache has 450
    cache = cache_of(arch, policy, codec, allocation, f"{kib}KiB")
    ids = tokens(1, PROMPT + STEPS)
    prefill(model, cache, ids[:, :PROMPT], future=ids[:, PROMPT:])
    check_bytes(cache, kib * 1024)
    for at in range(PROMPT, PROMPT + STEPS):
        assert feed(model, cache, ids[:, at : at + 1]).isfinite().all()
    check_bytes(cache, kib * 1024)
    check_positions(cache, PROMPT + STEPS)


@pytest.mark.parametrize("codec", CODECS.names())
@pytest.mark.parametrize("policy", EVICTORS)
def test_a_policy_over_a_codec_keeps_to_its_bytes(cache_of, small_model, policy, codec):
    arch = ARCHS[(EVICTORS.index(policy) + CODECS.names().index(codec)) % len(ARCHS)]
    check_case(cache_of, small_model(arch), arch, policy, codec, "uniform")


@pytest.mark.parametrize("allocation", ALLOCATIONS.names())
@pytest.mark.parametrize("policy", EVICTORS)
def test_a_policy_under_an_allocation_keeps_to_its_bytes(cache_of, small_model, policy, allocation):
    arch = ARCHS[(EVICTORS.index(policy) + ALLOCATIONS.names().index(allocation)) % len(ARCHS)]
    check_case(cache_of, small_model(arch), arch, policy, "none", allocation)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("allocation", ALLOCATIONS.names())
@pytest.mark.parametrize("codec", CODECS.names())
@pytest.mark.parametrize("policy", EVICTORS)
def test_triples_keep_to_their_bytes(cache_of, small_model, policy, codec, allocation, arch):
    check_case(cache_of, small_model(arch), arch, policy, codec, allocation)


@pytest.mark.parametrize("policy", POLICIES.names())
def test_a_whole_budget_loses_nothing(cache_of, small_model, policy):
    arch = ARCHS[POLICIES.names().index(policy) % len(ARCHS)]
    model = small_model(arch)
    for codec in ("none", "int4", "svd"):
        expected = run(model, cache_of(arch, codec=codec))
        found = run(model, cache_of(arch, policy, codec))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("allocation", ALLOCATIONS.names())
@pytest.mark.parametrize("policy", EVICTORS)
def test_the_same_run_keeps_the_same_tokens_in_order(cache_of, small_model, policy, allocation):
    """Twice the same; after a prompt the positions are in order, and the keys are those that the model made there."""
    if owns_its_budget(policy, allocation):
        return
    arch = ARCHS[EVICTORS.index(policy) % len(ARCHS)]
    model, ids = small_model(arch), tokens(2, PROMPT)
    full = cache_of(arch)
    feed(model, full, ids)
    caches = [cache_of(arch, policy, allocation=allocation, budget=SHARE.get(policy, 0.25)) for _ in range(2)]
    for cache in caches:
        prefill(model, cache, ids, future=ids[:, :16])
    for index, (one, other) in enumerate(zip(*(cache.positions for cache in caches))):
        assert torch.equal(one, other)
        for head in one.flatten(0, 1):
            real = head[head >= 0].tolist()
            assert real == sorted(set(real)) and real
        keys, values, position = caches[0].retrieve(index)
        whole = full.retrieve(index)
        at = position.clamp(min=0).long()[..., None].expand_as(keys)
        for found, exact in zip((keys, values), whole):
            torch.testing.assert_close(found[position >= 0], exact.gather(2, at)[position >= 0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("allocation", ["uniform", "ada-kv"])
@pytest.mark.parametrize("policy", EVICTORS)
def test_a_padded_row_keeps_what_it_keeps_alone(cache_of, small_model, policy, allocation):
    """No padding is kept while a real token is dropped, and a row's neighbours change nothing, steps later either.

    On a dense model: experts are chosen by scores that rounding can turn over.
    """
    if owns_its_budget(policy, allocation):
        return
    arch = "llama"
    model, pad = small_model(arch), 100
    ids = tokens(2, 240)
    is_token = torch.ones_like(ids, dtype=torch.bool)
    is_token[1, :pad] = False
    share = SHARE.get(policy, 0.25)
    together = cache_of(arch, policy, allocation=allocation, budget=share)
    prefill(model, together, ids, future=ids[:, :16], is_token=is_token)
    alone = cache_of(arch, policy, allocation=allocation, budget=share)
    prefill(model, alone, ids[1:, pad:], future=ids[1:, :16])
    check_same_tokens(together, alone)
    if policy == "knorm":
        return  # in the first layer a token's keys are equally long wherever it stands: rounding decides
    for token in tokens(2, 24, seed=1).unbind(1):
        feed(model, together, token[:, None], torch.ones(2, 1, dtype=torch.bool))
        feed(model, alone, token[1:, None])
    check_same_tokens(together, alone)


def check_same_tokens(together, alone):
    """Compare what the second row keeps in a batch with what it keeps alone."""
    for both, one in zip(together.positions, alone.positions):
        for mixed, own in zip(both[1], one[0]):
            assert sorted(mixed[mixed >= 0].tolist()) == sorted(own[own >= 0].tolist())


@pytest.mark.parametrize("codec", ["none", "int8"])
@pytest.mark.parametrize("allocation", ["uniform", "ada-kv", "entropy"])
@pytest.mark.parametrize("policy", EVICTORS)
def test_later_turns_beams_and_copies(cache_of, small_model, policy, allocation, codec):
    """After eviction single steps, steps of 8 and long ones work, on reordered rows and on copies too."""
    if owns_its_budget(policy, allocation):
        return
    arch = ARCHS[EVICTORS.index(policy) % len(ARCHS)]
    model = small_model(arch)
    cache = cache_of(arch, policy, codec, allocation, SHARE.get(policy, 0.25))
    logits = run(model, cache, rows=2)
    assert logits.isfinite().all()
    kept = sum(int((position >= 0).sum()) for position in cache.positions)
    whole = (PROMPT + STEPS + 48) * sum(position.shape[0] * position.shape[1] for position in cache.positions)
    assert kept <= (SHARE.get(policy, 0.25) + (0.5 if codec == "int8" else 0.03)) * whole

    swapped = copy.deepcopy(cache)
    swapped.reorder_cache(torch.tensor([1, 0]))
    pickled = pickle.loads(pickle.dumps(cache))
    ids = tokens(2, 9, seed=5)
    outputs = []
    for copied, rows in ((cache, ids), (swapped, ids.flip(0)), (pickled, ids)):
        out = [feed(model, copied, rows[:, :1]), feed(model, copied, rows[:, 1:])]
        outputs.append(torch.stack(out))
    straight, reordered, restored = outputs
    assert torch.equal(restored, straight)
    assert (reordered.flip(1) - straight).abs().max() <= 1e-4 * straight.abs().max()


def test_memory_is_given_back(cache_of):
    """The process itself shrinks when a large cache is compressed: 92 MB a layer, then a tenth."""
    generator = torch.Generator().manual_seed(0)
    resident = []
    for share in (1.0, 0.1):
        cache = cache_of("llama", "streaming-llm", budget=share)
        before = memory_bytes()
        for layer in cache.own_layers:
            layer.hold()
            for _ in range(6):
                keys, values = torch.randn(2, 2, 8, 15_000, 16, generator=generator).unbind(0)
                layer.update(keys, values)
                layer.attend(keys[:, :, :0].repeat(1, 2, 1, 1), 0.25)
            layer.compress()
        del keys, values
        resident.append((memory_bytes() - before, cache.resident_bytes))
    (whole, whole_counted), (kept, kept_counted) = resident
    assert whole_counted > 5 * kept_counted
    assert whole - kept > 0.8 * (whole_counted - kept_counted), f"{whole} and {kept} bytes"


def memory_bytes():
    """Resident memory of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def owns_its_budget(policy, allocation):
    """Tell policies that spread the budget themselves: any other allocation is refused, which has its own test."""
    return allocation != "uniform" and POLICIES[policy].capacity is not Evictor.capacity
