"""The shared expert: what it adds, its gate, its count apart."""

import numpy as np
import pytest
import torch

from pikv_core.moe import create_moe
from pikv_core.moe.shared import SharedExpert

E, K, D, F = 5, 2, 16, 24


@pytest.mark.parametrize("gated", [True, False])
def test_the_output_equals_a_float64_brute_force(gated):
    torch.manual_seed(0)
    shared = SharedExpert(D, F, gated)
    x = torch.randn(2, 7, D)
    weight = {name: value.detach().double().numpy() for name, value in shared.named_parameters()}
    assert ("gate.weight" in weight) == gated
    for row, y in zip(x.double().numpy().reshape(-1, D), shared(x).reshape(-1, D)):
        gate, up = np.split(weight["gate_up_proj.weight"] @ row, 2)
        expected = weight["down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)
        if gated:
            expected /= 1 + np.exp(-weight["gate.weight"][0] @ row)
        np.testing.assert_allclose(y.detach().numpy(), expected, atol=1e-5)


def test_gradients_equal_finite_differences():
    torch.manual_seed(0)
    shared = SharedExpert(5, 4).double()
    names = [name for name, _ in shared.named_parameters()]

    def output(x, *values):
        return torch.func.functional_call(shared, dict(zip(names, values)), (x,))

    inputs = [torch.randn(3, 5, dtype=torch.float64), *(value.detach() for value in shared.parameters())]
    assert torch.autograd.gradcheck(output, [value.clone().requires_grad_() for value in inputs])


def test_the_layer_adds_it_to_the_chosen_experts():
    torch.manual_seed(0)
    moe = create_moe("base", D, E, K, F, shared_expert=True)
    x = torch.randn(3, 4, D)
    y, routing = moe(x)
    own = moe.experts(x.reshape(-1, D), routing.weights, routing.experts).view_as(x)
    torch.testing.assert_close(y, own + moe.shared_expert(x))


def test_its_tokens_and_bytes_are_counted_apart():
    moe = create_moe("base", D, E, K, F, shared_expert=True, shared_expert_size=10)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, :3] = False
    moe(torch.randn(2, 8, D), mask)
    moe(torch.randn(4, D))
    stats = moe.get_stats()
    assert stats["shared_expert_tokens"] == 13 + 4
    assert sum(stats["expert_tokens"]) == (13 + 4) * K
    assert stats["shared_expert_bytes"] == 4 * (3 * D * 10 + D)
    moe.reset_stats()
    assert moe.get_stats()["shared_expert_tokens"] == 0
    assert "shared_expert_tokens" not in create_moe("base", D, E, K, F).get_stats()


def test_autocast_keeps_the_output_type():
    shared = SharedExpert(D, F)
    with torch.autocast("cpu", torch.bfloat16):
        assert shared(torch.randn(3, D)).dtype == torch.float32
