"""The mooncake shape with a `block_size` in every record and, where given, the `block_tokens` of each of its blocks.

A prompt fills its blocks from the first on, so that only the last may hold fewer tokens than the block size.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any, ClassVar

from pikv_core.simulation.readers import READERS
from pikv_core.simulation.readers.base import Damaged, Options, Reader, read_lines
from pikv_core.simulation.readers.records import LIMIT, Requests, block_ids, moment, record_of, shown, tokens
from pikv_core.simulation.source import Head, Source
from pikv_core.simulation.trace import Trace

KEYS = ("timestamp", "input_length", "output_length", "hash_ids", "block_size")


@READERS.register("blocks")
@dataclass(frozen=True)
class Blocks(Reader):
    shape: ClassVar[str] = "jsonl as mooncake's with block_size and, where known, block_tokens (a list, one per block)"

    @staticmethod
    def recognises(head: Head) -> bool:
        is_sized = '"block_size"' in head.line or '"block_tokens"' in head.line
        is_other = '"requests"' in head.line or "chat_id" in head.line
        return head.line.lstrip().startswith("{") and '"hash_ids"' in head.line and is_sized and not is_other

    def read(self, source: Source, options: Options) -> Trace:
        requests = Requests()
        block_size: int | None = None

        def take(line: str) -> None:
            nonlocal block_size
            record = record_of(line, KEYS)
            size = record["block_size"]
            if type(size) is not int or not 1 <= size < LIMIT:
                raise Damaged(f"block_size: expected a number of tokens of at least 1, got {shown(size)}")
            if block_size not in (None, size):
                raise Damaged(f"block_size: expected {block_size} as in the lines before, got {size}")
            ids, input_tokens = block_ids(record), tokens(record, "input_length")
            _check_block_tokens(record, ids, input_tokens, size)
            requests.add(
                ids, moment(record, "timestamp", "milliseconds"), input_tokens, tokens(record, "output_length")
            )
            block_size = size

        read_lines(source, options.damage, take, f"a blocks trace is {self.shape}")
        return requests.trace(block_size or 1)


def _check_block_tokens(record: dict[str, Any], ids: array[int], input_tokens: int, block_size: int) -> None:
    """Raise Damaged where the record's tokens by block are not those of a prompt cut into blocks."""
    listed = record.get("block_tokens")
    if listed is None:
        return
    if not isinstance(listed, list) or len(listed) != len(ids):
        raise Damaged(f"block_tokens: expected a list of {len(ids)} numbers, one per block, got {shown(listed)}")
    if not all(type(count) is int and 1 <= count <= block_size for count in listed):
        raise Damaged(f"block_tokens: expected numbers of tokens from 1 to {block_size}, got {shown(listed)}")
    if any(count != block_size for count in listed[:-1]):
        raise Damaged(f"block_tokens: expected {block_size} in every block but the last, got {shown(listed)}")
    if sum(listed) > input_tokens:
        raise Damaged(f"block_tokens: expected at most the {input_tokens} of input_length, got {sum(listed)}")
