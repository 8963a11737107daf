"""DuoAttention's gates (arXiv 2410.10819): which key/value heads need more than the first and the newest tokens.

The model is frozen. Gates in 0..1 start at 1; the loss is what they change in the hidden states that predict the
answers, plus their mean. Shapes: N answer tokens, L layers, G key/value heads, D hidden size.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pikv_core.cache.calibration import layer_shapes
from pikv_core.cache.support import windows
from pikv_core.data.source import Batch
from pikv_core.errors import PiKVError
from pikv_core.runs import Run
from pikv_core.schema import DuoGateSettings
from pikv_core.training.gated_attention import GatedAttention, gated_attention
from pikv_core.training.interrupt import Interrupt
from pikv_core.training.needles import Needles

EVALUATION_SEED = 20_261
LEAST_RATE = 0.1  # of the learning rate, at the start and at the end


@dataclass(frozen=True)
class Learned:
    """gates: float32 [L,G], 1 in layers with a sliding window. sha256: of the token ids they were learned on."""

    gates: Tensor
    num_tokens: int
    sha256: str
    tokens_per_s: float


def learn(model: Any, needles: Needles, settings: DuoGateSettings, run: Run) -> Learned:
    """Learn the gates of a model, which afterwards is what it was.

    Raises PiKVError where no layer can have gates, where the loss is not finite, and when interrupted.
    """
    digest, num_tokens, begun = hashlib.sha256(), 0, time.perf_counter()
    at_a_time = max(1, settings.batch_tokens // settings.length)
    with _frozen(model), gated_attention(model, settings.sinks, settings.recent) as attention, Interrupt() as interrupt:
        gated_L = torch.tensor(attention.has_gate, device=model.device)
        if not bool(gated_L.any()):
            raise PiKVError(
                "every layer of the model has a sliding window, so there is no gate to learn",
                hint="choose a model with full attention in some layers",
            )
        gates_LG = torch.ones(_shape(model), device=model.device, requires_grad=True)
        optimizer = torch.optim.AdamW([gates_LG], lr=settings.lr, weight_decay=0.0)
        for step in range(settings.steps):
            batch = _draw(needles, settings, [run.recipe.seed, step], at_a_time, "train")
            digest.update(batch.ids.astype("<i8").tobytes())
            num_tokens += batch.ids.size
            difference = _difference(model, attention, gates_LG, batch)
            mean_gate = gates_LG[gated_L].abs().mean()
            loss = difference + settings.l1 * mean_gate
            if not math.isfinite(loss.item()):
                raise PiKVError(f"the loss is {loss.item()} at step {step}", hint="learn in --dtype float32")
            optimizer.param_groups[0]["lr"] = settings.lr * _rate(step, settings.steps)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                gates_LG.clamp_(0, 1)
            if interrupt.wanted:
                raise PiKVError(
                    f"interrupted at step {step + 1} of {settings.steps}: no gates are kept",
                    hint="start again; learning gates has no checkpoints",
                )
            _tell(run, step + 1, settings, loss.item(), difference.item(), gates_LG.detach(), attention)
    elapsed = max(1e-9, time.perf_counter() - begun)
    return Learned(gates_LG.detach().cpu(), num_tokens, digest.hexdigest(), num_tokens / elapsed)


@torch.no_grad()
def measure(model: Any, needles: Needles, settings: DuoGateSettings, gates: Tensor) -> dict[str, float]:
    """Return what the gates do to held-out samples, the same for every seed.

    accuracy_*: the share of answer tokens predicted with full attention, with the gates as they are, with the better
    half of the heads full and the others streaming, and with all of them streaming.
    """
    gates_LG = gates.to(model.device)
    gated_L = torch.tensor([window is None for window in windows(model.config)], device=model.device)
    half_LG = torch.ones_like(gates_LG)
    half_LG[gated_L] = _better_half(gates_LG[gated_L])
    variants = {
        "full": None,
        "gates": gates_LG,
        "half_streaming": half_LG,
        "all_streaming": torch.zeros_like(gates_LG),
    }
    num_correct = dict.fromkeys(variants, 0)
    num_answers, difference = 0, 0.0
    at_a_time = max(1, settings.batch_tokens // settings.length)
    with _frozen(model), gated_attention(model, settings.sinks, settings.recent) as attention:
        for start in range(0, settings.eval_samples, at_a_time):
            num_samples = min(at_a_time, settings.eval_samples - start)
            batch = _draw(needles, settings, [EVALUATION_SEED, start], num_samples, "test")
            expected_N = torch.from_numpy(batch.ids[:, 1:][batch.answer_mask[:, :-1]]).to(model.device)
            num_answers += len(expected_N)
            hidden = {name: _hidden(model, attention, gates, batch) for name, gates in variants.items()}
            for name, hidden_ND in hidden.items():
                found_N = model.get_output_embeddings()(hidden_ND).argmax(-1)
                num_correct[name] += int((found_N == expected_N).sum())
            change = (hidden["full"].float() - hidden["gates"].float()).square().mean(-1)
            difference += float(change.sum())
    difference /= num_answers
    mean_gate = float(gates_LG[gated_L].mean())
    return {
        "loss": difference + settings.l1 * mean_gate,
        "hidden_difference": difference,
        "mean_gate": mean_gate,
        **{f"accuracy_{name}": count / num_answers for name, count in num_correct.items()},
    }


def _better_half(gates: Tensor) -> Tensor:
    """Return 1 for the larger half of the gates, 0 for the others."""
    rank = gates.flatten().argsort(stable=True).argsort().view(gates.shape)
    return (rank >= gates.numel() // 2).to(gates)


def _difference(model: Any, attention: GatedAttention, gates_LG: Tensor, batch: Batch) -> Tensor:
    """Return how far the gates move the hidden states behind the answers: mean square over tokens and channels."""
    with torch.no_grad():
        full_ND = _hidden(model, attention, None, batch)
    return (full_ND.float() - _hidden(model, attention, gates_LG, batch).float()).square().mean()


def _hidden(model: Any, attention: GatedAttention, gates_LG: Tensor | None, batch: Batch) -> Tensor:
    """Return the last hidden states [N,D] at the tokens whose successor is an answer."""
    attention.gates = gates_LG
    ids_BT = torch.from_numpy(batch.ids).to(model.device)
    hidden_BTD = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
    return hidden_BTD[torch.from_numpy(batch.answer_mask).to(model.device)]


def _draw(needles: Needles, settings: DuoGateSettings, seed: list[int], num_samples: int, split: str) -> Batch:
    return needles.batch(np.random.default_rng(seed), num_samples, settings.length, split)


def _rate(step: int, num_steps: int) -> float:
    """Return the share of the learning rate: it rises over the first fifth of the steps, and falls over the last."""
    fifth = max(1, num_steps // 5)
    return min(1.0, max((step + 1) / fifth, LEAST_RATE), max((num_steps - step) / fifth, LEAST_RATE))


def _shape(model: Any) -> tuple[int, int]:
    layers = layer_shapes(model.config)
    return len(layers), layers[0].num_kv_heads


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Let no weight ask for a gradient, and no dropout disturb; afterwards all is as before."""
    was_training, learned = model.training, [weight for weight in model.parameters() if weight.requires_grad]
    try:
        model.eval()
        for weight in learned:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in learned:
            weight.requires_grad_(True)
        model.train(was_training)


def _tell(
    run: Run,
    step: int,
    settings: DuoGateSettings,
    loss: float,
    difference: float,
    gates_LG: Tensor,
    attention: GatedAttention,
) -> None:
    run.reporter.progress(f"learning gates: step {step}, loss {loss:.4f}", step, settings.steps)
    if step % settings.log_every and step != settings.steps:
        return
    gated = [(layer, gate_G.tolist()) for layer, gate_G in enumerate(gates_LG) if attention.has_gate[layer]]
    means = {f"gate/layer_{layer}": sum(gate_G) / len(gate_G) for layer, gate_G in gated}
    run.telemetry.metrics(
        step,
        {
            "train/loss": loss,
            "train/hidden_difference": difference,
            "gate/mean": sum(means.values()) / len(means),
            **means,
        },
    )
    for layer, gate_G in gated:
        for head, gate in enumerate(gate_G):
            run.telemetry.scalar(f"gate/layer_{layer}/head_{head}", gate, step)
