"""Staging buffers on the device, and the thread that fills them ahead of the attention that reads them.

Reads repeat: layer after layer, each its pieces in order, then the same for the next token. So the thread always knows
what comes next, and fetches it as soon as a buffer is free. On a GPU it works on a stream of its own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch


class Piece(NamedTuple):
    """What is read at a time: the pages from `first` to `end` of a layer as they were at `version`.

    num_units: that the buffer is laid out for.
    """

    layer: int
    version: int
    first: int
    end: int
    num_units: int


@dataclass
class Totals:
    """Bytes by tier and seconds of transfers, and how long attention waited for them."""

    bytes_read: dict[str, int] = field(default_factory=dict)  # from a tier to the device
    bytes_written: dict[str, int] = field(default_factory=dict)
    bytes_unused: int = 0  # of those read: fetched ahead and then not wanted
    transfer_s: float = 0.0
    waited_s: float = 0.0
    write_s: float = 0.0  # placing pages, which nothing hides

    @property
    def hidden_s(self) -> float:
        """Seconds of transfers that nobody waited for."""
        return max(0.0, self.transfer_s - self.waited_s)

    def read(self, moved: dict[str, int], transfer_s: float, waited_s: float) -> None:
        _add(self.bytes_read, moved)
        self.transfer_s += transfer_s
        self.waited_s += waited_s

    def wrote(self, tier: str, num_bytes: int, seconds: float) -> None:
        _add(self.bytes_written, {tier: num_bytes})
        self.write_s += seconds


@dataclass
class Fetch:
    """A piece on its way into a buffer."""

    piece: Piece
    buffer: int
    result: Future[tuple[dict[str, int], Any, Any]]  # bytes by tier, begin and end: seconds, or events of a GPU


class Transfers:
    """Fetch pieces into buffers, ahead where it can.

    bring: copies a piece into a buffer and returns its bytes by tier. follow: returns the piece that is read after
    one, or None while that is not known.
    """

    def __init__(
        self,
        device: torch.device,
        bring: Callable[[Piece, torch.Tensor], dict[str, int]],
        follow: Callable[[Piece | None], Piece | None],
    ):
        self.totals = Totals()
        self.buffers: list[torch.Tensor] = []  # uint8
        self.device, self._bring, self._follow = device, bring, follow
        self._free: list[int] = []
        self._freed: dict[int, Any] = {}  # on a GPU: the event after which a buffer is read no more
        self._ahead: deque[Fetch] = deque()
        self._last: Piece | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="pikv-tiers")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._untold: list[tuple[dict[str, int], Any, Any, Any, Any]] = []  # transfers whose events are not read yet

    @property
    def nbytes(self) -> int:
        return sum(buffer.untyped_storage().nbytes() for buffer in self.buffers)

    def resize(self, num_buffers: int, buffer_bytes: int) -> None:
        """Have this many buffers of this size; what was in others is lost."""
        if len(self.buffers) == num_buffers and self.buffers[0].numel() == buffer_bytes:
            return
        self.forget()
        if self._stream is not None:
            self._stream.synchronize()
        self.buffers.clear()
        for number in range(num_buffers):
            self.buffers.append(torch.empty(buffer_bytes, dtype=torch.uint8, device=self.device))
            self._note_free(number)
        self._free = list(range(num_buffers))

    @contextmanager
    def reading(self, piece: Piece) -> Iterator[torch.Tensor]:
        """Give the buffer that holds a piece, until it is read; then fetch on."""
        if not (self._ahead and self._ahead[0].piece == piece):
            self.forget()
            self._submit(piece)
        fetch = self._ahead.popleft()
        self._wait(fetch)
        try:
            yield self.buffers[fetch.buffer]
        finally:
            self._note_free(fetch.buffer)
            self._free.append(fetch.buffer)
        self.fetch_on()

    def fetch_on(self) -> None:
        """Fetch what follows, as far as there are buffers."""
        while self._free:
            piece = self._follow(self._last)
            if piece is None or any(fetch.piece == piece for fetch in self._ahead):
                return
            self._submit(piece)

    def forget(self) -> None:
        """Give up what was fetched ahead."""
        while self._ahead:
            fetch = self._ahead.popleft()
            moved, _, _ = fetch.result.result()
            _add(self.totals.bytes_read, moved)
            self.totals.bytes_unused += sum(moved.values())
            self._free.append(fetch.buffer)
        self._last = None

    def tell(self) -> Totals:
        """Return the totals, of a GPU's transfers too."""
        if self._untold:
            torch.cuda.synchronize(self.device)
        for moved, begin, end, before, after in self._untold:
            self.totals.read(moved, begin.elapsed_time(end) / 1000, before.elapsed_time(after) / 1000)
        self._untold.clear()
        return self.totals

    def _note_free(self, buffer: int) -> None:
        """Remember after what a GPU may write to a buffer."""
        if self._stream is not None:
            self._freed[buffer] = torch.cuda.current_stream(self.device).record_event()

    def _submit(self, piece: Piece) -> None:
        buffer = self._free.pop(0)
        self._last = piece
        self._ahead.append(Fetch(piece, buffer, self._worker.submit(self._fetch, piece, buffer)))

    def _fetch(self, piece: Piece, buffer: int) -> tuple[dict[str, int], Any, Any]:
        if self._stream is None:
            begin = time.perf_counter()
            with torch.inference_mode():  # buffers may have been made in it
                moved = self._bring(piece, self.buffers[buffer])
            return moved, begin, time.perf_counter()
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            self._stream.wait_event(self._freed[buffer])
            begin = self._event()
            moved = self._bring(piece, self.buffers[buffer])
            return moved, begin, self._event()

    def _wait(self, fetch: Fetch) -> None:
        if self._stream is None:
            start = time.perf_counter()
            moved, begin, end = fetch.result.result()
            self.totals.read(moved, end - begin, time.perf_counter() - start)
            return
        before = self._event()
        moved, begin, end = fetch.result.result()
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(end)
        self._untold.append((moved, begin, end, before, self._event()))

    def _event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _add(sums: dict[str, int], more: dict[str, int]) -> None:
    for name, number in more.items():
        sums[name] = sums.get(name, 0) + number
