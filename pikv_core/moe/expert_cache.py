"""Which experts a fast memory that holds some of them would have had: least recently used, one memory a sequence.

Letters: B sequences, S tokens of each, K choices of a token, N = S·K accesses in order, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def lru_hits(experts_BSK: Tensor, num_experts: int, capacity: int, mask_BS: Tensor | None = None) -> Tensor:
    """Return bool [B, S, K]: the choices whose expert was among the last `capacity` different ones used before.

    A sequence begins with an empty memory, and a token's choices are accesses one after the other. mask_BS is True for
    real tokens; the others access nothing.
    """
    accesses_BN = experts_BSK.flatten(1)
    places_N = torch.arange(1, accesses_BN.shape[1] + 1, device=accesses_BN.device)
    used_BNE = F.one_hot(accesses_BN, num_experts) * places_N[:, None]
    if mask_BS is not None:
        used_BNE = used_BNE * mask_BS.repeat_interleave(experts_BSK.shape[2], 1)[..., None]
    last_BNE = used_BNE.cummax(1).values.roll(1, 1)  # the place of each expert's last access before this one, or 0
    last_BNE[:, 0] = 0
    own_BN1 = last_BNE.gather(2, accesses_BN[..., None])
    num_newer_BN = (last_BNE > own_BN1).sum(2)
    hits_BN = (own_BN1[..., 0] > 0) & (num_newer_BN < capacity)
    hits_BSK = hits_BN.view_as(experts_BSK)
    return hits_BSK if mask_BS is None else hits_BSK & mask_BS[..., None]
