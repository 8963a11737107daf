"""Train the bases of a layer so that attention's output moves least, starting from the singular vectors.

x ≈ α/r · dropout(x) A B as LoRA adds it to a weight (arXiv 2106.09685), here in place of keys and of values.
Shapes: W windows, H query heads, G key/value heads, N tokens, D head dim, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from pikv_core.compression.base import LayerSamples
from pikv_core.compression.low_rank_fit import LayerFit, Rope, fit_svd
from pikv_core.compression.measured import measure, outputs

CHECKS = 10  # how often the held-out error is looked at


@dataclass(frozen=True)
class Course:
    """How the bases are trained; see the options of `lora`."""

    alpha: float
    dropout: float
    num_steps: int
    lr: float


def fit_lora(samples: LayerSamples, layer: int, rank: int, rope: Rope, course: Course) -> LayerFit:
    """Return the best bases on held-out windows, the start included; the notes tell both errors there."""
    seen, held_out = _split(samples)
    start = fit_svd(seen, layer, rank, 1.0, rope)
    scaling = course.alpha / rank
    # Half of the scaling's inverse in each factor: steps of Adam are as large for A as for B.
    factors = [x.to(seen.keys.device) * scaling**-0.5 for pair in (start.key, start.value) for x in pair]
    factors = [x.clone().requires_grad_() for x in factors]
    optimizer = torch.optim.Adam(factors, lr=course.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, course.num_steps)
    generator = torch.Generator(seen.keys.device).manual_seed(layer)

    def fit_of(tensors: list[torch.Tensor]) -> LayerFit:
        key_down, key_up, value_down, value_up = (x.detach() * scaling**0.5 for x in tensors)
        return replace(start, key=(key_down, key_up), value=(value_down, value_up))

    start_error = best_error = _error(start, layer, held_out)
    best = start
    order = torch.randint(len(seen.keys), (course.num_steps,), generator=generator, device=generator.device).tolist()
    for step, window in enumerate(order, start=1):
        one = _part(seen, slice(window, window + 1), slice(None))
        loss = _loss(factors, one, layer, start.unrotated, scaling, course.dropout, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, course.num_steps // CHECKS) == 0:
            trained = fit_of(factors)
            error = _error(trained, layer, held_out)
            if error < best_error:
                best, best_error = trained, error
    notes = {"held_out_error": best_error, "held_out_error_of_svd": start_error}
    return replace(best, notes={**start.notes, **notes})


def _loss(
    factors: list[torch.Tensor],
    samples: LayerSamples,
    layer: int,
    unrotated: bool,
    scaling: float,
    dropout: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return the squared relative error of the attention output, differentiable."""
    keys, values = samples.keys.float(), samples.values.float()
    with torch.no_grad():
        exact = outputs(samples, keys, values)
        coded = samples.rotary.unrotate(keys, samples.position, layer) if unrotated else keys
    key_down, key_up, value_down, value_up = factors

    def through(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if dropout:
            kept = torch.rand(x.shape, generator=generator, device=x.device) >= dropout
            x = x * kept / (1 - dropout)
        return scaling * ((x @ down) @ up.transpose(-1, -2))

    rebuilt = through(coded, key_down, key_up)
    if unrotated:
        rebuilt = samples.rotary.rotate(rebuilt, samples.position, layer)
    found = outputs(samples, rebuilt, through(values, value_down, value_up))
    return (found - exact).square().sum() / exact.square().sum().clamp(min=torch.finfo(torch.float32).tiny)


def _error(fit: LayerFit, layer: int, samples: LayerSamples) -> float:
    return measure(fit.codec(layer, samples.rotary), samples).output_error


def _split(samples: LayerSamples) -> tuple[LayerSamples, LayerSamples]:
    """Return three quarters to train on and the rest: whole windows, or the end of each where there are too few."""
    W, _, N, _ = samples.keys.shape
    held_windows, held_tokens = W // 4, N // 4
    if held_windows:
        return _part(samples, slice(held_windows, W), slice(N)), _part(samples, slice(held_windows), slice(N))
    return _part(samples, slice(W), slice(N - held_tokens)), _part(samples, slice(W), slice(N - held_tokens, N))


def _part(samples: LayerSamples, windows: slice, tokens: slice) -> LayerSamples:
    queries, keys, values = (x[windows, :, tokens] for x in (samples.queries, samples.keys, samples.values))
    return replace(samples, queries=queries, keys=keys, values=values, position=samples.position[tokens])
