"""Replays over tiers equal a simulation of plain lists, the compiled loop its twin, and one tier a plain replay."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

import numpy as np
import pytest

from pikv_core.components import Component
from pikv_core.simulation.ceiling import ceiling_hits
from pikv_core.simulation.cost.hardware import Hardware
from pikv_core.simulation.cost.kv_model import KvModel
from pikv_core.simulation.cost.prefill import compute_s
from pikv_core.simulation.cost.priced import build_priced
from pikv_core.simulation.cost.tier_replay import TierStudy, replay_tiers
from pikv_core.simulation.cost.tiers import make_tiers
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.replay import replay
from pikv_core.simulation.trace import Trace, make_trace

MODEL, HARDWARE = KvModel.load("llama-3.1-8b"), Hardware.load("h100")
BLOCK_TOKENS = 4
BLOCK_BYTES = MODEL.block_bytes(BLOCK_TOKENS)


def random_trace(seed: int, chained: bool) -> tuple[Trace, list[list[int]]]:
    """Return prompts with common beginnings, or with ids in any order that repeat within a prompt."""
    random_ = random.Random(seed)
    paths = [
        tuple(random_.randrange(3) for _ in range(random_.randrange(0, 7))) for _ in range(random_.randrange(2, 40))
    ] + [(0,)]
    names: dict[tuple[int, ...], int] = {}
    requests = [
        [names.setdefault(path[: end + 1] if chained else path[end : end + 1], len(names)) for end in range(len(path))]
        for path in paths
    ]
    lengths = [max(0, BLOCK_TOKENS * len(request) - random_.randrange(BLOCK_TOKENS)) for request in requests]
    return make_trace(requests, BLOCK_TOKENS, lengths), requests


def random_tiers(seed: int, num_tiers: int) -> list[dict[str, Any]]:
    random_ = random.Random(1000 + seed)
    tiers = [
        {
            "name": f"tier {level}",
            "capacity": random_.choice((1, 2, 3, 5, 8, 100)),
            "policy": random_.choice(("lru", "fifo")),
            "gb_per_s": random_.choice((2.9, 7.1, 13.3, "unlimited")),
            "latency_ms": random_.choice((0, 0.013, 0.31)),
            "write": random_.choice(("back", "through")),
            "promote": random_.random() < 0.7,
        }
        for level in range(num_tiers)
    ]
    if random_.random() < 0.3:
        tiers[-1]["capacity"] = "unlimited"
    return tiers


@dataclasses.dataclass
class Shelf:
    """A tier as a list, next victim first."""

    told: dict[str, Any]
    blocks: list[int] = dataclasses.field(default_factory=list)
    counts: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(COUNTS, 0))

    def use(self, block: int) -> None:
        if self.told["policy"] == "lru":
            self.blocks.remove(block)
            self.blocks.append(block)

    def load_s(self, num_blocks: int) -> float:
        rate = self.told["gb_per_s"]
        seconds = 0.0 if rate == "unlimited" else num_blocks * BLOCK_BYTES / (rate * 1e9)
        return seconds + (self.told["latency_ms"] / 1000 if num_blocks else 0.0)


COUNTS = ("block_hits", "blocks_used", "tokens_used", "written", "evictions")


def put(shelves: list[Shelf], block: int) -> None:
    shelf, below = shelves[0], shelves[1:]
    capacity = shelf.told["capacity"]
    if capacity != "unlimited" and len(shelf.blocks) == capacity:
        victim = shelf.blocks.pop(0)
        shelf.counts["evictions"] += 1
        if below and victim in below[0].blocks:
            below[0].use(victim)
        elif below and shelf.told["write"] == "back":
            put(below, victim)
    shelf.blocks.append(block)
    shelf.counts["written"] += 1
    if below and shelf.told["write"] == "through" and block not in below[0].blocks:
        put(below, block)


def by_lists(
    requests: list[list[int]], lengths: list[int], tiers: list[dict[str, Any]], overlap: float, warm_up: int
) -> tuple[list[Shelf], list[tuple[int, int, float]]]:
    """Return the shelves, and of each request the blocks found, the blocks used and the seconds to load them."""
    shelves = [Shelf(told) for told in tiers]
    told = []
    for number, (request, length) in enumerate(zip(requests, lengths)):
        if number == warm_up:
            for shelf in shelves:
                shelf.counts = dict.fromkeys(COUNTS, 0)
        held = [[shelf for shelf in shelves if block in shelf.blocks] for block in request]
        num_found = next((place for place, shelf in enumerate(held) if not shelf), len(request))
        sources = [places[0] for places in held[:num_found]]
        best_s, num_used, load_s = float("inf"), 0, 0.0
        for count in range(num_found + 1):
            load = sum(shelf.load_s(sum(source is shelf for source in sources[:count])) for shelf in shelves)
            compute = float(compute_s(MODEL, HARDWARE, length, min(length, count * BLOCK_TOKENS)))
            seconds = overlap * max(compute, load) + (1 - overlap) * (compute + load)
            if seconds <= best_s:
                best_s, num_used, load_s = seconds, count, load
        told.append((num_found, num_used, load_s))
        for place, source in enumerate(sources):
            source.counts["block_hits"] += 1
            if place < num_used:
                source.counts["blocks_used"] += 1
                source.counts["tokens_used"] += min(BLOCK_TOKENS, max(0, length - place * BLOCK_TOKENS))
        for place in reversed(range(len(request))):
            block = request[place]
            if block in shelves[0].blocks:
                shelves[0].use(block)
                continue
            if place < num_used and sources[place] is not shelves[0]:
                if block in sources[place].blocks:
                    sources[place].use(block)
                if not sources[place].told["promote"]:
                    continue
            put(shelves, block)
    return shelves, told


def study(trace: Trace, tiers: list[dict[str, Any]], **how: Any) -> TierStudy:
    return replay_tiers(trace, make_tiers({"tiers": tiers}, MODEL, trace.block_tokens), MODEL, HARDWARE, **how)


@pytest.mark.parametrize("num_tiers", [1, 2, 3])
@pytest.mark.parametrize("chained", [True, False])
def test_replay_equals_lists(num_tiers: int, chained: bool) -> None:
    for seed in range(120):
        trace, requests = random_trace(seed, chained)
        tiers = random_tiers(seed, num_tiers)
        overlap, warm_up = (0.0, 0.4, 1.0)[seed % 3], seed % 4 * (len(requests) // 5)
        found = study(trace, tiers, overlap=overlap, warm_up=warm_up, backend="python")
        shelves, told = by_lists(requests, trace.input_tokens.tolist(), tiers, overlap, warm_up)
        assert found.requests.blocks_found.tolist() == [blocks for blocks, _, _ in told], f"seed {seed}"
        assert found.requests.blocks_used.tolist() == [blocks for _, blocks, _ in told], f"seed {seed}"
        assert found.requests.load_s.tolist() == pytest.approx([load_s for _, _, load_s in told]), f"seed {seed}"
        for row, shelf in zip(found.tiers, shelves):
            counts = {
                "block_hits": row.block_hits,
                "blocks_used": row.blocks_used,
                "tokens_used": row.tokens_used,
                "written": row.bytes_written // BLOCK_BYTES,
                "evictions": row.evictions,
            }
            assert counts == shelf.counts, f"seed {seed}, {row.tier}"


def same(one: TierStudy, other: TierStudy) -> bool:
    arrays = zip(vars(one.requests).values(), vars(other.requests).values())
    return one.plain() == other.plain() and all((left == right).all() for left, right in arrays)


SWITCH = {"name": "switch", "policies": ["lru", "lfu"], "window": 7}


@pytest.mark.parametrize(
    "policies",
    [
        ("lru",),
        ("lru", "fifo"),
        pytest.param(("fifo", "lfu", "lru"), marks=pytest.mark.slow),
        pytest.param((SWITCH, "ttl"), marks=pytest.mark.slow, id="switch-ttl"),
        pytest.param(("workload-aware", "gdsf"), marks=pytest.mark.slow),
    ],
)
def test_twin_equals_compiled(policies: tuple[Any, ...]) -> None:
    for seed in range(40):
        trace, _ = random_trace(seed, chained=seed % 2 == 0)
        tiers = [{**told, "policy": name} for told, name in zip(random_tiers(seed, len(policies)), policies)]
        how: dict[str, Any] = {"overlap": 0.5, "warm_up": seed % 3, "num_servers": 2}
        assert same(study(trace, tiers, **how), study(trace, tiers, **how, backend="python")), f"seed {seed}"


@pytest.mark.parametrize("policy", REQUEST_POLICIES.names())
def test_one_tier_equals_a_plain_replay(policy: str) -> None:
    for seed in range(12):
        trace, _ = random_trace(seed, chained=seed % 2 == 0)
        for capacity in (1, 3, 8, 1000):
            tiers = [{"name": "hbm", "capacity": capacity, "policy": policy}]
            found = study(trace, tiers, backend="python")
            expected = replay(trace, build_priced(Component(policy), MODEL), capacity, backend="python")
            assert found.requests.blocks_found.tolist() == expected.hits.tolist()
            assert found.requests.blocks_used.tolist() == expected.hits.tolist()
            assert (found.tiers[0].evictions, found.tiers[0].expirations) == (expected.evictions, expected.expirations)
            assert found.touch == expected.touch


LOWER = [name for name in REQUEST_POLICIES.names() if not REQUEST_POLICIES[name].knows_future]


@pytest.mark.parametrize("policy", LOWER)
def test_every_policy_keeps_its_books_in_every_tier(policy: str) -> None:
    for seed in range(12):
        trace, _ = random_trace(seed, chained=seed % 2 == 0)
        tiers = [{**told, "policy": policy} for told in random_tiers(seed, 3)]
        for row, told in zip(study(trace, tiers, backend="python").tiers, tiers):
            left = row.bytes_written // BLOCK_BYTES - row.evictions - row.expirations
            limit = trace.num_blocks if row.capacity_blocks is None else row.capacity_blocks
            assert 0 <= left <= limit, (seed, told)


@pytest.mark.parametrize("expires", [False, True])
def test_policies_are_told_of_a_use_of_the_block(expires: bool) -> None:
    told: list[tuple[int, int, int]] = []

    def noted(function: Any) -> Any:
        def call(state: Any, block: int, access: int, request: int) -> None:
            told.append((block, access, request))
            function(state, block, access, request)

        return call

    lru = REQUEST_POLICIES["lru"]
    members = {"touch": noted(lru.touch), "admit": noted(lru.admit), "expires": expires, "name": "spy"}
    spy = type(
        "Spy",
        (lru,),
        {key: value if key in ("expires", "name") else staticmethod(value) for key, value in members.items()},
    )
    for seed in range(20):
        trace, _ = random_trace(seed, chained=seed % 2 == 0)
        tiers = list(make_tiers({"tiers": random_tiers(seed, 3)}, MODEL, BLOCK_TOKENS))
        tiers[1] = dataclasses.replace(tiers[1], policy=spy())
        told.clear()
        replay_tiers(trace, tiers, MODEL, HARDWARE, backend="python")
        requests = [request for _, _, request in told]
        if expires:
            assert requests == sorted(requests)
        for block, access, request in told:
            assert trace.starts[request] <= access < trace.starts[request + 1]
            assert expires or trace.ids[access] == block


def test_the_place_in_the_prompt_goes_down_with_the_block() -> None:
    tiers = [{"name": "hbm", "capacity": 2}, {"name": "dram", "capacity": 3, "policy": "length-aware"}]
    trace = make_trace([[0, 1], [2], [3], [4], [5], [0, 1]], 512)
    found = study(trace, tiers, backend="python", touch="forward")
    # 0, 1 and 2 came down in this order; for 3 the block leaves that is farthest into its prompt
    assert found.requests.blocks_found.tolist() == [0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("write", ["back", "through"])
@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_an_unlimited_last_tier_that_is_free_catches_every_repeat(write: str, policy: str) -> None:
    for seed in range(30):
        trace, _ = random_trace(seed, chained=seed % 2 == 0)
        for capacity in (1, 4):
            tiers = [
                {"name": "hbm", "capacity": capacity, "policy": policy, "write": write},
                {"name": "dram", "capacity": capacity + 1, "policy": policy, "write": write},
                {"name": "free", "capacity": "unlimited", "gb_per_s": "unlimited", "latency_ms": 0},
            ]
            found = study(trace, tiers, backend="python")
            assert found.block_hits == ceiling_hits(trace, "prefix")
            tiers[1] = {**tiers[1], "gb_per_s": "unlimited", "latency_ms": 0}
            assert study(trace, tiers, backend="python").requests.blocks_used.sum() == found.block_hits


def test_a_tier_slower_than_computing_is_not_used() -> None:
    trace = make_trace([[0, 1, 2], [0, 1, 2], [0, 1, 2]], 512)
    slow = [
        {"name": "hbm", "capacity": 1},
        {"name": "disk", "capacity": "unlimited", "gb_per_s": 0.1, "latency_ms": 1},
    ]
    found = study(trace, slow, backend="python")
    assert found.requests.blocks_found.tolist() == [0, 3, 3]
    assert found.requests.blocks_used.tolist() == [0, 1, 1]  # the first block is in hbm
    assert (found.tiers[1].block_hits, found.tiers[1].blocks_used, found.tiers[1].bytes_read) == (4, 0, 0)
    assert found.tiers[1].break_even_tokens is not None and found.tiers[1].break_even_tokens > 3 * 512


def test_a_copy_below_is_not_written_again() -> None:
    tiers = [{"name": "hbm", "capacity": 1}, {"name": "dram", "capacity": "unlimited"}]
    trace = make_trace([[0], [1], [0], [1], [0], [1]], 512)
    found = study(trace, tiers, backend="python")
    assert found.tiers[0].evictions == 5
    assert found.tiers[1].bytes_written == 2 * MODEL.block_bytes(512)
    through = study(trace, [{**tiers[0], "write": "through"}, tiers[1]], backend="python")
    assert through.tiers[1].bytes_written == 2 * MODEL.block_bytes(512)


def test_times_and_tokens_of_requests() -> None:
    trace = make_trace([[0, 1], [0, 1]], 512, [1000, 1000], timestamps_ms=[0.0, 10_000.0])
    tiers = [{"name": "dram", "capacity": 10, "gb_per_s": 40, "latency_ms": 2}]
    for overlap in (0.0, 0.25, 1.0):
        found = study(trace, tiers, overlap=overlap, slo_s=0.02)
        load_s = 0.002 + 2 * MODEL.block_bytes(512) / 40e9
        computed = [float(compute_s(MODEL, HARDWARE, 1000, 0)), 0.0]
        assert found.requests.tokens_used.tolist() == [0, 1000]
        assert found.requests.load_s.tolist() == pytest.approx([0, load_s])
        assert found.requests.compute_s.tolist() == pytest.approx(computed)
        assert found.requests.ttft_s.tolist() == pytest.approx([computed[0], load_s])
        assert found.serving.gpu_s == pytest.approx(computed[0] + load_s)
        assert found.serving.slo_share == 0.5
        assert found.token_hit_ratio == 0.5
        assert found.tiers[0].read_utilisation == pytest.approx(2 * MODEL.block_bytes(512) / 40e9 / 10)


def test_break_even_is_the_first_prompt_that_loads_no_slower() -> None:
    trace = make_trace([[0]], 512)
    for gb_per_s in (0.5, 3, 3.3, 3.4, 3.5, 50):
        tiers = [{"name": "ssd", "capacity": 1, "gb_per_s": gb_per_s, "latency_ms": 30}]
        found = study(trace, tiers, backend="python").tiers[0].break_even_tokens
        ahead = (
            tokens
            for tokens in range(512, 512 * 4000, 512)
            if 0.03 + tokens * MODEL.bytes_per_token / (gb_per_s * 1e9) <= compute_s(MODEL, HARDWARE, tokens, 0)
        )
        assert found == next(ahead), gb_per_s
    never = [{"name": "tape", "capacity": 1, "gb_per_s": 1e-4, "latency_ms": 0}]
    assert study(trace, never, backend="python").tiers[0].break_even_tokens is None
    free = [{"name": "hbm", "capacity": 1}]
    assert study(trace, free, backend="python").tiers[0].break_even_tokens == 512


def test_progress_and_json() -> None:
    trace, requests = random_trace(3, chained=True)
    calls: list[tuple[int, int]] = []
    found = study(trace, random_tiers(3, 2), progress=lambda *call: calls.append(call), warm_up=2, backend="python")
    assert calls[-1] == (len(requests), len(requests))
    plain = found.plain()
    assert "requests" not in plain
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert np.isfinite(found.requests.ttft_s).all()
