"""A prefix store holds what its policy says, whatever ends a run, and never gives what it did not take in."""

import itertools
import json
import os
import random

import pytest
import torch
from plain_replay import random_requests

from pikv_core.cache.prefix.blocks import pack
from pikv_core.cache.prefix.store import Measured, PrefixStore
from pikv_core.errors import PiKVError, UsageError
from pikv_core.schema import PrefixSettings
from pikv_core.simulation.metrics import hit_row
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.readers.base import Options
from pikv_core.simulation.readers.blocks import Blocks
from pikv_core.simulation.replay import replay
from pikv_core.simulation.source import Source
from pikv_core.simulation.trace import make_trace

BLOCK_TOKENS = 4
IDENTITY = {"weights": "a", "config": "b", "dtype": "float32", "codec": "none", "calibration": []}
BLOCK_BYTES = len(pack({"0.keys": torch.zeros(1, 2, BLOCK_TOKENS, 3)}, "0" * 64))
NAMES = [
    name
    for name in REQUEST_POLICIES.names()
    if not REQUEST_POLICIES[name].knows_future and not REQUEST_POLICIES[name].unbounded
]


class Clock:
    """Seconds that pass as a test says."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def open_store(folder, capacity=6, said=None, identity=IDENTITY, clock=None, **settings):
    asked = {"bytes": f"{capacity * BLOCK_BYTES}B", "block_tokens": BLOCK_TOKENS, **settings}
    say = (lambda text: None) if said is None else said.append
    measured = Measured(BLOCK_BYTES, [[2, 3]], 1)
    return PrefixStore(
        str(folder), PrefixSettings.model_validate(asked), identity, lambda: measured, say, clock or Clock()
    )


def block_of(tokens):
    """Return a block whose content tells its tokens."""
    return {"0.keys": torch.tensor(tokens, dtype=torch.float32).view(1, 1, -1, 1).expand(1, 2, -1, 3)}


def tokens_of(ids, tail=1):
    """Return the tokens of a prompt made of these blocks, the last block broken."""
    return [token for block in ids for token in range(4 * block, 4 * block + BLOCK_TOKENS)] + [7] * tail


def serve(store, tokens):
    """Serve a prompt, check what is loaded against its tokens, and return its hits."""
    arrival = store.arrive(tokens)
    loaded = store.load(arrival, len(arrival.keys))
    parts = [tokens[start : start + BLOCK_TOKENS] for start in range(0, len(tokens), BLOCK_TOKENS)]
    assert len(loaded) == arrival.hits
    for block, part in zip(loaded, parts):
        assert torch.equal(block["0.keys"], block_of(part)["0.keys"])
    store.keep(arrival, arrival.hits, lambda place: block_of(parts[place]))
    store.finish(arrival, 4 * arrival.hits, 5)
    return arrival.hits


def log_of(folder):
    return Blocks().read(Source(str(folder / "requests.jsonl")), Options())


def policy_of(name):
    listed = getattr(REQUEST_POLICIES[name], "listed", None)
    options = {listed: ("lru", "lfu")} if listed else {}
    return REQUEST_POLICIES[name](**options), {"name": name, **{key: [*value] for key, value in options.items()}}


@pytest.mark.parametrize("name", NAMES)
def test_hits_equal_simulate_cache_on_the_session_and_on_the_stores_own_log(tmp_path, name):
    policy, asked = policy_of(name)
    for seed, capacity, touch in ((2, 5, "reverse"), (4, 9, "forward")):
        folder, clock, hits = tmp_path / f"{seed}", Clock(), []
        requests, times = prefixes(seed), []
        gaps = random.Random(seed)
        for ids in requests:
            clock.now += gaps.choice((0.0, 0.5, 200.0))
            times.append(1000 * clock.now)
            if len(hits) % 9 == 0:  # a process that goes on from the log
                store = open_store(folder, capacity, policy=asked, touch=touch, clock=clock)
            hits.append(serve(store, tokens_of(ids)))
            assert store.report().resident_bytes <= capacity * BLOCK_BYTES
            report = store.report()
            if len(hits) % 9 == 0 or len(hits) == len(requests):
                store.close()
        tokens = [4 * len(ids) + 1 for ids in requests]
        session = make_trace(requests, BLOCK_TOKENS, tokens, times)
        expected = replay(session, policy, capacity, "prefix", touch, backend="python")
        assert hits == expected.hits.tolist()
        assert report.evictions == expected.evictions
        assert report.expirations == expected.expirations
        again = replay(log_of(folder), policy, capacity, "prefix", touch, backend="python")
        assert again.hits.tolist() == hits
        assert hit_row(log_of(folder), again) == hit_row(session, expected)


def prefixes(seed):
    """Return requests whose blocks name their prefix, as hashes of prompts do."""
    numbers = {}
    chained = []
    for ids in random_requests(seed)[:30]:
        paths = itertools.accumulate(((block,) for block in ids), lambda before, block: before + block)
        chained.append([numbers.setdefault(path, len(numbers)) for path in paths])
    return chained


def test_a_store_of_another_model_or_of_other_settings_is_refused(tmp_path):
    with open_store(tmp_path) as store:
        serve(store, tokens_of([1, 2]))
    for name, what in (("weights", "another model"), ("dtype", "another dtype"), ("codec", "another codec: none")):
        with pytest.raises(UsageError, match=what):
            open_store(tmp_path, identity={**IDENTITY, name: "other"})
    with pytest.raises(UsageError, match="made with policy lru, not fifo"):
        open_store(tmp_path, policy="fifo")
    with pytest.raises(UsageError, match="made with bytes"):
        open_store(tmp_path, capacity=7)
    with open_store(tmp_path) as store:
        assert serve(store, tokens_of([1, 2, 3])) == 2


def test_settings_that_are_not_given_are_the_stores_own(tmp_path):
    with open_store(tmp_path, policy="sieve", touch="forward") as store:
        serve(store, tokens_of([1]))
    with PrefixStore(str(tmp_path), PrefixSettings(), IDENTITY, lambda: None) as store:
        assert store.settings.policy.name == "sieve"
        assert store.settings.touch == "forward"
        assert serve(store, tokens_of([1])) == 1


def test_two_at_once_are_refused(tmp_path):
    with open_store(tmp_path), pytest.raises(UsageError, match="another run has this prefix store"):
        open_store(tmp_path)
    open_store(tmp_path).close()


@pytest.mark.parametrize(("name", "why"), [("belady", "requests to come"), ("infinite", "never evicts")])
def test_bounds_are_no_policies_of_a_store(tmp_path, name, why):
    with pytest.raises(UsageError, match=why):
        open_store(tmp_path, policy=name)


def test_a_budget_that_holds_no_block_is_refused(tmp_path):
    with pytest.raises(PiKVError, match=f"one is {BLOCK_BYTES:,} bytes"):
        open_store(tmp_path, bytes=f"{BLOCK_BYTES - 1}B")
    with open_store(tmp_path, bytes=f"{2 * BLOCK_BYTES - 1}B") as store:
        assert store.report().capacity_blocks == 1


def blocks_of(folder):
    return sorted((folder / "blocks").iterdir())


def test_every_byte_of_a_block_is_checked_and_a_lost_one_is_told_and_written_anew(tmp_path):
    tokens = tokens_of([1, 2, 3])
    with open_store(tmp_path) as store:
        serve(store, tokens)
        keys = store.arrive(tokens).keys
    file = tmp_path / "blocks" / f"{keys[1]}.safetensors"
    good = file.read_bytes()
    for place in range(0, len(good), 7):
        file.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        said = []
        with open_store(tmp_path, said=said) as store:
            assert serve(store, tokens) == 1
            assert store.report().lost_blocks == 2
        assert len(said) == 1
        assert file.name in said[0]
        assert file.read_bytes() == good
    file.write_bytes(good[:-1])
    with open_store(tmp_path) as store:
        assert serve(store, tokens) == 1
    file.unlink()
    said = []
    with open_store(tmp_path, said=said) as store:
        assert "1 of the blocks" in said[0]
        assert serve(store, tokens) == 1
        assert serve(store, tokens) == 3
    file.write_bytes((tmp_path / "blocks" / f"{keys[0]}.safetensors").read_bytes())  # whole, but another block
    with open_store(tmp_path, said=said) as store:
        assert serve(store, tokens) == 1
    assert "another block" in said[-1]


def test_every_byte_of_log_and_manifest_is_checked(tmp_path):
    with open_store(tmp_path) as store:
        for ids in ([1, 2], [1, 3], [4]):
            serve(store, tokens_of(ids))
    for name in ("requests.jsonl", "manifest.json"):
        file = tmp_path / name
        good = file.read_bytes()
        for place in range(0, len(good) - 1, 5):
            file.write_bytes(good[:place] + bytes([good[place] ^ 2]) + good[place + 1 :])
            with pytest.raises(PiKVError, match=f"{name}.*damaged"):
                open_store(tmp_path)
        file.write_bytes(good)
    lines = (tmp_path / "requests.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "requests.jsonl").write_bytes(lines[0] + lines[2])
    with pytest.raises(PiKVError, match=r"requests\.jsonl:2: damaged"):
        open_store(tmp_path)


def test_names_lead_nowhere_but_into_the_store(tmp_path):
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(b"precious")
    folder = tmp_path / "store"
    with open_store(folder) as store:
        serve(store, tokens_of([1]))
    block = blocks_of(folder)[0]
    block.unlink()
    block.symlink_to(outside)
    (folder / "blocks" / "strange").write_bytes(b"")
    with open_store(folder) as store:
        assert serve(store, tokens_of([1])) == 0
        assert serve(store, tokens_of([1])) == 1
    assert outside.read_bytes() == b"precious"
    assert not block.is_symlink()
    assert blocks_of(folder) == [block]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "blocks").mkdir()
    (tmp_path / "blocks" / "mine").write_bytes(b"")
    with pytest.raises(PiKVError, match="not empty"):
        open_store(tmp_path)
    assert (tmp_path / "blocks" / "mine").exists()


def test_a_folder_of_other_logs_gets_no_blocks(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(PiKVError, match="not empty"):
        open_store(tmp_path)
    assert not (tmp_path / "blocks").exists()


class Killed(BaseException):
    pass


def test_an_end_at_any_moment_leaves_a_store_that_holds_what_its_log_says(tmp_path, monkeypatch):
    session = [tokens_of(ids) for ids in ([1, 2, 3], [1, 2, 4, 5], [6, 7, 8], [1, 2], [9, 10])]
    for moment in itertools.count(1):
        folder, steps = tmp_path / f"{moment}", itertools.count(1)

        def counted(done, steps=steps, moment=moment):
            def step(*given, **options):
                if next(steps) == moment:
                    if done.__name__ == "write":  # half of a line
                        done(given[0], given[1][: len(given[1]) // 2])
                    raise Killed
                return done(*given, **options)

            return step

        store = None
        with monkeypatch.context() as patched:
            for name in ("replace", "write", "remove"):
                patched.setattr(os, name, counted(getattr(os, name)))
            try:
                store = open_store(folder, capacity=4)
                for tokens in session:
                    serve(store, tokens)
                break
            except Killed:
                pass
        if store is not None:
            store.close()
        said = []
        with open_store(folder, capacity=4, said=said) as store:
            assert said == []
            served = store.report()
            assert served.resident_blocks == len(blocks_of(folder))
            assert served.resident_bytes <= 4 * BLOCK_BYTES
            hits = [serve(store, tokens) for tokens in session]
        policy = REQUEST_POLICIES["lru"]()
        assert hits == replay(log_of(folder), policy, 4, backend="python").hits.tolist()[-len(session) :]
    assert moment > 15


def test_a_prompt_that_was_not_finished_did_not_come(tmp_path):
    with open_store(tmp_path, capacity=3) as store:
        serve(store, tokens_of([1, 2]))
        store.keep(store.arrive(tokens_of([3, 4])), 2, None)  # and then something went wrong
        assert serve(store, tokens_of([1, 2])) == 2
    assert len(json.loads(f"[{','.join((tmp_path / 'requests.jsonl').read_text().splitlines())}]")) == 2
