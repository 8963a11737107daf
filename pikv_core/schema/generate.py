"""The recipe of `pikv generate`, and of a cache by itself."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from pikv_core.components import Component
from pikv_core.schema.base import AllocationSpec, Budget, CodecSpec, PolicySpec, Positive, Recipe, Section, Share


class CacheRecipe(Section):
    """What the cache keeps, and in which form."""

    policy: PolicySpec = Component("full")
    budget: Budget = 1.0  # a share of the tokens seen, tokens per head, or bytes of the whole cache
    allocation: AllocationSpec = Component("uniform")
    codec: CodecSpec = Component("none")
    calibration: list[str] = []  # folders that hold what calibrated codecs and policies need
    rerotate: bool = False  # read keys at the positions 0, 1, 2, ... of what is left, as StreamingLLM does

    @model_validator(mode="after")
    def _full_has_no_budget(self) -> CacheRecipe:
        if self.policy.name == "full" and not (isinstance(self.budget, float) and self.budget == 1.0):
            text = f"policy 'full' keeps every token, so a budget of {self.budget} means nothing; choose another policy"
            raise PydanticCustomError("sizes", "{text}", {"text": text})
        return self


class GenerateRecipe(Recipe):
    verb: Literal["generate"] = "generate"
    model: str
    cache: CacheRecipe = CacheRecipe()
    prompt: str | None = None
    prompt_file: str | None = None
    prompts: str | None = None  # a jsonl file with a key `prompt` in every line
    batch_size: Positive = 1
    chat: bool = False
    max_new_tokens: Positive = 64
    temperature: Annotated[float, Field(ge=0)] = 0.0  # 0 is greedy
    top_k: Positive | None = None
    top_p: Share | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
