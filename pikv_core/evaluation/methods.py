"""Methods of a sweep: `h2o`, `int8`, `h2o+int8`: a policy, a codec or both, at a budget."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pikv_core.components import Component
from pikv_core.compression import CODECS
from pikv_core.errors import UsageError, closest
from pikv_core.scheduling import POLICIES
from pikv_core.schema import CacheRecipe


@dataclass(frozen=True)
class Method:
    """One row of a sweep."""

    cache: CacheRecipe

    @property
    def label(self) -> str:
        return label(self.cache.policy.name, self.cache.codec.name)


def label(policy: str, codec: str) -> str:
    """Name a policy and a codec as on the command line: `h2o`, `int8`, `h2o+int8`."""
    return policy if codec == "none" else codec if policy == "full" else f"{policy}+{codec}"


def expand(methods: Iterable[str], budgets: Iterable[float | int | str], allocation: Component) -> list[Method]:
    """Return a method for each name and budget, the full cache first; a codec alone has no budget.

    Raises UsageError for a name that is neither policy nor codec, or a pair that is not one of each.
    """
    rows: dict[tuple[str, str], Method] = {}
    budgets = list(budgets)
    for text in ["full", *methods]:
        policy, codec = _parse(text)
        limited: list[float | int | str] = [1.0] if policy == "full" else budgets
        for budget in limited:
            cache = CacheRecipe(policy=Component(policy), codec=Component(codec), budget=budget, allocation=allocation)
            rows.setdefault((f"{policy}+{codec}", repr(budget)), Method(cache))
    return list(rows.values())


def _parse(text: str) -> tuple[str, str]:
    parts = [part.strip() for part in text.split("+")]
    policies = [part for part in parts if part in POLICIES.names()]
    codecs = [part for part in parts if part in CODECS.names()]
    for part in parts:
        if part not in policies and part not in codecs:
            names = [*POLICIES.names(), *CODECS.names()]
            raise UsageError(
                f"method '{text}': '{part}' is neither a policy nor a codec{closest(part, names)}",
                hint=f"policies: {', '.join(POLICIES.names())}; codecs: {', '.join(CODECS.names())}",
            )
    if len(policies) > 1 or len(codecs) > 1:
        raise UsageError(f"method '{text}': at most one policy and one codec", hint="for example h2o+int8")
    return (policies or ["full"])[0], (codecs or ["none"])[0]
