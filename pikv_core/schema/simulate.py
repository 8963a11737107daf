"""The recipes of `pikv simulate-cache`: of a request log under block policies, and of recorded attention."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pikv_core.components import Component
from pikv_core.schema.base import (
    AllocationSpec,
    Budget,
    PolicySpec,
    Positive,
    Recipe,
    RequestPolicySpec,
    Section,
    Share,
    parse_bytes,
)


def _capacity(value: Any) -> Any:
    number = parse_bytes(value) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number < CAPACITY_LIMIT:
        text = "expected a whole number of blocks from 1 to below 2^62, or bytes such as '64GiB'"
        raise PydanticCustomError("capacity", "{text}", {"text": text})
    return value


def _of_blocks(value: Any) -> Any:
    """Refuse policies of tokens with the reason, which the names of block policies do not tell."""
    from pikv_core.scheduling import POLICIES
    from pikv_core.simulation.policies import REQUEST_POLICIES

    name = value.get("name") if isinstance(value, Mapping) else value
    if isinstance(name, str) and name in set(POLICIES.names()) - set(REQUEST_POLICIES.names()):
        text = f"policy '{name}' is one of tokens, for recorded attention: give --budget"
        raise PydanticCustomError("component", "{text}", {"text": text})
    return value


def _interleaving(text: str) -> str:
    kind = text.partition(":")[0]
    fits = {
        "absolute": r"absolute",
        "poisson": r"poisson:\d+(\.\d+)?",
        "closed-loop": r"closed-loop:[1-9]\d*",
    }
    if kind not in fits or not re.fullmatch(fits[kind], text):
        raise PydanticCustomError("interleaving", "expected absolute, poisson:GAP_S or closed-loop:N")
    return text


def _tiers(file: str) -> str:
    from pikv_core.simulation.cost.tiers import read_tiers

    read_tiers(file)
    return file


def _hardware(spec: str | dict[str, float]) -> str | dict[str, float]:
    from pikv_core.simulation.cost.hardware import Hardware

    Hardware.load(spec)
    return spec


CAPACITY_LIMIT = 2**62
OF_ONE_TIER = ("policies", "capacities", "curve", "sample", "diagnostics")
Capacity = Annotated[int | str, BeforeValidator(_capacity)]
HardwareSpec = Annotated[str | dict[str, float], AfterValidator(_hardware)]
TiersFile = Annotated[str, AfterValidator(_tiers)]
BlockPolicySpec = Annotated[RequestPolicySpec, BeforeValidator(_of_blocks)]
Interleaving = Annotated[str, AfterValidator(_interleaving)]


class ServingSettings(Section):
    """What a block costs to compute, keep and load; without kv_model nothing is told of bytes and times."""

    kv_model: str | None = None  # a config.json, a folder that has one, or a model of the built-in list
    kv_dtype: Literal["bfloat16", "float8"] = "bfloat16"  # of the cached keys and values
    hardware: HardwareSpec | None = None  # a name of the built-in list, or numbers by name
    servers: Positive = 1  # prefill servers, first come first served
    slo_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = (
        None  # time to first token that counts as served well
    )
    overlap: Annotated[float, Field(ge=0, le=1)] = 0.0  # of loading with computing, layer by layer


class SimulateRecipe(Recipe):
    """A replay of a request log; capacities in blocks, or in bytes with serving.kv_model."""

    verb: Literal["simulate-cache"] = "simulate-cache"
    trace: str
    policies: Annotated[list[BlockPolicySpec], Field(min_length=1)] = [
        Component("lru"),
        Component("fifo"),
        Component("belady"),
    ]
    capacities: list[Capacity] = []
    curve: bool = False
    sample: Share | None = None  # share of the blocks that a curve of object hits is estimated from (SHARDS)
    semantics: Literal["prefix", "object"] | None = None  # by default prefix, of logs of single objects object
    touch: Literal["reverse", "forward"] | None = None
    warm_up: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of the requests that is replayed but not counted
    partial_blocks: bool = True  # whether a block that a prompt's end fills in part is cached
    interleave: Interleaving | None = None  # of sessions with clocks of their own; by default absolute
    keep_columns: bool = True  # beside the trace, for the next time
    skip_bad_lines: bool = False
    diagnostics: bool = False  # reuse distances and times, hits by category, turn and time
    plot: bool = False
    per_request: str | None = None  # a parquet or csv file
    export: str | None = None  # an oracleGeneral file to write the trace to
    serving: ServingSettings = ServingSettings()
    tiers: TiersFile | None = None  # a YAML file; see recipes/simulate/tiers/

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> type[Recipe]:
        return AttentionReplayRecipe if "budgets" in tree else cls

    @property
    def job(self) -> str:
        return "simulate_cache" if self.tiers is None else "study_tiers"

    @model_serializer(mode="wrap")
    def _only_what_counts(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        tree = handler(self)
        unused = () if self.tiers is None else OF_ONE_TIER
        return {name: value for name, value in tree.items() if name not in unused}

    @model_validator(mode="after")
    def _parts_fit(self) -> SimulateRecipe:
        serving = self.serving
        asked = [
            (self.sample is not None and not self.curve, "sample is of the curve: give curve too"),
            (
                self.sample is not None and self.semantics == "prefix",
                "a sample of the blocks has no prefixes: leave sample out, the exact curve takes one pass",
            ),
            (
                self.sample is not None and self.warm_up > 0,
                "an estimated curve counts every request: leave warm_up or sample out",
            ),
            (
                self.semantics == "object" and self.touch == "reverse",
                "object hits are touched forward: leave touch out, or give forward",
            ),
            (
                serving.kv_model is None and serving.kv_dtype != "bfloat16",
                "serving.kv_dtype needs serving.kv_model, whose blocks it is of",
            ),
            (
                serving.kv_model is None and any(isinstance(capacity, str) for capacity in self.capacities),
                "capacities in bytes need serving.kv_model, for the bytes of a block",
            ),
            (
                serving.hardware is not None and serving.kv_model is None,
                "serving.hardware needs serving.kv_model, for the work of a prompt",
            ),
            (
                self.tiers is not None and any(name in self.model_fields_set for name in OF_ONE_TIER),
                f"tiers have policies and capacities of their own: leave {', '.join(OF_ONE_TIER)} out",
            ),
            (
                serving.hardware is not None and self.semantics == "object",
                "times follow from prefix hits, which a prompt can use: leave serving.hardware or semantics out",
            ),
            (
                self.tiers is not None and self.semantics == "object",
                "tiers serve prefixes: leave semantics out",
            ),
            (
                self.tiers is None and serving.overlap > 0,
                "serving.overlap is of loading from tiers: give tiers too",
            ),
            (
                self.tiers is not None and serving.hardware is None,
                "tiers need serving.kv_model and serving.hardware, for what a block weighs and costs",
            ),
            (
                serving.slo_s is not None and serving.hardware is None,
                "serving.slo_s needs serving.hardware: without it no time is known",
            ),
            (
                serving.servers > 1 and serving.hardware is None,
                "serving.servers needs serving.hardware: without it no time is known",
            ),
        ]
        problems = [text for is_wrong, text in asked if is_wrong]
        if problems:
            raise PydanticCustomError("sizes", "{text}", {"text": "; ".join(problems)})
        return self


class AttentionReplayRecipe(Recipe):
    """A replay of recorded attention under the policies of `generate`, which it becomes by its budgets."""

    verb: Literal["simulate-cache"] = "simulate-cache"
    trace: str
    policies: Annotated[list[PolicySpec], Field(min_length=1)] = [
        Component("streaming-llm"),
        Component("h2o"),
        Component("oracle"),
    ]
    budgets: Annotated[list[Budget], Field(min_length=1)]
    allocation: AllocationSpec = Component("uniform")
    top_tokens: Positive = 16  # of a step, whose hit rate is told
    plot: bool = False

    @property
    def job(self) -> str:
        return "replay_attention"
