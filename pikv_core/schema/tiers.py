"""Where a cache that outgrows the device lies: host memory, disk, or a simulated CXL memory."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from pikv_core.schema.base import Positive, Section, parse_bytes


def _bytes(value: Any) -> Any:
    number = parse_bytes(value) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise PydanticCustomError("sizes", "{text}", {"text": f"expected bytes such as '64MiB', got {value!r}"})
    return number


Bytes = Annotated[int, BeforeValidator(_bytes)]
Above = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class CxlRecipe(Section):
    """A memory that is simulated: a transfer takes its latency and its bytes over its bandwidth, at least."""

    bandwidth_gb_s: Above = 20.0  # 10^9 bytes a second
    latency_us: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    bytes: Bytes | None = None  # None: as many as there are


class TiersRecipe(Section):
    """The tiers of a cache, fastest first: device, host, CXL, disk. Sizes are of the whole cache; None is no limit."""

    device: Bytes | None = None  # staging buffers and what describes pages included
    host: Bytes | None = None  # 0 leaves it out
    cxl: CxlRecipe | None = None
    disk: str | None = None  # a folder; its files are gone with the process, however it ends
    disk_bytes: Bytes | None = None
    staging: Bytes | None = None  # of the device's: what pages are brought into; half of it, without limit two layers
    page_tokens: Positive = 32  # that leave the device together
