"""Evicting what is encoded: whole units, by score, never below the budget, the same in a batch as alone."""

import pytest
import torch
from single_layer import single_layer

from pikv_core.compression.int8 import Int8
from pikv_core.scheduling.h2o import H2O
from pikv_core.scheduling.streaming_llm import StreamingLLM

B, H, G, D, UNIT, RESIDUAL = 2, 4, 2, 16, 16, 8


def layer_of(policy, budget):
    return single_layer(policy, budget, Int8(group=UNIT, residual=RESIDUAL))


def feed(layer, schedule, seed=0, first_is_token=None, rows=slice(None), start=0):
    """Feed steps of these lengths, the first from `start` on; return outputs and the kept positions after each."""
    generator = torch.Generator().manual_seed(seed)
    outputs, kept = [], []
    for index, T in enumerate(schedule):
        query = torch.randn(B, H, T, D, generator=generator)[rows]
        keys, values = (torch.randn(B, G, T, D, generator=generator)[rows] for _ in range(2))
        begin = start if index == 0 else 0
        layer.update(keys[:, :, begin:], values[:, :, begin:])
        outputs.append(layer.attend(query[:, :, begin:], D**-0.5, first_is_token if index == 0 else None))
        position = layer.retrieve()[2]
        kept.append([[sorted(int(p) for p in head if p >= 0) for head in row] for row in position])
    return outputs, kept


@pytest.mark.parametrize("policy", [StreamingLLM(), H2O()])
def test_a_second_turn_competes_with_the_old_context(policy):
    _, kept = feed(layer_of(policy, 100), [150, 1, 1, 200, 1, 1])
    for rows in kept[2:]:
        for row in rows:
            for head in row:
                assert 100 <= len(head) <= 100 + UNIT + RESIDUAL
                if isinstance(policy, StreamingLLM):
                    assert head[:4] == [0, 1, 2, 3]


@pytest.mark.parametrize("policy", [StreamingLLM(), H2O()])
def test_many_steps_keep_tokens_positions_and_budget(policy):
    layer = layer_of(policy, 60)
    _, kept = feed(layer, [90] + [1] * 150)
    for step, rows in enumerate(kept[10:], 10):
        for row in rows:
            for head in row:
                assert len(set(head)) == len(head) and head[-1] == 89 + step
                assert 60 <= len(head) < 60 + UNIT
    keys = layer.retrieve()[0]
    generator = torch.Generator().manual_seed(0)
    fed = []
    for T in [90] + [1] * 150:
        torch.randn(B, H, T, D, generator=generator)
        fed.append(torch.randn(B, G, T, D, generator=generator))
        torch.randn(B, G, T, D, generator=generator)
    exact = torch.cat(fed, dim=2)
    position = layer.retrieve()[2].long()
    taken = exact.gather(2, position.clamp(min=0)[..., None].expand(*position.shape, D))
    assert ((keys - taken).abs()[position >= 0] < 0.05).all()


@pytest.mark.parametrize("policy", [StreamingLLM(), H2O()])
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_short_neighbour_takes_nothing_from_a_row(policy, share):
    schedule = [130] + [1] * 40 + [30] + [1] * 10
    is_token = torch.ones(B, 130, dtype=torch.bool)
    is_token[1, :90] = False
    together, kept = feed(layer_of(policy, share), schedule, first_is_token=is_token)
    alone, kept_alone = feed(layer_of(policy, share), schedule, rows=slice(0, 1))
    for step, (both, one) in enumerate(zip(together, alone)):
        assert (both[:1] - one).abs().max() < 1e-4, f"step {step}"
        assert kept[step][0] == kept_alone[step][0]
    for step, rows in enumerate(kept):
        seen = 130 + sum(schedule[1 : step + 1])
        for row, num_seen in zip(rows, (seen, seen - 90)):
            for head in row:
                assert len(head) >= int(share * num_seen)
