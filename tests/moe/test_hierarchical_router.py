"""Two-level routing against a float64 loop over groups and experts, and the sizes that it takes."""

import math

import numpy as np
import pytest
import torch

from pikv_core.errors import UsageError
from pikv_core.moe import create_moe_router

E, D, T = 12, 16, 40


def softmax64(values):
    return np.exp(values) / np.exp(values).sum()


@pytest.mark.parametrize("num_groups, top_groups, top_k", [(4, 2, 3), (3, 1, 4), (6, 6, 2), (1, 1, 2), (12, 3, 3)])
def test_probabilities_choices_and_losses_equal_a_float64_loop(num_groups, top_groups, top_k):
    torch.manual_seed(0)
    router = create_moe_router("hierarchical", D, E, top_k, num_groups=num_groups, top_groups=top_groups)
    x = torch.randn(T, D)
    routing = router(x)
    size = E // num_groups
    weight, group_weight = (w.detach().numpy().astype(np.float64) for w in (router.weight, router.group_weight))
    counts, sums, squares = np.zeros(E), np.zeros(E), 0.0
    for token, row in enumerate(x.numpy().astype(np.float64)):
        groups = softmax64(group_weight @ row)
        probs = np.concatenate([p * softmax64(weight[g * size : (g + 1) * size] @ row) for g, p in enumerate(groups)])
        assert probs.sum() == pytest.approx(1)
        np.testing.assert_allclose(routing.probs[token].detach().numpy(), probs, rtol=1e-5)
        chosen = np.argsort(-groups)[:top_groups]
        best = [expert for expert in np.argsort(-probs) if expert // size in chosen][:top_k]
        assert routing.experts[token].tolist() == best
        np.testing.assert_allclose(routing.weights[token].detach().numpy(), probs[best] / probs[best].sum(), rtol=1e-5)
        counts[best] += 1
        sums += probs
        squares += np.log(np.exp(group_weight @ row).sum()) ** 2
    balance = E / (T * top_k) * (counts * sums / T).sum()
    assert routing.losses["balance"].item() == pytest.approx(balance, rel=1e-5)
    assert routing.losses["z"].item() == pytest.approx(squares / T, rel=1e-5)


def test_the_group_limit_changes_choices_that_the_best_experts_alone_would_not():
    torch.manual_seed(0)
    x = torch.randn(200, D)
    limited = create_moe_router("hierarchical", D, E, 3, num_groups=4, top_groups=1)
    free = create_moe_router("hierarchical", D, E, 3, num_groups=4, top_groups=4)
    free.load_state_dict(limited.state_dict())
    groups = limited(x).experts // 3
    assert (groups == groups[:, :1]).all()
    assert not torch.equal(free(x).experts.sort(-1).values, limited(x).experts.sort(-1).values)
    assert torch.equal(free(x).experts, free(x).probs.topk(3).indices)


def test_z_loss_of_zero_scores_is_the_squared_log_of_the_number_of_groups():
    router = create_moe_router("hierarchical", D, E, 2, num_groups=4)
    for weight in router.parameters():
        torch.nn.init.zeros_(weight)
    assert router(torch.randn(T, D)).losses["z"].item() == pytest.approx(math.log(4) ** 2)


def test_extreme_scores_give_finite_weights():
    router = create_moe_router("hierarchical", D, E, 3, num_groups=4, top_groups=2)
    routing = router(1e4 * torch.randn(T, D))
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(T))
    assert all(len(set(row)) == 3 for row in routing.experts.tolist())
    routing.loss.backward()
    assert all(torch.isfinite(weight.grad).all() for weight in router.parameters())


@pytest.mark.parametrize("num_experts, num_groups", [(12, 3), (16, 4), (8, 2), (7, 1), (1, 1)])
def test_groups_are_by_default_about_the_square_root(num_experts, num_groups):
    router = create_moe_router("hierarchical", D, num_experts, 1)
    assert (router.num_groups, router.top_groups) == (num_groups, 1)


def test_impossible_groups_are_refused():
    for num_groups in (5, 0, -3, 24):
        with pytest.raises(UsageError, match=f"num_groups: {num_groups} does not divide the 12 experts") as caught:
            create_moe_router("hierarchical", D, E, 2, num_groups=num_groups)
        assert "1, 2, 3, 4, 6, 12" in caught.value.hint
    for top_groups in (0, 1, 5):
        with pytest.raises(UsageError, match=f"top_groups: {top_groups} of 4 groups cannot hold 4 choices") as caught:
            create_moe_router("hierarchical", D, E, 4, num_groups=4, top_groups=top_groups)
        assert "from 2 to 4" in caught.value.hint
