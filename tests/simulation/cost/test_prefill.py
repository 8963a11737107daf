"""Prefill work equals sums over layers, heads and tokens."""

from __future__ import annotations

import numpy as np
import pytest

from pikv_core.simulation.cost.hardware import Hardware
from pikv_core.simulation.cost.kv_model import KvModel
from pikv_core.simulation.cost.prefill import compute_s, prefill_flops

LLAMA = KvModel.load("llama-3.1-8b")
DEEPSEEK = KvModel.load("deepseek-v3")


def by_hand(model: KvModel, tokens: int, cached: int) -> float:
    """Sum over new tokens: the weights, and products of queries with keys and of shares with values, half masked."""
    weights = sum(2.0 * model.num_active_params for _ in range(cached, tokens))
    attention = 0.0
    for place in range(cached, tokens):
        keys = place + 0.5  # seen in the middle of the token's own step: sums to (L² - p²) / 2
        attention += model.num_layers * model.num_heads * 2.0 * keys * (model.qk_head_dim + model.v_head_dim)
    return weights + attention


@pytest.mark.parametrize("model", [LLAMA, DEEPSEEK])
@pytest.mark.parametrize(("tokens", "cached"), [(0, 0), (1, 0), (7, 3), (512, 512), (1000, 999), (3000, 512)])
def test_flops(model: KvModel, tokens: int, cached: int) -> None:
    assert float(prefill_flops(model, tokens, cached)) == pytest.approx(by_hand(model, tokens, cached), rel=1e-12)


def test_formula_of_grouped_attention() -> None:
    expected = 2.0 * LLAMA.num_active_params * 600 + 2.0 * 32 * 32 * 128 * (1000.0**2 - 400.0**2)
    assert float(prefill_flops(LLAMA, 1000, 400)) == pytest.approx(expected, rel=1e-12)


def test_seconds_by_request() -> None:
    hardware = Hardware.load("peak_tflops=100,mfu=0.5,gpus=2")
    tokens, cached = np.array([1000, 4096, 10]), np.array([0, 512, 10])
    found = compute_s(LLAMA, hardware, tokens, cached)
    expected = [by_hand(LLAMA, int(L), int(p)) / 1e14 for L, p in zip(tokens, cached)]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_parts_add_up_to_the_whole() -> None:
    whole = prefill_flops(LLAMA, 5000, 0)
    assert float(prefill_flops(LLAMA, 5000, 1234) + prefill_flops(LLAMA, 1234, 0)) == pytest.approx(float(whole))
