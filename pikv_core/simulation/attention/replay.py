"""Replay recorded attention through the very cache that `pikv generate` runs, policy, budget and allocation included.

A policy sees, of each recorded row, what falls on the tokens that the cache still holds, brought back to a sum of 1.
For a layer by itself that is what it would have seen in the model; what evictions in the layers below would have
changed in a layer's queries and keys is not in a record.
Shapes: H query heads, G key/value heads, S tokens, D head dim.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig

from pikv_core.cache import PiKVCache
from pikv_core.errors import UsageError
from pikv_core.scheduling.base import Evictor, Policy, Selector, Tokens
from pikv_core.schema import CacheRecipe
from pikv_core.simulation.attention.measure import Measures
from pikv_core.simulation.attention.trace import AttentionTrace, Header

Progress = Callable[[int, int], None]


class Replay:
    """A cache for a trace, empty. Raises UsageError where the recipe's parts do not go together, or with the trace."""

    def __init__(self, trace: AttentionTrace, recipe: CacheRecipe):
        self.trace, self.recipe = trace, recipe
        self.cache = PiKVCache(_config(trace.header), recipe)
        self.policy = self.cache.own_layers[0].policy
        for layer in self.cache.own_layers:
            layer.policy = _told_only(self.policy, trace.holds)
            layer.reset()

    @functools.cached_property
    def _keys(self) -> list[torch.Tensor]:
        return [self._keys_of(layer) for layer in range(self.trace.header.num_layers)]

    def prefill(self) -> None:
        """Feed the prompt, and what a policy that knows the future is shown."""
        h, cache = self.trace.header, self.cache
        if cache.looks is None:
            self._feed_all(0, h.num_prompt_tokens)
            return
        cache.hold()
        self._feed_all(0, h.num_prompt_tokens)
        cache.look()
        self._feed_all(h.num_prompt_tokens, h.num_tokens)
        cache.rewind(h.num_steps)
        cache.compress()

    def step(self, layer: int, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Feed a layer one token of a decode step; return its row [H,P] as recorded, and the positions [G,·] read."""
        row = self.trace.rows(layer, position, position + 1)
        return row[:, 0], self._feed(layer, position, position + 1, row)[0].numpy()

    def resident(self, layer: int) -> np.ndarray:
        """Return the positions [G,·] that a layer stores, -1 for empty slots."""
        return self.cache.own_layers[layer].positions()[0].numpy()

    def run(self, top_tokens: int, progress: Progress = lambda done, total: None) -> Measures:
        """Feed everything, and measure each decode step; top_tokens: of a step, whose hits are counted."""
        h = self.trace.header
        found = Measures.empty(h.num_steps, h.num_layers, h.num_kv_heads)
        page_tokens = self.policy.page_tokens if isinstance(self.policy, Selector) else 1
        self.prefill()
        for step in range(h.num_steps):
            progress(step, h.num_steps)
            for layer in range(h.num_layers):
                row, read = self.step(layer, h.num_prompt_tokens + step)
                by_group = row.reshape(h.num_kv_heads, -1, row.shape[-1])
                found.note(step, layer, by_group, read, self.resident(layer), top_tokens, page_tokens)
        return found

    def _feed_all(self, first: int, end: int) -> None:
        for layer in range(self.trace.header.num_layers):
            self._feed(layer, first, end)

    def _feed(self, layer: int, first: int, end: int, rows: np.ndarray | None = None) -> torch.Tensor:
        """Feed a layer the tokens at positions `first` to `end`; rows: their attention, where it is at hand."""

        def recorded(new: slice) -> tuple[torch.Tensor, torch.Tensor]:
            part = first + new.start, first + new.stop
            own = self.trace.rows(layer, *part) if rows is None else rows
            return torch.from_numpy(own)[None], torch.from_numpy(self.trace.sinks(layer, *part).copy())[None]

        h, own = self.trace.header, self.cache.own_layers[layer]
        new_keys = self._keys[layer][:, :, first:end]
        queries = self.trace.tensors.get(f"layers.{layer}.queries")
        query = None if queries is None else torch.from_numpy(queries[None, :, first:end]).to(getattr(torch, h.dtype))
        own.update(new_keys, new_keys)
        return own.replay(recorded, query)

    def _keys_of(self, layer: int) -> torch.Tensor:
        """Return a layer's keys [1,G,S,D] in the model's dtype; zeros where none were recorded."""
        h, dtype = self.trace.header, getattr(torch, self.trace.header.dtype)
        keys = self.trace.vectors(layer, "keys")
        if keys is not None:
            return torch.from_numpy(keys)[None].to(dtype)
        channels = h.head_dim if isinstance(self.recipe.budget, str) else 1  # they count in bytes alone
        return torch.zeros(1, 1, 1, 1, dtype=dtype).expand(1, h.num_kv_heads, h.num_tokens, channels)


def _config(header: Header) -> Any:
    """Return a configuration of the recorded model's layers and heads."""
    config: Any = LlamaConfig(
        vocab_size=1,
        hidden_size=header.num_heads * header.head_dim,
        num_hidden_layers=header.num_layers,
        num_attention_heads=header.num_heads,
        num_key_value_heads=header.num_kv_heads,
        head_dim=header.head_dim,
        bos_token_id=None,
        eos_token_id=None,
    )
    config.sliding_window = next((window for window in header.windows if window), None)
    config.layer_types = ["sliding_attention" if window else "full_attention" for window in header.windows]
    return config


def _told_only(policy: Policy, holds: frozenset[str]) -> Policy:
    """Return a policy that is refused the keys and values that are not in the trace, should it not have said so."""
    if not isinstance(policy, Evictor):
        return policy
    told = copy.copy(policy)

    def refuse(kind: str) -> Callable[[], torch.Tensor]:
        def ask() -> torch.Tensor:
            raise UsageError(
                f"policy '{policy.name}' goes by {kind}, which the trace does not hold and it does not declare",
                hint=f"name '{kind}' in the class's `reads`",
            )

        return ask

    def score(tokens: Tokens) -> torch.Tensor:
        keys = tokens.keys if "keys" in holds else refuse("keys")
        return policy.score(dataclasses.replace(tokens, keys=keys, values=refuse("values")))

    object.__setattr__(told, "score", score)
    return told
