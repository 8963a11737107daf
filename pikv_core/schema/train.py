"""The recipe of `pikv train`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from pydantic_core import PydanticCustomError

from pikv_core.components import Component, as_pydantic
from pikv_core.errors import UsageError
from pikv_core.schema.base import Positive, Recipe, RouterSpec, Section, Share, TaskSpec
from pikv_core.schema.generate import CacheRecipe


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
    router: RouterSpec = Component("base")  # with options of its own: {name: fast, gate: noisy}; of arch pikv
    balance_loss: Annotated[float, Field(ge=0)] = 0.01
    z_loss: Annotated[float, Field(ge=0)] = 0.001
    expert_rank: Positive | None = None  # experts share one base and differ by weights of this rank; of arch pikv
    expert_alpha: Annotated[float, Field(gt=0)] = 1.0  # their scale is expert_alpha / expert_rank
    train_base: bool = True  # whether that base learns too
    shared_expert: bool | None = None  # one more expert for every token, by default as the router has it; of arch pikv
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    max_positions: Positive = 4096
    attention_bias: bool = True  # of q and k, where the architecture has it
    qk_norm: bool = False  # normalise queries and keys, as qwen3_moe always does; of arch pikv

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

    @model_validator(mode="after")
    def _router_fits(self) -> ModelRecipe:
        ours = {"router": Component("base"), "expert_rank": None, "shared_expert": None, "qk_norm": False}
        given = [name for name, default in ours.items() if getattr(self, name) != default]
        if given and self.arch != "pikv":
            text = f"{', '.join(given)}: arch '{self.arch}' of transformers has none; set model.arch: pikv"
            raise PydanticCustomError("sizes", "{text}", {"text": text})
        if not self.train_base and self.expert_rank is None:
            raise PydanticCustomError("sizes", "train_base: there is a base to freeze with expert_rank alone")
        if self.router.options:  # by building it, for nothing else knows what its options allow
            check_router(self.router, self.hidden_size, self.num_experts, self.top_k)
        return self


def check_router(router: Component, hidden_size: int, num_experts: int, top_k: int) -> None:
    """Raise pydantic's error where a router of these sizes cannot have its options."""
    import torch

    from pikv_core.moe import create_moe_router

    try:
        with torch.device("meta"):
            create_moe_router(router.name, hidden_size, num_experts, top_k, **router.options)
    except UsageError as error:
        raise as_pydantic(error) from None


class DataRecipe(Section):
    """The task; `path` is a folder gen-data wrote for it (without it, the data are made for the run)."""

    task: TaskSpec = Component("recall")
    path: str | None = None
    text: list[str] = []
    column: str | None = None


class LoRASettings(Section):
    """Low-rank weights beside frozen ones (arXiv 2106.09685), on attention and experts."""

    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0  # the low-rank product is scaled by alpha / rank
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of what goes into it, in training
    targets: list[str] = []  # names of modules and of stacked weights; by default attention's and the feed-forward's
    merge: bool = True  # into the saved model; otherwise it stays as it was, and the adapter lies beside it


class DistillSettings(Section):
    """A teacher to learn from (arXiv 1503.02531); it leaves no trace in the saved model."""

    teacher: str  # a model folder, a run folder, or a hub id; of the same tokens
    temperature: Annotated[float, Field(gt=0)] = 2.0
    logits: Annotated[float, Field(ge=0)] = 1.0  # weight of temperature²·KL(teacher, student) where answers are scored
    hidden: Annotated[float, Field(ge=0)] = 0.0  # weight of the relative squared error of the last hidden states

    @model_validator(mode="after")
    def _learns_something(self) -> DistillSettings:
        if self.logits == self.hidden == 0:
            raise PydanticCustomError("sizes", "logits and hidden are both 0: there is nothing to learn of the teacher")
        return self


class ParallelSettings(Section):
    """How the processes that torchrun starts share the work; each has its part of every batch."""

    expert_ranks: Positive = 1  # processes that share the experts of every layer; of arch pikv
    place_every: Positive = 100  # steps after which the router eplb has experts moved and copied by their load


