"""What the recipes of several verbs are made of: sections, budgets, names of registered members."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from pikv_core.components import Component, MemberOf

_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*(KiB|MiB|GiB|TiB|KB|MB|GB|TB|B)")
_UNITS = {
    "B": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}


def parse_bytes(text: str) -> int | None:
    """Return the bytes of `64MiB`, or None where the text is no size."""
    match = _BYTES.fullmatch(text.strip())
    return int(float(match[1]) * _UNITS[match[2]]) if match else None


def _budget(value: Any) -> Any:
    problem = PydanticCustomError(
        "budget",
        "expected a share in (0, 1], a whole number of tokens of at least 1, or bytes such as '64MiB'",
    )
    if isinstance(value, str) and parse_bytes(value) is not None:
        if parse_bytes(value) == 0:
            raise problem
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise problem
    if (isinstance(value, int) and value < 1) or (isinstance(value, float) and not 0 < value <= 1):
        raise problem
    return value


def _bytes(value: Any) -> Any:
    if not isinstance(value, str) or not parse_bytes(value):
        raise PydanticCustomError("budget", "expected bytes such as '64MiB'")
    return value


Bytes = Annotated[str, BeforeValidator(_bytes)]
Budget = Annotated[float | int | str, BeforeValidator(_budget)]
PolicySpec = Annotated[Component, MemberOf("pikv_core.scheduling:POLICIES")]
CodecSpec = Annotated[Component, MemberOf("pikv_core.compression:CODECS")]
AllocationSpec = Annotated[Component, MemberOf("pikv_core.scheduling.allocation:ALLOCATIONS")]
TaskSpec = Annotated[Component, MemberOf("pikv_core.data:TASKS")]
RouterSpec = Annotated[Component, MemberOf("pikv_core.moe.routers:ROUTERS")]
RequestPolicySpec = Annotated[Component, MemberOf("pikv_core.simulation.policies:REQUEST_POLICIES")]

Backend = Literal["auto", "torch", "numba", "triton"]  # of the attention of new tokens; auto: what is there
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)


class Recipe(Section):
    """What every verb knows."""

    verb: str
    name: str | None = None  # of the run folder: runs/<name>-<n>
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: Positive | None = None
    out: str | None = None  # the run folder; by default the next free one under runs/
    plugins: list[str] = []  # Python files that register members of their own

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> type[Recipe]:
        """Return the schema that a verb's recipe of this content is read by."""
        return cls

    @property
    def job(self) -> str:
        """Name the module of pikv_core.jobs that carries the recipe out."""
        return self.verb.replace("-", "_")
