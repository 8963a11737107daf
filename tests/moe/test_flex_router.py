"""Routing by modality combination: `base` where all is observed, an expert of its own where something is missing."""

import itertools

import numpy as np
import pytest
import torch

from pikv_core.errors import UsageError
from pikv_core.moe import create_moe_router
from pikv_core.moe.routers.flex import ModalityBank, combination_of

E, K, D, T = 8, 2, 16, 60


def routers_and_input():
    torch.manual_seed(0)
    flex, base = create_moe_router("flex", D, E, K), create_moe_router("base", D, E, K)
    base.load_state_dict(flex.state_dict())
    return flex, base, torch.randn(T, D)


@pytest.mark.parametrize("info", [None, torch.zeros(T, dtype=torch.int64)])
def test_with_all_modalities_it_is_base(info):
    flex, base, x = routers_and_input()
    mask = torch.rand(T) < 0.7
    got, expected = flex(x, info, mask), base(x, mask)
    assert torch.equal(got.weights, expected.weights) and torch.equal(got.experts, expected.experts)
    assert got.losses["combination"] == 0
    assert torch.equal(got.loss, expected.loss)


def test_the_combination_loss_equals_a_float64_brute_force():
    flex, _, x = routers_and_input()
    info, mask = torch.randint(0, 2 * E, (T,)), torch.rand(T) < 0.7
    logits = x.double().numpy() @ flex.weight.detach().double().numpy().T
    terms = [
        np.log(np.exp(logits[t]).sum()) - logits[t, int(info[t]) % E] for t in range(T) if mask[t] and info[t] != 0
    ]
    assert 0 < len(terms) < int(mask.sum())
    routing = flex(x.view(5, 12, D), info.view(5, 12), mask.view(5, 12))
    assert routing.losses["combination"].item() == pytest.approx(np.mean(terms), rel=1e-5)


def test_padding_and_full_tokens_alone_have_no_combination_loss():
    flex, _, x = routers_and_input()
    info = torch.ones(T, dtype=torch.int64)
    assert flex(x, info, torch.zeros(T, dtype=torch.bool)).losses["combination"] == 0


def test_gradients_of_the_combination_loss_equal_finite_differences():
    flex, _, x = routers_and_input()
    info = torch.randint(0, E, (5,))

    def loss(x, weight):
        return torch.func.functional_call(flex, {"weight": weight}, (x, info)).losses["combination"]

    inputs = (x[:5].double().requires_grad_(), flex.weight.detach().double().requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)


def test_training_makes_a_combinations_expert_its_first_choice():
    flex, _, _ = routers_and_input()
    info = torch.arange(1, 7).repeat_interleave(20)
    x = torch.randn(7, D)[info] + 0.3 * torch.randn(120, D)
    assert (flex(x, info).experts[:, 0] == info).float().mean() < 0.5
    optimizer = torch.optim.Adam(flex.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        flex(x, info).loss.backward()
        optimizer.step()
    assert (flex(x, info).experts[:, 0] == info).all()


def test_combinations_are_numbered_without_gaps_from_all_observed():
    for num_modalities in (1, 2, 3, 4):
        rows = [row for row in itertools.product([True, False], repeat=num_modalities) if any(row)]
        numbers = combination_of(torch.tensor(rows)).tolist()
        assert sorted(numbers) == list(range(2**num_modalities - 1))
        assert numbers[0] == 0  # all observed
    assert combination_of(torch.tensor([[True, False, True], [False, True, False]])).tolist() == [2, 5]


def test_the_bank_fills_what_is_missing_and_nothing_else():
    torch.manual_seed(0)
    bank = ModalityBank(3, D)
    assert bank.embeddings.shape == (7, 3, D)
    observed = torch.tensor([[[True, True, True], [True, False, True]], [[False, True, False], [True, False, True]]])
    x = torch.randn(2, 2, 3, D)
    x[0, 1, 1] = x[1, 0, 0] = torch.nan  # the other missing ones hold numbers
    x.requires_grad_()
    filled, combinations = bank(x, observed)
    assert combinations.tolist() == [[0, 2], [5, 2]]
    for i, j, m in itertools.product(range(2), range(2), range(3)):
        expected = x[i, j, m] if observed[i, j, m] else bank.embeddings[combinations[i, j], m]
        assert torch.equal(filled[i, j, m], expected)
    filled.sum().backward()
    assert torch.equal(x.grad[..., 0] == 1, observed) and x.grad.isfinite().all()
    reached = bank.embeddings.grad[..., 0]
    expected = torch.zeros(7, 3)
    expected[2, 1], expected[5, 0], expected[5, 2] = 2, 1, 1
    assert torch.equal(reached, expected)


def test_items_without_any_modality_are_refused():
    with pytest.raises(UsageError, match="an item has no observed modality"):
        ModalityBank(2, D)(torch.zeros(1, 2, D), torch.zeros(1, 2, dtype=torch.bool))
    with pytest.raises(UsageError, match="num_modalities: expected a whole number of at least 1, got 0"):
        ModalityBank(0, D)
