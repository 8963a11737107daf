"""Attention in which each key/value head mixes what it sees of all tokens with what it sees of a few.

DuoAttention's training form (arXiv 2410.10819): gate·full + (1 − gate)·streaming, streaming being the first tokens
and the newest. Shapes: B batch, H query heads, G key/value heads, L layers, T tokens, S visible tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pikv_core.cache.support import windows
from pikv_core.errors import PiKVError

ENTRY = "pikv-gated"
QUERIES_AT_A_TIME = 256


class GatedAttention:
    """Attend as transformers asks for; `gates` [L,G] are set between two passes, None lets every head see everything.

    Layers with a sliding window keep it, whatever their gates.
    """

    def __init__(self, per_layer: list[int | None], sinks: int, recent: int):
        self._windows = per_layer
        self._sinks, self._recent = sinks, recent
        self.gates: Tensor | None = None

    @property
    def has_gate(self) -> list[bool]:
        """Whether each layer's heads are gated."""
        return [window is None for window in self._windows]

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Return output [B,T,H,D] of query [B,H,T,D] over key and value [B,G,T,D], all of the same tokens."""
        if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
            raise PiKVError(
                "gates cannot be learned through attention with soft caps or sinks of its own, which this model has",
                hint="choose a model such as llama, qwen3, mistral, mixtral, qwen3_moe or pikv",
            )
        assert attention_mask is None and query.shape[2] == key.shape[2]
        window = self._windows[module.layer_idx]
        if window is not None:
            return _streaming(query, key, value, scaling, 0, window).transpose(1, 2), None
        full_BTHD, _ = sdpa_attention_forward(module, query, key, value, None, scaling=scaling)
        if self.gates is None:
            return full_BTHD, None
        gate_G = self.gates[module.layer_idx].to(query.device)
        gate_H1 = gate_G.repeat_interleave(query.shape[1] // key.shape[1])[:, None]
        streaming_BTHD = _streaming(query, key, value, scaling, self._sinks, self._recent).transpose(1, 2)
        return torch.lerp(streaming_BTHD, full_BTHD, gate_H1.to(full_BTHD.dtype)), None


@contextmanager
def gated_attention(model: Any, sinks: int, recent: int) -> Iterator[GatedAttention]:
    """Let `model` attend through the yielded object; afterwards it attends as before."""
    before = model.config._attn_implementation
    attention = GatedAttention(windows(model.config), sinks, recent)
    ALL_ATTENTION_FUNCTIONS[ENTRY] = attention
    try:
        model.set_attn_implementation(ENTRY)
        yield attention
    finally:
        model.set_attn_implementation(before)
        del ALL_ATTENTION_FUNCTIONS[ENTRY]


def _streaming(
    query_BHTD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, scale: float | None, sinks: int, recent: int
) -> Tensor:
    """Return [B,H,T,D]: the token at t sees those at s <= t with s < sinks or t − s < recent."""
    num_tokens, repeats = query_BHTD.shape[2], query_BHTD.shape[1] // key_BGTD.shape[1]
    place_T = torch.arange(num_tokens, device=query_BHTD.device)
    parts = []
    for start in range(0, num_tokens, QUERIES_AT_A_TIME):
        end = min(start + QUERIES_AT_A_TIME, num_tokens)
        place_S = torch.cat([place_T[: min(sinks, end)], place_T[max(sinks, start - recent + 1) : end]])
        age_TS = place_T[start:end, None] - place_S
        mask_TS = (age_TS >= 0) & ((place_S < sinks) | (age_TS < recent))
        key_BHSD, value_BHSD = (x[:, :, place_S].repeat_interleave(repeats, 1) for x in (key_BGTD, value_BGTD))
        query = query_BHTD[:, :, start:end]
        parts.append(F.scaled_dot_product_attention(query, key_BHSD, value_BHSD, attn_mask=mask_TS, scale=scale))
    return torch.cat(parts, 2)
