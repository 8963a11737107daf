"""FastMoE's gates: each against a float64 loop, what chance does in training alone, and the values of the losses."""

import math

import numpy as np
import pytest
import torch

from pikv_core.errors import UsageError
from pikv_core.moe import create_moe_router
from pikv_core.moe.routers.fast import TOP_K, chance_of_choice, squared_variation

E, D, T = 6, 16, 40


def router_of(gate, top_k=None, **options):
    torch.manual_seed(0)
    return create_moe_router("fast", D, E, top_k or TOP_K[gate] or 2, gate=gate, **options)


def softmax64(router, x):
    logits = x.numpy().astype(np.float64) @ router.weight.detach().numpy().astype(np.float64).T
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


@pytest.mark.parametrize("gate", TOP_K)
def test_evaluation_equals_a_float64_loop(gate):
    router = router_of(gate).eval()
    x, mask = torch.randn(T, D), torch.rand(T) < 0.7
    routing = router(x, mask)
    probs, top_k = softmax64(router, x), router.top_k
    counts, firsts, sums, importance = (np.zeros(E) for _ in range(4))
    for token in range(T):
        best = np.argsort(-probs[token], kind="stable")[:top_k]
        weights = probs[token, best] / (1 if gate == "switch" else probs[token, best].sum())
        assert routing.experts[token].tolist() == best.tolist()
        np.testing.assert_allclose(routing.weights[token].detach().numpy(), weights, rtol=1e-5)
        if mask[token]:
            counts[best] += 1
            firsts[best[0]] += 1
            sums += probs[token]
            importance[best] += weights
    num_real = int(mask.sum())
    if gate == "noisy":
        expected = {
            name: values.var() / values.mean() ** 2 for name, values in [("importance", importance), ("load", counts)]
        }
    else:
        counted = firsts if gate == "gshard" else counts
        expected = {"balance": E * (counted / counted.sum() * sums / num_real).sum()}
    assert set(routing.losses) == {*expected, "z"}
    for name, value in expected.items():
        assert routing.losses[name].item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("gate", TOP_K)
def test_chance_is_of_training_alone(gate):
    router = router_of(gate, jitter=0.5)
    x = torch.randn(400, D)
    first, second = router(x), router(x)
    same = torch.equal(first.weights, second.weights)
    assert same == (gate == "naive")
    assert torch.equal(router.eval()(x).weights, router(x).weights)


def test_gshard_keeps_the_second_choice_with_twice_its_weight():
    router = router_of("gshard")
    with torch.no_grad():
        router.weight.copy_(torch.eye(E, D))
    row = torch.tensor([5 + math.log(3), 5.0] + [0.0] * (D - 2))  # weights 3/4 and 1/4
    num_tokens = 20_000
    routing = router(row.expand(num_tokens, D))
    share = routing.kept[:, 1].double().mean().item()
    assert abs(share - 0.5) < 5 * math.sqrt(0.5 * 0.5 / num_tokens)
    assert routing.kept[:, 0].all()
    assert (routing.weights[:, 1] > 0).equal(routing.kept[:, 1])
    assert routing.expert_tokens.sum() == routing.kept.sum()  # what chance skips is no load


def test_what_chance_skips_takes_no_slot():
    router = router_of("gshard", capacity_factor=0.6)
    x = torch.randn(400, D)
    routing = router(x)
    capacity = math.ceil(0.6 * 400 * 2 / E)
    taken = torch.bincount(routing.experts[routing.kept], minlength=E)
    assert torch.equal(taken, routing.expert_tokens.clamp(max=capacity))
    assert (taken == capacity).any() and int(taken.sum()) < 800


def test_jitter_scales_the_input_within_its_bounds():
    router = router_of("switch", jitter=0.25)
    with torch.no_grad():
        router.weight.copy_(torch.eye(E, D))
    logits = router(torch.full((2000, D), 4.0)).logits
    assert logits.min() >= 3.0 and logits.max() <= 5.0
    assert logits.min() < 3.01 and logits.max() > 4.99
    assert logits.mean().item() == pytest.approx(4.0, abs=0.03)
    assert torch.equal(router(torch.zeros(5, D)).logits, torch.zeros(5, E))  # scaled, nothing added


def test_noise_has_the_learnt_standard_deviation():
    router = router_of("noisy")
    row = torch.randn(D)
    with torch.no_grad():
        router.noise_weight.normal_()
        expected = torch.nn.functional.softplus(router.noise_weight @ row) + 0.01
        noise = router(row.expand(20_000, D)).logits - router.weight @ row
    torch.testing.assert_close(noise.std(0), expected, rtol=0.03, atol=0)
    torch.testing.assert_close(noise.mean(0) / expected, torch.zeros(E), rtol=0, atol=0.04)


