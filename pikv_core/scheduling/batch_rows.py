"""Find the batch rows that stored tokens belong to, for policies that remember something per row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pikv_core.errors import PiKVError
from pikv_core.scheduling.base import Tokens

if TYPE_CHECKING:
    import torch


def batch_rows(tokens: Tokens, num_rows: int) -> torch.Tensor:
    """Return the row [B,1] of a batch of `num_rows` for each of the tokens' rows.

    Raises PiKVError where a batch has been parted by heads that hold unequally many tokens.
    """
    import torch

    held = tokens.position.shape
    device = tokens.position.device
    if held[:2] == (num_rows, tokens.layer.num_kv_heads):
        return torch.arange(num_rows, device=device)[:, None]
    if num_rows > 1:
        raise PiKVError(
            "this policy cannot score another prompt in a batch whose heads hold unequally many tokens",
            hint="run one sequence at a time, or with the allocation 'uniform'",
        )
    return torch.zeros(held[0], 1, dtype=torch.long, device=device)
