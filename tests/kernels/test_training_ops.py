"""Operations of the training step against their definitions: values, gradients, shapes at the edges."""

import pytest
import torch

from pikv_kernels import block_causal_attention as attention
from pikv_kernels import linear_cross_entropy as head
from pikv_kernels.rms_norm import rms_norm, rms_norm_reference
from pikv_kernels.rotary import rotate, rotate_reference
from pikv_kernels.swiglu_experts import swiglu_experts, swiglu_experts_reference

pytestmark = pytest.mark.usefixtures("nan_memory")
DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])


def drawn(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def assert_same(op, reference, inputs, tolerance):
    """Hold values and gradients of op(*inputs) against those of the definition in float64."""
    wide = [one.detach().double().requires_grad_(one.requires_grad) for one in inputs]
    expected, got = reference(*wide), op(*inputs)
    assert got.shape == expected.shape
    wanted = [one for one in inputs if one.requires_grad]
    probe = drawn(*got.shape, dtype=got.dtype, seed=9).detach()
    grads = torch.autograd.grad(got, wanted, probe)
    expected_grads = torch.autograd.grad(expected, [one for one in wide if one.requires_grad], probe.double())
    for one, other, like in zip((got, *grads), (expected, *expected_grads), (got, *wanted), strict=True):
        assert one.dtype == like.dtype
        error = (one.double() - other).abs()
        assert error.numel() == 0 or error.max() <= tolerance * max(1.0, other.abs().max()), (
            f"max {error.max()}, mean {error.mean()}"
        )


@DTYPES
@pytest.mark.parametrize("shape", [(1, 8), (3, 5, 2, 16), (0, 8)])
def test_rms_norm_equals_its_definition(shape, dtype, tolerance):
    inputs = drawn(*shape, dtype=dtype), drawn(shape[-1], dtype=dtype, seed=1)
    assert_same(lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: rms_norm_reference(x, w, 1e-6), inputs, tolerance)


def test_rms_norm_of_few_bits_may_leave_in_more():
    x, weight = drawn(5, 16, dtype=torch.bfloat16), drawn(16, dtype=torch.float32)
    y = rms_norm(x, weight, 1e-6, torch.float32)
    torch.testing.assert_close(y, rms_norm_reference(x.float(), weight, 1e-6))
    assert rms_norm(x, weight, 1e-6).dtype == torch.bfloat16


@DTYPES
def test_rotation_equals_its_definition(dtype, tolerance):
    angles = drawn(1, 7, 1, 4).detach()
    cos, sin = ((2 * one).to(torch.promote_types(dtype, torch.float32)) for one in (angles.cos(), angles.sin()))
    qkv = drawn(2, 7, 5, 8, dtype=dtype)
    assert_same(
        lambda x: rotate(x[:, :, 1:4], cos, sin),
        lambda x: rotate_reference(x[:, :, 1:4], cos.double(), sin.double()),
        [qkv],
        tolerance,
    )


@DTYPES
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("num_tokens", [1, 63, 128, 129, 300])
def test_block_causal_attention_equals_its_definition(num_tokens, group, dtype, tolerance):
    query = (drawn(2, num_tokens * group, 8, dtype=dtype) * 0.35).detach().requires_grad_()
    keys, values = (drawn(2, num_tokens, 8, dtype=dtype, seed=seed) for seed in (1, 2))
    reference = attention.causal_attention_reference
    assert_same(attention.block_causal_attention, reference, [query, keys, values], tolerance)


@DTYPES
@pytest.mark.parametrize("num_tokens", [0, 1, 40])
def test_experts_equal_their_definition(num_tokens, dtype, tolerance):
    num_experts, top_k, hidden, width = 4, 2, 6, 5
    x = drawn(num_tokens, hidden, dtype=dtype)
    weights = drawn(num_tokens, top_k).abs().to(torch.promote_types(dtype, torch.float32))
    weights[::3, 1] = 0.0  # a choice that is not kept
    weights = weights.detach().requires_grad_()
    gate_up = drawn(num_experts, 2 * width, hidden, dtype=dtype)
    down = drawn(num_experts, hidden, width, dtype=dtype)
    chosen = torch.rand(num_tokens, 3, generator=torch.Generator().manual_seed(0)).topk(top_k).indices  # never expert 3
    order = chosen.reshape(-1).argsort(stable=True)
    counts = torch.bincount(chosen.reshape(-1), minlength=num_experts)
    # Two rows beside each expert's own, which no choice reads.
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order)) + 2 * chosen.reshape(-1)[order]
    choices = order.new_zeros(len(order) + 2 * num_experts if num_tokens else 0)
    choices[places] = torch.arange(len(order))
    num_rows = (counts + 2).tolist() if num_tokens else [0] * num_experts

    def run(op):
        return lambda *inputs: op(inputs[0], inputs[1], choices, places, num_rows, *inputs[2:])

    assert_same(run(swiglu_experts), run(swiglu_experts_reference), [x, weights, gate_up, down], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("num_rows", [0, 1, 7, 8, 21])
def test_linear_cross_entropy_equals_its_definition(monkeypatch, num_rows, dtype, tolerance):
    monkeypatch.setattr(head, "MOST_LOGITS", {"cpu": 8 * 11})
    monkeypatch.setattr(head, "LEAST_ROWS", 1)
    targets = torch.randint(11, (num_rows,), generator=torch.Generator().manual_seed(0))
    inputs = drawn(num_rows, 6, dtype=dtype), drawn(11, 6, dtype=dtype)

    def run(op):
        return lambda x, weight: op(x, weight, targets) / max(1, num_rows)

    wide = [one.detach().double().requires_grad_() for one in inputs]
    expected, got = run(head.linear_cross_entropy_reference)(*wide), run(head.linear_cross_entropy)(*inputs)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)
    if num_rows:
        grads, wanted = torch.autograd.grad(got, inputs), torch.autograd.grad(expected, wide)
        for one, other in zip(grads, wanted, strict=True):
            torch.testing.assert_close(one.double(), other, atol=tolerance, rtol=tolerance)


