"""Methods of a sweep as text: `h2o`, `int8`, `h2o+int8`, `snapkv+int4@ada-kv`, `switch:h2o+snapkv+int8`."""

from __future__ import annotations

from typing import Any

from pydantic_core import PydanticCustomError

from pikv_core.components import Component
from pikv_core.compression import CODECS
from pikv_core.errors import closest
from pikv_core.scheduling import POLICIES

SWITCH = "switch"


def parse(text: str) -> dict[str, Any]:
    """Return the keys of a MethodRecipe: a policy, a codec or both, joined by `+`, then `@` and an allocation.

    After `switch:` come policies, joined by `+`; a codec may follow them. Raises pydantic's error for a name that is
    neither policy nor codec, or more than one of each.
    """
    body, at, allocation = text.partition("@")
    head, colon, rest = body.partition(":")
    policies, codecs = _split(text, rest if colon else body)
    if (len(policies) > 1 and not colon) or len(codecs) > 1:
        raise _problem(text, "at most one policy and one codec", f"for example h2o+int8, {SWITCH}:h2o+snapkv+int8")
    policy = f"{head.strip()}:{'+'.join(policies)}" if colon else (policies or ["full"])[0]
    method: dict[str, Any] = {"policy": policy, "codec": (codecs or ["none"])[0]}
    return {**method, "allocation": allocation.strip()} if at else method


def label(policy: Component, codec: Component, allocation: Component, rerotate: bool = False) -> str:
    """Name a method as on the command line, with what the command line cannot say in brackets."""
    name = policy.label(*(["rerotate"] if rerotate else []))
    if codec.name != "none":
        name = codec.label() if name == "full" else f"{name}+{codec.label()}"
    return name if allocation == Component("uniform") else f"{name}@{allocation.label()}"


def _split(text: str, joined: str) -> tuple[list[str], list[str]]:
    parts = [part.strip() for part in joined.split("+")]
    policies = [part for part in parts if part in POLICIES.names()]
    codecs = [part for part in parts if part in CODECS.names()]
    for part in parts:
        if part not in policies and part not in codecs:
            near = closest(part, [*POLICIES.names(), *CODECS.names()])
            allowed = f"policies: {', '.join(POLICIES.names())}; codecs: {', '.join(CODECS.names())}"
            raise _problem(text, f"'{part}' is neither a policy nor a codec{near}", allowed)
    return policies, codecs


def _problem(text: str, reason: str, allowed: str) -> PydanticCustomError:
    return PydanticCustomError("component", "{text}", {"text": f"method '{text}': {reason}; {allowed}"})
