"""Routing of time series: weights as the softmax gives them, a shared expert, and when a token is."""

import math

import numpy as np
import pytest
import torch

from pikv_core.errors import UsageError
from pikv_core.moe import create_moe, create_moe_router
from pikv_core.moe.routers.time import time_features

E, K, D, T = 6, 2, 16, 40


def router_and_input():
    torch.manual_seed(0)
    return create_moe_router("time", D, E, K, num_periods=3), torch.randn(T, D)


def test_weights_are_the_plain_probabilities_of_the_chosen():
    router, x = router_and_input()
    routing = router(x)
    best = routing.probs.detach().numpy().argsort(-1)[:, ::-1][:, :K]
    assert np.array_equal(routing.experts.numpy(), best)
    assert torch.equal(routing.weights, routing.probs.gather(-1, routing.experts))
    assert (routing.weights.sum(-1) < 1).all()
    assert router.loss_weights == {"balance": 0.02, "z": 0.0}


def test_scores_with_time_equal_a_float64_brute_force():
    router, x = router_and_input()
    torch.nn.init.normal_(router.time_weight)
    time = 100 * torch.rand(T)
    expected = x.double().numpy() @ router.weight.detach().double().numpy().T
    weight = router.time_weight.detach().double().numpy()
    for token in range(T):
        for power in (1, 2, 3):
            angle = 2 * math.pi * float(time[token]) / 2**power
            expected[token] += math.sin(angle) * weight[:, power - 1] + math.cos(angle) * weight[:, 3 + power - 1]
    routing = router(x.view(4, 10, D), time.view(4, 10))
    np.testing.assert_allclose(routing.logits.detach().numpy(), expected, atol=1e-5)
    assert not torch.equal(routing.experts, router(x).experts)


def test_time_changes_nothing_until_it_is_learnt():
    router, x = router_and_input()
    expected = x @ router.weight.T
    assert torch.equal(router(x).logits, expected)
    assert torch.equal(router(x, torch.arange(T).float()).logits, expected)


def test_times_of_a_clock_keep_their_phase():
    seconds = torch.tensor([1_700_000_001, 3, 8])
    near = time_features(seconds % 8, 3)
    torch.testing.assert_close(time_features(seconds, 3), near, atol=1e-9, rtol=0)
    assert not torch.equal(near[1], near[2])


def test_every_weight_has_a_gradient_with_and_without_time():
    router, x = router_and_input()
    router(x).loss.backward()
    assert router.time_weight.grad is not None and not router.time_weight.grad.any()
    router(x, torch.arange(T).float()).loss.backward()
    assert router.time_weight.grad.any()


def test_gradients_equal_finite_differences():
    router, x = router_and_input()
    time = torch.arange(5).double()

    def output(x, weight, time_weight):
        values = {"weight": weight, "time_weight": time_weight}
        routing = torch.func.functional_call(router, values, (x, time))
        return routing.weights, routing.loss

    inputs = [x[:5], router.weight.detach(), torch.randn_like(router.time_weight)]
    assert torch.autograd.gradcheck(output, [value.double().requires_grad_() for value in inputs])


def test_time_and_mask_pass_through_the_layer():
    torch.manual_seed(0)
    moe = create_moe("time", D, E, K)
    torch.nn.init.normal_(moe.gate.time_weight)
    x, time = torch.randn(2, 5, D), torch.rand(2, 5) * 9
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 2:] = False
    y, routing = moe(x, mask, time_info=time)
    assert torch.equal(routing.logits, moe.gate(x, time, mask).logits)
    assert routing.expert_tokens.sum() == 7 * K
    own = moe.experts(x.view(-1, D), routing.weights, routing.experts).view_as(x)
    torch.testing.assert_close(y, own + moe.shared_expert(x))


def test_no_periods_are_refused():
    with pytest.raises(UsageError, match="num_periods: expected a whole number of at least 1, got 0"):
        create_moe_router("time", D, E, K, num_periods=0)
