"""Softmax top-k routing with renormalised weights, as in Mixtral (2401.04088)."""

from __future__ import annotations

from pikv_core.moe.router import Router
from pikv_core.moe.routers import ROUTERS


@ROUTERS.register("base")
class BaseRouter(Router):
    """Send each token to its K most probable experts."""

    @property
    def top_k_weights(self) -> str | None:
        return "renormalised"
