"""Perplexity of text that follows a compressed context, fed one token per step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from pikv_core.cache import PiKVCache
from pikv_core.evaluation.prompts import TextWindows
from pikv_core.evaluation.steps import feed, step


def measure_perplexity(
    model: Any, new_cache: Callable[[], PiKVCache], windows: TextWindows, context_tokens: int, batch_size: int
) -> float:
    """Return exp of the mean negative log-likelihood (nats) of the tokens that follow `context_tokens`.

    The first of them is fed but not scored: the prompt's own pass predicts it, at full precision.
    """
    losses = []
    for ids in windows.ids.split(batch_size):
        cache = new_cache()
        feed(model, cache, ids[:, :context_tokens])
        for at in range(context_tokens, ids.shape[1] - 1):
            logits = step(model, cache, ids[:, at])
            losses.append(F.cross_entropy(logits, ids[:, at + 1].to(logits.device), reduction="none"))
    return torch.cat(losses).mean().exp().item()
