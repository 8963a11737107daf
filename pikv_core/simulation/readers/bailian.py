"""The traces of "KVCache in the wild" (arXiv 2506.02634): chats of Aliyun Bailian, 16-token blocks.

A request tells its chat and, where known, the chat before it in the conversation, the turn and the kind of service.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from pikv_core.simulation.readers import READERS
from pikv_core.simulation.readers.base import Damaged, Options, Reader, read_lines
from pikv_core.simulation.readers.records import Requests, block_ids, moment, record_of, shown, tokens
from pikv_core.simulation.source import Head, Source
from pikv_core.simulation.trace import ROOT, Trace

BLOCK_TOKENS = 16
MS_PER_S = 1000
KEYS = ("chat_id", "timestamp", "input_length", "output_length", "hash_ids")
CATEGORIES_MAX = 2**15


@READERS.register("bailian")
@dataclass(frozen=True)
class Bailian(Reader):
    """The parent is the latest request before with the chat's id; turns count from 0 here, from 1 in the log."""

    shape: ClassVar[str] = (
        "jsonl with chat_id, parent_chat_id, timestamp (s), input_length, output_length (tokens), type, turn, hash_ids"
    )

    @staticmethod
    def recognises(head: Head) -> bool:
        return (
            head.line.lstrip().startswith("{")
            and '"hash_ids"' in head.line
            and '"chat_id"' in head.line
            and '"requests"' not in head.line
        )

    def read(self, source: Source, options: Options) -> Trace:
        requests = Requests()
        category, turns, parents = array("h"), array("i"), array("q")
        names: dict[str, int] = {}
        latest: dict[int, int] = {}  # request of each chat

        def take(line: str) -> None:
            record = record_of(line, KEYS)
            chat, parent = _chat(record, "chat_id"), _chat(record, "parent_chat_id")
            kind, turn = _kind(record, names), _turn(record)
            requests.add(
                block_ids(record),
                moment(record, "timestamp", "seconds") * MS_PER_S,
                tokens(record, "input_length"),
                tokens(record, "output_length"),
            )
            category.append(names.setdefault(kind, len(names)))
            turns.append(turn)
            parents.append(latest.get(parent, ROOT) if parent != ROOT else ROOT)
            latest[chat] = len(parents) - 1

        read_lines(source, options.damage, take, f"a bailian trace is {self.shape}")
        return requests.trace(
            BLOCK_TOKENS,
            category=np.frombuffer(category, np.int16),
            categories=tuple(names) or ("all",),
            turn=np.frombuffer(turns, np.int32),
            parent=np.frombuffer(parents, np.int64),
        )


def _chat(record: dict[str, Any], key: str) -> int:
    value = record.get(key, ROOT)
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise Damaged(f"{key}: expected the number of a chat, got {shown(value)}")
    return value


def _turn(record: dict[str, Any]) -> int:
    value = record.get("turn", 1)
    if type(value) is not int or not 0 <= value < 2**31:
        raise Damaged(f"turn: expected a number from 1 on, got {shown(value)}")
    return max(0, value - 1)


def _kind(record: dict[str, Any], names: dict[str, int]) -> str:
    value = record.get("type", "all")
    if not isinstance(value, str):
        raise Damaged(f"type: expected a name, got {shown(value)}")
    if value not in names and len(names) == CATEGORIES_MAX:
        raise Damaged(f"type: expected at most {CATEGORIES_MAX} different names, got {shown(value)}")
    return value
