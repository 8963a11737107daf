"""The recipe of `pikv generate`, and of a cache by itself."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from pikv_core.components import Component
from pikv_core.schema.base import (
    AllocationSpec,
    Backend,
    Budget,
    Bytes,
    CodecSpec,
    PolicySpec,
    Positive,
    Recipe,
    RequestPolicySpec,
    Section,
    Share,
)
from pikv_core.schema.tiers import TiersRecipe

Place = Annotated[str, Field(min_length=1)]


class CacheRecipe(Section):
    """What the cache keeps, and in which form."""

    policy: PolicySpec = Component("full")
    budget: Budget = 1.0  # a share of the tokens seen, tokens per head, or bytes of the whole cache
    allocation: AllocationSpec = Component("uniform")
    codec: CodecSpec = Component("none")
    calibration: list[str] = []  # folders that hold what calibrated codecs and policies need
    rerotate: bool = False  # read keys at the positions 0, 1, 2, ... of what is left, as StreamingLLM does
    tiers: TiersRecipe | None = None  # where it lies; None is device memory, and for policy flexgen no limits

    @model_validator(mode="after")
    def _full_has_no_budget(self) -> CacheRecipe:
        from pikv_core.scheduling import POLICIES

        whole = isinstance(self.budget, float) and self.budget == 1.0
        if not whole and not POLICIES[self.policy.name].takes_budget:
            text = (
                f"policy '{self.policy.name}' keeps every token, so a budget of {self.budget} means nothing; choose "
                "another policy"
            )
            raise PydanticCustomError("sizes", "{text}", {"text": text})
        return self


class RecordSettings(Section):
    """How much of a run's attention its trace holds."""

    top_p: Share = 0.999  # of each query's attention, by the tokens that get most of it; 1.0 is all
    dtype: Literal["float16", "float32"] = "float16"  # float16 rounds to 11 bits, and what is below 3e-8 to 0
    prompt_queries: Positive | None = None  # the newest of a prompt alone; some policies observe them all
    vectors: bool = True  # keys and queries, for the policies that go by them


class PrefixSettings(Section):
    """How a new prefix store is kept; one that is there keeps its own, and refuses others."""

    bytes: Bytes = "1GiB"  # of all blocks
    policy: RequestPolicySpec = Component("lru")  # which blocks stay; any of simulate-cache's that knows no future
    block_tokens: Positive = 64  # a multiple of the codec's unit; a prompt's last, broken block is not stored
    touch: Literal["reverse", "forward"] = (
        "reverse"  # last block of a prompt first: its end leaves before its beginning
    )


class GenerateRecipe(Recipe):
    verb: Literal["generate"] = "generate"
    model: str
    cache: CacheRecipe = CacheRecipe()
    backend: Backend = "auto"
    graph: bool = False  # record a step at full budget as a CUDA graph, and replay it
    split: Literal["heads", "tokens", "shards"] | None = None  # how the ranks that torchrun starts share the cache
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
    save_state: Place | None = None  # a folder or fsspec URL: the log of states that a later run goes on from
    save_every: Positive = 16  # tokens
    resume: str | None = None  # a folder or URL that save_state wrote; the prompt, if any, comes behind what is there
    prefix_cache: Place | None = None  # a folder that keeps blocks of prompts for later ones that begin alike
    prefix: PrefixSettings = PrefixSettings()
    record_attention: str | None = None  # a file of safetensors, for `pikv simulate-cache`
    record: RecordSettings = RecordSettings()

    @model_validator(mode="after")
    def _saves_one_sequence(self) -> GenerateRecipe:
        for name in ("save_state", "resume"):
            if getattr(self, name) is not None and self.prompts is not None:
                text = f"{name} takes one prompt, not a file of many: a state is of one sequence"
                raise PydanticCustomError("sizes", "{text}", {"text": text})
        if self.resume is not None and (self.record_attention is not None or self.prompt_file is not None):
            text = (
                "resume takes neither record_attention nor prompt_file: a trace is of a whole run; give text as prompt"
            )
            raise PydanticCustomError("sizes", "{text}", {"text": text})
        return self

    @model_validator(mode="after")
    def _begins_with_a_prefix(self) -> GenerateRecipe:
        if self.prefix_cache is None:
            if self.prefix != PrefixSettings():
                text = "prefix says how a store is kept, and there is none; give prefix_cache a folder"
                raise PydanticCustomError("sizes", "{text}", {"text": text})
            return self
        refused = [
            (self.batch_size > 1, "batch_size above 1: prompts are padded to one length, and a prefix begins at 0"),
            (self.resume is not None, "resume: a state has its prompt with it"),
            (self.record_attention is not None, "record_attention: what is stored is not attended from"),
            (self.graph, "graph: steps are not replayed beside a store"),
            (self.split is not None, "split: a block is of whole layers"),
            (self.save_state == self.prefix_cache, "save_state in the same folder: each has a manifest of its own"),
        ]
        for is_asked, reason in refused:
            if is_asked:
                text = f"prefix_cache does not go with {reason}"
                raise PydanticCustomError("sizes", "{text}", {"text": text})
        return self

    @model_validator(mode="after")
    def _splits_what_it_can(self) -> GenerateRecipe:
        if self.split is not None and (self.graph or self.record_attention is not None):
            name, why = (
                ("graph", "a graph replays one process") if self.graph else ("record_attention", "a trace is whole")
            )
            text = f"split does not go with {name}: {why}, and each rank has a part; leave out one of them"
            raise PydanticCustomError("sizes", "{text}", {"text": text})
        return self

    @model_validator(mode="after")
    def _records_the_whole(self) -> GenerateRecipe:
        if self.record_attention is None:
            return self
        if self.prompts is not None:
            text = "record_attention takes one prompt, not a file of many: a trace is of one sequence"
            raise PydanticCustomError("sizes", "{text}", {"text": text})
        for kind, chosen, whole in (("policy", self.cache.policy, "full"), ("codec", self.cache.codec, "none")):
            if chosen.name != whole:
                text = (
                    f"record_attention needs {kind} '{whole}': a trace is of the whole attention, and a replay of it "
                    f"tells what {kind} '{chosen.name}' would keep; leave out {kind}"
                )
                raise PydanticCustomError("sizes", "{text}", {"text": text})
        return self
