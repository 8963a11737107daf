"""Policies that go by what a block costs to compute again, told of the model that computes it."""

from __future__ import annotations

import dataclasses
from typing import cast

from pikv_core.components import Component, build
from pikv_core.simulation.cost.kv_model import KvModel
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.policies.base import RequestPolicy


def build_priced(component: Component, model: KvModel | None) -> RequestPolicy:
    """Build a policy; its option `attention_tokens`, where it has one, is the model's unless another is given."""
    options = {field.name for field in dataclasses.fields(REQUEST_POLICIES[component.name])}
    if model is not None and "attention_tokens" in options:
        component = Component(component.name, {"attention_tokens": model.attention_tokens, **component.options})
    return cast(RequestPolicy, build(REQUEST_POLICIES, component))
