"""Recall: how many questions about the context are answered right through a cache, and how deep the answer lay."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from pikv_core.cache import PiKVCache
from pikv_core.evaluation.prompts import RecallPrompts
from pikv_core.evaluation.steps import feed, step

NUM_DEPTHS = 5


@dataclass(frozen=True)
class Recall:
    """Share of answers whose every token is right; `interval` is half the 95 % confidence interval (Wilson).

    by_depth: the share in each fifth of the context, first to last, None where nothing was asked.
    answer_perplexity: of the answer tokens.
    """

    share: float
    interval: float
    num_queries: int
    by_depth: list[float | None]
    answer_perplexity: float


def measure_recall(
    model: Any,
    new_cache: Callable[[], PiKVCache],
    prompts: RecallPrompts,
    question: Literal["inside", "after"],
    batch_size: int,
) -> Recall:
    """Ask every question, one token per step, over the compressed context.

    question "after": the policy compresses the context alone. "inside": it has first observed every question, each
    fed and forgotten again, so that the questions' attention is known when it compresses.
    """
    hits, losses = torch.zeros(prompts.depth.shape), []
    for rows in torch.arange(len(prompts.context)).split(batch_size):
        cache = new_cache()
        questions, answers = prompts.questions[rows], prompts.answers[rows]
        if question == "inside":
            cache.hold()
        feed(model, cache, prompts.context[rows])
        if question == "inside":
            for asked in questions.unbind(1):
                for token in asked.unbind(1):
                    step(model, cache, token)
                cache.rewind(asked.shape[1])
            cache.compress()
        for index, (asked, answer) in enumerate(zip(questions.unbind(1), answers.unbind(1))):
            correct = torch.ones(len(rows), dtype=torch.bool)
            for token in asked.unbind(1):
                logits = step(model, cache, token)
            for token in answer.unbind(1):
                losses.append(F.cross_entropy(logits, token.to(logits.device), reduction="none").cpu())
                correct &= logits.argmax(-1).cpu() == token
                logits = step(model, cache, token)
            hits[rows, index] = correct.float()
    return _summary(hits, prompts.depth, torch.cat(losses))


def _summary(hits: torch.Tensor, depths: torch.Tensor, losses: torch.Tensor) -> Recall:
    n, p = hits.numel(), hits.mean().item()
    z = 1.96
    interval = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    fifth = (depths * NUM_DEPTHS).long().clamp(max=NUM_DEPTHS - 1)
    by_depth = [hits[fifth == i].mean().item() if (fifth == i).any() else None for i in range(NUM_DEPTHS)]
    return Recall(p, interval, n, by_depth, losses.mean().exp().item())
