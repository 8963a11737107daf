"""lucidrains' top-2 gate against a float64 loop over sequences: draws, slots, losses, and none of it in evaluation."""

import math

import numpy as np
import pytest
import torch

from pikv_core.errors import UsageError
from pikv_core.moe import create_moe_router

E, D, B, S = 6, 16, 3, 50


def router_and_input(**options):
    torch.manual_seed(0)
    return create_moe_router("mixture", D, E, **options), torch.randn(B, S, D) + 0.3, torch.rand(B, S) < 0.8


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("capacity_factor", [1.25, 0.5, 0.01, 100.0])
def test_weights_kept_choices_and_losses_equal_a_float64_loop(training, capacity_factor):
    router, x, mask = router_and_input(capacity_factor=capacity_factor)
    torch.manual_seed(1)
    routing = router.train(training)(x, mask)
    torch.manual_seed(1)
    draws = torch.rand(B * S).view(B, S)
    logits = x.numpy().astype(np.float64) @ router.weight.detach().numpy().astype(np.float64).T
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    balance, loads = 0.0, np.zeros(E)
    for row in range(B):
        real = int(mask[row].sum())
        capacity = max(min(real, int(real * capacity_factor / E)), 4)
        best = np.argsort(-probs[row], axis=-1)[:, :2]
        weights = np.take_along_axis(probs[row], best, -1)
        weights /= weights.sum(-1, keepdims=True)
        expected, taken, firsts = np.zeros((S, 2)), np.zeros(E), np.zeros(E)
        for choice in range(2):
            for token in range(S):
                skipped = training and choice == 1 and draws[row, token].item() >= weights[token, 1] / 0.2
                if not mask[row, token] or skipped:
                    continue
                expert = best[token, choice]
                loads[expert] += 1
                firsts[expert] += choice == 0
                if not training or taken[expert] < capacity:
                    taken[expert] += 1
                    expected[token, choice] = weights[token, choice]
        got = routing.weights.view(B, S, 2)[row].detach().numpy()
        if not training:
            got = got * mask[row, :, None].numpy()
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)
        balance += E * (firsts / real * probs[row][mask[row].numpy()].mean(0)).sum() / B
        np.testing.assert_array_equal(routing.experts.view(B, S, 2)[row].numpy(), best)
    assert routing.expert_tokens.tolist() == loads.tolist()
    assert routing.losses["balance"].item() == pytest.approx(balance, rel=1e-5)
    if training:
        assert torch.equal(routing.kept, routing.weights > 0)
        assert int(routing.kept.sum()) < loads.sum() or capacity_factor == 100.0
    else:
        assert routing.kept is None


def test_second_choices_are_kept_by_their_weight_over_the_threshold():
    router, _, _ = router_and_input(capacity_factor=None)
    with torch.no_grad():
        router.weight.copy_(torch.eye(E, D))
    row = torch.tensor([9 + math.log(9), 9.0] + [0.0] * (D - 2))  # weights 9/10 and 1/10, threshold 1/5
    routing = router(row.expand(20_000, D))
    share = routing.kept[:, 1].double().mean().item()
    assert abs(share - 0.5) < 5 * math.sqrt(0.25 / 20_000)
    assert routing.kept[:, 0].all()
    assert router(torch.zeros(2000, D)).kept.all()  # equal weights, both above the threshold


def test_sequences_do_not_share_slots():
    router, x, mask = router_and_input()
    router.second_threshold = 1e-9  # nothing is left to chance
    together = router(x, mask)
    for row in range(B):
        alone = router(x[row], mask[row])
        assert torch.equal(alone.kept, together.kept.view(B, S, 2)[row])
    flat = router(x.flatten(0, 1), mask.flatten())
    assert not torch.equal(flat.kept, together.kept)


def test_balance_is_one_at_balance_and_the_number_of_experts_at_collapse():
    router, _, _ = router_and_input()
    with torch.no_grad():
        router.weight.copy_(torch.eye(E, D))
    x = torch.zeros(1, E, D)
    x[0, :, :E] = 30 * torch.eye(E)
    assert router(x).losses["balance"].item() == pytest.approx(1.0)
    assert router(x[:, :1].expand(2, 8, D)).losses["balance"].item() == pytest.approx(E)


def test_a_sequence_of_padding_alone_counts_in_no_mean():
    router, x, mask = router_and_input()
    router.eval()
    mask[1] = False
    expected = router(x[[0, 2]], mask[[0, 2]]).losses["balance"]
    torch.testing.assert_close(router(x, mask).losses["balance"], expected)


def test_gradients_of_training_equal_differences_in_float64():
    router, x, mask = router_and_input(capacity_factor=0.5)
    router.double()
    x = x[:2, :9].double().requires_grad_()

    def outputs(x, weight):
        torch.manual_seed(3)
        routing = router(x, mask[:2, :9])
        return (routing.weights, *routing.losses.values())

    assert torch.autograd.gradcheck(outputs, (x, router.weight), fast_mode=True)


def test_impossible_options_are_refused():
    with pytest.raises(UsageError, match="a 'mixture' router makes 2 choices a token, got 3"):
        create_moe_router("mixture", D, E, 3)
    with pytest.raises(UsageError, match="second_threshold: expected a number above 0, got 0"):
        create_moe_router("mixture", D, E, second_threshold=0)
