"""What a reader of traces has to answer, and the one place where damaged lines are told or counted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from pikv_core.errors import PiKVError
from pikv_core.simulation.source import Head, Source
from pikv_core.simulation.trace import Trace

SHOWN = 3  # damaged places that a status line names


class Damaged(Exception):
    """Say what is wrong with a line or a file; the message names the field, what was expected and what came."""


@dataclass
class Damage:
    """The damaged lines or files of one trace: the first stops the reading, unless they are to be skipped."""

    skip: bool = False
    places: list[str] = field(default_factory=list)  # of the first SHOWN: `FILE:NUMBER: problem`
    count: int = 0

    def take(self, place: str, problem: str, hint: str) -> None:
        """Raise the problem of `FILE:NUMBER` or `FILE`, or count it; what was damaged is then left out."""
        told = f"{place}: {problem}"
        if not self.skip:
            raise PiKVError(told, hint=f"{hint}; --skip-bad-lines leaves out what is damaged")
        self.count += 1
        if len(self.places) < SHOWN:
            self.places.append(told)

    @property
    def summary(self) -> str:
        """Return what was left out, for a status line."""
        more = self.count - len(self.places)
        return "; ".join([f"left out {self.places[0]}", *self.places[1:]]) + (f"; and {more:,} more" if more else "")


@dataclass
class Options:
    """How a trace is read. interleave, seed: of sessions with clocks of their own."""

    interleave: str = "absolute"
    seed: int = 0
    damage: Damage = field(default_factory=Damage)


class Reader(ABC):
    """Read one format.

    shape: what the format looks like, for messages. has_sessions: it puts sessions on one clock, by
    Options.interleave. has_blocks: its requests access blocks. is_slow: parsing takes far longer than reading
    the bytes, so that the columns are worth keeping.
    """

    name: ClassVar[str]
    shape: ClassVar[str]
    has_sessions: ClassVar[bool] = False
    has_blocks: ClassVar[bool] = True
    is_slow: ClassVar[bool] = True

    @staticmethod
    @abstractmethod
    def recognises(head: Head) -> bool:
        """Tell whether the source is of this format, by its first bytes or its files' names; never raises."""

    @abstractmethod
    def read(self, source: Source, options: Options) -> Trace:
        """Return the trace, in order of time; tell options.damage what cannot be read.

        With everything skipped the trace has no requests: the caller says so.
        """


def read_lines(
    source: Source, damage: Damage, parse: Callable[[str], None], hint: str, skip_first: bool = False
) -> None:
    """Give each line to `parse`, which takes it whole or raises Damaged (or ValueError) and takes nothing.

    skip_first: the first line, a header, has been read already.
    """
    lines = source.lines()
    if skip_first:
        next(lines, None)
    for number, line in lines:
        try:
            parse(line.decode())
        except UnicodeDecodeError:
            damage.take(f"{source.name}:{number}", "not UTF-8 text", hint)
        except (Damaged, ValueError) as error:
            damage.take(f"{source.name}:{number}", str(error), hint)
