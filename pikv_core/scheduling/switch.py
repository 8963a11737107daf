"""Switch: change among evictors while running, on the share of attention that each would have kept.

Shapes: B batch, G key/value heads, N queries, S stored tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypedDict

from pydantic import Field

from pikv_core.components import Component, build
from pikv_core.errors import UsageError
from pikv_core.observation import LayerRun, Rows
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Evictor, Tokens

if TYPE_CHECKING:
    import torch

Columns = Mapping[str, "torch.Tensor"]

STATE = "switch/state"
NEWEST, PROMPT_END = "newest", "prompt_end"


class State(TypedDict):
    """How a layer's candidates have done: recall by name, a running mean over steps, and the choice it led to.

    kept, total: attention mass of the step under way, by candidate and in all. is_new_step: its mass is yet to come.
    """

    choice: str
    recall: dict[str, float]
    challenger: str | None
    num_better: int
    kept: dict[str, float]
    total: float
    is_new_step: bool


@POLICIES.register("switch")
@dataclass(frozen=True)
class Switch(Evictor):
    """Evict by one of several policies, the first named to begin with.

    A candidate's recall is the share of the newest query's attention, over batch and heads, on the tokens that it would
    keep under the current budget; a running mean of it forgets by `decay` a step. The choice goes to another candidate
    once that one has been the best, and better by `margin`, for `patience` steps in a row. What counts is up to the
    step before. A candidate that decides once stays with what it saw of the last prompt, and keeps all later tokens.
    """

    waits_for_steps: ClassVar[bool] = True
    listed: ClassVar[str] = "policies"  # what `switch:h2o+snapkv` names
    policies: tuple[str, ...] = ("h2o", "snapkv")
    margin: Annotated[float, Field(ge=0)] = 0.02
    patience: Annotated[int, Field(ge=1)] = 8
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.95
    candidates: ClassVar[dict[str, Evictor]]

    def __post_init__(self) -> None:
        if len(set(self.policies)) < max(2, len(self.policies)):
            raise UsageError(
                f"policy '{self.name}' needs two different policies or more, got '{'+'.join(self.policies)}'",
                hint=f"for example {self.name}:h2o+snapkv",
            )
        for name in self.policies:
            reason = _unfit(POLICIES[name])
            if reason:
                fit = ", ".join(known for known in POLICIES.names() if not _unfit(POLICIES[known]))
                raise UsageError(f"policy '{name}' {reason}, which a switch cannot use", hint=f"it takes: {fit}")
        candidates = {name: build(POLICIES, Component(name)) for name in self.policies}
        own = [_own(name, column) for name, candidate in candidates.items() for column in candidate.columns]
        object.__setattr__(self, "candidates", candidates)
        object.__setattr__(self, "columns", (NEWEST, PROMPT_END, *own))
        object.__setattr__(self, "reads", tuple({name for one in candidates.values() for name in one.reads}))

    @property
    def observes(self) -> int:
        return max(2, *(candidate.observes for candidate in self.candidates.values()))  # 2: to tell prompts from steps

    def observe(self, columns: Mapping[str, torch.Tensor], rows: Rows) -> None:
        is_step = rows.is_first and rows.is_last and rows.probs.shape[3] == 1
        for name, candidate in self.candidates.items():
            seen = rows.newest(candidate.observes)
            if seen is not None and not (is_step and candidate.decides_once):
                candidate.observe(_columns_of(name, columns), seen)
        if rows.is_last:
            columns[NEWEST].copy_(rows.probs[:, :, :, -1].mean(dim=2))
            if not is_step:
                columns[PROMPT_END].copy_(rows.query_position[:, -1, None, None] + 1)
            self._state(rows.layer)["is_new_step"] = True

    def score(self, tokens: Tokens) -> torch.Tensor:
        import torch

        state = self._state(tokens.layer)
        if state["is_new_step"]:
            self._choose(state, tokens)
            state |= {"kept": dict.fromkeys(self.policies, 0.0), "total": 0.0, "is_new_step": False}
        scores = {name: self._candidate_score(name, tokens) for name in self.policies}
        newest = tokens.columns[NEWEST].masked_fill(tokens.position < 0, 0.0)
        kept = [_kept(newest, score, tokens.capacity) for score in scores.values()]
        total, *mass = torch.stack([newest.sum(), *kept]).tolist()
        state["total"] += total
        for name, more in zip(scores, mass):
            state["kept"][name] += more
        return scores[state["choice"]]

    def _state(self, layer: LayerRun) -> State:
        first = State(
            choice=self.policies[0], recall={}, challenger=None, num_better=0, kept={}, total=0.0, is_new_step=False
        )
        return layer.own.setdefault(STATE, first)

    def _candidate_score(self, name: str, tokens: Tokens) -> torch.Tensor:
        """Return a candidate's score, -inf for empty slots; if it decides once, later tokens are above all others."""
        candidate = self.candidates[name]
        seen = dataclasses.replace(tokens, columns=dict(_columns_of(name, tokens.columns)))
        is_later = tokens.columns[PROMPT_END] == 0
        if candidate.decides_once:
            prompt_end = tokens.columns[PROMPT_END].amax(dim=(1, 2)).to(tokens.num_seen.dtype)
            position = tokens.position.masked_fill(is_later, -1)
            seen = dataclasses.replace(seen, position=position, num_seen=prompt_end)
        score = candidate.score(seen).masked_fill(tokens.position < 0, float("-inf"))
        if not candidate.decides_once:
            return score
        by_age = tokens.position.argsort(dim=-1, stable=True)
        order = score.masked_fill(is_later & (tokens.position >= 0), float("inf")).gather(-1, by_age)
        rank = by_age.gather(-1, order.argsort(dim=-1, stable=True)).argsort(dim=-1).float()
        return rank.masked_fill(tokens.position < 0, float("-inf"))

    def _choose(self, state: State, tokens: Tokens) -> None:
        """Take the last step's recall into account, and change the choice where another has been better for long."""
        if not state["total"]:
            return
        for name in self.policies:
            now = state["kept"][name] / state["total"]
            state["recall"][name] = self.decay * state["recall"].get(name, now) + (1 - self.decay) * now
        best = max(self.policies, key=lambda name: state["recall"][name])
        is_better = state["recall"][best] > state["recall"][state["choice"]] + self.margin
        again = is_better and best == state["challenger"]
        state["challenger"] = best if is_better else None
        state["num_better"] = state["num_better"] + 1 if again else int(is_better)
        if state["num_better"] < self.patience:
            return
        tokens.layer.events.append(
            {
                "event": "switch",
                "layer": tokens.layer.index,
                "step": int(tokens.num_seen.max()),
                "from": state["choice"],
                "to": best,
                "recall": dict(state["recall"]),
            }
        )
        state |= {"choice": best, "challenger": None, "num_better": 0}


def _unfit(policy: Any) -> str | None:
    """Return why a policy cannot be a candidate, None where it can."""
    if not issubclass(policy, Evictor):
        return "drops no tokens"
    if policy.name == Switch.name:
        return "is a switch itself"
    if policy.looks is not None:
        return "has to be shown more than the prompt"
    if policy.calibrated:
        return "needs a calibration"
    if policy.sees_queries:
        return "learns from queries"
    if policy.capacity is not Evictor.capacity:
        return "has budgets of its own"
    return None


def _own(name: str, column: str) -> str:
    return f"{name}.{column}"


def _columns_of(name: str, columns: Columns) -> Columns:
    """Return a candidate's columns under the names it knows."""
    return {key.removeprefix(_own(name, "")): x for key, x in columns.items() if key.startswith(_own(name, ""))}


def _kept(mass: torch.Tensor, score: torch.Tensor, capacity: torch.Tensor) -> torch.Tensor:
    """Return the mass [B,G,S] on the `capacity` [B,G] tokens of the highest score, summed."""
    import torch

    best_first = mass.gather(-1, score.argsort(dim=-1, descending=True, stable=True))
    return best_first[torch.arange(mass.shape[-1], device=mass.device) < capacity[..., None]].sum()
