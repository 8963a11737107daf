"""Networks that tell which tokens later queries attend to, fitted to a frozen model for the policy `learned-scorer`.

What a token is wanted for is the largest attention that it gets from any query of its group: of the context read a
second time, as KVzip has it (arXiv 2505.23416), and of what follows the context.
Shapes: L layers, G key/value heads, N samples, C context tokens, F features, W width.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pikv_core.cache import PiKVCache
from pikv_core.cache.layer import CacheLayer
from pikv_core.data.source import Batch
from pikv_core.errors import PiKVError
from pikv_core.evaluation import samples
from pikv_core.model.steps import feed, look
from pikv_core.runs import Run
from pikv_core.scheduling.learned_scorer import expect, features
from pikv_core.schema import TokenScorerSettings
from pikv_core.training.held_tokens import held_tokens
from pikv_core.training.needles import Needles

AT_A_TIME = 4  # samples
FLOOR = 1e-3  # of attention: below it one token is as good as another
LEAST_SPREAD = 1e-6  # of a feature
EVALUATION_SEED = 20_262
SHARES = (0.5, 0.25, 0.12)  # budgets at which a fit is measured


@dataclass(frozen=True)
class Lessons:
    """Features [L,G,N,C,F] and the largest attention [L,G,N,C] of the tokens of contexts; sha256: of the token ids."""

    features: Tensor
    peaks: Tensor
    sha256: str
    num_tokens: int


@dataclass(frozen=True)
class Fitted:
    """networks: what `learned-scorer` goes by. loss: of the last steps."""

    networks: dict[str, Tensor]
    loss: float
    tokens_per_s: float


def most_samples(model: Any, settings: TokenScorerSettings) -> int:
    """Return how many samples the memory for them holds; at least 1."""
    text = model.config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_token = text.num_hidden_layers * heads * 2 * head_dim * 4
    return max(1, samples.MOST_BYTES // (per_token * settings.num_context))


def gather(model: Any, needles: Needles, settings: TokenScorerSettings, num: int, seed: int, split: str) -> Lessons:
    """Read `num` samples of a split and return what became of their contexts' tokens.

    Raises PiKVError where a number is not finite.
    """
    found: list[tuple[Tensor, Tensor]] = []
    read: list[Batch] = []
    for start in range(0, num, AT_A_TIME):
        rng = np.random.default_rng([seed, start])
        read.append(needles.batch(rng, min(AT_A_TIME, num - start), settings.length, split))
        found.append(_of_contexts(model, torch.from_numpy(read[-1].ids), settings.num_context))
    all_features, peaks = (torch.cat(parts, dim=2) for parts in zip(*found))
    if not bool(all_features.isfinite().all() and peaks.isfinite().all()):
        raise PiKVError("the model's keys, values or attention are not finite", hint="fit in --dtype float32")
    ids = torch.from_numpy(np.concatenate([batch.ids for batch in read]))
    return Lessons(all_features, peaks, samples.fingerprint(ids), ids.numel())


def learn(lessons: Lessons, settings: TokenScorerSettings, run: Run) -> Fitted:
    """Fit the networks of all layers and heads side by side: mean square error of the peaks' logarithms."""
    begun = time.perf_counter()
    generator = torch.Generator().manual_seed(run.recipe.seed)
    x, target = lessons.features.flatten(2, 3), (lessons.peaks.flatten(2) + FLOOR).log()
    L, G, num_tokens, F = x.shape
    W = settings.width
    spread = x.std(dim=2).clamp(min=LEAST_SPREAD)
    fixed = {"mean": x.mean(dim=2), "scale": 1 / spread, "level": target.mean(dim=2)}
    learned = {
        "into": torch.randn(L, G, F, W, generator=generator) * F**-0.5,
        "bias": torch.zeros(L, G, W),
        "out": torch.randn(L, G, W, generator=generator) * 0.1 * W**-0.5,
    }
    optimizer = torch.optim.Adam([weight.requires_grad_() for weight in learned.values()], lr=settings.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    recent = 0.0
    for step in range(1, settings.steps + 1):
        drawn = torch.randint(num_tokens, (settings.batch_tokens,), generator=generator)
        found = expect({**fixed, **learned}, x[:, :, drawn])
        loss = (found - target[:, :, drawn]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        recent += (loss.item() - recent) / min(step, settings.log_every)
        if step % settings.log_every == 0 or step == settings.steps:
            run.reporter.progress(f"fitting: step {step}, loss {recent:.4f}", step, settings.steps)
            run.telemetry.metrics(step, {"train/loss": recent})
    if not math.isfinite(recent):
        raise PiKVError(f"the loss is {recent}", hint="lower token_scorer.lr")
    seen = settings.steps * settings.batch_tokens
    networks = {**fixed, **{name: weight.detach() for name, weight in learned.items()}}
    return Fitted(networks, recent, seen / max(1e-9, time.perf_counter() - begun))


@torch.no_grad()
def measure(lessons: Lessons, networks: dict[str, Tensor], seed: int) -> dict[str, float]:
    """Return what share of the peaks the kept tokens hold, over the most that as many could: mean over heads.

    The same for tokens drawn at random. Heads that were not looked at (of a sliding window) do not count.
    """
    score = expect(networks, lessons.features.flatten(2, 3)).view(lessons.peaks.shape)
    drawn = torch.rand(score.shape, generator=torch.Generator().manual_seed(seed))
    counted = lessons.peaks.sum(dim=-1) > 0
    shares = {}
    for share in SHARES:
        num_kept = max(1, int(share * score.shape[-1]))
        most = lessons.peaks.topk(num_kept, dim=-1).values.sum(dim=-1)
        for name, by in (("kept", score), ("kept_by_chance", drawn)):
            kept = lessons.peaks.gather(-1, by.topk(num_kept, dim=-1).indices).sum(dim=-1)
            shares[f"{name}_{share}"] = float((kept / most)[counted].mean())
    return shares


@torch.no_grad()
def _of_contexts(model: Any, ids: Tensor, num_context: int) -> tuple[Tensor, Tensor]:
    """Return features [L,G,N,C,F] and peaks [L,G,N,C] of the first `num_context` tokens of ids [N,T]."""
    context, later = ids[:, :num_context], ids[:, num_context:]
    cache = PiKVCache.for_model(model, {"policy": "kvzip", "budget": num_context})
    cache.hold()
    feed(model, cache, context)
    for shown in (context, later):
        look(model, cache, shown)
    layers = [_seen(layer, num_context) for layer in cache.own_layers]
    all_features, peaks = (torch.stack([x.transpose(0, 1).cpu() for x in parts]) for parts in zip(*layers))
    return all_features, peaks


def _seen(layer: CacheLayer, num_context: int) -> tuple[Tensor, Tensor]:
    """Return features [N,G,C,F] and peaks [N,G,C] of what a held layer holds."""
    tokens = held_tokens(layer, num_context)
    return features(tokens), tokens.columns["peak"]
