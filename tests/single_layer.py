"""A cache's layer on its own, fed by hand."""

from pikv_core.cache.budget import Budget
from pikv_core.cache.layer import CacheLayer
from pikv_core.compression.none import Plain
from pikv_core.observation import LayerRun
from pikv_core.scheduling.allocation.uniform import Uniform


def single_layer(policy, budget, codec=None, allocation=None, window=None, run=None):
    """Return a layer that drops and encodes after every step; budget: a share or tokens."""
    codec, limit = codec or Plain(), Budget(budget)
    layer = CacheLayer(
        run or LayerRun(0, 1),
        policy,
        allocation or Uniform(),
        limit,
        window,
        rerotate=False,
        bind=lambda index, shape: (codec, limit),
        after_step=lambda index, is_prompt: layer.compress(),
        on_change=lambda index: None,
    )
    return layer
