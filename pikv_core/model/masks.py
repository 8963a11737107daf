"""The causal mask for the attention in use, under every supported transformers release."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

_TAKES_CACHE_POSITION = "cache_position" in inspect.signature(create_causal_mask).parameters


def causal_mask(
    config: Any, embeddings: Tensor, attention_mask: Tensor | None, cache: Any, position_ids: Tensor
) -> Any:
    """Return what the attention implementation of `config` wants as its mask; embeddings: [B, T, D].

    Releases before 5.4 ask for the places of the new tokens, later ones read them off the cache.
    """
    more: dict[str, Any] = {}
    if _TAKES_CACHE_POSITION:
        seen = cache.get_seq_length() if cache is not None else 0
        more["cache_position"] = torch.arange(embeddings.shape[1], device=embeddings.device) + seen
    return create_causal_mask(
        config=config,
        inputs_embeds=embeddings,
        attention_mask=attention_mask,
        past_key_values=cache,
        position_ids=position_ids,
        **more,
    )
