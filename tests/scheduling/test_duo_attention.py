"""DuoAttention: which heads stream, how much they keep, and that the budget is met to the token."""

import pytest
import torch
from scheduling.synthetic import World, make_tokens
from single_layer import single_layer

from pikv_core.errors import PiKVError
from pikv_core.observation import LayerRun
from pikv_core.scheduling.duo_attention import DuoAttention


def capacities(policy, gates, mean, num_seen):
    """Return tokens per head [B,L,G]."""
    L, G = gates.shape
    runs = [LayerRun(index, L, num_kv_heads=G, fitted={"gates": gates}) for index in range(L)]
    return torch.stack([policy.capacity(torch.tensor(mean), torch.tensor(num_seen), run) for run in runs], dim=1)


def reference(gates, mean, num_seen, window):
    """Return each head's tokens by trying every number of streaming heads, fewest first; gates is a flat list."""
    num_heads, total = len(gates), mean * len(gates)
    by_gate = sorted(range(num_heads), key=lambda head: gates[head])
    window = min(window, num_seen)
    num_streaming = next((s for s in range(num_heads) if s * window + (num_heads - s) * num_seen <= total), num_heads)
    held = [num_seen] * num_heads
    for turn in range(total - (num_heads - num_streaming) * num_seen if num_streaming else 0):
        head = by_gate[turn % num_streaming]
        held[head] = held[head] % num_seen + 1 if turn < num_streaming else held[head] + 1
    return held


@pytest.mark.parametrize("sinks, recent", [(64, 256), (4, 12), (0, 1)])
def test_tokens_per_head_are_the_rules(sinks, recent):
    policy = DuoAttention(sinks=sinks, recent=recent)
    generator = torch.Generator().manual_seed(0)
    gates = torch.rand(3, 4, generator=generator)
    for num_seen in (1, 2, 5, 16, 17, 320, 321, 1000):
        for mean in sorted({1, 2, num_seen // 10, num_seen // 4, num_seen // 2, num_seen * 9 // 10, num_seen} - {0}):
            held = capacities(policy, gates, [mean], [num_seen])[0].flatten()
            expected = reference(gates.flatten().tolist(), min(mean, num_seen), num_seen, sinks + recent)
            assert held.tolist() == expected, (num_seen, mean)
            assert held.sum() == 12 * min(mean, num_seen)


def test_heads_that_keep_everything_are_those_with_the_largest_gates():
    gates = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    held = capacities(DuoAttention(sinks=2, recent=8), gates, [55, 100, 20], [100, 100, 40])
    assert held[0].tolist() == [[100, 10], [10, 100]]
    assert held[1].tolist() == [[100, 100], [100, 100]]
    assert held[2].tolist() == [[40, 14], [13, 13]]


def test_equal_gates_are_taken_in_order():
    held = capacities(DuoAttention(sinks=2, recent=8), torch.ones(2, 2), [55], [100])
    assert held[0].tolist() == [[10, 10], [100, 100]]


@pytest.mark.parametrize("capacity, num_sinks", [(20, 4), (40, 8), (320, 64), (400, 64), (1, 0), (4, 0), (5, 1)])
def test_score_is_sinks_and_newest_in_proportion(capacity, num_sinks):
    world = World(padding=(0,), steps=(500,))
    score = DuoAttention().score(make_tokens(world, world.layer_runs()[0], {}, capacity))
    kept = score[0, 0].topk(capacity).indices.sort().values.tolist()
    assert kept == [*range(num_sinks), *range(500 - capacity + num_sinks, 500)]


def test_gates_of_another_model_are_refused():
    with pytest.raises(PiKVError, match=r"gates for \(3, 2\) layers and heads, the model has \(3, 4\)"):
        DuoAttention().capacity(
            torch.tensor([5]), torch.tensor([10]), LayerRun(0, 3, num_kv_heads=4, fitted={"gates": torch.ones(3, 2)})
        )


def test_a_layer_holds_all_tokens_in_one_head_and_a_stream_in_the_other():
    run = LayerRun(0, 1, fitted={"gates": torch.tensor([[0.3, 0.7]])})
    layer = single_layer(DuoAttention(sinks=2, recent=6), budget=0.5, run=run)
    generator = torch.Generator().manual_seed(0)
    seen = 0
    for num_new in (30, *[1] * 10, 5, 1):
        query = torch.randn(2, 4, num_new, 8, generator=generator)
        keys, values = torch.randn(2, 2, 2, num_new, 8, generator=generator)
        layer.update(keys, values)
        layer.attend(query, 8**-0.5)
        seen += num_new
        budget = int(0.5 * seen + 1e-6)
        streaming, whole = (sorted(x[x >= 0].tolist()) for x in layer.positions()[1])
        expected = capacities(DuoAttention(sinks=2, recent=6), torch.tensor([[0.3, 0.7]]), [budget], [seen])[0, 0]
        assert len(streaming) == expected[0] and len(whole) == expected[1]
        num_sinks = min(2, len(streaming) * 2 // 8)
        assert streaming[:num_sinks] == list(range(num_sinks))
        assert len(streaming) + len(whole) == 2 * budget