class TrainSettings(Section):
    """The course of training; lengths in tokens."""

    init_from: str | None = (
        None  # a trained model to go on from; with a section `model`, a dense one to make experts of
    )
    lora: LoRASettings | None = None
    distill: DistillSettings | None = None
    cache: CacheRecipe | None = None  # what is kept of a context when the tokens after it are read
    selection_loss: Annotated[float, Field(ge=0)] = 0.0  # weight of: the policy observes what is read later

    parallel: ParallelSettings = ParallelSettings()

    batch_tokens: Positive = 4096  # a step, of all processes together
    max_steps: Positive = 6000
    # Without stages to master, as most tasks are, the last length is that of every step, and of a text the most tokens.
    curriculum: Annotated[list[Positive], Field(min_length=1)] = [16, 32, 64, 128, 256, 512, 1024]
    stage_accuracy: Share | None = 0.9  # batch accuracy (moving average) that ends a stage; none: no stages
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
    parallel: ParallelSettings = ParallelSettings()

    batch_tokens: Positive = 4096  # a step, of all processes together
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


class TokenScorerSettings(Section):
    """How the networks of the policy `learned-scorer` are fitted to a trained model; lengths in tokens."""

    length: Annotated[int, Field(ge=16)] = 1024  # of a sample
    context: Annotated[float, Field(gt=0, lt=1)] = 0.75  # share of a sample that is scored; what follows it attends
    samples: Positive = 32
    width: Positive = 32  # of the hidden layer of each head's network
    steps: Positive = 600
    batch_tokens: Positive = 512  # a step, of each head
    lr: Annotated[float, Field(gt=0)] = 0.01
    text: list[str] = []  # around the needles, in place of the embedded corpus
    column: str | None = None
    log_every: Positive = 50
    eval_samples: Positive = 16

    @property
    def num_context(self) -> int:
        return max(1, int(self.context * self.length))


class PolicyRouterSettings(Section):
    """How the routers of the policy `moe-router` are trained beside a frozen model; lengths in tokens."""

    strategies: Annotated[list[str], Field(min_length=2)] | None = None  # policies; by default moe-router's own
    num_strategies: Annotated[int, Field(ge=2)] | Literal["auto"] | None = None  # of them kept; auto: those that help
    router: Literal["base", "pikv"] = "base"
    mode: Literal["budget", "native"] = "budget"  # native: layers share a budget by the strategies' own shares
    mu: Annotated[float, Field(ge=0)] = 0.1  # nats that a layer kept whole is worth to the others; of mode native
    cache_aware: bool = False  # whether routers look at hit rates and at the history of costs
    calibration: list[str] = []  # folders of what calibrated strategies need, and of routers whose history goes on
    length: Annotated[int, Field(ge=16)] = 1024  # of a prompt and what follows it
    context: Annotated[float, Field(gt=0, lt=1)] = 0.9  # share of it that is compressed; what follows measures the loss
    budgets: Annotated[list[Share], Field(min_length=1)] = [0.5, 0.35, 0.2]  # shares of the context
    samples: Positive = 144  # prompts, each under every budget
    rounds: Positive = 1  # measured with the best single strategy in the other layers at first, then as routers choose
    validation_samples: Positive = 48  # prompts that tell the best single strategy, and how far to lean to it
    steps: Positive = 400  # a round
    batch: Positive = 64  # lessons a step
    lr: Annotated[float, Field(gt=0)] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    noise: Annotated[float, Field(ge=0)] = 1.0  # on features, in their standard deviations: what is unsure stays safe
    aversions: Annotated[list[Annotated[float, Field(ge=1)]], Field(min_length=1)] = [
        1.0,
        4.0,
        16.0,
    ]  # to losses; tried
    balance: Annotated[float, Field(ge=0)] = 0.01  # weight of the balance over strategies
    text: list[str] = []  # around the needles, in place of the embedded corpus
    column: str | None = None
    log_every: Positive = 50
    eval_samples: Positive = 16

    @property
    def num_context(self) -> int:
        return max(1, int(self.context * self.length))


