"""Azure's logs of language-model requests (Splitwise, ISCA'24): when, and how many tokens in and out; no blocks.

They load as a trace without accesses: nothing in them says what two prompts have in common.
"""

from __future__ import annotations

import datetime
from array import array
from dataclasses import dataclass
from typing import ClassVar

from pikv_core.simulation.readers import READERS
from pikv_core.simulation.readers.base import Damaged, Options, Reader, read_lines
from pikv_core.simulation.readers.csv import split
from pikv_core.simulation.readers.records import LIMIT, Requests, shown
from pikv_core.simulation.source import Head, Source
from pikv_core.simulation.trace import Trace

HEADER = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
MS_PER_S = 1000


@READERS.register("azure")
@dataclass(frozen=True)
class Azure(Reader):
    shape: ClassVar[str] = f"csv of {','.join(HEADER)} (lengths only, no hit ratios)"
    has_blocks: ClassVar[bool] = False

    @staticmethod
    def recognises(head: Head) -> bool:
        return head.line.strip().split(",") == HEADER

    def read(self, source: Source, options: Options) -> Trace:
        requests = Requests()

        def take(line: str) -> None:
            fields = split(line.strip())
            if len(fields) != len(HEADER):
                raise Damaged(f"expected {len(HEADER)} fields, got {len(fields)}")
            time, context, generated = fields
            requests.add(array("q"), _moment_ms(time), _length(context, HEADER[1]), _length(generated, HEADER[2]))

        read_lines(source, options.damage, take, f"an azure trace is {self.shape}", skip_first=True)
        return requests.trace(block_tokens=1)


def _moment_ms(text: str) -> float:
    """Return a time of the calendar in ms; without a zone it is UTC."""
    try:
        moment = datetime.datetime.fromisoformat(text.strip())
        return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp() * MS_PER_S
    except (ValueError, OverflowError):
        raise Damaged(f"{HEADER[0]}: expected a date and time, got {shown(text)}") from None


def _length(text: str, name: str) -> int:
    if not text.isdecimal() or len(text) > 20 or int(text) >= LIMIT:
        raise Damaged(f"{name}: expected a number of tokens, got {shown(text)}")
    return int(text)
