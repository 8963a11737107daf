"""8-bit floating point: e4m3 with one scale per head and page (arXiv 2209.05433)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from pikv_core.compression import CODECS
from pikv_core.compression.base import Codec, sees_alike, units_of_pages
from pikv_core.compression.empty_slots import fill_empty
from pikv_core.errors import PiKVError

if TYPE_CHECKING:
    import torch

    from pikv_kernels.partial_attention import Partial

HIGHEST = 448.0  # of e4m3


@CODECS.register("fp8")
@dataclass(frozen=True)
class Float8(Codec):
    """Store e4m3 numbers, scaled so that the largest of a page's keys, and of its values, is the format's largest.

    page: tokens that share a scale. residual: newest tokens kept in full precision before they are encoded.
    """

    page: Annotated[int, Field(ge=8, multiple_of=8)] = 64
    residual: Annotated[int, Field(ge=0)] = 0

    @property
    def unit_tokens(self) -> int:
        return self.page

    def encode(self, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor) -> dict[str, torch.Tensor]:
        encoded = {}
        for kind, x in (("key", keys), ("value", values)):
            pages = fill_empty(x, position, self.page).unflatten(2, (-1, self.page))
            encoded[f"{kind}_codes"], encoded[f"{kind}_scale"] = _encode_pages(pages, kind)
        return encoded

    def decode(
        self, encoded: dict[str, torch.Tensor], position: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from pikv_kernels.attend_float8 import decode

        return decode(encoded, dtype)

    def attend(
        self,
        query: torch.Tensor,
        encoded: dict[str, torch.Tensor],
        position: torch.Tensor,
        visible: torch.Tensor | None,
        scale: float,
        softcap: float | None,
        with_probs: bool,
    ) -> Partial:
        from pikv_kernels.attend_float8 import attend_float8, choose_for_float8

        if sees_alike(query, visible) and choose_for_float8(query, encoded) != "torch":
            return attend_float8(query, encoded, visible, scale, softcap, with_probs)
        return super().attend(query, encoded, position, visible, scale, softcap, with_probs)

    def attend_pages(
        self,
        query: torch.Tensor,
        encoded: dict[str, torch.Tensor],
        pages: torch.Tensor,
        page_tokens: int,
        visible: torch.Tensor | None,
        scale: float,
        softcap: float | None,
    ) -> Partial | None:
        from pikv_kernels.attend_float8 import attend_float8_pages, choose_for_float8

        chosen = choose_for_float8(query, encoded)
        if chosen == "torch":
            return None
        units = units_of_pages(pages, page_tokens // self.page)
        return attend_float8_pages(query, encoded, units, visible, scale, softcap, backend=chosen)


def _encode_pages(pages: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bytes of e4m3 codes, the shape of pages [B,G,U,page,D], and float32 scales [B,G,U]."""
    import torch

    exact = pages.float()
    scale = (exact.abs().amax(dim=(-1, -2)) / HIGHEST).clamp(min=torch.finfo(torch.float32).tiny)
    if not scale.isfinite().all():
        raise PiKVError(
            f"the {kind}s hold NaN or infinity, which codes cannot represent",
            hint="run with codec 'none' to see whether the model's own numbers are finite",
        )
    codes = (exact / scale[..., None, None]).to(torch.float8_e4m3fn)
    return codes.view(torch.uint8), scale
