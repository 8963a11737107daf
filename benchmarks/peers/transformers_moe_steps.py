"""A whole training step of a mixture-of-experts decoder, by transformers and by PiKV, from the same weights.

A contender is `<side>` of SIDES for an architecture of ARCHITECTURES. Both sides clip by foreach and step by the fused
AdamW, with the same rates; both balance their experts, PiKV in its own normalisation with the weight that makes both
losses equal at balance. `compiled` sides have their decoder compiled by torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from pikv_core.data.source import Batch
from pikv_core.model import PiKVConfig, PiKVForCausalLM
from pikv_core.schema import TrainSettings
from pikv_core.training.objective import score
from pikv_core.training.optimizers import BETAS, Optimizers

VOCABULARY, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 4096, 256, 4, 4, 2, 64
EXPERTS, TOP_K, EXPERT_WIDTH = 8, 2, 512
BALANCE, LR, DECAY, CLIP = 0.01, 1e-4, 0.01, 1.0
IMPLEMENTATIONS = ("grouped_mm", "eager")  # of transformers' experts; the first is its default
COMPILED = "compiled"

# By precision: fp32; bf16 by autocast; bf16 weights with float32 masters.
SIDES = {
    "fp32": (
        *(f"transformers fp32 {name}" for name in IMPLEMENTATIONS),
        "transformers fp32 grouped_mm compiled",
        "pikv fp32",
        "pikv fp32 compiled",
    ),
    "bf16": (
        "transformers autocast grouped_mm",
        *(f"transformers masters {name}" for name in IMPLEMENTATIONS),
        "transformers masters grouped_mm compiled",
        "pikv autocast",
        "pikv autocast compiled",
    ),
}
ARCHITECTURES = ("mixtral", "qwen3_moe")


def contender(architecture: str, side: str, device: str) -> Step:
    """Return a side of SIDES with the architecture's weights, which are those of every side."""
    who, precision, *how = side.split()
    theirs = _theirs(architecture, how[0] if who == "transformers" else IMPLEMENTATIONS[0])
    if who == "pikv":
        step: Step = PiKVStep(_ours(theirs, architecture), precision, device)
    else:
        step = TransformersStep(theirs, precision, device)
    if COMPILED in how:
        (step.model.base_model if who == "pikv" else step.model).compile()
    return step


class Step:
    """A model that trains; `step` does all of one and returns its loss."""

    def __init__(self, model: Any, precision: str, device: str):
        self.model, self.precision = model.to(device).train(), precision
        self.device = torch.device(device)

    def autocast(self) -> Any:
        """Return the context of a forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "autocast" else nullcontext()

    def step(self, ids: np.ndarray) -> float:
        """Train on ids [B, T]; the loss is back on the host, so that the step is done."""
        raise NotImplementedError

    def cross_entropy(self, ids: np.ndarray) -> float:
        """Return the loss without that of the routers."""
        raise NotImplementedError


class TransformersStep(Step):
    """As its documentation has it: the model's own loss, by autocast or on bf16 weights that float32 ones stand for."""

    def __init__(self, model: Any, precision: str, device: str):
        super().__init__(model, precision, device)
        self.weights = list(self.model.parameters())
        self.learning = self.weights
        if precision == "masters":
            self.learning = [weight.detach().clone().requires_grad_() for weight in self.weights]
            self.model.to(torch.bfloat16)
        matrices = [weight for weight in self.learning if weight.dim() > 1]
        others = [weight for weight in self.learning if weight.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)

    def step(self, ids: np.ndarray) -> float:
        ids_BT = torch.from_numpy(ids).to(self.device)
        with self.autocast():
            loss = self.model(input_ids=ids_BT, labels=ids_BT).loss
        loss.backward()
        if self.precision == "masters":
            for weight, master in zip(self.weights, self.learning, strict=True):
                master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.learning, CLIP, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.precision == "masters":
            with torch.no_grad():
                torch._foreach_copy_(self.weights, self.learning)
        return loss.item()

    @torch.no_grad()
    def cross_entropy(self, ids: np.ndarray) -> float:
        ids_BT = torch.from_numpy(ids).to(self.device)
        with self.autocast():
            logits = self.model(input_ids=ids_BT).logits[:, :-1].flatten(0, 1).float()
        return float(F.cross_entropy(logits, ids_BT[:, 1:].flatten()))


class PiKVStep(Step):
    """As the trainer does it: its objective, its optimizers."""

    def __init__(self, model: Any, precision: str, device: str):
        super().__init__(model, precision, device)
        settings = TrainSettings(optimizer="adamw", lr=LR, expert_lr=1.0, weight_decay=DECAY, clip_norm=CLIP)
        self.optimizers = Optimizers(self.model, settings)

    def step(self, ids: np.ndarray) -> float:
        losses = self._losses(ids)
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        self.optimizers.step(LR)
        return total.item()

    def cross_entropy(self, ids: np.ndarray) -> float:
        return self._losses(ids)["text"].item()

    def _losses(self, ids: np.ndarray) -> dict[str, Tensor]:
        batch = Batch(ids, np.zeros(ids.shape, dtype=bool), np.ones(ids.shape, dtype=bool))
        with self.autocast():
            scores, outputs = score(self.model, batch, with_text=True)
            return scores.losses(0.0) | outputs.aux_losses


def _sizes() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": EXPERT_WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "num_experts_per_tok": TOP_K,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rms_norm_eps": 1e-6,
        "use_cache": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _theirs(architecture: str, implementation: str = IMPLEMENTATIONS[0]) -> Any:
    sizes = {**_sizes(), "router_aux_loss_coef": BALANCE, "output_router_logits": True}
    if architecture == "mixtral":
        config: Any = MixtralConfig(num_local_experts=EXPERTS, sliding_window=None, **sizes)
    else:
        config = Qwen3MoeConfig(
            num_experts=EXPERTS, moe_intermediate_size=EXPERT_WIDTH, norm_topk_prob=True, decoder_sparse_step=1, **sizes
        )
    config._experts_implementation = implementation
    torch.manual_seed(0)
    model = (MixtralForCausalLM if architecture == "mixtral" else Qwen3MoeForCausalLM)(config)
    _draw(model.named_parameters())
    return model


@torch.no_grad()
def _draw(weights: Iterable[tuple[str, Tensor]]) -> None:
    for name, weight in weights:
        if weight.dim() > 1:
            weight.normal_(0, 0.5 if "embed_tokens" in name else weight.shape[-1] ** -0.5)


def _ours(theirs: Any, architecture: str) -> PiKVForCausalLM:
    config = PiKVConfig(
        **_sizes(), num_experts=EXPERTS, qk_norm=architecture == "qwen3_moe", balance_loss=TOP_K * BALANCE, z_loss=0.0
    )
    model = PiKVForCausalLM(config)
    model.load_state_dict(theirs.state_dict())
    return model
