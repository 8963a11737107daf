"""Stacked experts in float64: backends against the definition, gradients, the sort."""

import pytest
import torch

from pikv_core.moe.experts import GRAIN, Experts, choose_backend, sort_by_expert

E, K, D, F = 4, 2, 6, 5


def experts_and_input(backend, num_tokens):
    torch.manual_seed(0)
    experts = Experts(E, D, F, backend).double()
    chosen = torch.rand(num_tokens, E).topk(K).indices
    weights = torch.rand(num_tokens, K, dtype=torch.float64)
    return experts, torch.randn(num_tokens, D, dtype=torch.float64), weights, chosen


@pytest.mark.parametrize("num_tokens", [0, 1, 9, 200])
def test_the_loop_equals_the_reference_in_float64(num_tokens):
    results = []
    for backend in ("reference", "loop"):
        experts, x, weights, chosen = experts_and_input(backend, num_tokens)
        x.requires_grad_()
        weights.requires_grad_()
        y = experts(x, weights, chosen)
        assert y.dtype == torch.float64
        y.sin().sum().backward()
        results.append([y, x.grad, weights.grad, *(weight.grad for weight in experts.parameters())])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("backend", ["loop", "reference"])
def test_gradients_equal_finite_differences(backend):
    experts, x, weights, chosen = experts_and_input(backend, 5)

    def output(x, weights, gate_up, down):
        values = {"gate_up_proj": gate_up, "down_proj": down}
        return torch.func.functional_call(experts, values, (x, weights, chosen))

    inputs = (x, weights, experts.gate_up_proj.detach(), experts.down_proj.detach())
    assert torch.autograd.gradcheck(output, [value.clone().requires_grad_() for value in inputs])


@pytest.mark.parametrize(("backend", "num_tokens"), [("grouped_mm", 500), ("loop", 500), ("loop", 3)])
def test_sorted_rows_belong_to_their_expert_and_every_choice_has_one(backend, num_tokens):
    torch.manual_seed(0)
    chosen = torch.rand(num_tokens, E).topk(K).indices
    choices_P, places_N, rows_E = sort_by_expert(chosen, E, backend)
    assert rows_E.sum() == len(choices_P)
    assert torch.equal(choices_P[places_N], torch.arange(num_tokens * K))
    expert_P = torch.arange(E).repeat_interleave(rows_E)
    assert torch.equal(expert_P[places_N], chosen.reshape(-1))
    if (backend, num_tokens) == ("loop", 500):
        assert (rows_E % GRAIN == 0).all() and len(choices_P) > num_tokens * K
    else:
        assert len(choices_P) == num_tokens * K


def test_auto_takes_the_backend_of_the_device():
    assert choose_backend("auto", torch.device("cpu")) == "loop"
    assert choose_backend("auto", torch.device("cuda")) == "grouped_mm"
    assert choose_backend("reference", torch.device("cuda")) == "reference"