class ExportSettings(Section):
    """The architecture in which a trained model is told; its weights stay what they are."""

    to: Literal["mixtral", "qwen3_moe", "llama", "pikv"]


WITH_START = ("duo_gates", "token_scorer", "policy_router", "export")


class TrainRecipe(Recipe):
    """A model to train, or one that `start` names: to fit a policy to, or to tell in another architecture."""

    verb: Literal["train"] = "train"
    model: ModelRecipe = ModelRecipe()
    data: DataRecipe = DataRecipe()
    train: TrainSettings = TrainSettings()
    start: str | None = None  # a trained model's folder, its run folder, or a hub id
    duo_gates: DuoGateSettings | None = None
    token_scorer: TokenScorerSettings | None = None
    policy_router: PolicyRouterSettings | None = None
    export: ExportSettings | None = None

    @property
    def job(self) -> str:
        return next(iter(self._with_start), "train")

    @property
    def _with_start(self) -> list[str]:
        """Name the sections given that say what is done with the model `start`, and train nothing of it."""
        return [name for name in WITH_START if getattr(self, name) is not None]

    @property
    def builds(self) -> bool:
        """Whether the model is built from `model`; else it is the one that train.init_from names."""
        return self.train.init_from is None or "model" in self.model_fields_set

    @model_serializer(mode="wrap")
    def _only_what_counts(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        tree = handler(self)
        unused = ["model", "data", "train"] if self._with_start else ["start"]
        unused += [name for name in WITH_START if getattr(self, name) is None]
        if not self.builds:
            unused.append("model")
        elif self.train.init_from is not None:  # whose sizes are those that are not given
            given = self.model.model_fields_set
            tree["model"] = {name: value for name, value in tree["model"].items() if name in given}
        return {name: value for name, value in tree.items() if name not in unused}

    @model_validator(mode="after")
    def _gates_or_a_model(self) -> TrainRecipe:
        what = self._with_start
        if len(what) > 1:
            text = f"{' and '.join(what)} are {len(what)} runs, one after the other"
            raise PydanticCustomError("sizes", "{text}", {"text": text})
        if self.export is not None and self.start is None:
            raise PydanticCustomError("sizes", "export tells the trained model that start names: give --start RUN")
        if (self.start is None) != (not what):
            fits = [name for name in WITH_START if name != "export"]
            sections = f"{', '.join(fits[:-1])} or {fits[-1]}"
            text = f"start and {sections} go together: they are fitted to the trained model that start names"
            text += "; recipes/train/duo-gates.yaml has both, and --export-only --to NAME exports that model"
            raise PydanticCustomError("sizes", "{text}", {"text": text})
        given = [name for name in ("model", "data", "train") if name in self.model_fields_set]
        if what and given:
            text = f"{', '.join(given)}: nothing of the model itself is trained with {what[0]}; drop it"
            text += ", or leave the recipe out" if self.export is not None else ""
            raise PydanticCustomError("sizes", "{text}", {"text": text})
        return self

    @model_validator(mode="after")
    def _exports_as_stored(self) -> TrainRecipe:
        if self.export is not None and (self.dtype != "auto" or self.device == "cuda"):
            text = "an export keeps the stored dtype, and is compared on the CPU; leave device and dtype out"
            raise PydanticCustomError("sizes", "{text}", {"text": text})
        return self

    @model_validator(mode="after")
    def _lengths_fit(self) -> TrainRecipe:
        longest = max(*self.train.curriculum, *self.train.eval_lengths)
        if self.train.init_from is None and longest > self.model.max_positions:
            raise PydanticCustomError(
                "sizes",
                "model.max_positions must not be below the longest length of curriculum and eval_lengths",
            )
        return self
