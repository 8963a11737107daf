"""The typed, frozen schema of every verb's recipe; each field's comment has its unit.

`pikv_core.recipes` reads recipes from files and flags.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pikv_core.components import Component, MemberOf, NameIn
from pikv_core.errors import closest

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


Budget = Annotated[float | int | str, BeforeValidator(_budget)]
PolicySpec = Annotated[Component, MemberOf("pikv_core.scheduling:POLICIES")]
CodecSpec = Annotated[Component, MemberOf("pikv_core.compression:CODECS")]
AllocationSpec = Annotated[Component, MemberOf("pikv_core.scheduling.allocation:ALLOCATIONS")]
TaskSpec = Annotated[Component, MemberOf("pikv_core.data:TASKS")]
RouterName = Annotated[str, NameIn("pikv_core.moe.routers:ROUTERS")]
RequestPolicyName = Annotated[str, NameIn("pikv_core.simulation.policies:REQUEST_POLICIES")]

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)


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

    @property
    def job(self) -> str:
        """Name the module of pikv_core.jobs that carries the recipe out."""
        return self.verb.replace("-", "_")


class GenDataRecipe(Recipe):
    verb: Literal["gen-data"] = "gen-data"
    task: TaskSpec
    num_samples: Positive = 1000
    text: list[str] = []  # files and folders (txt, md, jsonl, parquet) in place of the embedded corpus
    column: str | None = None  # the text column of jsonl and parquet


class ModelRecipe(Section):
    """The decoder to build; sizes in units of elements."""

    arch: Literal["llama", "qwen3_moe", "mixtral", "pikv"] = "llama"
    num_layers: Positive = 4
    hidden_size: Positive = 128
    num_heads: Positive = 2
    num_kv_heads: Positive = 2
    head_dim: Positive | None = None  # by default hidden_size / num_heads
    ffn_size: Positive = 256  # width of a dense feed-forward block
    num_experts: Positive = 8
    top_k: Positive = 2
    expert_size: Positive = 128  # width of one expert
    router: RouterName = "base"
    balance_loss: Annotated[float, Field(ge=0)] = 0.01
    z_loss: Annotated[float, Field(ge=0)] = 0.001
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    max_positions: Positive = 4096
    attention_bias: bool = True  # of q and k, where the architecture has it

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelRecipe:
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise PydanticCustomError("sizes", "hidden_size must be a multiple of num_heads, or give head_dim")
        if (self.head_dim or self.hidden_size // self.num_heads) % 2:
            raise PydanticCustomError("sizes", "the head size must be even, for its rotation")
        if self.num_heads % self.num_kv_heads:
            raise PydanticCustomError("sizes", "num_heads must be a multiple of num_kv_heads")
        if self.top_k > self.num_experts:
            raise PydanticCustomError("sizes", "top_k must not exceed num_experts")
        return self


class DataRecipe(Section):
    """The task; `path` is a folder gen-data wrote for it (without it, the data are made for the run)."""

    task: TaskSpec = Component("recall")
    path: str | None = None
    text: list[str] = []
    column: str | None = None


class TrainSettings(Section):
    """The course of training; lengths in tokens."""

    batch_tokens: Positive = 4096
    max_steps: Positive = 6000
    curriculum: Annotated[list[Positive], Field(min_length=1)] = [16, 32, 64, 128, 256, 512, 1024]
    stage_accuracy: Share = 0.9  # batch accuracy (moving average) that ends a stage of the curriculum
    stage_steps: Positive = 20  # at least so many steps a stage
    decay_steps: Positive = 150  # steps at the last lengths with the learning rate falling to zero
    optimizer: Literal["muon", "adamw"] = "muon"
    lr: Annotated[float, Field(gt=0)] = 3e-3
    expert_lr: Annotated[float, Field(gt=0)] = 0.1  # of the stacked experts, as a multiple of lr
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup_steps: Positive = 50
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    filler_loss: Annotated[float, Field(ge=0)] = 0.0  # weight of the next-token loss on the filler
    log_every: Positive = 50
    checkpoint_every: Positive = 100  # steps
    eval_samples: Positive = 128
    eval_lengths: Annotated[list[Positive], Field(min_length=1)] = [512, 1024]


class DuoGateSettings(Section):
    """How DuoAttention's gates are learned from a trained model (arXiv 2410.10819); lengths in tokens."""

    sinks: Annotated[int, Field(ge=0)] = 64  # first tokens that a streaming head sees
    recent: Positive = 256  # newest tokens that it sees
    length: Positive = 1024  # of a sample
    steps: Positive = 200
    batch_tokens: Positive = 4096
    lr: Annotated[float, Field(gt=0)] = 0.02
    l1: Annotated[float, Field(ge=0)] = 0.05  # weight of the mean gate, against the change of the hidden states
    text: list[str] = []  # around the needles, in place of the embedded corpus
    column: str | None = None
    log_every: Positive = 10
    eval_samples: Positive = 64

    @model_validator(mode="after")
    def _hides_something(self) -> DuoGateSettings:
        if self.length <= self.sinks + self.recent:
            text = f"length must exceed sinks + recent, {self.sinks + self.recent}: else nothing is out of sight"
            raise PydanticCustomError("sizes", "{text}", {"text": text})
        return self


