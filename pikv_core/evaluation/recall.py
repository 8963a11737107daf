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
from pikv_core.model.steps import feed, look, prefill, step

NUM_DEPTHS = 5
WINDOW = 64  # newest tokens of a context that are fed with each question: as many as any policy takes a vote of


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

    question "after": the policy compresses the context alone, once for all questions. "inside": the context is
    compressed anew for each question, which has been at its end while the policy observed and is then asked through
    what is left. A policy that is shown what comes later is shown all questions, or the one.
    """
    hits: list[torch.Tensor] = []
    losses: list[torch.Tensor] = []
    for group in prompts:
        right = torch.zeros(group.depth.shape)
        for rows in torch.arange(len(group.context)).split(batch_size):
            ask = _ask_inside if question == "inside" else _ask_after
            right[rows] = ask(model, new_cache(), group, rows, losses)
        hits.append(right)
    return _summary(prompts, hits, torch.cat(losses))


def _ask_after(
    model: Any, cache: PiKVCache, group: RecallPrompts, rows: torch.Tensor, losses: list[torch.Tensor]
) -> torch.Tensor:
    """Ask all questions in turn over the context, compressed once."""
    prefill(model, cache, group.context[rows], group.asked()[rows])
    return _ask(model, cache, group.questions[rows], group.answers[rows], losses)


def _ask_inside(
    model: Any, cache: PiKVCache, group: RecallPrompts, rows: torch.Tensor, losses: list[torch.Tensor]
) -> torch.Tensor:
    """Ask each question over the context as it is compressed with that question at its end."""
    if cache.looks == "repeat":  # no question changes what it goes by
        return _ask_after(model, cache, group, rows, losses)
    context, questions, answers = group.context[rows], group.questions[rows], group.answers[rows]
    cache.hold()
    if context.shape[1] > WINDOW:
        feed(model, cache, context[:, :-WINDOW])
    right = torch.zeros(questions.shape[:2])
    for index in range(questions.shape[1]):
        own, asked = cache.fork(), questions[:, index]
        feed(model, own, torch.cat([context[:, -WINDOW:], asked], dim=1))
        own.rewind(asked.shape[1])
        if own.looks == "future":
            look(model, own, torch.cat([asked, answers[:, index]], dim=1))
        own.compress()
        one = slice(index, index + 1)
        right[:, one] = _ask(model, own, questions[:, one], answers[:, one], losses)
    return right


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
