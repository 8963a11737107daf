"""How far the queries of a prompt see, head by head, where a policy limits it.

Shapes: B rows, H query heads, G key/value heads, T new tokens, S stored slots, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from pikv_kernels.streaming_attention import streaming_attention


class Reach(NamedTuple):
    """Per head [B,G]: how many first tokens of the sequence a query sees, and how many newest, itself included."""

    sinks: torch.Tensor
    recent: torch.Tensor

    def of(self, part: Callable[[torch.Tensor], torch.Tensor]) -> Reach:
        """Return the reach of a part of the heads, which `part` takes from a tensor [B,G]."""
        return Reach(part(self.sinks), part(self.recent))

    def visible(self, position: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        """Return bool [B,G,T,S]: what queries at `position` [B,T] see of slots at `held` [B,1|G,S], the future too."""
        sinks, recent = (x.to(held.device)[..., None, None] for x in self)
        ahead = position[:, None, :, None] - held[:, :, None]
        return (held[:, :, None] < sinks) | (ahead < recent)

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
        """Attend query [B,H,T,D] over the same T tokens' keys and values [B,G,T,D], rows without padding."""
        output = torch.empty_like(query)
        G, T = keys.shape[1:3]
        by_group = output.view(len(query), G, -1, *query.shape[2:])
        sizes = [tuple(size) for size in torch.stack([self.sinks[0], self.recent[0].clamp(max=T)], dim=-1).tolist()]
        for size in sorted({*sizes}):
            heads = torch.tensor([head for head, own in enumerate(sizes) if own == size], device=query.device)
            own = query.unflatten(1, (G, -1)).index_select(1, heads).flatten(1, 2)
            attended = streaming_attention(
                own, keys.index_select(1, heads), values.index_select(1, heads), scale, *size
            )
            by_group.index_copy_(1, heads, attended.unflatten(1, (len(heads), -1)))
        return output
