"""Reading agent sessions: whose ids are whose, clocks of sub-agents, what is said of damaged files."""

from __future__ import annotations

import copy
import gzip
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pikv_core.errors import PiKVError
from pikv_core.simulation.ceiling import ceiling_hits
from pikv_core.simulation.curve import curve
from pikv_core.simulation.readers.base import Damage, Options
from pikv_core.simulation.readers.kv_cache_tester import KVCacheTester
from pikv_core.simulation.source import Source
from pikv_core.simulation.trace import ROOT, Trace

CAPACITIES = (2000, 5000, 10_000, 20_000, 50_000)
HITS_AT = {  # prefix hits of lru at these capacities, of the 35 sessions: what interleaving alone changes
    "absolute": [449885, 903952, 1419455, 2161235, 2821278],
    "poisson:60": [544763, 1072723, 1784186, 2507089, 2825503],
    "closed-loop:4": [1568410, 2446833, 2803909, 2834253, 2837329],
}
REAL = Path(__file__).parents[3] / "shared/traces/kv-cache-tester"


def request(t: float, *ids: int, model: str = "big", **more: Any) -> dict[str, Any]:
    return {"t": t, "type": "s", "model": model, "in": 64 * len(ids) + 5, "out": 9, "hash_ids": list(ids), **more}


def sub_agent(t: float, *requests: dict[str, Any]) -> dict[str, Any]:
    return {"t": t, "type": "subagent", "agent_id": "agent_001", "requests": list(requests)}


def session(*requests: dict[str, Any], scope: str = "local", **more: Any) -> dict[str, Any]:
    return {"id": "trace", "block_size": 64, "hash_id_scope": scope, "requests": list(requests), **more}


def read(path: Path, interleave: str = "absolute", seed: int = 0, damage: Damage | None = None) -> Trace:
    source = Source(str(path))
    assert KVCacheTester.recognises(source.head)
    return KVCacheTester().read(source, Options(interleave, seed, damage or Damage()))


def folder_of(folder: Path, *sessions: Any) -> Path:
    for number, one in enumerate(sessions):
        (folder / f"trace_{number:04d}.json").write_text(one if isinstance(one, str) else json.dumps(one))
    return folder


def prompts(trace: Trace) -> list[list[int]]:
    """Return the blocks of each request, numbered in the order in which they are first asked for."""
    numbers: dict[int, int] = {}
    ids = [numbers.setdefault(block, len(numbers)) for block in trace.ids.tolist()]
    return [ids[begin:end] for begin, end in pairwise(trace.starts.tolist())]


def test_columns(tmp_path: Path) -> None:
    first = session(request(0, 1, 2), request(10, 1, 2, 3, model="small"), request(12))
    trace = read(folder_of(tmp_path, first, session(request(5, 1, 2, out=0))))
    assert prompts(trace) == [[0, 1], [2, 3], [0, 1, 4], []]
    assert trace.timestamps_ms.tolist() == [0, 5000, 10_000, 12_000]
    assert trace.input_tokens.tolist() == [133, 133, 197, 5]
    assert trace.output_tokens.tolist() == [9, 0, 9, 9]
    assert (trace.block_tokens, trace.num_blocks) == (64, 5)
    assert [trace.categories[kind] for kind in trace.category] == ["big", "big", "small", "big"]
    assert trace.turn.tolist() == [0, 0, 1, 2]
    assert trace.parent.tolist() == [ROOT, ROOT, 0, 2]
    assert (trace.ids.dtype, trace.category.dtype, trace.turn.dtype) == (np.int32, np.int16, np.int32)


def test_local_ids_differ_between_sessions_and_global_ones_do_not(tmp_path: Path) -> None:
    big = 2**62
    sessions = [
        session(request(0, 1, -big)),
        session(request(1, 1, big), scope="global"),
        session(request(2, 1, -big)),
        session(request(3, big, 1, 7), scope="global"),
    ]
    assert prompts(read(folder_of(tmp_path, *sessions))) == [[0, 1], [2, 3], [4, 5], [3, 2, 6]]


