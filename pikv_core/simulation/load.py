"""Load a trace: its first bytes, or a folder's files, tell which reader it is for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pikv_core.errors import PiKVError, UsageError
from pikv_core.simulation.kept_columns import keep, kept
from pikv_core.simulation.readers import READERS
from pikv_core.simulation.readers.base import Damage, Options, Reader
from pikv_core.simulation.source import Head, Source
from pikv_core.simulation.trace import Trace

KEEP_FROM_S = 0.2  # of parsing, and
KEEP_FROM_BYTES = 1 << 20  # of the file: what took less is parsed again the next time
TRIED_LINES = 50  # that may be damaged before one tells the format, where such lines are skipped
ZIP = b"PK\x03\x04"


@dataclass(frozen=True)
class Loaded:
    """A trace and how it was read."""

    trace: Trace
    format: str  # the reader's name
    interleaving: str | None  # of sessions with clocks of their own; None for a log that has one clock
    skipped_lines: int  # damaged ones; files of a folder
    from_kept_columns: bool


def load(
    trace: str,
    *,
    interleave: str | None = None,
    seed: int = 0,
    keep_columns: bool = True,
    skip_bad_lines: bool = False,
    status: Callable[[str], None] = lambda text: None,
) -> Loaded:
    """Read a file or folder, `-` being stdin; raise PiKVError with file and line where it cannot be read.

    interleave, seed: see interleave.py. keep_columns: read the columns kept beside the file, and keep them where
    parsing took long. status: told what was skipped and where columns come from.
    """
    source = Source(trace)
    if keep_columns and source.path is not None and source.is_file:
        stored = kept(source.path)
        if stored is not None:
            _check_interleaving(source, READERS[stored.format], interleave)
            status(f"{source.name}: columns kept from the last time")
            return Loaded(stored.trace, stored.format, None, 0, from_kept_columns=True)
    reader = _reader(source, skip_bad_lines)
    _check_interleaving(source, reader, interleave)
    options = Options(interleave or "absolute", seed, Damage(skip_bad_lines))
    version = _version(source)
    began = time.perf_counter()
    read = reader.read(source, options)
    took_s = time.perf_counter() - began
    _check(source, reader, read, options.damage)
    if options.damage.count:
        status(options.damage.summary)
    elif keep_columns and source.path is not None and _worth_keeping(reader, took_s, version, _version(source)):
        keep(source.path, reader.name, read)
    interleaving = options.interleave if reader.has_sessions else None
    return Loaded(read, reader.name, interleaving, options.damage.count, from_kept_columns=False)


def _reader(source: Source, skip_bad_lines: bool) -> Reader:
    """Return the reader that recognises the source, by a later line where the first ones may be damaged."""
    known: list[type[Reader]] = [READERS[name] for name in READERS.names()]
    for head in _heads(source.head, skip_bad_lines):
        for reader in known:
            if reader.recognises(head):
                return reader()
    head = source.head
    if source.files is not None:
        problem = ": none of the folder's files is of a known format" if source.files else ": the folder is empty"
    elif not head.start.strip():
        problem = ": the trace is empty"
    elif head.start.startswith(ZIP) or head.start[8:10] in (b'{"', b"{}"):
        raise UsageError(
            f"{source.name}: this is recorded attention, not a log of requests",
            hint="give --budget to replay it under the policies of `pikv generate`",
        )
    elif b"\0" in head.start:
        problem = ": these bytes begin no trace of a known format"
    else:
        problem = f":{head.number}: this line begins no trace of a known format"
    raise PiKVError(source.name + problem, hint=_formats())


def _version(source: Source) -> tuple[int, int] | None:
    """Return what changes with a file's bytes, its time in ns and its size; None for anything but a file."""
    if source.path is None or not source.is_file:
        return None
    found = source.path.stat()
    return found.st_mtime_ns, found.st_size


def _worth_keeping(
    reader: Reader, took_s: float, before: tuple[int, int] | None, after: tuple[int, int] | None
) -> bool:
    """Tell whether to keep columns: of a file that nobody wrote to meanwhile and that took long to parse.

    What a plug-in read is not kept: whether columns are its own is told by the text of the readers beside this file.
    """
    is_ours = type(reader).__module__.startswith(f"{READERS.package}.")
    if not is_ours or reader.has_sessions or not reader.is_slow or before is None or before != after:
        return False
    return took_s >= KEEP_FROM_S and before[1] >= KEEP_FROM_BYTES


def _heads(head: Head, skip_bad_lines: bool) -> Iterator[Head]:
    yield head
    if skip_bad_lines:
        for line in head.start.split(b"\n")[:TRIED_LINES]:
            yield Head(line, line.decode(errors="replace"))


def _check_interleaving(source: Source, reader: Reader | type[Reader], interleave: str | None) -> None:
    if interleave is not None and not reader.has_sessions:
        raise UsageError(
            f"{source.name}: the requests of a {reader.name} trace are on one clock already: nothing to interleave",
            hint="leave --interleave out",
        )


def _check(source: Source, reader: Reader, trace: Trace, damage: Damage) -> None:
    if not trace.num_requests and damage.count:
        raise PiKVError(
            f"{source.name}: all {damage.count:,} lines are damaged: {damage.places[0]}",
            hint=f"a {reader.name} trace is {reader.shape}",
        )
    if not trace.num_requests:
        raise PiKVError(f"{source.name}: the trace has no request", hint=f"a {reader.name} trace is {reader.shape}")
    if reader.has_blocks and not trace.ids.size:
        raise PiKVError(f"{source.name}: no request has a block", hint=f"a {reader.name} trace is {reader.shape}")


def _formats() -> str:
    return "known formats: " + "; ".join(f"{name}: {READERS[name].shape}" for name in READERS.names())
