"""Next tokens for a model without a language head: its embeddings stand in for one, and nothing is added to it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pikv_core.collectives import mean_count


def text_loss(model: Any, hidden_BTD: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the mean cross-entropy (nats) of each token after the first one that mask_BT marks as part of a text."""
    scored_BT = mask_BT[:, 1:]
    logits = next_logits(model, hidden_BTD[:, :-1][scored_BT])
    return F.cross_entropy(logits, ids_BT[:, 1:][scored_BT], reduction="sum") / mean_count(len(logits))


def next_logits(model: Any, hidden_ND: Tensor) -> Tensor:
    """Return the logits [N, V] of the next tokens in float32."""
    words_VD = model.get_input_embeddings().weight
    with torch.autocast(hidden_ND.device.type, enabled=hidden_ND.dtype == torch.bfloat16):
        return F.linear(hidden_ND, words_VD.to(hidden_ND.dtype)).float() * words_VD.shape[1] ** -0.5
