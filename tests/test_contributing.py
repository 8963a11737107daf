"""The examples of CONTRIBUTING.md run as they stand."""

import re
from pathlib import Path

import pytest
import torch

from pikv_core.cache import PiKVCache
from pikv_core.compression import CODECS
from pikv_core.moe import create_moe
from pikv_core.moe.routers import ROUTERS
from pikv_core.scheduling import POLICIES

PRELUDE = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from pikv_core.compression import CODECS
from pikv_core.compression.base import Codec
from pikv_core.moe.routers import ROUTERS
from pikv_core.moe.routers.base import BaseRouter
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Evictor, Tokens
"""


@pytest.fixture
def examples():
    text = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
    scope = {"__name__": "contributing"}
    before = {registry: dict(registry._classes) for registry in (POLICIES, CODECS, ROUTERS)}
    exec(PRELUDE, scope)
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec("from __future__ import annotations\n" + block, scope)
    yield
    for registry, classes in before.items():
        registry._classes = classes


def test_the_examples_work(examples, small_model):
    model = small_model("llama")
    ids = torch.randint(1, 97, (2, 50), generator=torch.Generator().manual_seed(0))
    cache = PiKVCache.from_recipe(model.config, {"policy": "newest", "budget": 0.5, "codec": "half"})
    with torch.no_grad():
        model(ids, past_key_values=cache)
    keys, _, position = cache.retrieve(0)
    assert sorted(position[0, 0].tolist()) == list(range(25, 50)) and keys.dtype == torch.float32
    moe = create_moe("jittered", hidden_size=16, num_experts=4)
    x = torch.randn(3, 16)
    assert not torch.equal(moe(x)[0], moe(x)[0])
    moe.eval()
    assert torch.equal(moe(x)[0], moe(x)[0])
