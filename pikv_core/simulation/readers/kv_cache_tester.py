"""The coding-agent sessions of kv-cache-tester: one JSON document for each, with sub-agents nested in it.

`hash_ids` are of full blocks alone and chained by prefix. They belong to the session, its sub-agents included, where
`hash_id_scope` is `local`, and to all sessions where it is `global`. `t` counts from the session's start, in
sub-agents too; in some logs from the sub-agent's own, told by a first request from before it was launched.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from reprlib import repr as shortened
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pikv_core.errors import PiKVError
from pikv_core.simulation.interleave import Session, interleave
from pikv_core.simulation.readers import READERS
from pikv_core.simulation.readers.base import Damage, Damaged, Options, Reader
from pikv_core.simulation.readers.order import by_time
from pikv_core.simulation.source import Head, Source
from pikv_core.simulation.trace import ROOT, Trace, columns, dense

FILE_NAME = re.compile(r".*\.json(\.gz|\.zst)?", re.IGNORECASE)
CLOCK_SLACK_S = 1.0  # a sub-agent's first request may seem to come before its launch by rounding
MAX_TIME_S = 1e12
MAX_CATEGORIES = 2**15 - 1


@dataclass
class Recording:
    """One session: its requests, those of an agent in order of time, with indices of their own."""

    block_tokens: int
    is_global: bool  # block ids mean the same in every session
    ids: Any = field(default_factory=lambda: array("q"))  # [A]
    # of each request [n], up to the categories:
    sizes: array[int] = field(default_factory=lambda: array("q"))  # blocks
    times_s: array[float] = field(default_factory=lambda: array("d"))
    inputs: array[int] = field(default_factory=lambda: array("q"))
    outputs: array[int] = field(default_factory=lambda: array("q"))
    turns: array[int] = field(default_factory=lambda: array("q"))
    parents: array[int] = field(default_factory=lambda: array("q"))
    categories: list[str] = field(default_factory=list)
    end_s: float = 0.0  # when the last answer is there


@READERS.register("kv-cache-tester")
@dataclass(frozen=True)
class KVCacheTester(Reader):
    """Read a folder of sessions in order of file names, one session, or several as lines of one file.

    The category of a request is its model, marked where a sub-agent asks; turns count within an agent.
    """

    shape: ClassVar[str] = "json sessions, each with block_size and requests of t (s), in, out (tokens), hash_ids"
    has_sessions: ClassVar[bool] = True

    @staticmethod
    def recognises(head: Head) -> bool:
        if head.files:
            return any(FILE_NAME.fullmatch(name) for name in head.files)
        start = head.start.removeprefix(b"\xef\xbb\xbf").lstrip()
        return start.startswith(b"{") and b'"requests"' in start and b'"block_size"' in start

    def read(self, source: Source, options: Options) -> Trace:
        recordings: list[Recording] = []
        for place, text in _documents(source, options.damage):
            try:
                recording = parse_session(text)
                if recordings and recording.block_tokens != recordings[0].block_tokens:
                    before = recordings[0].block_tokens
                    raise Damaged(
                        f"block_size: expected {before} as in the sessions before, got {recording.block_tokens}"
                    )
            except (Damaged, ValueError) as error:
                options.damage.take(place, str(error), f"a kv-cache-tester trace is {self.shape}")
                continue
            recordings.append(recording)
        return merged(recordings, options)


def _documents(source: Source, damage: Damage) -> Iterator[tuple[str, bytes]]:
    """Yield each session's text with the place that errors name."""
    files = [source]
    if source.files is not None:
        files = [file for file in source.files if file.path and FILE_NAME.fullmatch(file.path.name)]
    for file in files:
        try:
            if file.head.line.rstrip().endswith("}"):  # whole, so that every line is a session
                for number, line in file.lines():
                    yield f"{file.name}:{number}", line
            else:
                yield file.name, file.whole()
        except PiKVError as error:
            damage.take(file.name, error.message.removeprefix(f"{file.name}: "), error.hint or "fetch the file again")


def parse_session(text: bytes) -> Recording:
    """Parse one session; raise Damaged with the place inside it, such as `requests[3].in`."""
    try:
        document = json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise Damaged("not UTF-8 text") from error
    except ValueError as error:
        raise Damaged(f"not a whole JSON object: {str(error).lower()}") from error
    except RecursionError as error:
        raise Damaged("nested too deeply") from error
    if not isinstance(document, dict):
        raise Damaged("expected a JSON object")
    block_tokens = document.get("block_size")
    if type(block_tokens) is not int or not 1 <= block_tokens < 2**31:
        raise Damaged(f"block_size: expected a number of tokens of at least 1, got {shortened(block_tokens)}")
    scope = document.get("hash_id_scope", "local")
    if scope not in ("local", "global"):
        raise Damaged(f"hash_id_scope: expected local or global, got {shortened(scope)}")
    recording = Recording(block_tokens, scope == "global")
    try:
        _add_agent(recording, document, "", "", 0.0)
    except RecursionError as error:
        raise Damaged("nested too deeply") from error
    if not recording.is_global:
        recording.ids = dense(np.array(recording.ids, np.int64))[0]
    return recording