class TrainRecipe(Recipe):
    """A model to train from scratch, or head gates to learn: then `start` names the model that has them."""

    verb: Literal["train"] = "train"
    model: ModelRecipe = ModelRecipe()
    data: DataRecipe = DataRecipe()
    train: TrainSettings = TrainSettings()
    start: str | None = None  # a trained model's folder, its run folder, or a hub id
    duo_gates: DuoGateSettings | None = None

    @property
    def job(self) -> str:
        return "train" if self.duo_gates is None else "duo_gates"

    @model_serializer(mode="wrap")
    def _only_what_counts(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        tree = handler(self)
        unused = ("start", "duo_gates") if self.duo_gates is None else ("model", "data", "train")
        return {name: value for name, value in tree.items() if name not in unused}

    @model_validator(mode="after")
    def _gates_or_a_model(self) -> TrainRecipe:
        if (self.start is None) != (self.duo_gates is None):
            text = "start and duo_gates go together: gates are learned from the trained model that start names"
            text += "; recipes/train/duo-gates.yaml has both"
            raise PydanticCustomError("sizes", "{text}", {"text": text})
        given = [name for name in ("model", "data", "train") if name in self.model_fields_set]
        if self.duo_gates is not None and given:
            text = f"{', '.join(given)}: nothing of the model itself is trained with duo_gates; drop it"
            raise PydanticCustomError("sizes", "{text}", {"text": text})
        return self

    @model_validator(mode="after")
    def _lengths_fit(self) -> TrainRecipe:
        longest = max(*self.train.curriculum, *self.train.eval_lengths)
        if longest > self.model.max_positions:
            raise PydanticCustomError(
                "sizes",
                "model.max_positions must not be below the longest length of curriculum and eval_lengths",
            )
        return self


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
        if self.target is not None and self.target.split("=")[0].strip() not in self.tasks:
            text = f"target '{self.target}' is not measured; tasks: {', '.join(self.tasks)}"
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


class SimulateRecipe(Recipe):
    """A replay of a request log over prefix blocks; capacities in blocks."""

    verb: Literal["simulate-cache"] = "simulate-cache"
    trace: str
    policies: Annotated[list[RequestPolicyName], Field(min_length=1)] = ["lru", "fifo", "belady"]
    capacities: list[Positive] = []
    curve: bool = False
    semantics: Literal["prefix", "object"] = "prefix"
    touch: Literal["reverse", "forward"] | None = None


RECIPES: dict[str, type[Recipe]] = {
    schema.model_fields["verb"].default: schema
    for schema in (GenDataRecipe, TrainRecipe, CompressRecipe, GenerateRecipe, SimulateRecipe)
}
