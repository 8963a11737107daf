"""The attention entry "pikv": models hand queries to it, and it hands them to the cache's layer.

`Cache.update` returns the layer itself in place of keys and values; transformers passes it on unchanged. Without a
PiKV cache the entry is transformers' own SDPA, mask included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pikv_core.cache.backend import OTHER_BACKEND
from pikv_core.cache.layer import CacheLayer
from pikv_core.errors import PiKVError
from pikv_kernels.backends import BackendError, backend_report

ENTRY = "pikv"


class DeferredMask:
    """Stand for a mask that a CacheLayer does not need: it masks by its own positions, padding apart."""

    def __init__(self, padding: torch.Tensor | None, build: Callable[[], torch.Tensor | None]):
        self._padding = padding
        self._newest: tuple[int, torch.Tensor | None] | None = None
        self.build = build

    def is_token(self, num_new: int) -> torch.Tensor | None:
        """Return bool [B,T] for the newest T tokens, None where none of them is padding."""
        if self._newest is None or self._newest[0] != num_new:
            newest = None if self._padding is None else self._padding[:, -num_new:].bool()
            self._newest = (num_new, None if newest is None or bool(newest.all()) else newest)
        return self._newest[1]


def deferred_mask(**arguments: Any) -> DeferredMask:
    """Take the place of `sdpa_mask`, which is built only if a stock cache asks for it."""
    return DeferredMask(arguments.get("attention_mask"), lambda: sdpa_mask(**arguments))


def pikv_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend query [B,H,T,D] through the layer given as `key`; return output [B,T,H,D]."""
    if not isinstance(key, CacheLayer):
        if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
            raise PiKVError(
                "SDPA knows neither soft caps nor attention sinks, which this model has",
                hint="generate through a PiKVCache, or call model.set_attn_implementation('eager') for other caches",
            )
        mask = attention_mask.build() if isinstance(attention_mask, DeferredMask) else attention_mask
        stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return stock(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    if attention_mask is not None and not isinstance(attention_mask, DeferredMask):
        raise PiKVError("a 4-D attention mask cannot follow evictions", hint="give a mask [B, T] of ones and zeros")
    is_token = None if attention_mask is None else attention_mask.is_token(query.shape[2])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    try:
        output = key.attend(query, scale, is_token, kwargs.get("softcap"), kwargs.get("s_aux"))
    except BackendError as error:
        raise PiKVError(str(error), hint=OTHER_BACKEND) from error
    return output.transpose(1, 2).contiguous(), None


def claim_entry() -> None:
    """Put the entry itself where models look for it: kvpress wraps every function that it finds on its import."""
    ALL_ATTENTION_FUNCTIONS[ENTRY] = pikv_attention


def chosen_kernels() -> dict[str, str]:
    """Return which implementation of each operation has run so far in this process, and why."""
    ran: dict[str, list[str]] = {}
    for op, device, dtype, backend, reason in backend_report():
        ran.setdefault(op, []).append(f"{backend} for {dtype} on {device}: {reason}")
    return {op: "; ".join(choices) for op, choices in ran.items()}


AttentionInterface.register(ENTRY, pikv_attention)
AttentionMaskInterface.register(ENTRY, deferred_mask)
