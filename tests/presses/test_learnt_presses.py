"""Presses of policies that were fitted to a model keep what PiKVCache keeps, padded or not."""

import pytest
import torch
from small_calibration import policies, write
from test_policy_presses import padded, pressed, stock  # noqa: F401

from pikv_core import presses
from pikv_core.cache import PiKVCache
from pikv_core.scheduling import POLICIES

pytestmark = pytest.mark.kvpress
LEARNT = [name for name in POLICIES.names() if POLICIES[name].calibrated and not presses.unfit(POLICIES[name])]


@pytest.mark.parametrize("arch", ["llama", "pikv"])
@pytest.mark.parametrize("name", LEARNT)
def test_a_press_keeps_what_its_learnt_policy_keeps(stock, name, arch, tmp_path):  # noqa: F811
    model = stock(arch)
    folder = write(model, tmp_path / "learnt", policies(model))
    press = presses.press_for(name)(0.5, calibration=[folder])
    ids, mask = padded(90, 60)
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    pressed(model, press, ids, **inputs)
    cache = PiKVCache.for_model(model, {"policy": name, "budget": 45, "calibration": [folder]})
    with torch.no_grad():
        model(ids, past_key_values=cache, **inputs)
    model.set_attn_implementation("sdpa")
    assert len(press.positions) == len(cache.layers)
    for layer, position in press.positions.items():
        assert torch.equal(position, cache.retrieve(layer)[2].sort(dim=-1).values)
