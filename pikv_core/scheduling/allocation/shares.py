"""Whole numbers of tokens from what each part would like to have.

Shapes: B batch, N parts (layers or heads).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def share_out(wish: torch.Tensor, total: torch.Tensor, least: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
    """Return whole numbers [B,N] from `least` to `most` whose sum is `total` [B], in proportion to `wish`.

    wish: [B,N] float64; where it already adds up it is only rounded, to the nearest, halves to the even one. least,
    most: whole numbers [B,1|N], which have to leave room for `total`.
    """
    least, most = (x.double().expand_as(wish) for x in (least, most))
    exact = wish.clamp(least, most)
    missing = (exact.sum(dim=1) - total).abs() > 1e-6
    if missing.any():
        exact = _scaled(wish, total.double(), least, most).where(missing[:, None], exact)
    rounded = exact.round()
    short = (total - rounded.sum(dim=1)).round()[:, None]
    most_wronged = ((exact - rounded) * short.sign()).argsort(dim=1, descending=True, stable=True)
    place = most_wronged.argsort(dim=1)
    return (rounded + short.sign() * (place < short.abs())).long()


def _scaled(wish: torch.Tensor, total: torch.Tensor, least: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
    """Return `wish` times the factor at which, held between `least` and `most`, it sums to `total`.

    The sum grows with the factor, in straight lines between the factors at which a part meets a bound.
    """
    import torch

    wish = wish.clamp(min=1e-9)
    factors = torch.cat((least / wish, most / wish), dim=1).sort(dim=1).values
    sums = (factors[..., None] * wish[:, None]).clamp(least[:, None], most[:, None]).sum(dim=-1)
    after = (sums < total[:, None]).sum(dim=1, keepdim=True).clamp(1, sums.shape[1] - 1)
    low, high = (x.gather(1, after - 1) for x in (factors, sums)), (x.gather(1, after) for x in (factors, sums))
    (factor, reached), (next_factor, next_sum) = low, high
    part = (total[:, None] - reached) / (next_sum - reached).clamp(min=1e-12)
    return (wish * (factor + part.clamp(0, 1) * (next_factor - factor))).clamp(least, most)
