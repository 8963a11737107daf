"""The contract of every router; the base router against a float64 brute force; losses, capacity, the dense view."""

import copy
import json
import math

import numpy as np
import pytest
import torch

from pikv_core.errors import UsageError
from pikv_core.moe import ROUTERS, create_moe_router
from pikv_core.moe.capacity import slots, within_capacity
from pikv_core.moe.routing import balance_loss, count_tokens, z_loss

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


def test_counting_takes_a_mask_of_tokens_or_of_choices():
    experts = torch.tensor([[0, 1], [1, 2], [2, 0]])
    assert count_tokens(experts, 4).tolist() == [2, 2, 2, 0]
    assert count_tokens(experts, 4, torch.tensor([True, False, True])).tolist() == [2, 1, 1, 0]
    choices = torch.tensor([[True, False], [False, False], [True, True]])
    assert count_tokens(experts, 4, choices).tolist() == [2, 0, 1, 0]


def test_slots_are_an_even_share_rounded_up_and_at_least_one():
    for num_choices, factor, expected in [(64, 0.5, 6), (60, 1.0, 10), (61, 1.0, 11), (1, 0.1, 1), (0, 1.0, 1)]:
        assert slots(num_choices, E, factor) == slots(torch.tensor(num_choices), E, factor) == expected


def test_capacity_of_each_group_equals_a_loop():
    generator = torch.Generator().manual_seed(0)
    experts = torch.rand(3, 20, E, generator=generator).argsort(-1)[..., :K]
    asked = torch.rand(3, 20, K, generator=generator) < 0.8
    capacity = torch.tensor([1, 4, 20])
    kept = within_capacity(experts, E, capacity, asked)
    expected = torch.zeros_like(asked)
    for group in range(3):
        taken = [0] * E
        for choice in range(K):
            for token in range(20):
                expert = experts[group, token, choice]
                if asked[group, token, choice] and taken[expert] < capacity[group]:
                    taken[expert] += 1
                    expected[group, token, choice] = True
    assert torch.equal(kept, expected)
    assert torch.equal(within_capacity(experts[1], E, torch.tensor(4), asked[1]), expected[1])


every_router = pytest.mark.parametrize("kind", ROUTERS.names())


def used_router(kind, **options):
    """Return a router that was trained on for two steps, so that what it learns without gradients is not at zero."""
    torch.manual_seed(0)
    router = create_moe_router(kind, D, E, K, **options)
    for _ in range(2):
        router(3 * torch.randn(T, D) + 1)
        router.end_step()
    return router


def assert_equal_for_real_tokens(routing, expected, mask):
    assert torch.equal(routing.experts[mask], expected.experts[mask])
    torch.testing.assert_close(routing.weights[mask], expected.weights[mask])
    torch.testing.assert_close(routing.losses, expected.losses)
    assert torch.equal(routing.expert_tokens, expected.expert_tokens)


@every_router
@pytest.mark.parametrize("training", [True, False])
def test_choices_weights_and_losses_have_their_shapes_and_ranges(kind, training):
    torch.manual_seed(0)
    router = create_moe_router(kind, D, E, K).train(training)
    routing = router(torch.randn(3, 5, D))
    assert routing.weights.shape == routing.experts.shape == (15, K)
    assert routing.logits.shape == routing.probs.shape == (15, E)
    assert routing.weights.dtype == routing.logits.dtype == torch.float32
    assert routing.experts.min() >= 0 and routing.experts.max() < E
    assert all(len(set(row)) == K for row in routing.experts.tolist())
    assert (routing.weights >= 0).all() and (routing.weights.sum(-1) < 1 + 1e-5).all()
    torch.testing.assert_close(routing.probs.sum(-1), torch.ones(15))
    chosen = 15 * K if routing.kept is None else int(routing.kept.sum())
    assert chosen <= routing.expert_tokens.sum() <= 15 * K
    assert training or chosen == 15 * K
    assert set(routing.losses) == set(routing.loss_weights)
    assert all(loss.shape == () for loss in routing.losses.values())
    routing.loss.backward()
    assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in router.parameters())
    json.dumps(router.get_stats())


@every_router
def test_evaluation_is_deterministic_causal_and_apart_by_row(kind):
    router = used_router(kind).eval()
    x = torch.randn(3, 12, D)
    expected = router(x)
    again = router(x)
    assert torch.equal(again.weights, expected.weights) and torch.equal(again.loss, expected.loss)
    changed = x.clone()
    changed[:, -1] = torch.randn(3, D)
    routing = router(changed)
    earlier = torch.ones(3, 12, dtype=torch.bool)
    earlier[:, -1] = False
    earlier = earlier.flatten()
    assert torch.equal(routing.experts[earlier], expected.experts[earlier])
    torch.testing.assert_close(routing.weights[earlier], expected.weights[earlier])
    row = router(x[1:2])
    assert torch.equal(row.experts, expected.experts[12:24])
    torch.testing.assert_close(row.weights, expected.weights[12:24])