def _add_agent(recording: Recording, agent: dict[str, Any], where: str, mark: str, start_s: float) -> None:
    """Add an agent's requests and, after them, its sub-agents'; its clock shows 0 at start_s of the session's."""
    entries = agent.get("requests")
    if not isinstance(entries, list):
        raise Damaged(f"{where}requests: expected a list, got {shortened(entries)}")
    requests: list[tuple[float, str, dict[str, Any]]] = []
    sub_agents: list[tuple[float, str, dict[str, Any]]] = []
    for number, entry in enumerate(entries):
        place = f"{where}requests[{number}]"
        if not isinstance(entry, dict):
            raise Damaged(f"{place}: expected a JSON object, got {shortened(entry)}")
        is_sub_agent = "requests" in entry or entry.get("type") == "subagent"
        (sub_agents if is_sub_agent else requests).append((_seconds(entry, "t", place), place, entry))
    parent = ROOT
    for turn, (time_s, place, request) in enumerate(sorted(requests, key=lambda each: each[0])):
        _add_request(recording, request, place, mark, start_s + time_s)
        recording.turns.append(turn)
        recording.parents.append(parent)
        parent = len(recording.turns) - 1
    for launch_s, place, sub_agent in sub_agents:
        if sub_agent.get("requests") is None:  # launched, and nothing of it recorded
            continue
        sub_start_s = start_s + launch_s if _has_own_clock(sub_agent, launch_s) else start_s
        _add_agent(recording, sub_agent, f"{place}.", ", sub-agent", sub_start_s)


def _has_own_clock(sub_agent: dict[str, Any], launch_s: float) -> bool:
    """Tell whether a sub-agent's times count from its launch, not from the start of the session."""
    entries = sub_agent["requests"] if isinstance(sub_agent["requests"], list) else []
    times: list[Any] = [entry.get("t") for entry in entries if isinstance(entry, dict)]
    return any(type(time) in (int, float) and time < launch_s - CLOCK_SLACK_S for time in times)


def _add_request(recording: Recording, request: dict[str, Any], place: str, mark: str, time_s: float) -> None:
    for key in ("in", "out"):
        if type(request.get(key)) is not int or not 0 <= request[key] < 2**62:
            raise Damaged(f"{place}.{key}: expected a number of tokens, got {shortened(request.get(key))}")
    blocks = request.get("hash_ids")
    if not isinstance(blocks, list):
        raise Damaged(f"{place}.hash_ids: expected a list, got {shortened(blocks)}")
    try:
        recording.ids.extend(array("q", blocks))
    except (TypeError, OverflowError) as error:
        raise Damaged(f"{place}.hash_ids: expected whole numbers of at most 64 bits") from error
    recording.sizes.append(len(blocks))
    recording.times_s.append(time_s)
    recording.inputs.append(request["in"])
    recording.outputs.append(request["out"])
    model = request.get("model")
    recording.categories.append(f"{model if model and isinstance(model, str) else 'no model told'}{mark}")
    answered_s = time_s + (_seconds(request, "api_time", place) if request.get("api_time") is not None else 0.0)
    recording.end_s = max(recording.end_s, answered_s)


def _seconds(entry: dict[str, Any], key: str, place: str) -> float:
    value: Any = entry.get(key)
    if type(value) not in (int, float) or not 0 <= value < MAX_TIME_S:
        raise Damaged(f"{place}.{key}: expected seconds from 0 on, got {shortened(value)}")
    return float(value)


def merged(recordings: Sequence[Recording], options: Options) -> Trace:
    """Return all sessions' requests on one clock, with block ids that differ between sessions unless global."""
    sessions = [Session(np.array(recording.times_s), recording.end_s) for recording in recordings]
    order, arrivals_ms = interleave(sessions, options.interleave, options.seed)
    timestamps_ms = np.empty_like(arrivals_ms)
    timestamps_ms[order] = arrivals_ms
    names, category = np.unique([name for each in recordings for name in each.categories], return_inverse=True)
    if names.size > MAX_CATEGORIES:
        raise PiKVError(
            f"{names.size} models in the sessions, expected {MAX_CATEGORIES} at most", hint="split the folder"
        )
    sessions_apart = columns(
        _ids(recordings),
        np.concatenate([np.zeros(1, np.int64), np.cumsum(_joined([recording.sizes for recording in recordings]))]),
        timestamps_ms,
        _joined([recording.inputs for recording in recordings]),
        _joined([recording.outputs for recording in recordings]),
        recordings[0].block_tokens if recordings else 1,
        category=category.astype(np.int16),
        categories=tuple(str(name) for name in names),
        turn=_joined([recording.turns for recording in recordings]).astype(np.int32),
        parent=_parents(recordings),
    )
    return by_time(sessions_apart)


def _ids(recordings: Sequence[Recording]) -> NDArray[np.int64]:
    """Return the block ids of all sessions: the global ones as they meet, the local ones of each session beside."""
    ids, num_blocks = dense(_joined([recording.ids for recording in recordings if recording.is_global]))
    shared = iter(np.split(ids, np.cumsum([len(recording.ids) for recording in recordings if recording.is_global])))
    parts = []
    for recording in recordings:
        if recording.is_global:
            parts.append(next(shared))
        else:
            parts.append(recording.ids + np.int32(num_blocks))
            num_blocks += int(recording.ids.max(initial=-1)) + 1
    return _joined(parts)


def _parents(recordings: Sequence[Recording]) -> NDArray[np.int64]:
    """Return the turn before as an index into the requests of all sessions, ROOT for none. [R]"""
    first = 0
    parts = []
    for recording in recordings:
        own = np.array(recording.parents, np.int64)
        parts.append(np.where(own == ROOT, ROOT, own + first))
        first += own.size
    return _joined(parts)


def _joined(parts: Sequence[Any]) -> NDArray[np.int64]:
    """Return the arrays, of any type of whole numbers, behind one another."""
    return np.concatenate([np.zeros(0, np.int64), *(np.asarray(part) for part in parts)], dtype=np.int64)
