"""A decode step through a cache at its budget, recorded once and then replayed without Python between its kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

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
    """Feed one token per row, as `steps.step` does; replayed after every layer of the cache has come to its budget.

    The first step there is run once more, so that nothing is new to the one that is recorded. record: how that is done;
    what it is given asks the device for nothing. Raises UsageError for a cache whose steps never become alike. Between
    two calls nothing else may feed, reorder or rewind the cache. num_replayed: calls that were replays.
    """

    def __init__(self, model: Any, cache: PiKVCache, record: Record = record_on_cuda):
        cache.check_static()
        self._model, self._cache, self._record = model, cache, record
        self._replay: Callable[[], None] | None = None
        self._is_warm, self.num_replayed = False, 0
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
            self.num_replayed += 1
        elif self._cache.is_static and self._is_warm:
            self._ids = ids[:, None].to(self._model.device, copy=True)
            self._positions = layers[0].seen.here[:, None].clone()
            for layer in layers:
                layer.is_recorded = True
            try:
                self._replay = self._record(self._forward)
            finally:
                for layer in layers:
                    layer.is_recorded = False
        else:
            self._is_warm = self._cache.is_static
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


@contextmanager
def replaying(model: Any, cache: PiKVCache, record: Record = record_on_cuda) -> Iterator[ReplayedStep]:
    """Let whatever feeds the model one token per row through this cache, such as its `generate`, get replayed steps."""
    decode, forward, feeds = ReplayedStep(model, cache, record), model.forward, False

    @wraps(forward)
    def replayed(input_ids: torch.Tensor, **given: Any) -> Any:
        nonlocal feeds
        if feeds or input_ids.shape[1] > 1:
            return forward(input_ids=input_ids, **given)
        feeds = True  # the step calls the model itself
        try:
            return CausalLMOutputWithPast(logits=decode(input_ids[:, 0])[:, None], past_key_values=cache)
        finally:
            feeds = False

    model.forward = replayed
    try:
        yield decode
    finally:
        del model.forward
