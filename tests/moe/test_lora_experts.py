"""Experts that share a base: every backend against the dense definition, and against plain experts once merged."""

import numpy as np
import pytest
import torch

from pikv_core.errors import UsageError
from pikv_core.moe import create_moe
from pikv_core.moe.lora import LoRAExperts

E, K, D, F, R = 5, 2, 16, 24, 3


def trained(backend="loop", dtype=torch.float32, rank=R, **options):
    """Return experts whose B is no longer zero, and their choices of 37 tokens."""
    torch.manual_seed(0)
    experts = LoRAExperts(E, D, F, rank, alpha=4.0, backend=backend, **options).to(dtype)
    for name, weight in experts.named_parameters():
        if name.endswith("_B"):
            torch.nn.init.normal_(weight)
    return experts


def routed(num_tokens, dtype=torch.float32):
    torch.manual_seed(1)
    chosen = torch.rand(num_tokens, E).topk(K).indices
    return torch.randn(num_tokens, D, dtype=dtype), torch.rand(num_tokens, K, dtype=dtype), chosen


def outputs_and_gradients(experts, x, weights, chosen):
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = experts(x, weights, chosen)
    (y * torch.linspace(-1, 1, D, dtype=y.dtype)).sum().backward()
    return [y.detach(), x.grad, weights.grad, *(weight.grad for weight in experts.parameters())]


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 65, 401])
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [("loop", torch.float64, 1e-12), ("loop", torch.float32, 1e-5), ("grouped_mm", torch.float32, 1e-5)],
)
def test_backends_equal_the_reference_with_gradients(backend, dtype, tolerance, num_tokens):
    expected = outputs_and_gradients(trained("reference", dtype), *routed(num_tokens, dtype))
    try:
        got = outputs_and_gradients(trained(backend, dtype), *routed(num_tokens, dtype))
    except (RuntimeError, NotImplementedError):
        if backend == "loop":
            raise
        pytest.skip("this torch has no grouped_mm on this processor")
    for a, b in zip(got, expected, strict=True):
        scale = b.abs().max().item() if b.numel() else 0.0  # gradients are sums over tokens, not small
        torch.testing.assert_close(a, b, atol=tolerance * max(1.0, scale), rtol=0)


def test_the_output_equals_a_float64_brute_force():
    experts = trained()
    x, weights, chosen = routed(9)
    weight = {name: value.detach().double().numpy() for name, value in experts.named_parameters()}
    for token, y in enumerate(experts(x, weights, chosen)):
        expected, row = np.zeros(D), x[token].double().numpy()
        for k, expert in enumerate(chosen[token].tolist()):
            first = weight["gate_up_proj"] + 4 / R * weight["gate_up_B"][expert] @ weight["gate_up_A"][expert]
            second = weight["down_proj"] + 4 / R * weight["down_B"][expert] @ weight["down_A"][expert]
            gate, up = np.split(first @ row, 2)
            expected += float(weights[token, k]) * (second @ (gate / (1 + np.exp(-gate)) * up))
        np.testing.assert_allclose(y.detach().numpy(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["loop", "reference"])
def test_gradients_equal_finite_differences(backend):
    experts = trained(backend, torch.float64)
    x, weights, chosen = routed(6, torch.float64)
    names = [name for name, _ in experts.named_parameters()]

    def output(x, weights, *values):
        return torch.func.functional_call(experts, dict(zip(names, values)), (x, weights, chosen))

    inputs = [x, weights, *(value.detach() for value in experts.parameters())]
    assert torch.autograd.gradcheck(output, [value.clone().requires_grad_() for value in inputs], fast_mode=True)


def test_merged_experts_give_the_same_outputs():
    experts = trained(dtype=torch.float64)
    merged = experts.merged()
    assert merged.gate_up_proj.shape == (E, 2 * F, D) and merged.down_proj.shape == (E, D, F)
    inputs = routed(37, torch.float64)
    torch.testing.assert_close(merged(*inputs), experts(*inputs), atol=1e-12, rtol=1e-12)


def test_experts_agree_with_the_base_until_b_is_trained():
    torch.manual_seed(0)
    experts = LoRAExperts(E, D, F, R)
    x, weights, chosen = routed(12)
    gate, up = torch.nn.functional.linear(x, experts.gate_up_proj).chunk(2, -1)
    base = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, experts.down_proj)
    torch.testing.assert_close(experts(x, weights, chosen), base * weights.sum(-1, keepdim=True))
    experts.gate_up_B.data[2].fill_(1.0)
    touched = (chosen == 2).any(-1)
    changed = (experts(x, weights, chosen) - base * weights.sum(-1, keepdim=True)).abs().amax(-1) > 1e-3
    assert torch.equal(changed, touched)


def test_a_frozen_base_gives_gradients_to_the_adapters_alone():
    experts = trained(train_base=False)
    y = experts(*routed(37))
    y.square().sum().backward()
    reached = {name for name, weight in experts.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert reached == {"gate_up_A", "gate_up_B", "down_A", "down_B"}


def test_the_adapter_is_counted_in_bytes():
    moe = create_moe("base", D, E, K, F, rank=R)
    stats = moe.get_stats()
    assert stats["adapter_bytes"] == 4 * E * R * (D + 2 * F + F + D)
    assert stats["expert_bytes"] == 4 * 3 * D * F
    whole = create_moe("base", D, E, K, F).get_stats()
    assert whole["expert_bytes"] == E * stats["expert_bytes"] and "adapter_bytes" not in whole


def test_alpha_scales_what_the_adapter_adds():
    x, weights, chosen = routed(8, torch.float64)
    outs = {}
    for alpha in (0.0, 1.0, 2.0):
        experts = trained("reference", torch.float64)
        torch.nn.init.zeros_(experts.gate_up_B)  # so that the output is linear in what is added
        experts.scaling = LoRAExperts(E, D, F, R, alpha).scaling
        outs[alpha] = experts(x, weights, chosen)
    torch.testing.assert_close(outs[2.0] - outs[0.0], 2 * (outs[1.0] - outs[0.0]))
    assert not torch.equal(outs[1.0], outs[0.0])


def test_autocast_computes_in_bfloat16_and_keeps_the_output_type():
    experts = trained()
    inputs = routed(300)
    expected = experts(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(*inputs)
    assert y.dtype == torch.float32
    assert 0 < (y - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_grouped_mm_equals_the_reference_on_a_gpu(rank):
    experts, reference = (trained(name, rank=rank).cuda() for name in ("grouped_mm", "reference"))
    x, weights, chosen = (value.cuda() for value in routed(65))
    error = (experts.bfloat16()(x.bfloat16(), weights, chosen).float() - reference(x, weights, chosen)).abs()
    scale = reference(x, weights, chosen).abs().max()
    assert error.max() < 0.05 * scale, f"max {error.max():.3g}, mean {error.mean():.3g}"


def test_what_does_not_exist_is_refused():
    with pytest.raises(UsageError, match="rank: expected a whole number of at least 1, got 0"):
        LoRAExperts(E, D, F, 0)
    with pytest.raises(UsageError, match="unknown expert backend 'cutlass'"):
        LoRAExperts(E, D, F, 2, backend="cutlass")
