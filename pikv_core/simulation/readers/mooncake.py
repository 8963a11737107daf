"""The traces of Mooncake (FAST'25): one JSON object a line, ids chained by prefix, 512-token blocks.

The last block of a prompt may be partial and has an id too. Records that name a block size: see `blocks.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pikv_core.simulation.readers import READERS
from pikv_core.simulation.readers.base import Options, Reader, read_lines
from pikv_core.simulation.readers.records import Requests, block_ids, moment, record_of, tokens
from pikv_core.simulation.source import Head, Source
from pikv_core.simulation.trace import Trace

BLOCK_TOKENS = 512
KEYS = ("timestamp", "input_length", "output_length", "hash_ids")


@READERS.register("mooncake")
@dataclass(frozen=True)
class Mooncake(Reader):
    shape: ClassVar[str] = "jsonl with timestamp (ms), input_length, output_length (tokens), hash_ids"

    @staticmethod
    def recognises(head: Head) -> bool:
        others = ("chat_id", '"block_size"', '"block_tokens"', '"requests"')
        return (
            head.line.lstrip().startswith("{")
            and '"hash_ids"' in head.line
            and not any(other in head.line for other in others)
        )

    def read(self, source: Source, options: Options) -> Trace:
        requests = Requests()

        def take(line: str) -> None:
            record = record_of(line, KEYS)
            requests.add(
                block_ids(record),
                moment(record, "timestamp", "milliseconds"),
                tokens(record, "input_length"),
                tokens(record, "output_length"),
            )

        read_lines(source, options.damage, take, f"a mooncake trace is {self.shape}")
        return requests.trace(BLOCK_TOKENS)
