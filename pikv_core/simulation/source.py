"""A trace's bytes, from a file, a folder of files or stdin; gzip and zstd are told by their first bytes."""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from pikv_core.errors import PiKVError

CHUNK_BYTES = 1 << 18
HEAD_BYTES = 1 << 16  # and at most HEAD_BYTES_MAX, to the end of the first line that is not empty
HEAD_BYTES_MAX = 1 << 24
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True)
class Head:
    """What a reader recognises its format by; of a folder the names of its files alone."""

    start: bytes = b""  # the first bytes, unpacked
    line: str = ""  # the first line that is not empty
    number: int = 1  # of that line, from 1
    files: tuple[str, ...] = ()


class Source:
    """One trace to be read once, front to back; `name` is what errors call it, "-" stands for stdin."""

    def __init__(self, trace: str):
        self.path = None if trace == "-" else Path(trace)
        self.name = "stdin" if trace == "-" else trace
        self._rest = self._chunks()

    @property
    def is_file(self) -> bool:
        """Tell whether it is a file that is there, also one that cannot be read."""
        return self.path is not None and os.path.isfile(self.path)

    @cached_property
    def files(self) -> tuple[Source, ...] | None:
        """Return a folder's files by name, hidden ones and folders within left out; None for anything else."""
        if self.path is None or not os.path.isdir(self.path):
            return None
        with self._said():
            inside = sorted(self.path.iterdir())
        return tuple(Source(str(path)) for path in inside if path.is_file() and not path.name.startswith("."))

    @cached_property
    def head(self) -> Head:
        if self.files is not None:
            return Head(files=tuple(file.path.name for file in self.files if file.path))
        return first_head(self._start)

    def chunks(self) -> Iterator[bytes]:
        """Yield the unpacked bytes piece by piece, once."""
        yield self._start
        yield from self._rest

    def whole(self) -> bytes:
        """Return all the unpacked bytes, once."""
        return b"".join(self.chunks())

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield each line that is not empty with its number from 1, without a mark of byte order, once."""
        unfinished: list[bytes] = []
        number = 1
        for chunk in self.chunks():
            first, *others = chunk.split(b"\n")
            unfinished.append(first)
            for other in others:
                yield from _told(number, b"".join(unfinished))
                unfinished = [other]
                number += 1
        yield from _told(number, b"".join(unfinished))

    @cached_property
    def _start(self) -> bytes:
        start = b""
        for chunk in self._rest:
            start += chunk
            if len(start) >= HEAD_BYTES and (b"\n" in start.lstrip() or len(start) >= HEAD_BYTES_MAX):
                break
        return start

    def _chunks(self) -> Iterator[bytes]:
        with self._said(), self._stream() as stream:
            packed = iter(lambda: stream.read(CHUNK_BYTES), b"")
            first = next(packed, b"")
            if first.startswith(GZIP):
                yield from self._unpacked(first, packed, _gzip, zlib.error)
            elif first.startswith(ZSTD):
                from zstandard import ZstdError

                yield from self._unpacked(first, packed, _zstd, ZstdError)
            else:
                yield first
                yield from packed

    @contextmanager
    def _stream(self) -> Iterator[BinaryIO]:
        if self.path is None:
            yield sys.stdin.buffer
            return
        with open(self.path, "rb") as stream:
            yield stream

    def _unpacked(
        self, first: bytes, packed: Iterator[bytes], unpacker: Callable[[], Any], problem: type[Exception]
    ) -> Iterator[bytes]:
        """Unpack one archive or several behind one another, as the command-line tools do."""
        unpacking = unpacker()
        chunk = first
        try:
            while True:
                yield unpacking.decompress(chunk)
                chunk = unpacking.unused_data.lstrip(b"\0") if unpacking.eof else b""
                chunk = chunk or next(packed, b"")
                if not chunk:
                    break
                if unpacking.eof:
                    unpacking = unpacker()
        except problem as error:
            self._damaged(str(error).lower(), error)
        if not unpacking.eof:
            self._damaged("it is cut off")

    def _damaged(self, problem: str, cause: Exception | None = None) -> NoReturn:
        raise PiKVError(
            f"{self.name}: cannot unpack the trace: {problem}", hint="fetch or pack the file again"
        ) from cause

    @contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
            raise PiKVError(
                f"{self.name}: cannot read the trace: {reason.lower()}",
                hint="`pikv gen-data requests --out DIR` writes one; - reads stdin",
            ) from error


def first_head(start: bytes) -> Head:
    """Return the head of what begins with these bytes."""
    number, line = next(((number, line) for number, line in enumerate(start.split(b"\n"), 1) if line.strip()), (1, b""))
    return Head(start, line.decode("utf-8-sig", errors="replace"), number)


def _told(number: int, line: bytes) -> Iterator[tuple[int, bytes]]:
    if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")
    if line and not line.isspace():
        yield number, line


def _gzip() -> Any:
    return zlib.decompressobj(wbits=31)


def _zstd() -> Any:
    from zstandard import ZstdDecompressor

    return ZstdDecompressor(max_window_size=2**31).decompressobj()
