"""Text that goes on after a compressed context, one token per step: its perplexity, and how far the model agrees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from pikv_core.cache import PiKVCache
from pikv_core.evaluation.prompts import TextWindows
from pikv_core.model.steps import prefill, step


@dataclass(frozen=True)
class Continuation:
    """perplexity: exp of the mean negative log-likelihood (nats) of the text.

    agreement: share of steps with the full cache's greedy token. agreement_kl: mean KL(full cache ‖ this one) of the
    next-token distributions, in nats. None where the full cache did not run beside.
    """

    perplexity: float
    agreement: float | None
    agreement_kl: float | None


def measure_continuation(
    model: Any,
    new_cache: Callable[[], PiKVCache],
    windows: TextWindows,
    context_tokens: int,
    batch_size: int,
    full_cache: Callable[[], PiKVCache] | None = None,
) -> Continuation:
    """Feed the tokens that follow `context_tokens`; with `full_cache`, feed them to a full cache side by side.

    The first of them is fed but not scored: the prompt's own pass predicts it, at full precision.
    """
    losses, equal, divergences = [], [], []
    for ids in windows.ids.split(batch_size):
        context, rest = ids[:, :context_tokens], ids[:, context_tokens:]
        cache = new_cache()
        prefill(model, cache, context, rest)
        full = full_cache() if full_cache is not None else None
        if full is not None:
            prefill(model, full, context)
        for token, following in zip(rest[:, :-1].unbind(1), rest[:, 1:].unbind(1)):
            logits = step(model, cache, token)
            losses.append(F.cross_entropy(logits, following.to(logits.device), reduction="none"))
            if full is not None:
                expected = step(model, full, token)
                equal.append(logits.argmax(-1) == expected.argmax(-1))
                divergences.append(divergence(expected, logits))
    return Continuation(
        perplexity=torch.cat(losses).mean().exp().item(),
        agreement=torch.cat(equal).float().mean().item() if equal else None,
        agreement_kl=torch.cat(divergences).mean().item() if divergences else None,
    )


def divergence(expected: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return KL(expected ‖ given) [B] in nats of the distributions of two sets of logits [B,V]."""
    log_p, log_q = expected.double().log_softmax(-1), logits.double().log_softmax(-1)
    return torch.where(log_p.isneginf(), 0, log_p.exp() * (log_p - log_q)).sum(-1)
