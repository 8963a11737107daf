"""8-bit floating point: e4m3 with one scale per head and page (arXiv 2209.05433)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from pikv_core.compression import CODECS
from pikv_core.compression.base import Codec
from pikv_core.compression.empty_slots import fill_empty
from pikv_core.errors import PiKVError

if TYPE_CHECKING:
    import torch

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
        from pikv_kernels.float8 import decode_e4m3

        def decoded(kind: str) -> torch.Tensor:
            numbers = decode_e4m3(encoded[f"{kind}_codes"])
            return numbers.mul_(encoded[f"{kind}_scale"][..., None, None]).to(dtype).flatten(2, 3)

        return decoded("key"), decoded("value")


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
