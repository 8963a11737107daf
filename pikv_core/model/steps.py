"""Feed a model through a cache: a prompt at once, then one token per step, as decoding does."""

from __future__ import annotations

from typing import Any

import torch

from pikv_core.cache import PiKVCache
from pikv_core.errors import UsageError

LOOK_TOKENS = 2048  # of the prompt that a policy is shown again at a time
LEAD_TOKENS = 8  # of what comes before them, so that the model knows where to go on


@torch.no_grad()
def feed(model: Any, cache: PiKVCache, ids: torch.Tensor, is_token: torch.Tensor | None = None) -> torch.Tensor:
    """Feed ids [B,T] at once; return the logits [B,V] after the last one, float32. is_token [B,T]: False is padding."""
    padding: dict[str, torch.Tensor] = {}
    seen = cache.own_layers[0].num_seen if cache.get_seq_length() else torch.zeros(len(ids), dtype=torch.int64)
    if is_token is None and bool((seen < cache.get_seq_length()).any()):
        is_token = torch.ones_like(ids, dtype=torch.bool)  # behind padding, positions are not those of the columns
    if is_token is not None:
        is_token = is_token.to(model.device)
        before = is_token.new_ones(len(ids), cache.get_seq_length())
        padding["attention_mask"] = torch.cat([before, is_token], dim=1).long()
        padding["position_ids"] = (seen.to(model.device)[:, None] + is_token.cumsum(1) - 1).clamp(min=0)
    output = model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1, **padding)
    return output.logits[:, -1].float()


def step(model: Any, cache: PiKVCache, ids: torch.Tensor) -> torch.Tensor:
    """Feed one token per row, ids [B]; return the logits [B,V] after it, float32."""
    return feed(model, cache, ids[:, None])


def prefill(
    model: Any,
    cache: PiKVCache,
    ids: torch.Tensor,
    future: torch.Tensor | None = None,
    is_token: torch.Tensor | None = None,
) -> torch.Tensor:
    """Feed a prompt [B,T], let a policy that looks have its look, and compress; return the logits [B,V] after it.

    future: tokens [B,F] that will be fed later, for a policy that is shown them. is_token [B,T]: False is padding.
    """
    if cache.looks is None:
        return feed(model, cache, ids, is_token)
    if cache.looks == "future" and future is None:
        raise UsageError(
            f"policy '{cache.recipe.policy.name}' scores by the attention of tokens that are yet to come",
            hint="it is a bound to compare with in `pikv compress`, which knows them; choose another policy here",
        )
    cache.hold()
    logits = feed(model, cache, ids, is_token)
    if cache.looks == "future":
        assert future is not None
        look(model, cache, future, None if is_token is None else torch.ones_like(future, dtype=torch.bool))
    else:
        for start in range(0, ids.shape[1], LOOK_TOKENS):
            part = slice(max(0, start - LEAD_TOKENS) if start else 0, start + LOOK_TOKENS)
            shown, real = ids[:, part], None if is_token is None else is_token[:, part]
            if cache.repeat_words is not None:
                words = cache.repeat_words.to(ids.device).expand(len(ids), -1)
                shown = torch.cat([words, shown], dim=1)
                real = None if real is None else torch.cat([torch.ones_like(words, dtype=torch.bool), real], dim=1)
            look(model, cache, shown, real)
    cache.compress()
    return logits


def look(model: Any, cache: PiKVCache, ids: torch.Tensor, is_token: torch.Tensor | None = None) -> None:
    """Show a held cache tokens [B,F] that its policy observes and that are then forgotten."""
    cache.look()
    feed(model, cache, ids, is_token)
    cache.rewind(ids.shape[1])
