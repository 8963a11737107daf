"""A decode step through a cache at its budget, recorded once and then replayed without Python between its kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pikv_core.cache import PiKVCache
from pikv_core.model.steps import step

Record = Callable[[Callable[[], None]], Callable[[], None]]  # run a function once; return what runs it again


def record_on_cuda(run: Callable[[], None]) -> Callable[[], None]:
    """Capture what `run` launches as a CUDA graph, launch it once, and return its replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    return graph.replay


class ReplayedStep:
    """Feed one token per row, as `steps.step` does; replayed from when every layer of the cache is at its budget.

    record: how a step is recorded; what it is given may ask the device for nothing. Raises UsageError for a cache whose
    steps never become alike. Between two calls nothing else may feed, reorder or rewind the cache.
    """

    def __init__(self, model: Any, cache: PiKVCache, record: Record = record_on_cuda):
        cache.check_static()
        self._model, self._cache, self._record = model, cache, record
        self._replay: Callable[[], None] | None = None
        self._ids = self._positions = self._logits = torch.empty(0)  # where a recorded step reads and writes

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Feed ids [B]; return the logits [B,V] after them, float32."""
        layers = self._cache.own_layers
        if self._replay is not None:
            self._ids.copy_(ids[:, None])
            self._replay()
            for layer in layers:
                layer.count_replayed()
        elif self._cache.is_static:
            self._ids = ids[:, None].to(self._model.device, copy=True)
            self._positions = layers[0].seen.here[:, None].clone()
            for layer in layers:
                layer.is_recorded = True
            self._replay = self._record(self._forward)
        else:
            return step(self._model, self._cache, ids)
        return self._logits.float()

    def _forward(self) -> None:
        found = self._model(
            input_ids=self._ids,
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._logits = found.logits[:, -1]
        self._positions.add_(1)
