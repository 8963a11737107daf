"""How far two choices of kept tokens agree, with what differs told apart into ties and the rest.

Shapes: N prompts, G key/value heads, K kept tokens, C context tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np

TIE = 1e-6  # relative distance from the last kept score below which a choice is a tie


@dataclass(frozen=True)
class Agreement:
    """Kept tokens over all prompts, layers and heads, and how many of them both sides keep.

    num_ties: tokens of theirs that ours left out for others, all of them within TIE of the last kept score.
    largest_gap: the largest relative distance from that score among tokens that only one side keeps.
    num_unequal_heads: heads where the sides keep different numbers of tokens.
    """

    num_kept: int
    num_shared: int
    num_ties: int
    num_unequal_heads: int
    largest_gap: float

    @property
    def share(self) -> float:
        """The share of their kept tokens that ours keeps too, ties counted as kept."""
        return (self.num_shared + self.num_ties) / self.num_kept

    @property
    def num_other(self) -> int:
        """Tokens of theirs that ours dropped and no tie explains."""
        return self.num_kept - self.num_shared - self.num_ties

    def summary(self) -> dict[str, float]:
        """Return the counts and what follows from them, as JSON values."""
        return asdict(self) | {"share": self.share, "num_other": self.num_other}


def compare(heads: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Agreement:
    """Compare head by head: (their kept positions [K], ours [K'], their scores [C], higher = keep)."""
    num_kept = num_shared = num_ties = num_unequal = 0
    largest = 0.0
    for theirs, ours, score in heads:
        only_theirs, only_ours = np.setdiff1d(theirs, ours), np.setdiff1d(ours, theirs)
        last = score[theirs].min().astype(np.float64)
        gaps = np.abs(score[np.concatenate([only_theirs, only_ours])] - last) / max(
            abs(last), np.finfo(np.float32).tiny
        )
        largest = max(largest, float(gaps.max(initial=0.0)))
        num_kept += len(theirs)
        num_shared += len(theirs) - len(only_theirs)
        num_unequal += len(theirs) != len(ours)
        if len(theirs) == len(ours):
            tied = gaps <= TIE
            num_ties += min(int(tied[: len(only_theirs)].sum()), int(tied[len(only_theirs) :].sum()))
    return Agreement(num_kept, num_shared, num_ties, num_unequal, largest)