def test_sub_agents_share_their_sessions_ids_and_take_turns_of_their_own(tmp_path: Path) -> None:
    nested = sub_agent(21, request(21, 1, 8, model="small"), request(23, 1, 8, 9, model="small"))
    inner = sub_agent(20, request(20, 1, 5), nested, request(22, 1, 5, 6))
    trace = read(folder_of(tmp_path, session(request(0, 1, 2), inner, request(20, 1, 2, 3), request(30, 1, 2, 3, 4))))
    assert prompts(trace) == [[0, 1], [0, 1, 2], [0, 3], [0, 4], [0, 3, 5], [0, 4, 6], [0, 1, 2, 7]]
    assert (trace.timestamps_ms / 1000).tolist() == [0, 20, 20, 21, 22, 23, 30]
    assert trace.turn.tolist() == [0, 1, 0, 0, 1, 1, 2]
    assert trace.parent.tolist() == [ROOT, 0, ROOT, ROOT, 2, 3, 1]
    kinds = [trace.categories[kind] for kind in trace.category]
    assert kinds == ["big", "big", *["big, sub-agent", "small, sub-agent"] * 2, "big"]


def test_a_sub_agents_own_clock_starts_at_its_launch(tmp_path: Path) -> None:
    nested = sub_agent(4, request(0, 7), request(3, 7))
    trace = read(folder_of(tmp_path, session(request(0, 1), sub_agent(10, request(0, 5), nested), request(40, 1))))
    assert (trace.timestamps_ms / 1000).tolist() == [0, 10, 14, 17, 40]


def test_a_sub_agent_that_left_no_requests(tmp_path: Path) -> None:
    launched = {"t": 3, "type": "subagent", "agent_id": "a", "status": "async_launched"}
    assert read(folder_of(tmp_path, session(request(0, 1), launched, sub_agent(4)))).num_requests == 1


def test_requests_out_of_order_are_sorted_by_time(tmp_path: Path) -> None:
    trace = read(folder_of(tmp_path, session(request(9, 1, 2), request(4, 1))))
    assert prompts(trace) == [[0], [0, 1]]
    assert trace.parent.tolist() == [ROOT, 0]


def test_closed_loop_waits_for_the_last_answer(tmp_path: Path) -> None:
    sub = sub_agent(2, request(2, 5, api_time=8))
    trace = read(folder_of(tmp_path, session(request(0, 1, api_time=1), sub), session(request(7, 1))), "closed-loop:1")
    assert (trace.timestamps_ms / 1000).tolist() == [0, 2, 10]


def test_one_file_lines_and_archives(tmp_path: Path) -> None:
    one = session(request(0, 1, 2), request(1, 1))
    for name, text in {"pretty.json": json.dumps(one, indent=2), "line.json": "\ufeff\n" + json.dumps(one)}.items():
        (tmp_path / name).write_text(text)
        assert prompts(read(tmp_path / name)) == [[0, 1], [0]]
    (tmp_path / "lines.jsonl").write_text(f"{json.dumps(one)}\n\n{json.dumps(one)}\n")
    assert prompts(read(tmp_path / "lines.jsonl")) == [[0, 1], [2, 3], [0], [2]]
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "a.json.gz").write_bytes(gzip.compress(json.dumps(one).encode()))
    (inside / "LICENSE").write_text("none of the trace")
    assert prompts(read(inside)) == [[0, 1], [0]]


def test_files_come_in_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.json", "a.json"):
        (tmp_path / name).write_text(json.dumps(session(request(0, ord(name[0]), out=ord(name[0])))))
    assert read(tmp_path).output_tokens.tolist() == [ord("a"), ord("b")]


def changed(**changes: Any) -> str:
    return json.dumps(session({**request(1, 1), **changes}))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"requests": [', "not a whole JSON object"),
        ("[]", "expected a JSON object"),
        ("\x00", "not a whole JSON object"),
        ('{"requests": []}', "block_size: expected a number of tokens of at least 1, got None"),
        (json.dumps(session(block_size=32)), "block_size: expected 64 as in the sessions before, got 32"),
        (json.dumps(session(scope="odd")), "hash_id_scope: expected local or global, got 'odd'"),
        ('{"block_size": 64, "requests": 3}', "requests: expected a list, got 3"),
        ('{"block_size": 64, "requests": [4]}', "requests[0]: expected a JSON object, got 4"),
        (changed(t=None), "requests[0].t: expected seconds from 0 on, got None"),
        (changed(t=float("nan")), "requests[0].t: expected seconds"),
        (changed(t=-1), "requests[0].t: expected seconds"),
        (changed(api_time="x"), "requests[0].api_time: expected seconds"),
        (changed(**{"in": 1.5}), "requests[0].in: expected a number of tokens, got 1.5"),
        (changed(out=2**70), "requests[0].out: expected a number of tokens"),
        (changed(hash_ids=None), "requests[0].hash_ids: expected a list, got None"),
        (changed(hash_ids=[1, "a"]), "requests[0].hash_ids: expected whole numbers of at most 64 bits"),
        (changed(hash_ids=[2**64]), "requests[0].hash_ids: expected whole numbers of at most 64 bits"),
        (
            json.dumps(session(sub_agent(0, request(0, 1), {"t": 1, "out": 3}))),
            "requests[0].requests[1].in: expected a number of tokens, got None",
        ),
        ('{"block_size": 64, "requests": ' + "[" * 100_000, "nested too deeply"),
        ('{"block_size": 64, "requests": ' + '[{"t": 0, "requests": ' * 9999, "nested too deeply"),
    ],
)
def test_damaged_file(tmp_path: Path, text: str, problem: str) -> None:
    folder = folder_of(tmp_path, session(request(0, 1)), text, session(request(2, 1)))
    with pytest.raises(PiKVError) as caught:
        read(folder)
    file = folder / "trace_0001.json"
    assert caught.value.message.startswith((f"{file}: {problem}", f"{file}:1: {problem}"))
    assert caught.value.hint
    damage = Damage(skip=True)
    assert read(folder, damage=damage).timestamps_ms.tolist() == [0, 2000]
    assert damage.count == 1
    assert damage.places == [caught.value.message]


