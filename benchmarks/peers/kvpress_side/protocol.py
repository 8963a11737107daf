"""What both sides of the comparison do alike: hold a prompt, answer questions over it, time it. Torch only.

Shapes: N prompts, C context tokens, Q questions of A tokens, L answer tokens, G key/value heads, K kept tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache


@dataclass(frozen=True)
class Prompts:
    """Token ids of prompts of one layout: context [N,C], questions [N,Q,A], answers [N,Q,L]."""

    context: torch.Tensor
    questions: torch.Tensor
    answers: torch.Tensor


def save(path: Path, groups: Sequence[Prompts]) -> None:
    """Write prompts of several layouts as an .npz that `load` reads in the other environment."""
    arrays = {
        f"{index}/{field.name}": getattr(group, field.name)
        for index, group in enumerate(groups)
        for field in fields(group)
    }
    np.savez(path, **arrays)


def load(path: Path) -> list[Prompts]:
    """Read what `save` wrote."""
    names = [field.name for field in fields(Prompts)]
    with np.load(path) as arrays:
        num_groups = len(arrays.files) // len(names)
        return [Prompts(*(torch.from_numpy(arrays[f"{i}/{name}"]) for name in names)) for i in range(num_groups)]


class Side:
    """One way of holding a prompt; this one, transformers' own cache, is the baseline of both environments."""

    def __init__(self, model: Any):
        self.model = model

    def new(self, num_tokens: int) -> Any:
        """Return an empty cache for a prompt of `num_tokens`, with the model set up for it."""
        self.model.set_attn_implementation("sdpa")
        return DynamicCache()

    def feed(self, cache: Any, ids: torch.Tensor) -> None:
        """Feed a prompt [B,C] at once; the cache holds it, compressed, afterwards."""
        self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def step(self, cache: Any, ids: torch.Tensor, position: int) -> torch.Tensor:
        """Feed one token per row, ids [B], at its true position; return the likeliest next tokens [B]."""
        positions = torch.full((len(ids), 1), position)
        output = self.model(input_ids=ids[:, None], past_key_values=cache, use_cache=True, position_ids=positions)
        return output.logits[:, -1].argmax(-1)

    def forget(self, cache: Any, num_tokens: int) -> None:
        """Drop the newest tokens, the ones `step` has fed."""
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :-num_tokens], layer.values[:, :, :-num_tokens]

    def num_bytes(self, cache: Any) -> int:
        """Return the bytes of the storage behind the cache's tensors."""
        held = [tensor.untyped_storage() for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())


@torch.no_grad()
def recall(side: Side, groups: Sequence[Prompts], batch_size: int = 16) -> float:
    """Return the share of questions whose every answer token is the likeliest one.

    A question is fed one token per step over the compressed context, and forgotten before the next one.
    """
    hits = []
    for prompts in groups:
        C = prompts.context.shape[1]
        for rows in torch.arange(len(prompts.context)).split(batch_size):
            cache = side.new(C)
            side.feed(cache, prompts.context[rows])
            for asked, answer in zip(prompts.questions[rows].unbind(1), prompts.answers[rows].unbind(1)):
                fed = torch.cat([asked, answer], dim=1)[:, :-1]
                likeliest = [side.step(cache, token, C + index) for index, token in enumerate(fed.unbind(1))]
                side.forget(cache, fed.shape[1])
                hits.append((torch.stack(likeliest[-answer.shape[1] :], dim=1) == answer).all(dim=1).float())
    return torch.cat(hits).mean().item()


@torch.no_grad()
def held_bytes(side: Side, ids: torch.Tensor) -> int:
    """Return the bytes that hold one prompt [1,C] after it was compressed."""
    cache = side.new(ids.shape[1])
    side.feed(cache, ids)
    return side.num_bytes(cache)


@torch.no_grad()
def prefill_ms(sides: Mapping[str, Side], ids: torch.Tensor, rounds: int) -> dict[str, float]:
    """Return the median CPU milliseconds of a prompt [1,C], all sides taking turns after a warm-up."""
    seen: dict[str, list[float]] = {label: [] for label in sides}
    for index in range(rounds + 1):
        for label, side in sides.items():
            cache = side.new(ids.shape[1])
            start = time.process_time()
            side.feed(cache, ids)
            if index > 0:
                seen[label].append(1e3 * (time.process_time() - start))
    return {label: statistics.median(values) for label, values in seen.items()}


def measure(
    sides: Mapping[str, Side], model: Any, groups: Sequence[Prompts], timed_tokens: list[int], rounds: int
) -> dict[str, Any]:
    """Return for every side its bytes, recall and prefill times by prompt length; "full" is transformers' own cache."""
    sides = {"full": Side(model), **sides}
    random = torch.Generator().manual_seed(0)
    found: dict[str, dict[str, Any]] = {
        label: {"bytes": held_bytes(side, groups[0].context[:1]), "recall": recall(side, groups), "prefill_ms": {}}
        for label, side in sides.items()
    }
    for length in timed_tokens:
        ids = torch.randint(0, model.config.vocab_size, (1, length), generator=random)
        for label, milliseconds in prefill_ms(sides, ids, rounds).items():
            found[label]["prefill_ms"][str(length)] = milliseconds
    return found
