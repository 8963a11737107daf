"""Which policies a trace can be replayed under: those whose declared needs it holds."""

from __future__ import annotations

from collections.abc import Iterable

from pikv_core.components import Component, build
from pikv_core.errors import UsageError
from pikv_core.observation import ALL
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.allocation.base import Allocation
from pikv_core.scheduling.base import Evictor, Policy
from pikv_core.simulation.attention.trace import AttentionTrace

IN_WORDS = {
    "calibration": "a calibration",
    "repetition": "the attention of a repeated prompt",
    "rotary": "the model's rotary embedding",
    "shards": "stores of its own",
}


def check_needs(trace: AttentionTrace, policies: Iterable[Policy], allocation: Allocation) -> None:
    """Raise UsageError that names every policy, and the allocation, that goes by what the trace does not hold."""
    asked = [(f"policy '{policy.name}'", missing(trace, policy)) for policy in policies]
    asked.append((f"allocation '{allocation.name}'", _missing_rows(trace, allocation.observes)))
    problems = [f"{who} goes by {', '.join(what)}" for who, what in asked if what]
    if not problems:
        return
    known = [build(POLICIES, Component(name)) for name in POLICIES.names()]
    served = ", ".join(policy.name for policy in known if not missing(trace, policy))
    raise UsageError(
        f"{'; '.join(problems)}: the trace holds {', '.join(sorted(trace.holds))}"
        + (f", of a prompt's newest {_num_rows(trace)} queries" if trace.header.first_query else ""),
        hint=f"it serves: {served}",
    )


def missing(trace: AttentionTrace, policy: Policy) -> list[str]:
    """Return in words what the policy needs and the trace does not hold."""
    found = [IN_WORDS.get(name, name) for name in sorted(policy.needs - trace.holds)]
    shown_later = isinstance(policy, Evictor) and policy.looks is not None
    observes = policy.observes if isinstance(policy, Evictor) and not shown_later else 0
    return found + _missing_rows(trace, observes)


def _missing_rows(trace: AttentionTrace, observes: int) -> list[str]:
    if min(observes, trace.header.num_prompt_tokens) <= _num_rows(trace):
        return []
    return [f"the attention of {'all' if observes == ALL else f'the newest {observes}'} prompt queries"]


def _num_rows(trace: AttentionTrace) -> int:
    return trace.header.num_prompt_tokens - trace.header.first_query
