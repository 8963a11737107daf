"""Our policies as kvpress presses, one for every evictor: `from pikv_core.presses import SnapKVPress`.

A press is named after its policy's class; its fields are kvpress's `compression_ratio` and the policy's options.
`press_for` finds it by the policy's name, a plug-in's too. Policies that kvpress cannot carry are refused by name.
A policy whose press is more than its fields registers a class for it in PRESSES, a `PolicyPress` in a file of its own.
"""

from __future__ import annotations

from typing import Any

from pikv_core.errors import PiKVError, UsageError
from pikv_core.registry import Registry
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Evictor

PRESSES = Registry("press", "PRESSES", "pikv_core.presses")
INSTALL = "pip install 'pikv[kvpress]'"


def press_for(policy: str) -> Any:
    """Return the press of a registered policy, a dataclass; raise UsageError where kvpress cannot carry the policy."""
    member = POLICIES[policy]
    reason = unfit(member)
    if reason is not None:
        fit = ", ".join(name for name in POLICIES.names() if unfit(POLICIES[name]) is None)
        raise UsageError(f"policy '{policy}' has no press: it {reason}", hint=f"use PiKVCache, or one of: {fit}")
    _check_kvpress()
    from pikv_core.presses.policy_press import make_press

    return make_press(member)


def unfit(policy: Any) -> str | None:
    """Return why a policy's class cannot be a press, None where it can."""
    if not issubclass(policy, Evictor):
        return "drops no tokens"
    if policy.calibrated and policy.capacity is not Evictor.capacity:
        return "spreads its budget over heads, and kvpress keeps as many tokens of each"
    if policy.looks is not None:
        return "has to be shown more than the prompt, and a press sees each prompt once"
    if policy.waits_for_steps:
        return "goes by decode steps, and a press compresses prompts"
    return None


def press_name(policy: Any) -> str:
    """Return what the press of a policy's class is called."""
    return f"{policy.__name__}Press"


def __getattr__(name: str) -> Any:
    if name.endswith("Press"):
        for policy in POLICIES.names():
            if press_name(POLICIES[policy]) == name:
                return press_for(policy)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    known = (POLICIES[name] for name in POLICIES.names())
    return sorted([*globals(), *(press_name(policy) for policy in known if unfit(policy) is None)])


def _check_kvpress() -> None:
    try:
        import kvpress  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "kvpress":
            raise PiKVError(f"kvpress does not import: {error}", hint=INSTALL) from error
        raise PiKVError("presses need kvpress, which is not installed", hint=INSTALL) from error
    except ImportError as error:  # of a transformers that it does not know
        raise PiKVError(f"kvpress does not import: {error}", hint=INSTALL) from error
