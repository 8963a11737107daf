"""Ranks as threads of one process: what they gather goes through memory."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from pikv_core.cache.ranks.split import Wire

PATIENCE_S = 60


class Board:
    """Where the threads lay down what the others read."""

    def __init__(self, count):
        self.count = count
        self.parts = [None] * count
        self.barrier = threading.Barrier(count, timeout=PATIENCE_S)


class ThreadWire(Wire):
    def __init__(self, rank, board):
        super().__init__(rank, board.count)
        self._board = board

    def _exchange(self, mine):
        self._board.parts[self.rank] = mine.clone()
        self._board.barrier.wait()
        whole = torch.cat(self._board.parts)
        self._board.barrier.wait()
        return whole

    def collect(self, data):
        self._board.parts[self.rank] = data
        self._board.barrier.wait()
        whole = list(self._board.parts)
        self._board.barrier.wait()
        return [] if self.rank else whole


def on_ranks(count, work):
    """Return what work(wire) returns on each of `count` ranks, in their order."""
    board = Board(count)

    def run(rank):
        try:
            with torch.no_grad():
                return work(ThreadWire(rank, board))
        except BaseException:
            board.barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        return [one.result() for one in [pool.submit(run, rank) for rank in range(count)]]
