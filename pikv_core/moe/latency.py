"""How long each expert of a layer takes, by the clock."""

from __future__ import annotations

import statistics
import time

import torch

from pikv_core.moe.layer import MoE


@torch.no_grad()
def measure_latencies(moe: MoE, num_tokens: int = 64, repeats: int = 5) -> list[float]:
    """Return the seconds that each expert takes for `num_tokens` rows, medians, after one call to warm up.

    A `pikv` router takes them in: `moe.gate.observe_latency(measure_latencies(moe))`. Training never asks the clock, so
    that a run is a function of its seed.
    """
    weight = moe.gate.weight
    x_TD = torch.randn(num_tokens, weight.shape[1], device=weight.device, dtype=moe.experts.down_proj.dtype)
    weights_T1 = torch.ones(num_tokens, 1, device=weight.device)
    medians = []
    for expert in range(moe.experts.num_experts):
        experts_T1 = torch.full((num_tokens, 1), expert, device=weight.device)
        seconds = []
        for _ in range(repeats + 1):
            _wait(weight.device)
            begun = time.perf_counter()
            moe.experts(x_TD, weights_T1, experts_T1)
            _wait(weight.device)
            seconds.append(time.perf_counter() - begun)
        medians.append(statistics.median(seconds[1:]))
    return medians


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
