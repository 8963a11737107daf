"""The recipe of `pikv compress`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_serializer, model_validator
from pydantic_core import PydanticCustomError

from pikv_core.components import Component
from pikv_core.errors import closest
from pikv_core.schema.base import AllocationSpec, Backend, Budget, CodecSpec, PolicySpec, Positive, Recipe, Section


class MethodRecipe(Section):
    """A policy, a codec or both, to be measured at every budget; written as text where it has no options."""

    policy: PolicySpec = Component("full")
    codec: CodecSpec = Component("none")
    allocation: AllocationSpec | None = None  # by default each of the sweep's allocations in turn
    rerotate: bool = False

    @model_serializer
    def _plain(self) -> dict[str, Any]:
        given = {"policy": self.policy.plain(), "codec": self.codec.plain()}
        if self.allocation is not None:
            given["allocation"] = self.allocation.plain()
        return {**given, "rerotate": True} if self.rerotate else given


def _method(value: Any) -> Any:
    from pikv_core.evaluation.methods import parse

    return parse(value) if isinstance(value, str) else value


def _target(text: str) -> str:
    from pikv_core.evaluation.target import Target

    Target.parse(text)
    return text


def _ruler_task(name: str) -> str:
    from pikv_core.data.ruler_tasks import DRAFTS

    if name not in DRAFTS:
        text = f"unknown task of RULER '{name}'{closest(name, DRAFTS)}; one of: {', '.join(DRAFTS)}"
        raise PydanticCustomError("component", "{text}", {"text": text})
    return name


MethodSpec = Annotated[MethodRecipe, BeforeValidator(_method)]
TargetSpec = Annotated[str, AfterValidator(_target)]
RulerTask = Annotated[str, AfterValidator(_ruler_task)]
Measurement = Literal["recall", "perplexity", "agreement", "ruler"]


class CompressRecipe(Recipe):
    """A sweep of methods over budgets."""

    verb: Literal["compress"] = "compress"
    model: str
    backend: Backend = "auto"
    methods: Annotated[list[MethodSpec], Field(min_length=1)] = Field(
        ["full", "streaming-llm", "h2o", "quest", "h2o+int8"], validate_default=True
    )
    budgets: Annotated[list[Budget], Field(min_length=1)] = [0.5, 0.25]
    allocations: Annotated[list[AllocationSpec], Field(min_length=1)] = [Component("uniform")]
    tasks: Annotated[list[Measurement], Field(min_length=1)] = ["recall", "perplexity", "agreement"]
    target: TargetSpec | None = None  # recall=0.99: report the least bytes that reach it
    calibration: list[str] = []  # folders that `calibrate` wrote, for what has to be fitted
    calibrate: bool = False  # fit the codecs named in methods to the model, in place of measuring
    save: str | None = None  # where `calibrate` writes
    text: list[str] = []
    column: str | None = None
    question: Literal["inside", "after"] = "after"  # whether the policy has seen the question when it compresses
    context_tokens: Annotated[int, Field(ge=16)] = 1024  # length of each prompt
    num_queries: Positive = 2000  # recall questions
    num_texts: Positive = 16  # continuations scored for perplexity and agreement
    continuation_tokens: Positive = 64  # fed one by one after each context
    ruler_samples: Positive = 25  # of each of RULER's tasks
    ruler_tasks: list[RulerTask] = []  # by default all
    batch_size: Positive = 16

    @property
    def job(self) -> str:
        return "calibrate" if self.calibrate else "compress"

    @model_validator(mode="after")
    def _parts_fit(self) -> CompressRecipe:
        if self.calibrate != (self.save is not None):
            text = "calibrate and save go together: what is fitted has to be written somewhere"
            raise PydanticCustomError("sizes", "{text}", {"text": text})
        if self.calibrate and self.backend != "auto":
            text = f"calibrate attends to prompts alone, so backend '{self.backend}' means nothing; leave it out"
            raise PydanticCustomError("sizes", "{text}", {"text": text})
        if self.target is not None and self.target.split("=")[0].strip() not in self.tasks:
            text = f"target '{self.target}' is not measured; tasks: {', '.join(self.tasks)}"
            raise PydanticCustomError("sizes", "{text}", {"text": text})
        return self