def test_damaged_archive_is_one_damaged_file(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, session(request(0, 1)))
    packed = gzip.compress(json.dumps(session(request(0, 1))).encode())
    (folder / "z.json.gz").write_bytes(packed[:-9])
    with pytest.raises(PiKVError, match=r"z\.json\.gz: cannot unpack the trace"):
        read(folder)
    damage = Damage(skip=True)
    assert read(folder, damage=damage).num_requests == 1
    assert damage.count == 1


def test_nothing_but_damage_gives_no_requests(tmp_path: Path) -> None:
    trace = read(folder_of(tmp_path, "{", "["), damage=Damage(skip=True))
    assert (trace.num_requests, trace.ids.size, trace.num_blocks) == (0, 0, 0)


VALID = session(request(0, 1, 2, api_time=1.5), sub_agent(3, request(3, 1), request(4, 1, 9)), request(9, 1, 2, 3))
VALUES: list[Any] = [None, True, -1, 0, 1.5, 2**64, 1e999, float("nan"), "x", [], {}, [[]], [None], {"requests": 1}]


def places(tree: Any) -> list[tuple[Any, Any]]:
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree))) if isinstance(tree, list) else []
    return [(tree, key) for key in keys] + [place for key in keys for place in places(tree[key])]


@given(
    which=st.integers(0, 10**6), value=st.sampled_from(VALUES), cut=st.none() | st.integers(0, 700), drop=st.booleans()
)
@settings(derandomize=True, deadline=None, max_examples=300)
def test_broken_sessions_are_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, which: int, value: Any, cut: int | None, drop: bool
) -> None:
    tree = copy.deepcopy(VALID)
    container, key = places(tree)[which % len(places(tree))]
    if drop:
        del container[key]
    else:
        container[key] = value
    file = tmp_path_factory.getbasetemp() / "broken.json"
    file.write_bytes(json.dumps(tree).encode()[:cut])
    try:
        trace = KVCacheTester().read(Source(str(file)), Options("closed-loop:1"))
    except PiKVError as error:
        assert str(file) in error.message
        return
    assert np.all(np.diff(trace.timestamps_ms) >= 0)
    assert trace.starts[-1] == trace.ids.size


@pytest.mark.parametrize("how", HITS_AT)
def test_real_sessions(how: str) -> None:
    if not REAL.is_dir():
        pytest.skip("the agent sessions are not here")
    trace = read(REAL, how)
    assert (trace.num_requests, trace.ids.size, trace.num_blocks) == (1795, 2942443, 105114)
    assert ceiling_hits(trace, "prefix") == sum(leading_hits(file) for file in sorted(REAL.glob("*.json")))
    np.testing.assert_array_equal(trace.blocks_per_request, trace.input_tokens // 64)
    own = trace.parent != ROOT
    assert own.sum() == 1795 - 35
    assert np.all(trace.parent[own] < np.flatnonzero(own))
    np.testing.assert_array_equal(trace.turn[own], trace.turn[trace.parent[own]] + 1)
    assert curve(trace).block_hits[list(CAPACITIES)].tolist() == HITS_AT[how]


def leading_hits(file: Path) -> int:
    """Count a session's prefix hits in a cache without limit, from the text alone."""
    seen: set[int] = set()
    hits = 0
    for one in json.loads(file.read_text())["requests"]:
        for block in one["hash_ids"]:
            if block not in seen:
                break
            hits += 1
        seen.update(one["hash_ids"])
    return hits