def test_a_word_that_the_head_rules_out_has_the_loss_it_has():
    weight = torch.zeros(3, 1)
    weight[0] = 500.0  # whose softmax leaves nothing of the other words in float32
    loss = head.linear_cross_entropy(torch.ones(2, 1), weight, torch.tensor([1, 0]))
    torch.testing.assert_close(loss, torch.tensor(500.0))


def test_without_a_gradient_to_come_none_is_taken(monkeypatch):
    weight, x = drawn(5, 3), drawn(4, 3)
    expected = head.linear_cross_entropy(x, weight, torch.arange(4))
    monkeypatch.setattr(torch, "zeros_like", lambda *_, **__: pytest.fail("room for a gradient"))
    with torch.no_grad():
        assert torch.equal(head.linear_cross_entropy(x, weight, torch.arange(4)), expected)


def test_gradients_equal_finite_differences(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 2)
    monkeypatch.setattr(head, "MOST_LOGITS", {"cpu": 2 * 4})
    monkeypatch.setattr(head, "LEAST_ROWS", 1)
    check = torch.autograd.gradcheck
    assert check(lambda x, w: rms_norm(x, w, 1e-6), (drawn(2, 3, 4), drawn(4)))
    angles = drawn(3, 1, 2).detach()
    assert check(lambda x: rotate(x, angles.cos(), angles.sin()), (drawn(2, 3, 2, 4),))
    assert check(attention.block_causal_attention, (drawn(2, 10, 3), drawn(2, 5, 3, seed=1), drawn(2, 5, 3, seed=2)))
    targets = torch.tensor([0, 3, 1, 1, 2])
    assert check(lambda x, w: head.linear_cross_entropy(x, w, targets), (drawn(5, 3), drawn(4, 3)))
