"""Cache- and latency-aware routing: inert where nothing is known or asked, exact in what it prefers and averages."""

import math

import numpy as np
import pytest
import torch

from pikv_core.errors import UsageError
from pikv_core.moe import create_moe_router

E, K, D, T = 6, 2, 16, 50
NAN = float("nan")


def router_and_input(**options):
    torch.manual_seed(0)
    return create_moe_router("pikv", D, E, K, **options), torch.randn(T, D)


def observe(router):
    router.observe_hits([9, 0, 5, 2, 0, 1], [10, 10, 10, 4, 0, 2])
    router.observe_latency([1e-3, 2e-2, NAN, 5e-3, 1e-3, 0.4])


def assert_equal_to_base(router, x):
    base = create_moe_router("base", D, E, K)
    base.weight.data.copy_(router.weight.data)
    got, expected = router(x), base(x)
    assert torch.equal(got.experts, expected.experts)
    assert torch.equal(got.loss, expected.loss)
    return got.weights, expected.weights


def test_with_both_weights_zero_it_is_base_to_the_bit():
    router, x = router_and_input(hit_weight=0.0, latency_weight=0.0)
    observe(router)
    weights, expected = assert_equal_to_base(router, x)
    assert torch.equal(weights, expected)


def test_before_anything_is_observed_it_chooses_as_base():
    router, x = router_and_input()
    weights, expected = assert_equal_to_base(router, x)
    torch.testing.assert_close(weights, expected)


def test_choices_and_weights_equal_a_float64_brute_force():
    router, x = router_and_input(hit_weight=2.0, latency_weight=0.5)
    observe(router)
    hit = [0.9, 0.0, 0.5, 0.5, None, 0.5]
    log_latency = [math.log(value) if value == value else None for value in (1e-3, 2e-2, NAN, 5e-3, 1e-3, 0.4)]
    for values in (hit, log_latency):
        known = [value for value in values if value is not None]
        values[values.index(None)] = sum(known) / len(known)
    preference = 2.0 * np.array(hit) - 0.5 * np.array(log_latency)
    logits = x.double().numpy() @ router.weight.detach().double().numpy().T
    routing = router(x)
    changed = 0
    for token in range(T):
        best = np.argsort(-(logits[token] + preference))[:K]
        assert routing.experts[token].tolist() == best.tolist()
        changed += best.tolist() != np.argsort(-logits[token])[:K].tolist()
        weights = np.exp(logits[token][best])
        np.testing.assert_allclose(routing.weights[token].detach().numpy(), weights / weights.sum(), rtol=1e-5)
    assert changed > T // 4
    np.testing.assert_allclose(routing.logits.detach().numpy(), logits, atol=1e-5)  # preference is of the choice alone


def test_hits_attract_and_latency_repels():
    for options, seen in (
        ({"hit_weight": 9.0}, lambda router: router.observe_hits([0, 0, 0, 8, 0, 0], [8] * E)),
        ({"latency_weight": 2.0}, lambda router: router.observe_latency([0.1, 0.1, 0.1, 1e-4, 0.1, 0.1])),
    ):
        router, x = router_and_input(**options)
        before = router(x).expert_tokens[3]
        seen(router)
        assert router(x).expert_tokens[3] > max(before, T - 5)
    router.observe_latency([0.1, 0.1, 0.1, 1e4, 0.1, 0.1])
    assert router(x).expert_tokens[3] == 0


