"""The press of any policy: kvpress's ScorerPress over `Evictor.observe` and `Evictor.score`.

Shapes: B batch, G key/value heads, T tokens of a prompt, K kept slots, D head dim.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, make_dataclass
from typing import Any, ClassVar

import torch
from kvpress import ScorerPress
from kvpress.utils import compute_n_kept

from pikv_core import recipes
from pikv_core.cache import calibration
from pikv_core.cache.rotary import Rotary, is_rotary_attention
from pikv_core.cache.store import EMPTY
from pikv_core.cache.support import windows
from pikv_core.components import Component, build
from pikv_core.errors import RecipeError, UsageError
from pikv_core.observation import LayerRun
from pikv_core.presses import PRESSES, press_name
from pikv_core.presses.masks import later_mask, real_tokens
from pikv_core.presses.prompt import Prompt
from pikv_core.presses.queries import prompt_queries
from pikv_core.presses.stats import LayerStats, stored_bytes, summary
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Evictor
from pikv_core.schema import CacheRecipe

CALIBRATION = "calibration"  # the field of policies that have learnt something
OTHER_WAY = "enter the press itself, `with press(model): ...`, or use PiKVCache"


@dataclass
class PolicyPress(ScorerPress):
    """Keep of each prompt what a policy scores highest, `1 - compression_ratio` of it, and all that comes later.

    positions: by layer, the true positions [B,G,K] of what the last prompt left, in order; -1 for slots of rows that
    have fewer tokens than others, which no later query sees.
    """

    positions: dict[int, torch.Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    policy: ClassVar[str]
    options: ClassVar[Mapping[str, Any]]  # of the policy, and their defaults
    called: ClassVar[Mapping[str, str]] = {}  # the fields of those options whose name is another here

    def __post_init__(self) -> None:
        if not 0 <= self.compression_ratio < 1:
            raise UsageError(
                f"{type(self).__name__}: compression_ratio: expected a share in [0, 1), got {self.compression_ratio}",
                hint="it is the share of a prompt that goes; 0.75 keeps a quarter",
            )
        self._built: tuple[Component, Evictor] | None = None
        self._learnt: tuple[Component, Mapping[str, torch.Tensor]] | None = None
        self._newest_layer, self._shared = -1, dict[str, Any]()
        self._stats: dict[int, LayerStats] = {}
        self._is_entered = False
        assert self._evictor  # fields are wrong here or nowhere

    @property
    def _component(self) -> Component:
        """The policy by the fields as they are now; raises RecipeError where it does not take them."""
        fields = {option: self.called.get(option, option) for option in self.options}
        options = {option: getattr(self, name) for option, name in fields.items()}
        asked = {option: value for option, value in options.items() if value != self.options[option]}
        press = type(self).__name__
        try:
            return recipes.validate(CacheRecipe, {"policy": {"name": self.policy, **asked}}, press).policy
        except RecipeError as error:
            problems = error.problems
            for option, name in fields.items():
                problems = [text.replace(f"{press}: policy.{option}:", f"{press}: {name}:") for text in problems]
            hint = f"its fields are the options of policy '{self.policy}', see docs/methods.md"
            raise RecipeError(problems, hint) from None

    @property
    def _evictor(self) -> Evictor:
        component = self._component if self._learnt is None else self._learnt[0]
        if self._built is None or self._built[0] != component:
            self._built = (component, self._build(component))
        return self._built[1]

    def _build(self, component: Component) -> Evictor:
        policy: Evictor = build(POLICIES, component)
        return policy

    def post_init_from_model(self, model: Any) -> None:
        """Take what the policy has learnt of a model, where it needs that; raises UsageError for another model's."""
        if POLICIES[self.policy].calibrated:
            folders = [*getattr(self, CALIBRATION)]
            self._learnt = calibration.fitted(folders, "policy", self._component, model.config)
            calibration.check_model(folders, model)

    @contextmanager
    def __call__(self, model: Any) -> Generator[None, None, None]:
        """Compress prompts within, and show later queries no padding."""
        with ExitStack() as entered:
            entered.enter_context(super().__call__(model))
            self._stats, self.positions = {}, {}
            for layer in getattr(model.model, "language_model", model.model).layers:
                hook = layer.self_attn.register_forward_pre_hook(self._mask_kept, with_kwargs=True)
                entered.callback(hook.remove)
            self._is_entered = True
            entered.callback(setattr, self, "_is_entered", False)
            yield

    def forward_hook(self, module: Any, input: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Compress a layer's cache after its prompt, and measure what became of it."""
        if not _is_prompt(kwargs):
            return output
        index, cache = module.layer_idx, kwargs["past_key_values"]
        self.positions.pop(index, None)
        full_bytes = stored_bytes(cache, index)
        output = super().forward_hook(module, input, kwargs, output)
        if index in self.positions:
            B, T = kwargs["hidden_states"].shape[:2]
            is_token = real_tokens(kwargs.get("attention_mask"), T)
            num_seen = B * T if is_token is None else int(is_token.sum())
            position = self.positions[index]
            self._stats[index] = LayerStats(
                num_seen * position.shape[1], int((position >= 0).sum()), stored_bytes(cache, index), full_bytes
            )
        return output

    def compress(
        self,
        module: Any,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attentions: Any,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the kept keys and values [B,G,K,D], in the order of their positions."""
        is_whole = _is_whole(hidden_states, keys, kwargs)
        if self.compression_ratio == 0 and not (is_whole and _window(module) is None):
            return keys, values
        prompt = self._prompt(module, hidden_states, keys, values, kwargs)
        if prompt.is_token is not None and not self._is_entered and self.compression_ratio:
            raise UsageError("a batch with padding needs masks, which the press itself sees to", OTHER_WAY)
        if self.compression_ratio == 0:
            position, slots = prompt.position[:, None].expand(keys.shape[:3]), None
        else:
            score, capacity = self._score(prompt, module)
            position, slots = _kept(score, capacity.to(score.device), prompt.position)
        if is_whole:
            self.positions[module.layer_idx] = position
        if slots is None or slots.shape[2] == keys.shape[2]:
            return keys, values
        by_channel = slots[..., None].expand(*slots.shape, keys.shape[-1])
        return keys.gather(2, by_channel), values.gather(2, by_channel)

    def score(
        self,
        module: Any,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attentions: Any,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Return float32 [B,G,T], higher = keep, -inf for padding: what other presses compose."""
        if type(self._evictor).capacity is not Evictor.capacity:
            raise UsageError(f"policy '{self.policy}' spreads the budget itself, so no other press can", OTHER_WAY)
        prompt = self._prompt(module, hidden_states, keys, values, kwargs)
        if (prompt.num_tokens < compute_n_kept(keys.shape[2], self.compression_ratio)).any():
            raise UsageError("a row has fewer tokens than are to stay, so padding would", OTHER_WAY)
        return self._score(prompt, module)[0]

    def get_stats(self) -> dict[str, Any]:
        """Return what the last prompt left: tokens over rows and heads, and bytes of live storage, in all and by layer.

        Measured as each layer is compressed. Raises UsageError before there was a prompt, and where another press
        compressed by this one's scores.
        """
        if not self._stats:
            raise UsageError(f"{type(self).__name__} has compressed no prompt yet", OTHER_WAY)
        return {"policy": self.policy, "compression_ratio": self.compression_ratio, **summary(self._stats)}

    @torch.no_grad()
    def _score(self, prompt: Prompt, module: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scores [B,G,T] and how many tokens [B,G] stay, on the CPU."""
        B, G, T, _ = prompt.keys.shape
        if module.layer_idx <= self._newest_layer:
            self._shared = {}
        self._newest_layer, num_layers = module.layer_idx, module.config.num_hidden_layers
        if POLICIES[self.policy].calibrated and self._learnt is None:
            raise UsageError(f"policy '{self.policy}' was not told which model it is on", OTHER_WAY)
        fitted = {} if self._learnt is None else self._learnt[1]
        run = LayerRun(module.layer_idx, num_layers, G, _rotary(module), fitted=fitted, shared=self._shared)
        mean = torch.full((B,), compute_n_kept(T, self.compression_ratio))
        own = self._evictor.capacity(mean, prompt.num_tokens, run)
        capacity = (mean[:, None] if own is None else own).clamp(min=1).minimum(prompt.num_tokens[:, None])
        if (capacity != capacity[:, :1]).any():
            raise UsageError(f"policy '{self.policy}' makes heads unequal, which a press cannot", OTHER_WAY)
        capacity = capacity.expand(B, G)
        return prompt.score(self._evictor, run, capacity), capacity

    def _prompt(
        self,
        module: Any,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        kwargs: dict[str, Any],
    ) -> Prompt:
        """Return what a hook is given as a prompt; raise UsageError where it cannot be told, or not by this policy."""
        if _window(module) is not None:
            raise UsageError(
                f"layer {module.layer_idx} has a sliding window, whose cache drops tokens by itself",
                hint="use PiKVCache, which serves such layers",
            )
        if _is_whole(hidden_states, keys, kwargs):
            is_token = real_tokens(kwargs.get("attention_mask"), keys.shape[2])
        elif self._evictor.needs and self._evictor.needs <= {"keys", "values"}:
            is_token = None  # of a part of a prompt each slot counts as its own place
        else:
            raise UsageError(
                f"policy '{self.policy}' goes by whole prompts, and was given {keys.shape[2]} slots of which it does "
                "not know the places",
                hint="presses that go by keys and values alone serve ChunkPress, DecodingPress and their like",
            )

        def queries(num_newest: int) -> torch.Tensor:
            cos, sin = (x[:, -num_newest:] for x in kwargs["position_embeddings"])
            return prompt_queries(module, hidden_states[:, -num_newest:], (cos, sin), _rotary(module))

        return Prompt(keys, values, is_token, queries, module.scaling)

    def _mask_kept(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Give new tokens the mask of a pressed layer, where they come with one."""
        position, mask = self.positions.get(module.layer_idx), kwargs.get("attention_mask")
        if position is None or mask is None or _is_prompt(kwargs):
            return None
        num_new = kwargs["hidden_states"].shape[1]
        is_kept = (position >= 0)[:, 0]
        if num_new > 1 and not bool(is_kept.all()):
            raise UsageError("after a pressed batch with padding, tokens come one at a time", OTHER_WAY)
        num_slots = kwargs["past_key_values"].get_seq_length(module.layer_idx) + num_new
        return args, {**kwargs, "attention_mask": later_mask(mask, is_kept, num_slots, num_new)}


@functools.cache
def make_press(policy: type[Evictor]) -> type[PolicyPress]:
    """Return the press of a policy's class: a dataclass with the policy's fields, of what PRESSES has for it."""
    base: type[PolicyPress] = PRESSES[policy.name] if policy.name in PRESSES.names() else PolicyPress
    fields: list[Any] = []
    options: dict[str, Any] = {}
    for one in dataclasses.fields(policy):  # type: ignore[arg-type]
        default: Any = one.default
        own: dict[str, Any] = {"default": None if default is dataclasses.MISSING else default}
        if one.default_factory is not dataclasses.MISSING:
            default, own = one.default_factory(), {"default_factory": one.default_factory}
        fields.append((base.called.get(one.name, one.name), one.type, field(**own)))
        options[one.name] = default
    doc = f"{policy.__doc__}\n\n    compression_ratio: share of each prompt that goes."
    if policy.calibrated:
        fields.append((CALIBRATION, "Sequence[str]", field(default=())))
        doc += f" {CALIBRATION}: folders that hold what the policy has learnt of the model."
    if base is not PolicyPress:
        doc += f"\n    {base.__doc__}"
    namespace = {"policy": policy.name, "options": options, "__doc__": doc, "__module__": "pikv_core.presses"}
    return make_dataclass(press_name(policy), fields, bases=(base,), namespace=namespace)


def _rotary(module: Any) -> Rotary | None:
    """Return the rotary embedding, which kvpress hangs on attention modules, None where these do not rotate."""
    embedding = getattr(module, "rotary_emb", None) if is_rotary_attention(module) else None
    return None if embedding is None else Rotary(embedding, module, module.config)


def _window(module: Any) -> int | None:
    """Return how many tokens a layer looks back, None for all."""
    return windows(module.config)[module.layer_idx]


def _is_prompt(kwargs: dict[str, Any]) -> bool:
    return int(kwargs["cache_position"][-1]) + 1 == kwargs["hidden_states"].shape[1]


def _is_whole(hidden_states: torch.Tensor, keys: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    """Tell whether keys are those of all tokens that the layer was given, in their order."""
    return hidden_states.shape[1] == keys.shape[2] == len(kwargs["cache_position"])


def _kept(score: torch.Tensor, capacity: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return positions and slots [B,G,K] of the `capacity` [B,G] best, in order; EMPTY where a row has fewer than K."""
    best = score.topk(int(capacity.max()), dim=-1).indices
    held = position[:, None].expand(score.shape).gather(2, best)
    is_surplus = torch.arange(best.shape[2], device=best.device) >= capacity[..., None]
    held, order = held.masked_fill(is_surplus, EMPTY).sort(dim=-1)
    return held, best.gather(2, order)
