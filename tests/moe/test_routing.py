"""Routers against a float64 brute force, their losses and their dense view."""

import math

import numpy as np
import pytest
import torch

from pikv_core.errors import UsageError
from pikv_core.moe import ROUTERS, create_moe_router
from pikv_core.moe.routing import balance_loss, z_loss

E, K, D, T = 6, 2, 16, 40


def router_and_input(seed=0):
    torch.manual_seed(seed)
    return create_moe_router("base", D, E, K), torch.randn(T, D)


def test_weights_experts_and_losses_equal_a_float64_brute_force():
    router, x = router_and_input()
    mask = torch.rand(T) > 0.3
    routing = router(x, mask)
    logits = x.numpy().astype(np.float64) @ router.weight.detach().numpy().astype(np.float64).T
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    counts, sums, squares = np.zeros(E), np.zeros(E), 0.0
    for token in range(T):
        best = sorted(range(E), key=lambda expert: -probs[token, expert])[:K]
        assert routing.experts[token].tolist() == best
        weights = probs[token, best] / probs[token, best].sum()
        np.testing.assert_allclose(routing.weights[token].detach().numpy(), weights, rtol=1e-5)
        if mask[token]:
            counts[best] += 1
            sums += probs[token]
            squares += np.log(np.exp(logits[token]).sum()) ** 2
    num_real = int(mask.sum())
    assert routing.expert_tokens.tolist() == counts.tolist()
    balance = E / (num_real * K) * (counts * sums / num_real).sum()
    assert routing.losses["balance"].item() == pytest.approx(balance, rel=1e-5)
    assert routing.losses["z"].item() == pytest.approx(squares / num_real, rel=1e-5)


def test_balance_loss_is_one_at_balance_and_the_number_of_experts_at_collapse():
    uniform = torch.full((12, E), 1 / E)
    assert balance_loss(uniform, torch.full((E,), 4)).item() == pytest.approx(1.0)
    collapsed = torch.nn.functional.one_hot(torch.zeros(12, dtype=torch.int64), E).float()
    counts = torch.tensor([12, 0, 0, 0, 0, 0])
    assert balance_loss(collapsed, counts).item() == pytest.approx(E)


def test_z_loss_of_zero_logits_is_the_squared_log_of_the_number_of_experts():
    assert z_loss(torch.zeros(5, E)).item() == pytest.approx(math.log(E) ** 2)


def test_routing_is_float32_under_bfloat16_autocast():
    router, x = router_and_input()
    expected = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(x)
    assert routing.logits.dtype == routing.weights.dtype == torch.float32
    assert torch.equal(routing.logits, expected.logits)
    assert torch.equal(routing.experts, expected.experts)
    assert torch.equal(routing.loss, expected.loss)


def test_dense_view_unpacks_and_gives_every_choice_one_slot():
    router, x = router_and_input()
    routing = router(x)
    dispatch, combine, probs, loss = routing
    assert dispatch.dtype == torch.bool
    assert dispatch.shape == combine.shape == (T, E, int(routing.expert_tokens.max()))
    assert dispatch.sum(0).max() == 1
    assert torch.equal(dispatch.sum((0, 2)), routing.expert_tokens)
    torch.testing.assert_close(combine.sum((1, 2)), torch.ones(T))
    torch.testing.assert_close(combine.sum(2), torch.zeros(T, E).scatter(1, routing.experts, routing.weights.detach()))
    torch.testing.assert_close(probs.sum(-1), torch.ones(T))
    expected = 0.01 * routing.losses["balance"] + 0.001 * routing.losses["z"]
    torch.testing.assert_close(loss, expected)


def test_padding_alone_gives_finite_losses():
    router, x = router_and_input()
    routing = router(x, torch.zeros(T, dtype=torch.bool))
    assert routing.loss.item() == 0
    assert routing.expert_tokens.sum() == 0


@pytest.mark.parametrize("kind", ROUTERS.names())
def test_every_router_meets_the_contract(kind):
    torch.manual_seed(0)
    router = create_moe_router(kind, D, E, K)
    routing = router(torch.randn(3, 5, D))
    assert routing.weights.shape == routing.experts.shape == (15, K)
    assert routing.weights.dtype == torch.float32
    assert routing.experts.min() >= 0 and routing.experts.max() < E
    assert all(len(set(row)) == K for row in routing.experts.tolist())
    assert routing.expert_tokens.sum() == 15 * K
    assert set(routing.losses) == set(routing.loss_weights)
    routing.loss.backward()
    assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in router.parameters())


def test_an_unknown_kind_is_refused_with_the_allowed_ones():
    with pytest.raises(UsageError, match="unknown router 'bsae'; did you mean 'base'") as caught:
        create_moe_router("bsae", D, E)
    assert "base" in caught.value.hint


def test_more_choices_than_experts_are_refused():
    with pytest.raises(UsageError, match="top_k: 9 is more than the 6 experts"):
        create_moe_router("base", D, E, 9)


@pytest.mark.parametrize("kind", ROUTERS.names())
def test_capacity_is_of_training_alone_and_never_exceeded(kind):
    router = create_moe_router(kind, D, E, K, capacity_factor=0.5)
    x, mask = torch.randn(T, D), torch.rand(T) < 0.8
    routing = router(x, mask=mask)
    capacity = -(-int(mask.sum()) * K // (2 * E))
    taken = torch.zeros(E, dtype=torch.int64).index_add_(
        0, routing.experts[routing.kept], torch.ones(1, dtype=torch.int64).expand(int(routing.kept.sum()))
    )
    assert taken.max() <= max(1, capacity) and not routing.kept[~mask].any()
    assert (routing.weights[~routing.kept] == 0).all()
    assert routing.dispatch.sum() == routing.kept.sum() and routing.dispatch.sum(0).max() <= 1
    first, second = routing.kept[:, 0], routing.kept[:, 1]
    for expert in range(E):  # a first choice is dropped only where no second one is kept
        dropped_first = (mask & (routing.experts[:, 0] == expert) & ~first).any()
        assert not (dropped_first and (second & (routing.experts[:, 1] == expert)).any())
    assert router.eval()(x, mask=mask).kept is None
