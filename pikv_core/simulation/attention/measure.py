"""What a decode step's reads are worth, by the attention that the model itself had.

Shapes: N steps, L layers, G key/value heads, R query heads of a group, P tokens seen.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Measures:
    """By step, layer and key/value head [N,L,G].

    A token's share is the mean over a group's query heads of its part of the recorded mass. attention_recall: the
    shares of what is read; oracle_recall: of as many tokens with the largest, which no choice exceeds.
    top_token_hit_ratio: of the tokens with the largest shares, how many are read. read_tokens and pages_read: at the
    step, its own token included. resident_tokens: stored after it.
    """

    attention_recall: NDArray[np.float64]
    oracle_recall: NDArray[np.float64]
    top_token_hit_ratio: NDArray[np.float64]
    resident_tokens: NDArray[np.float64]
    read_tokens: NDArray[np.float64]
    pages_read: NDArray[np.float64]

    @classmethod
    def empty(cls, num_steps: int, num_layers: int, num_kv_heads: int) -> Measures:
        return cls(*(np.full((num_steps, num_layers, num_kv_heads), np.nan) for _ in fields(cls)))

    def note(
        self,
        step: int,
        layer: int,
        row: NDArray[np.float32],
        read: NDArray[np.integer],
        resident: NDArray[np.integer],
        top_tokens: int,
        page_tokens: int,
    ) -> None:
        """Measure one step of one layer; row: [G,R,P] as recorded; read, resident: positions [G,·], -1 for none."""
        G, _, P = row.shape
        whole = row.sum(axis=2, dtype=np.float64)
        share = (row / np.maximum(whole, np.finfo(np.float64).tiny)[..., None]).mean(axis=1)
        is_read = np.zeros((G, P + 1), bool)  # the last takes what empty slots hold
        is_read[np.arange(G)[:, None], read] = True
        is_read = is_read[:, :P]
        num_read = is_read.sum(axis=1)
        falling = np.sort(share, axis=1)[:, ::-1]  # numbers alone sort many times as fast as their places
        is_best = np.arange(P) < num_read[:, None]
        is_top = _first_largest(share, falling[:, [min(top_tokens, P) - 1]], top_tokens) & (share > 0)
        at = step, layer
        self.attention_recall[at] = (share * is_read).sum(axis=1)
        self.oracle_recall[at] = (falling * is_best).sum(axis=1)
        self.top_token_hit_ratio[at] = (is_read & is_top).sum(axis=1) / np.maximum(1, is_top.sum(axis=1))
        self.read_tokens[at] = num_read
        self.resident_tokens[at] = (resident >= 0).sum(axis=1)
        padded = np.zeros((G, -(-P // page_tokens) * page_tokens), bool)
        padded[:, :P] = is_read
        self.pages_read[at] = padded.reshape(G, -1, page_tokens).any(axis=2).sum(axis=1)


def _first_largest(share: NDArray[np.float64], least: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    """Mark the `count` largest of each row [G,P]; of those that equal the `least` [G,1] of them, the first ones."""
    above, equal = share > least, share == least
    return above | (equal & (equal.cumsum(axis=1) <= count - above.sum(axis=1, keepdims=True)))
