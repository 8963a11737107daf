"""How many tokens each row's sequence has had: on the host, and where the keys are.

Shapes: B batch, T new tokens.
"""

from __future__ import annotations

import torch

from pikv_core.cache.store import EMPTY


class Seen:
    """Count tokens; the counter beside the keys is advanced in place, so that a step finds it where it was.

    here: int64 [B] on the keys' device.
    """

    def __init__(self, batch: int, device: torch.device):
        self._host = torch.zeros(batch, dtype=torch.int64)
        self._ahead = 0  # tokens of every row that are not in `_host` yet
        self.here = torch.zeros(batch, dtype=torch.int64, device=device)

    @property
    def host(self) -> torch.Tensor:
        """The counts [B] on the CPU."""
        if self._ahead:
            self._host, self._ahead = self._host + self._ahead, 0
        return self._host

    def set(self, counts: torch.Tensor) -> None:
        """Start from counts [B] on the CPU."""
        self._host, self._ahead, self.here = counts, 0, counts.to(self.here.device, copy=True)

    def advance(self, num_tokens: int, is_token: torch.Tensor | None) -> torch.Tensor:
        """Count new tokens, of which `is_token` [B,T] is False for padding; return their positions [B,T]."""
        if is_token is not None:
            position = (self.here[:, None] + is_token.cumsum(1) - 1).masked_fill(~is_token, EMPTY)
            self.set(self.host + is_token.sum(1).cpu())
            return position
        first = self.here[:, None].clone()
        self.here.add_(num_tokens)
        self.skip(num_tokens)
        return first if num_tokens == 1 else first + torch.arange(num_tokens, device=first.device)

    def skip(self, num_tokens: int) -> None:
        """Count tokens of every row on the host alone: the counter beside the keys has been advanced."""
        self._ahead += num_tokens
