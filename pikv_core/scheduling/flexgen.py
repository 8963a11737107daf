"""FlexGen: drop nothing, and place the cache over device, host and disk by shares (arXiv 2303.06865)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from pikv_core.errors import UsageError
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Policy

Part = Annotated[float, Field(ge=0, le=1)]


@POLICIES.register("flexgen")
@dataclass(frozen=True)
class FlexGen(Policy):
    """Read everything, wherever it lies; the newest tokens are the device's share, older pages are dealt by share.

    device, host, disk, cxl: shares of the tokens, which sum to 1. Where a tier is too small, the next one takes more.
    """

    takes_budget: ClassVar[bool] = False
    device: Part = 0.3
    host: Part = 0.5
    disk: Part = 0.2
    cxl: Part = 0.0

    def __post_init__(self) -> None:
        total = self.device + self.host + self.disk + self.cxl
        if abs(total - 1) > 1e-6:
            raise UsageError(
                f"the shares device, host, disk and cxl of policy 'flexgen' sum to {total:g}, not to 1",
                hint="for example {name: flexgen, device: 0.2, host: 0.6, disk: 0.2}",
            )

    @property
    def slow_shares(self) -> dict[str, float]:
        """Return the shares of what is not on the device, by tier."""
        return {"host": self.host, "cxl": self.cxl, "disk": self.disk}