def test_chance_of_choice_equals_redrawing_the_noise():
    generator = torch.Generator().manual_seed(0)
    clean, std = torch.randn(E, generator=generator), torch.rand(E, generator=generator) + 0.2
    noisy = clean + std * torch.randn(E, generator=generator)
    chances = chance_of_choice(clean[None], noisy[None], std[None], 2)[0]
    num_draws = 40_000
    for expert in range(E):
        drawn = noisy.repeat(num_draws, 1)
        drawn[:, expert] = clean[expert] + std[expert] * torch.randn(num_draws, generator=generator)
        share = (drawn.topk(2).indices == expert).any(-1).double().mean().item()
        assert chances[expert].item() == pytest.approx(share, abs=0.013)


def test_the_load_of_noisy_training_equals_a_float64_loop():
    router = router_of("noisy")
    with torch.no_grad():
        router.noise_weight.normal_()
    x, mask = torch.randn(T, D), torch.rand(T) < 0.7
    torch.manual_seed(1)
    routing = router(x, mask)
    torch.manual_seed(1)
    draws = torch.randn(T, E).numpy().astype(np.float64)
    rows = x.numpy().astype(np.float64)
    clean = rows @ router.weight.detach().numpy().astype(np.float64).T
    std = np.log1p(np.exp(rows @ router.noise_weight.detach().numpy().astype(np.float64).T)) + 0.01
    noisy, load = clean + std * draws, np.zeros(E)
    for token in np.flatnonzero(mask.numpy()):
        for expert in range(E):
            second = np.sort(np.delete(noisy[token], expert))[-2]  # to be among the best two, it beats this one
            load[expert] += 0.5 * (1 + math.erf((clean[token, expert] - second) / std[token, expert] / math.sqrt(2)))
    assert routing.losses["load"].item() == pytest.approx(load.var() / load.mean() ** 2, rel=1e-4)


def test_gradients_of_the_training_losses_equal_differences_in_float64():
    for gate in TOP_K:
        router = router_of(gate).double()
        x = torch.randn(9, D, dtype=torch.float64, requires_grad=True)

        def outputs(x, *_, router=router):
            torch.manual_seed(3)
            routing = router(x)
            return (routing.weights, *routing.losses.values())

        assert torch.autograd.gradcheck(outputs, (x, *router.parameters()), fast_mode=True)


def test_the_noise_learns_from_the_load():
    router = router_of("noisy")
    router(torch.randn(T, D)).losses["load"].backward()
    assert router.noise_weight.grad.abs().sum() > 0
    assert router.weight.grad.abs().sum() > 0


def test_losses_at_balance_and_at_collapse():
    assert squared_variation(torch.full((E,), 7.0)).item() == 0
    assert squared_variation(torch.tensor([12.0, 0, 0, 0, 0, 0])).item() == pytest.approx(E - 1)
    for gate, balanced in [("naive", 1), ("gshard", 1), ("switch", 1), ("noisy", 0)]:
        router = router_of(gate).eval()
        with torch.no_grad():  # token t prefers expert t to t + 1 to the rest: a perfectly even load
            router.weight.copy_(torch.eye(E, D))
        x = torch.zeros(E, D)
        x[:, :E] = 3 * torch.eye(E) + torch.eye(E).roll(1, dims=1)
        routing = router(x)
        assert routing.expert_tokens.tolist() == [router.top_k] * E
        for name in routing.losses.keys() - {"z"}:
            assert routing.losses[name].item() == pytest.approx(balanced, abs=1e-6)


def test_noisy_gate_with_all_experts_chosen_has_an_even_load():
    routing = router_of("noisy", top_k=E)(torch.randn(T, D))
    assert routing.losses["load"].item() == 0
    assert routing.losses["importance"].item() > 0


def test_impossible_gates_are_refused():
    with pytest.raises(UsageError, match="unknown gate 'gshrad'") as caught:
        create_moe_router("fast", D, E, gate="gshrad")
    assert "gshard" in caught.value.hint
    with pytest.raises(UsageError, match="the gate 'switch' makes 1 choices a token, got 2"):
        create_moe_router("fast", D, E, gate="switch")
    with pytest.raises(UsageError, match="the gate 'gshard' makes 2 choices a token, got 3"):
        create_moe_router("fast", D, E, 3, gate="gshard")
