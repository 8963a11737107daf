"""Policies told of what a recipe says elsewhere: the model that computes blocks again, and the seed."""

from __future__ import annotations

import dataclasses
from typing import cast

from pikv_core.components import Component, build
from pikv_core.simulation.cost.kv_model import KvModel
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.policies.base import RequestPolicy


def build_priced(component: Component, model: KvModel | None, seed: int = 0) -> RequestPolicy:
    """Build a policy; `attention_tokens` and `seed`, where it has such an option, are these unless it names others."""
    told = {"seed": abs(seed)} if model is None else {"seed": abs(seed), "attention_tokens": model.attention_tokens}
    fields = {field.name for field in dataclasses.fields(REQUEST_POLICIES[component.name])}
    taken = {name: value for name, value in told.items() if name in fields}
    component = Component(component.name, {**taken, **component.options})
    return cast(RequestPolicy, build(REQUEST_POLICIES, component))
