"""Attention without a model: random causal rows over random keys, shown to policies as a cache would show them.

Shapes: B batch, G key/value heads, R query heads of a group, S tokens and slots, D head dim, L layers.
"""

from dataclasses import dataclass, field

import torch

from pikv_core.observation import LayerRun, Rows
from pikv_core.scheduling.base import Tokens

NUM_LAYERS = 4


@dataclass
class World:
    """What every layer of a small run computes; the first `padding` slots of a row hold padding.

    steps: how many tokens arrive at a time. attention [B,G,R,S,S] and keys, values [B,G,S,D] are float64.
    """

    padding: tuple[int, ...] = (0, 5)
    steps: tuple[int, ...] = (24, 1, 1, 4, 1, 1)
    num_heads: int = 2
    group: int = 2
    head_dim: int = 16
    seed: int = 0
    rotary: object = None
    fitted: dict = field(default_factory=dict)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        B, G, R, S, D = len(self.padding), self.num_heads, self.group, sum(self.steps), self.head_dim
        self.shape = B, G, R, S, D

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        logits = 2 * random(B, G, R, S, S)
        self.keys, self.values = random(B, G, S, D) + random(B, G, 1, D), random(B, G, S, D)
        self.queries = random(B, G * R, S, D)
        pad = torch.tensor(self.padding)
        self.position = (torch.arange(S) - pad[:, None]).clamp(min=-1)
        self.num_seen = S - pad
        sees = (self.position[:, None, :] <= self.position[:, :, None]) & (self.position[:, None] >= 0)
        self.sees = sees & (self.position[:, :, None] >= 0)  # [B,S,S]
        masked = logits.masked_fill(~self.sees[:, None, None], -torch.inf)
        self.attention = torch.softmax(masked, dim=-1).nan_to_num(0.0)

    def row(self, row, heads=None):
        """Return a world of one row (and some of its heads) alone, without its padding."""
        pad = self.padding[row]
        alone = World((0,), (self.steps[0] - pad, *self.steps[1:]), self.num_heads, self.group, self.head_dim)
        heads = slice(None) if heads is None else heads
        alone.attention = self.attention[row : row + 1, heads, :, pad:, pad:]
        alone.keys, alone.values = (x[row : row + 1, heads, pad:] for x in (self.keys, self.values))
        alone.queries = self.queries[row : row + 1, :, pad:]
        alone.rotary, alone.fitted = self.rotary, self.fitted
        return alone

    def layer_runs(self):
        shared = {}
        return [
            LayerRun(index, NUM_LAYERS, self.num_heads, self.rotary, self.fitted, {}, shared)
            for index in range(NUM_LAYERS)
        ]


def show(observer, world, run, chunk=7, slots=None, steps=None):
    """Return the columns [B,G,S] after all steps, observed in chunks of queries; `slots` [S] orders the store."""
    B, _, _, S, _ = world.shape
    G = world.attention.shape[1]
    columns = {name: torch.zeros(B, G, S) for name in observer.columns}
    slots = torch.arange(S) if slots is None else slots
    in_order = torch.equal(slots, torch.arange(S))
    end = 0
    for step in world.steps[:steps]:
        start, end = end, end + step
        if getattr(observer, "sees_queries", False):
            observer.observe_queries(world.queries[:, :, start:end].float(), world.position[:, start:end], run)
        first = max(start, end - observer.observes)
        for low in range(first, end, chunk):
            high = min(end, low + chunk)
            stored = slots[:high] if in_order else slots
            rows = Rows(
                world.attention[:, :, :, low:high][..., stored].float(),
                world.position[:, low:high],
                world.position[:, None, stored].expand(-1, G, -1).to(torch.int32),
                world.sees[:, None, low:high].sum(-1).expand(-1, G, -1),
                is_first=low == first,
                num_after=end - high,
                layer=run,
            )
            observer.observe({name: x[:, :, : len(stored)] for name, x in columns.items()}, rows)
    return columns


def make_tokens(world, run, columns, capacity=8, slots=None, heads=None):
    """Return the Tokens of a store whose slots are in the order `slots` [S], after everything was seen."""
    B, _, _, S, _ = world.shape
    G = world.attention.shape[1]
    slots = torch.arange(S) if slots is None else slots
    position = world.position[:, None, slots].expand(-1, G, -1).to(torch.int32)
    return Tokens(
        position,
        columns,
        world.num_seen.clone(),
        torch.full((B, G), capacity),
        torch.arange(G).expand(B, G) if heads is None else heads,
        torch.arange(B),
        lambda: world.keys[:, :, slots].float(),
        lambda: world.values[:, :, slots].float(),
        run,
    )


def observe_and_score(policy, world, capacity=8, slots=None, heads=None):
    """Return the policy's score [B,G,S] in the last layer, after it has observed every layer."""
    for run in world.layer_runs():
        columns = show(policy, world, run, slots=slots)
    return policy.score(make_tokens(world, run, columns, capacity, slots, heads))