@every_router
@pytest.mark.parametrize("training", [True, False])
def test_padding_counts_in_nothing(kind, training):
    router = used_router(kind, capacity_factor=0.7).train(training)
    twin = copy.deepcopy(router)
    x = torch.randn(3, 9, D)
    mask = torch.rand(3, 9) < 0.6
    changed = torch.where(mask[..., None], x, 50 * torch.randn(3, 9, D))
    torch.manual_seed(1)
    expected = router(x, mask=mask)
    torch.manual_seed(1)
    routing = twin(changed, mask=mask)
    assert_equal_for_real_tokens(routing, expected, mask.flatten())
    router.end_step()
    twin.end_step()
    torch.testing.assert_close(twin.state_dict(), router.state_dict(), rtol=0, atol=0)


@every_router
def test_padding_is_as_if_it_were_not_there(kind):
    router = used_router(kind).eval()
    x, mask = torch.randn(T, D), torch.rand(T) < 0.6
    routing, expected = router(x, mask=mask), router(x[mask])
    assert torch.equal(routing.experts[mask], expected.experts)
    torch.testing.assert_close(routing.losses, expected.losses)
    assert torch.equal(routing.expert_tokens, expected.expert_tokens)


@every_router
def test_a_saved_state_restores_the_behaviour(kind):
    router = used_router(kind).eval()
    torch.manual_seed(5)
    fresh = create_moe_router(kind, D, E, K).eval()
    x = torch.randn(T, D)
    assert not torch.equal(fresh(x).weights, router(x).weights)
    fresh.load_state_dict(router.state_dict())
    assert torch.equal(fresh(x).experts, router(x).experts)
    assert torch.equal(fresh(x).weights, router(x).weights)
    assert torch.equal(fresh(x).loss, router(x).loss)


@every_router
def test_bfloat16_autocast_changes_nothing(kind):
    router = used_router(kind)
    x = torch.randn(T, D)
    torch.manual_seed(1)
    expected = copy.deepcopy(router)(x)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(x)
    assert routing.weights.dtype == torch.float32
    assert torch.equal(routing.experts, expected.experts)
    assert torch.equal(routing.weights, expected.weights)
    assert torch.equal(routing.loss, expected.loss)


@every_router
def test_averages_stay_in_float32_when_the_module_is_converted(kind):
    router = used_router(kind)
    expected = {name: buffer.clone() for name, buffer in router.named_buffers()}
    router.bfloat16()
    for name, buffer in router.named_buffers():
        assert torch.equal(buffer, expected[name]) and buffer.dtype == expected[name].dtype
    assert all(weight.dtype == torch.bfloat16 for weight in router.parameters())
    assert router(torch.randn(T, D, dtype=torch.bfloat16)).weights.dtype == torch.float32


@every_router
def test_gradients_of_weights_and_losses_equal_differences_in_float64(kind):
    router = used_router(kind).double().eval()
    x = torch.randn(7, D, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True] * 5 + [False] * 2)

    def outputs(x, *_):
        routing = router(x, mask=mask)
        return (routing.weights, *routing.losses.values())

    assert outputs(x)[0].dtype == torch.float64
    assert torch.autograd.gradcheck(outputs, (x, *router.parameters()), fast_mode=True)


@every_router
def test_balance_loss_is_one_where_all_experts_are_equally_probable(kind):
    router = create_moe_router(kind, D, E, K).eval()
    for weight in router.parameters():
        torch.nn.init.zeros_(weight)
    losses = router(torch.randn(4, 6, D)).losses
    assert losses["balance"].item() == pytest.approx(1.0)


@every_router
@pytest.mark.parametrize("shape", [(0, D), (2, 0, D), (1, D)])
def test_no_token_and_one_token_are_routed(kind, shape):
    router = create_moe_router(kind, D, E, K)
    routing = router(torch.randn(shape))
    assert routing.weights.shape == (math.prod(shape[:-1]), K)
    assert torch.isfinite(routing.loss)
    router.end_step()


def test_an_unknown_kind_is_refused_with_the_allowed_ones():
    with pytest.raises(UsageError, match="unknown router 'bsae'; did you mean 'base'") as caught:
        create_moe_router("bsae", D, E)
    assert "base" in caught.value.hint


def test_more_choices_than_experts_are_refused():
    with pytest.raises(UsageError, match="top_k: 9 is more than the 6 experts"):
        create_moe_router("base", D, E, 9)


@every_router
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