def test_averages_are_decayed_by_observations_of_that_expert():
    router, _ = router_and_input(decay=0.5)
    random = np.random.default_rng(0)
    hits, accesses, latencies = np.zeros(E), np.zeros(E), [[] for _ in range(E)]
    for _ in range(7):
        new_accesses = random.integers(0, 4, E)
        new_hits = random.integers(0, new_accesses + 1)
        for expert in np.flatnonzero(new_accesses):
            hits[expert] = 0.5 * hits[expert] + new_hits[expert]
            accesses[expert] = 0.5 * accesses[expert] + new_accesses[expert]
        latency = np.where(random.random(E) < 0.5, random.random(E) + 1e-3, NAN)
        for expert in np.flatnonzero(latency == latency):
            latencies[expert].append(latency[expert])
        router.observe_hits(torch.from_numpy(new_hits), torch.from_numpy(new_accesses))
        router.observe_latency(torch.from_numpy(latency))
    stats = router.get_stats()
    assert stats["hit_rate"] == pytest.approx((hits / accesses).tolist())
    means = [np.average(seen, weights=0.5 ** np.arange(len(seen))[::-1]) for seen in latencies]
    assert stats["latency_s"] == pytest.approx(means)


def test_an_expert_long_unobserved_keeps_its_average():
    router, _ = router_and_input()
    router.observe_latency([1e-6] * E)
    for _ in range(12_000):
        router.observe_latency([1e-6] * (E - 1) + [NAN])
    assert router.get_stats()["latency_s"] == pytest.approx([1e-6] * E, rel=1e-3)
    assert router.preference().isfinite().all()


def test_what_was_never_observed_is_none_in_the_stats():
    router, _ = router_and_input()
    observe(router)
    stats = router.get_stats()
    assert stats["hit_rate"][4] is None and stats["latency_s"][2] is None
    assert stats["hit_rate"][0] == pytest.approx(0.9)


def test_improbable_experts_chosen_for_their_speed_have_finite_weights_and_gradients():
    router, x = router_and_input(latency_weight=100.0)
    router.observe_latency([1.0, 1.0, 1.0, 1.0, 1e-6, 1e-6])
    routing = router(300 * x)
    assert set(routing.experts.reshape(-1).tolist()) == {4, 5}
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(T))
    routing.weights.square().sum().backward()
    assert router.weight.grad.isfinite().all()


def test_gradients_equal_finite_differences():
    router, x = router_and_input()
    observe(router)

    def output(x, weight):
        routing = torch.func.functional_call(router, {"weight": weight}, (x,))
        return routing.weights, routing.loss

    inputs = (x[:5].double().requires_grad_(), router.weight.detach().double().requires_grad_())
    assert torch.autograd.gradcheck(output, inputs)


def test_what_is_observed_is_saved_stays_float32_and_takes_no_gradient():
    router, x = router_and_input()
    observe(router)
    other, _ = router_and_input()
    other.load_state_dict(router.state_dict())
    assert torch.equal(other(x).experts, router(x).experts)
    other.to(torch.bfloat16)
    for name, buffer in router.named_buffers():
        assert buffer.dtype == torch.float32 and not buffer.requires_grad and buffer.any()
        assert torch.equal(dict(other.named_buffers())[name], buffer)


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("observe_hits", ([1] * E, [0] + [1] * (E - 1)), "expert_hits: expected from 0 to expert_accesses hits"),
        ("observe_hits", ([-1] * E, [1] * E), "expert_hits: expected from 0 to expert_accesses hits"),
        ("observe_hits", ([1] * E, [1]), "expert_accesses: expected one number for each of 6 experts"),
        ("observe_latency", ([1.0],), "latency_s: expected one number for each of 6 experts"),
        ("observe_latency", ([0.0] * E,), "latency_s: expected seconds above 0"),
        ("observe_latency", ([math.inf] * E,), "latency_s: expected seconds above 0"),
    ],
)
def test_impossible_observations_are_refused_and_change_nothing(method, arguments, message):
    router, _ = router_and_input()
    with pytest.raises(UsageError, match=message):
        getattr(router, method)(*arguments)
    assert not any(buffer.any() for buffer in router.buffers())


def test_a_decay_beyond_one_is_refused():
    with pytest.raises(UsageError, match="decay: expected a number from 0 to 1, got 2"):
        create_moe_router("pikv", D, E, K, decay=2)
