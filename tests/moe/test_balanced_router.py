"""The bias that balances: it selects and never weighs, moves once a step by the load of all ranks, and balances."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pikv_core.errors import UsageError
from pikv_core.moe import create_moe_router

E, K, D, T = 6, 2, 16, 60


def router_of(**options):
    torch.manual_seed(0)
    return create_moe_router("balanced", D, E, K, **options)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_the_bias_selects_and_never_weighs(score):
    router = router_of(score=score)
    router.bias.copy_(torch.tensor([0.3, -0.2, 0.0, 0.1, -0.3, 0.1]))
    x = torch.randn(T, D)
    routing = router(x)
    logits = x.numpy().astype(np.float64) @ router.weight.detach().numpy().astype(np.float64).T
    scores = 1 / (1 + np.exp(-logits))
    if score == "softmax":
        scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    changed = 0
    for token in range(T):
        best = np.argsort(-(scores[token] + router.bias.double().numpy()))[:K]
        changed += set(best) != set(np.argsort(-scores[token])[:K])
        assert routing.experts[token].tolist() == best.tolist()
        weights = scores[token, best] / scores[token, best].sum()
        np.testing.assert_allclose(routing.weights[token].detach().numpy(), weights, rtol=1e-5)
    assert changed > T // 4


def test_the_bias_moves_once_a_step_by_the_sign_of_what_is_missing():
    router = router_of(rate=0.01)
    load = torch.zeros(E)
    for _ in range(3):  # three forwards are one step
        load += router(torch.randn(T, D) + 1, mask=torch.rand(T) < 0.7).expert_tokens
        assert not router.bias.any()
    router.eval()(torch.randn(500, D))  # evaluation counts in nothing
    router.train().end_step()
    move = 0.01 * (load.mean() - load).sign()
    assert move.any()
    torch.testing.assert_close(router.bias, move - move.mean())
    before = router.bias.clone()
    router.end_step()  # no token since
    torch.testing.assert_close(router.bias, before)
    second = router(torch.randn(T, D) + 1).expert_tokens.float()
    router.end_step()
    move = 0.01 * (second.mean() - second).sign()
    torch.testing.assert_close(router.bias, before + move - move.mean())
    assert router.bias.mean().item() == pytest.approx(0, abs=1e-7)


def test_a_skewed_load_is_balanced_in_the_end():
    router = router_of(rate=0.01)
    with torch.no_grad():
        router.weight[0] += 0.5
    spread = []
    for _ in range(150):
        load = router(torch.randn(400, D) + 0.5).expert_tokens.double()
        router.end_step()
        spread.append((load.std(correction=0) / load.mean()).item())
    assert np.mean(spread[:5]) > 0.5
    assert np.mean(spread[-20:]) < 0.15


def test_the_bias_is_saved_moved_and_told():
    router = router_of()
    assert dict(router.named_buffers()).keys() == {"bias"} and "bias" in router.state_dict()
    assert not router.bias.requires_grad and "bias" not in dict(router.named_parameters())
    router(torch.randn(T, D))
    router.end_step()
    assert router.get_stats() == {"bias": router.bias.tolist()}
    router.bfloat16()
    for _ in range(3):  # a step of 0.001 is lost in bfloat16 beside a bias of 1
        router.bias += 1.0
        before = router.bias.clone()
        router(torch.randn(T, D, dtype=torch.bfloat16))
        router.end_step()
        assert ((router.bias - before).abs() > 1e-4).any()


def test_tiny_scores_give_finite_weights():
    router = router_of()
    router.bias.copy_(torch.tensor([3.0, 3.0, 0, 0, 0, 0]))
    with torch.no_grad():
        router.weight.fill_(-50.0)
    routing = router(torch.ones(4, D))
    torch.testing.assert_close(routing.weights, torch.full((4, K), 0.5))


def test_the_balance_loss_is_off_unless_asked_for():
    assert router_of().loss_weights["balance"] == 0
    assert router_of(balance_weight=0.02).loss_weights["balance"] == 0.02


def test_an_unknown_score_is_refused():
    with pytest.raises(UsageError, match="unknown score 'tanh'") as caught:
        router_of(score="tanh")
    assert "sigmoid, softmax" in caught.value.hint


def _steps(router, part):
    """Take a step in which each rank has its part of the tokens, and one in which the second rank has none."""
    torch.manual_seed(10)
    first, second = torch.randn(2, T, D) + 0.5, torch.randn(T, D) - 0.5
    router(first[part].reshape(-1, D))
    router.end_step()
    router(second[:0] if part == 1 else second)
    router.end_step()
    return router.bias


def _run_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    torch.save(_steps(router_of(), rank), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_ranks_share_their_load(tmp_path):
    mp.spawn(_run_rank, (tmp_path,), nprocs=2)
    expected = _steps(router_of(), slice(None))
    assert not torch.equal(_steps(router_of(), 0), expected)
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), expected)
