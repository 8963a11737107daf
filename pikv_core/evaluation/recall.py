"""Recall: how many questions about the context are answered right through a cache, and how deep the answer lay."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from pikv_core.cache import PiKVCache
from pikv_core.evaluation.prompts import RecallPrompts
from pikv_core.model.steps import feed, prefill, step

NUM_DEPTHS = 5


@dataclass(frozen=True)
class Recall:
    """Share of answers whose every token is right; `interval` is half the 95 % confidence interval (Wilson).

    by_depth: the share in each fifth of the context, first to last, None where nothing was asked. by_needles: the
    share by the number of needles in the context. answer_perplexity: of the answer tokens.
    """

    share: float
    interval: float
    num_queries: int
    by_depth: list[float | None]
    by_needles: dict[str, float]
    answer_perplexity: float


def measure_recall(
    model: Any,
    new_cache: Callable[[], PiKVCache],
    prompts: Sequence[RecallPrompts],
    question: Literal["inside", "after"],
    batch_size: int,
) -> Recall:
    """Ask every question, one token per step, over the compressed context.

    question "after": the policy compresses the context alone. "inside": it has first observed every question, each
    fed and forgotten again, so that the questions' attention is known when it compresses. A policy that is shown
    what comes later, or the context once more, is shown that in either case.
    """
    hits: list[torch.Tensor] = []
    losses: list[torch.Tensor] = []
    for group in prompts:
        right = torch.zeros(group.depth.shape)
        for rows in torch.arange(len(group.context)).split(batch_size):
            cache = new_cache()
            if question == "inside" and cache.looks is None:
                _feed_with_questions(model, cache, group, rows)
            else:
                prefill(model, cache, group.context[rows], group.asked()[rows])
            right[rows] = _ask(model, cache, group.questions[rows], group.answers[rows], losses)
        hits.append(right)
    return _summary(prompts, hits, torch.cat(losses))


def _feed_with_questions(model: Any, cache: PiKVCache, group: RecallPrompts, rows: torch.Tensor) -> None:
    cache.hold()
    feed(model, cache, group.context[rows])
    for asked in group.questions[rows].unbind(1):
        for token in asked.unbind(1):
            step(model, cache, token)
        cache.rewind(asked.shape[1])
    cache.compress()


def _ask(
    model: Any, cache: PiKVCache, questions: torch.Tensor, answers: torch.Tensor, losses: list[torch.Tensor]
) -> torch.Tensor:
    """Ask questions [B,Q,A] in turn, the right answers [B,Q,L] being fed; return 1 where right [B,Q], add to losses."""
    right = torch.ones(questions.shape[:2])
    for index, (asked, answer) in enumerate(zip(questions.unbind(1), answers.unbind(1))):
        for token in asked.unbind(1):
            logits = step(model, cache, token)
        for token in answer.unbind(1):
            losses.append(F.cross_entropy(logits, token.to(logits.device), reduction="none").cpu())
            right[:, index] *= logits.argmax(-1).cpu() == token
            logits = step(model, cache, token)
    return right


def _summary(prompts: Sequence[RecallPrompts], hits: Sequence[torch.Tensor], losses: torch.Tensor) -> Recall:
    right = torch.cat([group.flatten() for group in hits])
    depths = torch.cat([group.depth.flatten() for group in prompts])
    share = right.mean().item()
    fifth = (depths * NUM_DEPTHS).long().clamp(max=NUM_DEPTHS - 1)
    return Recall(
        share,
        half_interval(share, right.numel()),
        right.numel(),
        by_depth=[right[fifth == i].mean().item() if (fifth == i).any() else None for i in range(NUM_DEPTHS)],
        by_needles={str(group.num_needles): own.mean().item() for group, own in zip(prompts, hits)},
        answer_perplexity=losses.mean().exp().item(),
    )


def half_interval(share: float, count: int) -> float:
    """Return half the 95 % confidence interval (Wilson) of a share of `count` answers."""
    z = 1.96
    return z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
