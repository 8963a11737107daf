"""KeyDiff: the tokens whose keys are unlike the others' (arXiv 2504.15364)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Evictor, Tokens

if TYPE_CHECKING:
    import torch


@POLICIES.register("keydiff")
@dataclass(frozen=True)
class KeyDiff(Evictor):
    """Keep the keys with the least cosine to their head's anchor: the mean of its stored keys, each normalised."""

    is_static: ClassVar[bool] = True
    heads_apart: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("keys",)

    def score(self, tokens: Tokens) -> torch.Tensor:
        from torch.nn import functional

        direction = functional.normalize(tokens.keys().float(), dim=-1)
        is_token = (tokens.position >= 0)[..., None]
        anchor = direction.masked_fill(~is_token, 0.0).sum(dim=2, keepdim=True)  # its length does not matter
        return -(direction * functional.normalize(anchor, dim=-1)).sum(dim=-1)
