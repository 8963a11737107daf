"""The queries of a prompt, made once more of an attention module's input.

Shapes: B batch, H query heads, T tokens, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch

from pikv_core.cache.rotary import Rotary
from pikv_core.errors import UsageError


def prompt_queries(
    module: Any, hidden_states: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], rotary: Rotary | None
) -> torch.Tensor:
    """Return the queries [B,H,T,D] as attention uses them.

    hidden_states: [B,T,hidden]. angles: cosines and sines of these tokens. Raises UsageError for a model whose queries
    or attention are computed another way.
    """
    D = module.head_dim
    norm = getattr(module, "q_norm", None)
    other = _another_way(module, norm, rotary)
    if other:
        raise UsageError(
            f"model type '{module.config.model_type}' {other}, so its attention cannot be told from a press",
            hint="use PiKVCache, or a press that goes by keys alone, such as KeyDiffPress",
        )
    assert rotary is not None
    if hasattr(module, "q_proj"):
        query = module.q_proj(hidden_states)
    else:
        query = module.qkv_proj(hidden_states)[..., : module.config.num_attention_heads * D]
    query = query.unflatten(-1, (-1, D)).transpose(1, 2)
    query = query if norm is None else norm(query)
    return rotary.apply(query, query[:, :0], *angles)[0]


def _another_way(module: Any, norm: Any, rotary: Rotary | None) -> str | None:
    """Return what is special about a model's attention, None where it is a softmax over plain rotated queries."""
    if rotary is None or rotary.is_conditional:
        return "does not rotate the queries of every layer"
    if not (hasattr(module, "q_proj") or hasattr(module, "qkv_proj")):
        return "has no projection that makes its queries alone"
    if hasattr(norm, "weight") and norm.weight.numel() != module.head_dim:
        return "normalises the queries of all heads together"
    if getattr(module, "sinks", None) is not None:
        return "has attention sinks"
    if getattr(module.config, "attn_logit_softcapping", None) is not None:
        return "caps its logits"
    return None
