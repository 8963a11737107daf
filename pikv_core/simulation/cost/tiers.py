"""Tiers of memory, top first, from a YAML file; see `recipes/simulate/tiers/` for what one looks like.

A block enters the top tier when it is computed or promoted. It is never changed, so that a copy in a lower tier stays
good: a block that leaves a tier costs a write below only where it is not there already.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from pikv_core.components import Component
from pikv_core.errors import UsageError
from pikv_core.recipes import validate
from pikv_core.schema.base import RequestPolicySpec, Section, parse_bytes
from pikv_core.simulation.cost.kv_model import KvModel
from pikv_core.simulation.cost.priced import build_priced
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.policies.base import RequestPolicy
from pikv_core.strict_yaml import parse_yaml

UNLIMITED = "unlimited"
HINT = "each tier has name, capacity, policy, gb_per_s, latency_ms, write, promote; see recipes/simulate/tiers/"


@dataclass(frozen=True)
class Speed:
    """What a tier of a known name is like, where its file does not say."""

    read_gb_per_s: float
    write_gb_per_s: float
    latency_ms: float


KNOWN = {
    "hbm": Speed(math.inf, math.inf, 0.0),  # the GPU's own memory: attention reads blocks where they lie
    "dram": Speed(50, 50, 0.02),  # of the host, over PCIe 5 x16
    "cxl": Speed(25, 25, 0.02),  # memory behind CXL 2 x8
    "ssd": Speed(6, 4, 0.1),  # one NVMe drive over PCIe 4 x4
    "remote": Speed(10, 10, 0.5),  # another machine's memory over 100 Gbit/s
}


def _capacity(value: Any) -> Any:
    if value == UNLIMITED or (isinstance(value, str) and parse_bytes(value)):
        return value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        text = "expected a whole number of blocks of at least 1, bytes such as '64GiB', or unlimited"
        raise PydanticCustomError("capacity", "{text}", {"text": text})
    return value


def _rate(value: Any) -> Any:
    if value == UNLIMITED:
        return math.inf
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        text = "expected GB/s above 0, or unlimited"
        raise PydanticCustomError("rate", "{text}", {"text": text})
    return value


Rate = Annotated[float, BeforeValidator(_rate)]


class TierSettings(Section):
    """One tier as its file tells it; speeds may be left out for the names in KNOWN."""

    name: str
    capacity: Annotated[int | str, BeforeValidator(_capacity)]
    policy: RequestPolicySpec = Component("lru")
    gb_per_s: Rate | None = None  # both ways
    read_gb_per_s: Rate | None = None
    write_gb_per_s: Rate | None = None
    latency_ms: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None  # of one request's reads
    write: Literal["back", "through"] = "back"  # down when a block leaves, or as soon as it enters
    promote: bool = True  # whether a block that is loaded from here enters the top tier

    @model_validator(mode="after")
    def _is_told(self) -> TierSettings:
        if self.name in KNOWN:
            return self
        told = {
            "gb_per_s": self.gb_per_s or (self.read_gb_per_s and self.write_gb_per_s),
            "latency_ms": self.latency_ms is not None,
        }
        missing = [key for key, is_told in told.items() if not is_told]
        if missing:
            text = f"tier '{self.name}' needs {' and '.join(missing)}; only {', '.join(KNOWN)} have speeds of their own"
            raise PydanticCustomError("sizes", "{text}", {"text": text})
        return self

    @property
    def speed(self) -> Speed:
        known = KNOWN.get(self.name, Speed(math.inf, math.inf, 0.0))
        return Speed(
            self.read_gb_per_s or self.gb_per_s or known.read_gb_per_s,
            self.write_gb_per_s or self.gb_per_s or known.write_gb_per_s,
            known.latency_ms if self.latency_ms is None else self.latency_ms,
        )


class TierFile(Section):
    tiers: Annotated[list[TierSettings], Field(min_length=1)]

    @model_validator(mode="after")
    def _parts_fit(self) -> TierFile:
        names = [tier.name for tier in self.tiers]
        repeated = sorted({name for name in names if names.count(name) > 1})
        asked = [
            (bool(repeated), f"the name '{'/'.join(repeated)}' is given to more than one tier"),
            (
                any(tier.capacity == UNLIMITED for tier in self.tiers[:-1]),
                "only the last tier can be unlimited: nothing would ever move below it",
            ),
            *((True, _unfit(tier)) for tier in self.tiers[1:] if REQUEST_POLICIES[tier.policy.name].knows_future),
        ]
        problems = [text for is_wrong, text in asked if is_wrong]
        if problems:
            raise PydanticCustomError("sizes", "{text}", {"text": "; ".join(problems)})
        return self


def _unfit(tier: TierSettings) -> str:
    return (
        f"policy '{tier.policy.name}' cannot run in tier '{tier.name}': it is told of the future at accesses, "
        "and blocks enter a lower tier between them"
    )


@dataclass(frozen=True)
class Tier:
    """One tier in blocks and seconds."""

    name: str
    policy: RequestPolicy
    label: str  # of the policy with its options
    capacity_blocks: int | None  # None: unlimited
    read_bytes_per_s: float  # inf: nothing has to be loaded
    write_bytes_per_s: float
    latency_s: float
    writes_through: bool
    promotes: bool


def load_tiers(file: str | Path, model: KvModel, block_tokens: int, seed: int = 0) -> tuple[Tier, ...]:
    """Read a file of tiers; raise RecipeError with every problem found, PiKVError where no block fits."""
    return tuple(_tier(settings, model, block_tokens, seed) for settings in read_tiers(file).tiers)


def read_tiers(file: str | Path) -> TierFile:
    """Read what a file of tiers tells; raise RecipeError with every problem found."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "not a UTF-8 text file" if isinstance(error, ValueError) else (error.strerror or str(error)).lower()
        raise UsageError(f"{file}: cannot read the tiers: {reason}", hint=HINT) from error
    return _told(parse_yaml(text, str(file)), str(file))


def make_tiers(tree: Any, model: KvModel, block_tokens: int, source: str = "tiers") -> tuple[Tier, ...]:
    """Return the tiers of what a YAML file holds: `tiers`, a list; see load_tiers."""
    return tuple(_tier(settings, model, block_tokens) for settings in _told(tree, source).tiers)


def _told(tree: Any, source: str) -> TierFile:
    if not isinstance(tree, dict):
        raise UsageError(f"{source}: expected the key tiers with a list of tiers", hint=HINT)
    told: TierFile = validate(TierFile, tree, source, hint=HINT)
    return told


def _tier(settings: TierSettings, model: KvModel, block_tokens: int, seed: int = 0) -> Tier:
    capacity: int | None
    if isinstance(settings.capacity, int):
        capacity = settings.capacity
    else:
        capacity = None if settings.capacity == UNLIMITED else model.blocks(settings.capacity, block_tokens)
    speed = settings.speed
    return Tier(
        name=settings.name,
        policy=build_priced(settings.policy, model, seed),
        label=settings.policy.label(),
        capacity_blocks=capacity,
        read_bytes_per_s=speed.read_gb_per_s * 1e9,
        write_bytes_per_s=speed.write_gb_per_s * 1e9,
        latency_s=speed.latency_ms / 1000,
        writes_through=settings.write == "through",
        promotes=settings.promote,
    )
