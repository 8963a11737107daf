"""PiKVCache: a transformers cache that keeps what a policy says, in the form a codec says."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from pikv_core import recipes
from pikv_core.cache import by_hand
from pikv_core.cache.attention import ENTRY, claim_entry
from pikv_core.cache.backend import check_forced
from pikv_core.cache.budget import Budget, Shape
from pikv_core.cache.layer import CacheLayer
from pikv_core.cache.ranks.split import Wire, make_split
from pikv_core.cache.recording import Recorder
from pikv_core.cache.rotary import Rotary
from pikv_core.cache.shards.routing import Routing
from pikv_core.cache.static import check_static
from pikv_core.cache.support import allocation_of, check_layers, check_recipe, windows
from pikv_core.cache.tiers.tiers import Tiers
from pikv_core.components import Component, build
from pikv_core.compression import CODECS
from pikv_core.compression.base import Codec
from pikv_core.compression.none import Plain
from pikv_core.errors import PiKVError, UsageError
from pikv_core.observation import LayerRun, Reads
from pikv_core.registry import Registry
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Evictor, Policy, ShardSelector
from pikv_core.scheduling.flexgen import FlexGen
from pikv_core.schema import CacheRecipe


class PiKVCache(Cache):
    """Serve as `past_key_values` of any decoder that attends through transformers' attention interface.

    config: the model's own config object; its attention is switched to the entry "pikv", which without a PiKVCache
    is transformers' SDPA. recipe: policy, budget, allocation and codec. Policies and codecs that rotate keys or were
    calibrated also need the model: `PiKVCache.for_model(model, recipe)`, or `attach(model)` before the first token.
    """

    def __init__(self, config: Any, recipe: CacheRecipe | None = None):
        recipe = recipe or CacheRecipe()
        check_recipe(recipe)
        policy, policy_tensors = _ready(POLICIES, "policy", recipe.policy, recipe, config)
        self._asked_codec, self._codec_tensors = _ready(CODECS, "codec", recipe.codec, recipe, config)
        allocation, budget = allocation_of(recipe, policy), Budget(recipe.budget)
        self.recipe, self._config = recipe, config
        per_layer = windows(config)
        check_layers(policy, allocation, budget, per_layer)
        self._codecs: list[Codec] | None = None
        self._num_columns = _num_columns(policy)
        self._asks = isinstance(policy, Evictor) and policy.asks
        self.compares_layers = allocation.compares_layers and isinstance(policy, Evictor)
        self._layer_bytes = [0] * len(per_layer)
        self._total_bytes = self.peak_bytes = 0
        self.events: list[dict[str, Any]] = []  # what policies tell of the run, such as switches
        self.repeat_words: torch.Tensor | None = None  # [1,K]: put before the prompt when it is shown again
        shared: dict[str, Any] = {}
        super().__init__(
            layers=[
                CacheLayer(
                    LayerRun(index, len(per_layer), fitted=policy_tensors, shared=shared, events=self.events),
                    policy,
                    allocation,
                    budget,
                    window,
                    recipe.rerotate,
                    self._bind,
                    self._after_step,
                    self._note_bytes,
                )
                for index, window in enumerate(per_layer)
            ]
        )
        placed = recipe.tiers is not None or isinstance(policy, FlexGen)
        self.tiers = Tiers(recipe, policy, per_layer) if placed else None  # None: all of it is on the device
        for layer in self.own_layers:
            layer.tiers = self.tiers
        claim_entry()
        config._attn_implementation = ENTRY

    @classmethod
    def for_model(cls, model: PreTrainedModel, recipe: Any) -> PiKVCache:
        """Build from whatever `from_recipe` takes, and attach to the model."""
        return cls.from_recipe(model.config, recipe).attach(model)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Hand new keys and values [B,G,T,D] to a layer, which the attention entry then gets in their place."""
        if layer_idx == 0 and self._config._attn_implementation != ENTRY:
            raise PiKVError(
                f"the model's attention was set to '{self._config._attn_implementation}' after the cache was made",
                hint="call cache.attach(model)",
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @classmethod
    def from_recipe(cls, config: Any, recipe: Any) -> PiKVCache:
        """Build from a CacheRecipe, a recipe that holds one, a mapping of its keys, or a YAML file of `generate`."""
        if isinstance(recipe, str | Path):
            recipe = recipes.load("generate", recipe, flags={"model": "given"})
        if isinstance(recipe, Mapping):
            recipe = recipes.validate(CacheRecipe, recipe, "cache")
        return cls(config, recipe if isinstance(recipe, CacheRecipe) else recipe.cache)

    @property
    def own_layers(self) -> list[CacheLayer]:
        """The layers, as what they are."""
        return cast("list[CacheLayer]", self.layers)

    @classmethod
    def in_tokens(cls, model: PreTrainedModel, recipe: CacheRecipe) -> CacheRecipe:
        """Return the recipe with a budget in bytes turned into the tokens per head it is for one sequence."""
        cache = cls.for_model(model, recipe)
        _, budget = cache._bind(0, cache._shape_for(model))
        return recipe.model_copy(update={"budget": budget.value})

    def check_backend(self, model: PreTrainedModel) -> None:
        """Raise UsageError where the backend that is forced (`attending_by`) has no kernel for codec or dtype."""
        shape = self._shape_for(model)
        codecs = {id(codec): codec for codec, _ in (self._bind(index, shape) for index in range(len(self.layers)))}
        heads = model.config.get_text_config(decoder=True).num_attention_heads
        check_forced([Plain(), *codecs.values()], heads, shape, model.device)

    def _shape_for(self, model: PreTrainedModel) -> Shape:
        """Return the sizes of one sequence of the model."""
        text = model.config.get_text_config(decoder=True)
        heads = text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        return Shape(len(self.layers), 1, getattr(text, "num_key_value_heads", None) or heads, head_dim, model.dtype)

    def share(self, split: str, wire: Wire, model: PreTrainedModel) -> PiKVCache:
        """Hold a part of every layer, split over a wire's ranks by "heads", "tokens" or "shards"; return the cache.

        Raises UsageError where the recipe cannot be split so.
        """
        shape = self._shape_for(model)
        codecs = [self._bind(index, shape)[0] for index in range(len(self.layers))]
        policy, per_layer = self.own_layers[0].policy, windows(self._config)
        made = make_split(split, wire, self.recipe, policy, codecs, shape.num_kv_heads, per_layer)
        for layer in self.own_layers:
            layer.split = made
        return self

    def attach(self, model: PreTrainedModel) -> PiKVCache:
        """Make `model` attend through this cache's entry, and return the cache.

        Raises UsageError where a calibration was made for another model.
        """
        if self.recipe.calibration:
            from pikv_core.cache import calibration

            calibration.check_model(self.recipe.calibration, model)
        rotary, policy = Rotary.of(model), self.own_layers[0].policy
        routing = Routing.of(model) if isinstance(policy, ShardSelector) and policy.by == "router" else None
        for layer in self.own_layers:
            layer.run.rotary, layer.run.routing = rotary, routing
        self._codecs = None
        model.set_attn_implementation(ENTRY)
        return self

    @property
    def looks(self) -> Literal["repeat", "future"] | None:
        """What the policy has to be shown after a prompt (see `Evictor.looks`), None for nothing."""
        evictor = self.own_layers[0].evictor
        return None if evictor is None else evictor.looks

    def look(self) -> None:
        """Let a policy that looks observe what is fed from now on, while the cache is held, until `compress`.

        Raises UsageError where it is not held.
        """
        for layer in self.own_layers:
            layer.look()

    def fork(self) -> PiKVCache:
        """Return a copy with storage of its own, which goes on from here apart from this one."""
        shared = [self._config, self.recipe, self._codecs, self._codec_tensors, self._asked_codec]
        for layer in self.own_layers:
            shared += [layer.policy, layer.allocation, layer.run.rotary, layer.run.routing, layer.run.fitted]
        return copy.deepcopy(self, {id(x): x for x in shared})

    @property
    def positions(self) -> list[torch.Tensor]:
        """True positions [B,G,S] of what each layer stores, -1 for empty slots."""
        return [layer.positions() for layer in self.own_layers]

    @property
    def resident_bytes(self) -> int:
        """Bytes of live storage over all layers and tiers, staging buffers included."""
        return sum(layer.resident_bytes for layer in self.own_layers) + self._staging_bytes

    @property
    def _staging_bytes(self) -> int:
        return 0 if self.tiers is None else self.tiers.staging_bytes

    @property
    def full_bytes(self) -> int:
        """Bytes that transformers' own cache would hold for the same tokens and dtype."""
        return sum(layer.full_bytes for layer in self.own_layers)

    @property
    def num_stored(self) -> list[int]:
        """Slots per head of each layer; the mean, rounded up, where heads are unequal."""
        return [layer.num_stored for layer in self.own_layers]

    def append(
        self,
        layer_id: int,
        token_id: int,
        k: torch.Tensor,
        v: torch.Tensor,
        q: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> torch.Tensor | None:
        """Hand a layer its next token, or several, without a model; return what `q` attends to, None without it.

        k, v: [G,D], [B,G,D] or [B,G,T,D], keys as attention uses them. q: the same with H heads; it sees these tokens
        and all that are left of those before them. token_id: how many tokens the layer has seen before. scale: of the
        logits, by default D^-1/2. Several tokens at once are a prompt. Raises UsageError for a token out of order, and
        without q where policy, allocation or codec goes by attention.
        """
        if not 0 <= layer_id < len(self.layers):
            raise UsageError(f"no layer {layer_id}", hint=f"the layers are 0 to {len(self.layers) - 1}")
        return by_hand.append(self.own_layers[layer_id], token_id, k, v, q, scale)

    def retrieve(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return a layer's keys and values [B,G,S,D], decoded, and their true positions [B,G,S] (-1: empty)."""
        return self.own_layers[layer].retrieve()

    def record(self, recorder: Recorder) -> None:
        """Let a recorder see keys, queries and attention of what is fed from now on, which changes nothing else.

        Raises UsageError where the cache keeps a part or codes: a record is of the whole attention.
        """
        if self.recipe.policy.name != "full" or self.recipe.codec.name != "none" or self.tiers is not None:
            raise UsageError(
                "only a cache of policy 'full' and codec 'none' in one memory records: what is dropped, coded or "
                "elsewhere has no attention",
                hint="leave out policy, budget, codec and tiers",
            )
        for layer in self.own_layers:
            layer.recorder = recorder

    def count_reads(self) -> Reads:
        """Count from now on, in what is returned, the bytes that attention of single new tokens reads."""
        reads = Reads()
        for layer in self.own_layers:
            layer.run.reads = reads
        return reads

    @property
    def is_held(self) -> bool:
        """Whether `hold` was called, and `compress` not yet."""
        return self.own_layers[0].held

    def hold(self) -> None:
        """Keep all that arrives, whatever the budget, until `compress`; statistics go on."""
        for layer in self.own_layers:
            layer.hold()

    def compress(self) -> None:
        """End `hold`: drop what is over budget and encode."""
        self.ask()
        for layer in self.own_layers:
            layer.compress()

    def ask(self) -> None:
        """Let every layer ask for its part of the budget, where the policy's layers do; before any of them drops."""
        if self._asks:
            for layer in self.own_layers:
                layer.ask()

    def check_static(self) -> None:
        """Raise UsageError where a step of one token never comes to be the same as the one before it."""
        first = self.own_layers[0]
        check_static(self.recipe, first.policy, first.allocation, windows(self._config))

    @property
    def is_static(self) -> bool:
        """Whether every layer is at its budget, so that a step can be recorded and replayed."""
        return all(layer.is_static for layer in self.own_layers)

    def reset(self) -> None:
        """Forget every token and the peak."""
        super().reset()
        self._layer_bytes = [0] * len(self.own_layers)
        self._total_bytes = self.peak_bytes = 0
        self._codecs = None
        if self.tiers is not None:
            self.tiers.reset()

    def rewind(self, num_tokens: int) -> None:
        """Forget the newest tokens; raises UsageError where they were not fed while the cache was held."""
        for layer in self.own_layers:
            layer.rewind(num_tokens)

    def _bind(self, layer: int, shape: Shape) -> tuple[Codec, Budget]:
        """Return a layer's codec and the budget in tokens, now that the keys' shape is known."""
        if self._codecs is None:
            rotary = self.own_layers[0].run.rotary
            self._codecs = [
                self._asked_codec.for_layer(index, self._codec_tensors, rotary) for index in range(len(self.layers))
            ]
            if self.recipe.rerotate and rotary is None:
                raise PiKVError(
                    "rerotate needs the model's rotary embedding",
                    hint="make the cache by PiKVCache.for_model(model, recipe); learned positions cannot be moved",
                )
        return self._codecs[layer], Budget(self.recipe.budget).resolve(shape, self._codecs, self._num_columns)

    def _after_step(self, layer: int, is_prompt: bool) -> None:
        """Let a layer drop and encode; all of them after the last one, where the allocation compares layers."""
        own = self.own_layers[layer]
        if not (self.compares_layers and (is_prompt or (self._asks and own.scoring))):
            own.compress()
        elif layer == len(self.layers) - 1:
            self.compress()

    def _note_bytes(self, layer: int) -> None:
        held = self.own_layers[layer].resident_bytes
        self._total_bytes += held - self._layer_bytes[layer]
        self._layer_bytes[layer] = held
        self.peak_bytes = max(self.peak_bytes, self._total_bytes + self._staging_bytes)
        if self.tiers is not None:
            self.tiers.note(layer, held)


def _ready(
    registry: Registry, kind: Literal["codec", "policy"], component: Component, recipe: CacheRecipe, config: Any
) -> tuple[Any, Mapping[str, torch.Tensor]]:
    """Build a policy or codec, with what was fitted of it where it needs that."""
    if not registry[component.name].calibrated:
        return build(registry, component), {}
    from pikv_core.cache import calibration

    component, tensors = calibration.fitted(recipe.calibration, kind, component, config)
    return build(registry, component), tensors


def _num_columns(policy: Policy) -> int:
    """Count the float32 statistics that stay with each token."""
    if not isinstance(policy, Evictor):
        return 0
    return 1 if policy.decides_once else len(policy.columns)
