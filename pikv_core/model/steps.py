"""Feed a model through a cache: a prompt at once, then one token per step, as decoding does."""

from __future__ import annotations

from typing import Any

import torch

from pikv_core.cache import PiKVCache


@torch.no_grad()
def feed(model: Any, cache: PiKVCache, ids: torch.Tensor) -> torch.Tensor:
    """Feed ids [B,T] at once; return the logits [B,V] after the last one, float32."""
    output = model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.logits[:, -1].float()


def step(model: Any, cache: PiKVCache, ids: torch.Tensor) -> torch.Tensor:
    """Feed one token per row, ids [B]; return the logits [B,V] after it, float32."""
    return feed(model, cache, ids[:, None])
