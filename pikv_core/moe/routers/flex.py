"""Routing of Flex-MoE (2410.08245): any combination of modalities, each missing one with an expert of its own.

A combination is a number whose bit m says that modality m is missing: 0 where all are observed, at most 2^M − 2.
Letters: T tokens, M modalities, E experts, D hidden size.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pikv_core.collectives import mean_count
from pikv_core.errors import UsageError
from pikv_core.moe.router import Router
from pikv_core.moe.routers import ROUTERS
from pikv_core.moe.routing import Routing


@ROUTERS.register("flex")
class FlexRouter(Router):
    """Send each token to its K most probable experts, and teach an expert to come first for each combination.

    Tokens with all modalities are routed generally, as by `base`. The loss "combination", the mean cross-entropy
    between the logits of the others and the expert of their combination, number c mod E, makes that expert their
    first choice. One matrix serves both, as in the paper's code.
    """

    told: ClassVar[str | None] = "modality_info"

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int = 2, combination_weight: float = 1.0, **options: Any
    ):
        super().__init__(hidden_size, num_experts, top_k, **options)
        self.loss_weights["combination"] = combination_weight

    def forward(self, x: Tensor, modality_info: Tensor | None = None, mask: Tensor | None = None) -> Routing:  # type: ignore[override]
        """Route x [..., D]; modality_info [...] int: each token's combination; mask [...] as of every router.

        Without modality_info all modalities are taken as observed.
        """
        mask_T = None if mask is None else mask.reshape(-1)
        info_T = None if modality_info is None else modality_info.reshape(-1)
        return self.route(x.reshape(-1, x.shape[-1]), mask_T, info_T)

    @property
    def top_k_weights(self) -> str | None:
        return "renormalised"

    def losses(
        self, logits_TE: Tensor, probs_TE: Tensor, expert_tokens: Tensor, mask_T: Tensor | None, info_T: Tensor | None
    ) -> dict[str, Tensor]:
        losses = super().losses(logits_TE, probs_TE, expert_tokens, mask_T, info_T)
        losses["combination"] = logits_TE.new_zeros(())
        if info_T is not None:
            special_T = info_T != 0 if mask_T is None else (info_T != 0) & mask_T
            entropy_T = F.cross_entropy(logits_TE, info_T.long() % self.num_experts, reduction="none")
            losses["combination"] = (entropy_T * special_T).sum() / mean_count(special_T.sum())
        return losses


class ModalityBank(nn.Module):
    """Learned embeddings [2^M − 1, M, D] that stand in for missing modalities, by what else was observed."""

    def __init__(self, num_modalities: int, hidden_size: int):
        super().__init__()
        if num_modalities < 1:
            raise UsageError(f"num_modalities: expected a whole number of at least 1, got {num_modalities}")
        self.embeddings = nn.Parameter(torch.randn(2**num_modalities - 1, num_modalities, hidden_size))

    def forward(self, x: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
        """Return x [..., M, D] with the missing modalities filled, and the combinations [...], the modality_info.

        observed: bool [..., M]. What x holds for missing modalities, NaN too, is read by none. Raises UsageError
        where nothing is observed.
        """
        combinations = combination_of(observed)
        filled = self.embeddings.to(x.dtype)[combinations]
        return torch.where(observed[..., None], x, filled), combinations


def combination_of(observed: Tensor) -> Tensor:
    """Return int64 [...]: the number of each combination of observed modalities, bool [..., M]."""
    if not bool(observed.any(-1).all()):
        raise UsageError("an item has no observed modality", hint="leave such items out")
    return (~observed << torch.arange(observed.shape[-1], device=observed.device)).sum(-1)
