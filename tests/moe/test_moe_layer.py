"""The layer: every backend against the dense definition, no token dropped, none seeing another."""

import copy

import numpy as np
import pytest
import torch

from pikv_core.errors import UsageError
from pikv_core.moe import create_moe

E, K, D, F = 5, 2, 16, 24


def layer(backend="loop", seed=0):
    torch.manual_seed(seed)
    return create_moe("base", D, E, K, F, backend=backend)


def grouped_mm_runs_here():
    try:
        layer("grouped_mm")(torch.zeros(4, D))
    except (RuntimeError, NotImplementedError):
        return False
    return True


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 64, 401])
@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_backends_equal_the_reference_with_gradients(backend, num_tokens):
    if backend == "grouped_mm" and not grouped_mm_runs_here():
        pytest.skip("this torch has no grouped_mm on this processor")
    results = []
    for name in ("reference", backend):
        moe = layer(name)
        x = torch.randn(num_tokens, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y, routing = moe(x)
        (y * torch.linspace(-1, 1, D)).sum().add(routing.loss).backward()
        results.append([y, x.grad, *(weight.grad for weight in moe.parameters())])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 65, 1000])
def test_grouped_mm_equals_the_reference_on_a_gpu(num_tokens):
    moe = layer("grouped_mm").to("cuda", torch.bfloat16)
    reference = copy.deepcopy(moe).float()
    reference.experts.backend = "reference"
    x = torch.randn(num_tokens, D, device="cuda", dtype=torch.bfloat16)
    error = (moe(x)[0].float() - reference(x.float())[0]).abs()
    assert error.max() < 0.1, f"max {error.max():.3g}, mean {error.mean():.3g}"


def test_the_sum_over_chosen_experts_equals_a_float64_brute_force():
    moe = layer()
    x = torch.randn(9, D)
    y, routing = moe(x)
    gate_up = moe.experts.gate_up_proj.detach().numpy().astype(np.float64)
    down = moe.experts.down_proj.detach().numpy().astype(np.float64)
    for token, row in enumerate(x.numpy().astype(np.float64)):
        expected = np.zeros(D)
        for weight, expert in zip(routing.weights[token].tolist(), routing.experts[token].tolist()):
            gate, up = np.split(gate_up[expert] @ row, 2)
            expected += weight * (down[expert] @ (gate / (1 + np.exp(-gate)) * up))
        np.testing.assert_allclose(y[token].detach().numpy(), expected, atol=1e-5)


def test_the_dense_view_gives_the_same_output():
    moe = layer()
    x = torch.randn(11, D)
    y, (dispatch, combine, _, _) = moe(x)
    slots_ECD = torch.einsum("tec,td->ecd", dispatch.float(), x)
    gate, up = torch.einsum("ecd,efd->ecf", slots_ECD, moe.experts.gate_up_proj).chunk(2, -1)
    out = torch.einsum("ecf,edf->ecd", torch.nn.functional.silu(gate) * up, moe.experts.down_proj)
    torch.testing.assert_close(torch.einsum("tec,ecd->td", combine, out), y, atol=1e-5, rtol=1e-4)


def test_later_tokens_do_not_change_earlier_outputs():
    moe = layer()
    x = torch.randn(2, 12, D)
    changed = x.clone()
    changed[:, 6:] = torch.randn(2, 6, D)
    torch.testing.assert_close(moe(changed)[0][:, :6], moe(x)[0][:, :6])


def test_permuting_tokens_permutes_outputs():
    moe = layer()
    x = torch.randn(30, D)
    order = torch.randperm(30)
    torch.testing.assert_close(moe(x[order])[0], moe(x)[0][order])


def test_stats_count_the_load_until_reset_and_ignore_padding():
    moe = layer()
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, :3] = False
    _, routing = moe(torch.randn(2, 8, D), mask)
    moe(torch.randn(2, 8, D))
    stats = moe.get_stats()
    tokens = np.array(stats["expert_tokens"])
    assert tokens.sum() == (13 + 16) * K
    assert routing.expert_tokens.sum() == 13 * K
    assert stats["load_max_over_mean"] == pytest.approx(tokens.max() / tokens.mean())
    assert stats["load_cv"] == pytest.approx(tokens.std() / tokens.mean())
    assert stats["dropped_tokens"] == 0
    moe.reset_stats()
    assert moe.get_stats()["expert_tokens"] == [0] * E


def test_autocast_computes_experts_in_bfloat16_and_keeps_the_output_type():
    moe = layer()
    x = torch.randn(32, D)
    expected = moe(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = moe(x)
    assert y.dtype == torch.float32
    error = (y - expected).abs().max()
    assert 0 < error < 0.05 * expected.abs().max()
    assert torch.equal(routing.experts, moe(x)[1].experts)


def test_an_unknown_backend_is_refused():
    with pytest.raises(UsageError, match="unknown expert backend 'cutlass'"):
        layer("cutlass")
