"""The work of a prompt of which a part is cached: 2 P (L - p) for the weights and A (L² - p²) for attention.

P: weights per token; A: layers x heads x (query and value dims), that is 2 x layers x heads x head_dim where both are
the same: each token attends to those before it. A prompt that is cached whole costs nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pikv_core.simulation.cost.hardware import Hardware
from pikv_core.simulation.cost.kv_model import KvModel


def prefill_flops(model: KvModel, tokens: Any, cached_tokens: Any) -> NDArray[np.float64]:
    """Return the FLOPs of prompts of `tokens` of which the first `cached_tokens` are cached; [R] or numbers."""
    whole, cached = np.asarray(tokens, np.float64), np.asarray(cached_tokens, np.float64)
    flops: NDArray[np.float64] = (whole - cached) * (
        2.0 * model.num_active_params + model.attention_flops * (whole + cached)
    )
    return flops


def compute_s(model: KvModel, hardware: Hardware, tokens: Any, cached_tokens: Any) -> NDArray[np.float64]:
    """Return the seconds that prefill takes on one server; [R] or numbers."""
    return prefill_flops(model, tokens, cached_tokens) / hardware.flops_per_s
