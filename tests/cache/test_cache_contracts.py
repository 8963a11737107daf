"""What every policy, codec, allocation and their pairs owe their users, found by registry name, on whole models."""

import gc

import pytest
import torch
from small_calibration import codecs, gates, write

from pikv_core.cache import PiKVCache
from pikv_core.components import Component
from pikv_core.compression import CODECS
from pikv_core.errors import UsageError
from pikv_core.model.steps import feed, prefill
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Evictor
from pikv_core.schema import CacheRecipe

ARCHS = ["llama", "mixtral", "qwen3_moe"]
EVICTORS = [name for name in POLICIES.names() if issubclass(POLICIES[name], Evictor)]
OPTIONS = {"fastv": {"first_layer": 1}}  # of three layers
PROMPT, STEPS = 600, 12
KIB = {"fastv": (300, 240)}  # budgets; a full cache has 450


@pytest.fixture(scope="module")
def calibration_of(small_model, tmp_path_factory):
    made = {}

    def make(arch):
        if arch not in made:
            model = small_model(arch)
            made[arch] = write(model, tmp_path_factory.mktemp(arch) / "calibration", [*codecs(model), gates(model)])
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
    assert cache.resident_bytes == live_bytes(cache)
    plan = cache.own_layers[0].plan
    plain = 2 * 16 * 4 + 4 * (1 + len(plan.columns(scoring=False)))
    heads = sum(lane.head.numel() for layer in cache.own_layers for lane in layer.lanes)
    over = cache.resident_bytes - budget
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


def skip_unless_allowed(policy, allocation):
    """Tell pairs that are refused, and why: the refusal is the contract."""
    owns = issubclass(POLICIES[policy], Evictor) and POLICIES[policy].capacity is not Evictor.capacity
    return owns and allocation != "uniform"


def check_case(cache_of, model, arch, policy, codec, allocation):
    if skip_unless_allowed(policy, allocation):
        with pytest.raises(UsageError, match="spreads the budget itself"):
            cache_of(arch, policy, codec, allocation, "150KiB")
        return
    for kib in KIB.get(policy, (150, 80)):
        cache = cache_of(arch, policy, codec, allocation, f"{kib}KiB")
        ids = tokens(1, PROMPT + STEPS)
        prefill(model, cache, ids[:, :PROMPT], future=ids[:, PROMPT:])
        check_bytes(cache, kib * 1024)
        for at in range(PROMPT, PROMPT + STEPS):
            assert feed(model, cache, ids[:, at : at + 1]).isfinite().all()
        check_bytes(cache, kib * 1024)
        check_positions(cache, PROMPT + STEPS)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("codec", CODECS.names())
@pytest.mark.parametrize("policy", EVICTORS)
def test_a_policy_over_a_codec_keeps_to_its_bytes(cache_of, small_model, arch, policy, codec):
    check_case(cache_of, small_model(arch), arch, policy, codec, "uniform")
