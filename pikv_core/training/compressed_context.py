"""Attention in which what follows a context sees of it only what a PiKVCache keeps, so that a model learns to live so.

The cache is the real one, with its policy, budget, allocation and codec: the forward pass reads what it holds, and
gradients go straight through to the keys and values it was made of. The choice of tokens has none, so for policies that
go by attention `selection_loss` brings what they observe near to what is read later. The context itself is read whole,
as a prompt is. Shapes: B batch, H query heads, G key/value heads, C tokens of context, T tokens in all,
N = T − C later ones, S slots of the cache, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pikv_core.cache import PiKVCache
from pikv_core.cache.support import windows
from pikv_core.errors import PiKVError
from pikv_core.model.steps import prefill
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Selector
from pikv_core.schema import CacheRecipe

ENTRY = "pikv-compressed-context"
MOST_OBSERVED = 128  # queries, spread evenly over those that a policy observes: their mean is what is learned


@dataclass(frozen=True)
class ContextStatistics:
    """What the cache holds of the newest context. kept_share: of its tokens, mean over rows, layers and heads."""

    resident_bytes: int
    full_bytes: int
    kept_share: float


class CompressedContext:
    """Attend as transformers asks for; `read` names the context of the next pass, without it every token is seen."""

    def __init__(self, model: Any, recipe: CacheRecipe):
        self._model, self._cache = model, _Cache.for_model(model, recipe)
        # Such a cache drops nothing before all layers are through, when the pass that learns is over.
        self._needs_own_pass = self._cache.looks is not None or self._cache.compares_layers
        self._num_context = 0
        self._selection_losses: list[Tensor] = []

    def read(self, context_BC: Tensor) -> None:
        """Let the next pass, whose ids begin with these, see after them only what the cache keeps of them."""
        self._cache.reset()
        self._num_context = context_BC.shape[1]
        self._selection_losses = []
        if self._needs_own_pass:
            self._prefill(context_BC)

    @property
    def selection_loss(self) -> Tensor:
        """How far the attention that the policy observes is from what later tokens read, over the newest context.

        KL divergence, mean over rows, heads and layers; what they would read if all were there, without a gradient. 0
        for policies that do not go by the context's attention.
        """
        found = self._selection_losses
        return torch.stack(found).mean() if found else torch.zeros((), device=self._model.device)

    @property
    def statistics(self) -> ContextStatistics:
        """What the cache holds, once a pass has gone through it."""
        held = [(position_BGS >= 0).sum() for position_BGS in self._cache.positions]
        layer = self._cache.own_layers[0]
        rows, heads, _ = layer.dimensions
        total = rows * heads * layer.seen_length * len(held)
        return ContextStatistics(self._cache.resident_bytes, self._cache.full_bytes, int(sum(held)) / total)

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Return output [B,T,H,D] of query [B,H,T,D] over key and value [B,G,T,D], all of the same tokens."""
        if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
            raise PiKVError(
                "a compressed context cannot be learned with attention of soft caps or sinks, which this model has",
                hint="choose a model such as llama, qwen3, mixtral, qwen3_moe or pikv",
            )
        assert attention_mask is None and query.shape[2] == key.shape[2] > self._num_context
        query, key, value = _in_one_dtype(query, key, value)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        C, layer = self._num_context or query.shape[2], module.layer_idx
        output_BHTD = _attend(query[:, :, :C], key[:, :, :C], value[:, :, :C], None, scale, dropout)
        if self._num_context:
            if not self._needs_own_pass:
                self._compress(layer, query, key, value, scale)
            if torch.is_grad_enabled() and self._num_observed:
                self._selection_losses.append(_surprise(query, key[:, :, :C], self._num_observed, scale))
            later_BHND = _attend(query[:, :, C:], *self._seen_later(layer, key, value), scale, dropout)
            output_BHTD = torch.cat([output_BHTD, later_BHND], dim=2)
            if layer == len(self._cache.layers) - 1:
                self._num_context = 0
        return output_BHTD.transpose(1, 2), None

    @property
    def _num_observed(self) -> int:
        """How many of the context's newest queries the policy goes by, where it drops anything."""
        evictor = self._cache.own_layers[0].evictor
        return 0 if evictor is None or evictor.looks is not None else evictor.observes

    @torch.no_grad()
    def _prefill(self, context_BC: Tensor) -> None:
        """Fill the cache by a pass of its own, in evaluation mode."""
        was_training = self._model.training
        self._model.eval()
        self._cache.attach(self._model)
        try:
            prefill(self._model, self._cache, context_BC)
        finally:
            self._model.train(was_training)
            self._model.set_attn_implementation(ENTRY)

    @torch.no_grad()
    def _compress(self, layer: int, query_BHTD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, scale: float) -> None:
        """Let a layer of the cache take the context as a prompt, observe its attention, drop and encode."""
        own, C = self._cache.own_layers[layer], self._num_context
        with torch.autocast(query_BHTD.device.type, enabled=False):
            own.update(key_BGTD[:, :, :C], value_BGTD[:, :, :C])
            own.attend(query_BHTD[:, :, :C], scale)

    def _seen_later(self, layer: int, key_BGTD: Tensor, value_BGTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys and values [B,G,S+N,D] of what is held and of the later tokens, and who sees what [B,G,N,S+N]."""
        C, N = self._num_context, key_BGTD.shape[2] - self._num_context
        held_key, held_value, position_BGS = self._cache.retrieve(layer)
        source = position_BGS.clamp(min=0).long()[..., None].expand(held_key.shape)
        key = torch.cat([_StraightThrough.apply(key_BGTD.gather(2, source), held_key), key_BGTD[:, :, C:]], dim=2)
        value = torch.cat([_StraightThrough.apply(value_BGTD.gather(2, source), held_value), value_BGTD[:, :, C:]], 2)
        is_held = (position_BGS >= 0)[:, :, None].expand(-1, -1, N, -1)
        causal = is_held.new_ones(N, N).tril().expand(*is_held.shape[:3], N)
        return key, value, torch.cat([is_held, causal], dim=-1)


@contextmanager
def compressed_attention(model: Any, recipe: CacheRecipe) -> Iterator[CompressedContext]:
    """Let `model` attend through the yielded object; afterwards it attends as before.

    Raises PiKVError where what follows a context would not see what the cache holds, and only that.
    """
    _check(model, recipe)
    before = model.config._attn_implementation
    try:
        ALL_ATTENTION_FUNCTIONS[ENTRY] = context = CompressedContext(model, recipe)
        model.set_attn_implementation(ENTRY)
        yield context
    finally:
        model.set_attn_implementation(before)
        ALL_ATTENTION_FUNCTIONS.pop(ENTRY, None)


def _check(model: Any, recipe: CacheRecipe) -> None:
    """Raise PiKVError for models and recipes with which what is held is not what is read."""
    policy = POLICIES[recipe.policy.name]
    if issubclass(policy, Selector):
        raise PiKVError(
            f"policy '{policy.name}' drops nothing and chooses anew for every query, so no context is compressed",
            hint="choose a policy that drops tokens, or a codec alone",
        )
    if getattr(policy, "looks", None) == "future":
        raise PiKVError(
            f"policy '{policy.name}' scores by tokens that are yet to come, which no model can learn to live with",
            hint="choose another policy",
        )
    if recipe.rerotate:
        raise PiKVError("with rerotate, keys are not read as they are held", hint="leave out rerotate")
    if any(window is not None for window in windows(model.config)):
        raise PiKVError(
            "a compressed context cannot be learned by layers with a sliding window, which this model has",
            hint="choose a model with full attention, such as llama, qwen3, mixtral, qwen3_moe or pikv",
        )
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise PiKVError(
            "with gradient checkpointing each layer would compress the context twice",
            hint="call model.gradient_checkpointing_disable()",
        )


class _Cache(PiKVCache):
    """Hold keys and values in the type that attention computes in, which rotations leave under autocast."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        key, value = _in_one_dtype(key_states, value_states)
        return super().update(key, value, layer_idx, *args, **kwargs)


class _StraightThrough(torch.autograd.Function):
    """What is held forwards, with the gradient of what it was made of."""

    @staticmethod
    def forward(ctx: Any, made: Tensor, held: Tensor) -> Tensor:
        return held.to(made.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _surprise(query_BHTD: Tensor, key_BGCD: Tensor, num_observed: int, scale: float) -> Tensor:
    """Return the KL divergence of what the newest of C queries attend to from what those after them do, both means."""
    C = key_BGCD.shape[2]
    first = max(0, C - num_observed)
    observed_N = torch.linspace(first, C - 1, min(C - first, MOST_OBSERVED), device=query_BHTD.device).long()
    ahead_NC = torch.arange(C, device=query_BHTD.device) > observed_N[:, None]
    log_found_BGC = _mean_attention(query_BHTD[:, :, observed_N], key_BGCD, ahead_NC, scale).clamp(min=1e-9).log()
    with torch.no_grad():
        wanted_BGC = _mean_attention(query_BHTD[:, :, C:], key_BGCD, ahead_NC.new_zeros(()), scale)
    return F.kl_div(log_found_BGC, wanted_BGC, reduction="none").sum(-1).mean()


def _mean_attention(query_BHND: Tensor, key_BGCD: Tensor, hidden_NC: Tensor, scale: float) -> Tensor:
    """Return float32 [B,G,C]: attention over the keys, mean over queries and a group's heads."""
    query_BGRND = query_BHND.unflatten(1, (key_BGCD.shape[1], -1))
    logits = (query_BGRND @ key_BGCD[:, :, None].mT).float() * scale
    return logits.masked_fill(hidden_NC, -torch.inf).softmax(-1).mean((2, 3))


def _in_one_dtype(*tensors: Tensor) -> list[Tensor]:
    """Return them in the type of autocast; without it, in that of the last."""
    device = tensors[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensors[-1].dtype
    return [x.to(dtype) for x in tensors]


def _attend(
    query_BHND: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, visible: Tensor | None, scale: float, dropout: float
) -> Tensor:
    """Return [B,H,N,D]; visible [B,G,N,S], None where every token sees itself and those before."""
    repeats = query_BHND.shape[1] // key_BGSD.shape[1]
    key, value = (x.repeat_interleave(repeats, 1) for x in (key_BGSD, value_BGSD))
    mask = None if visible is None else visible.repeat_interleave(repeats, 1)
    return F.scaled_dot_product_attention(
        query_BHND, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale
    )
