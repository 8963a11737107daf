"""A model told in an architecture of transformers, the same logits without our code: the mirror of upcycling.

Every architecture here names its parts alike. What another has no place for is named, all of it at once; what it has
and the model lacks (biases of attention) is zero. E experts, F expert width, D hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pikv_core.cache.support import windows
from pikv_core.components import Component
from pikv_core.errors import UsageError
from pikv_core.moe.layer import MoE
from pikv_core.moe.lora import LoRAExperts
from pikv_core.training.architectures import HEADS

TEXT_HEADS = ("causal-lm", "sequence-classification", "question-answering")
SAME: tuple[str, ...] = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SAME += ("max_position_embeddings", "rms_norm_eps", "hidden_act", "attention_dropout", "initializer_range")
SAME += ("use_cache", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
LABELS = ("id2label", "label2id", "problem_type")


@dataclass(frozen=True)
class Target:
    """What an architecture has a place for; settings: from a model and the settings all share to its configuration's.

    norms: whether queries and keys may be normalised. top_k_weights: as routers say. experts: or one dense block.
    """

    settings: Callable[[Any, dict[str, Any]], dict[str, Any]]
    biases: bool
    norms: tuple[bool, ...]
    top_k_weights: tuple[str, ...] = ("renormalised",)
    experts: bool = True


def head_of(name: str) -> str:
    """Return which of HEADS the class `name` has; raise UsageError for one that does not read tokens."""
    head = next((head for head in TEXT_HEADS if name.endswith(_family(head))), None)
    if head is None:
        raise UsageError(
            f"start: a {name} cannot be told in an architecture of transformers",
            hint=f"models with these heads can: {', '.join(TEXT_HEADS)}",
        )
    return head


def export(model: Any, to: str) -> Any:
    """Return a model of the type `to` in TARGETS with the same logits, its weights copied in the dtype they have.

    One that is of that type already is returned as it is. Low-rank experts become whole ones, in float32: what is
    rounded anew is not the same. Raises UsageError with every reason why it cannot be told so.
    """
    head = head_of(type(model).__name__)
    if model.config.model_type == to:
        return model
    reasons = list(_reasons(model, to))
    if reasons:
        raise UsageError(
            "\n".join(f"export.to: '{to}' cannot tell this model: {reason}" for reason, _ in reasons),
            hint=_hint(model, [setting for _, setting in reasons]),
        )
    import transformers

    low_rank = any(isinstance(module, LoRAExperts) for module in model.modules())
    family = getattr(transformers, HEADS[head])
    told = family.from_config(_config(model, to, head), dtype=torch.float32 if low_rank else model.dtype).eval()
    told.base_model.load_state_dict(_decoder_weights(model, told))
    for name, part in model.named_children():
        if part is not model.base_model:
            told.get_submodule(name).load_state_dict(part.state_dict())
    if head == "causal-lm":
        told.generation_config = copy.deepcopy(model.generation_config)
    return told


def _reasons(model: Any, to: str) -> Iterator[tuple[str, str]]:
    """Yield why a model cannot be told in an architecture, each with what would change that."""
    config, target = model.config, TARGETS[to]
    kind = config.model_type
    if kind not in TARGETS:
        yield f"it is a '{kind}'", f"one of these types: {', '.join(TARGETS)}"
        return
    blocks = [layer.mlp for layer in model.base_model.layers]
    if any(not hasattr(block, "experts") for block in blocks):
        yield "not all of its layers have experts", "experts, which recipes/train/upcycle.yaml makes of a dense one"
        return
    if any(window is not None for window in windows(config)):
        yield "it has layers with a sliding window", "no sliding window"
    biases = _biases(model)
    if biases and not target.biases:
        text = f"{len(biases)} biases of attention are not zero, {biases[0]} among them"
        yield text, "model.attention_bias: false"
    norms = _has_norms(model)
    if norms not in target.norms:
        text = "it norms queries and keys" if norms else "it does not norm queries and keys, and no weights of such"
        text += "" if norms else " norms would leave them as they are"
        yield text, f"model.qk_norm: {str(not norms).lower()}"
    num_experts = len(blocks[0].gate.weight)
    for weights in sorted({_top_k_weights(config, block) for block in blocks} - set(target.top_k_weights)):
        how = "without renormalising the weights" if weights == "plain" else "otherwise than by a softmax's top-k"
        yield f"its router {_router(config)} weighs experts {how}", "model.router: base"
    if any(getattr(block, "shared_expert", None) is not None for block in blocks):
        yield "it has a shared expert", "model.shared_expert: false"
    if num_experts > 1 and not target.experts:
        yield f"it has {num_experts} experts, and a dense model has one block", "model.num_experts: 1"
    if to == "llama" and config.hidden_size % config.num_attention_heads:
        text = f"its hidden size {config.hidden_size} is no multiple of its {config.num_attention_heads} heads"
        yield text, "another model.hidden_size"
    if to == "pikv" and config.hidden_act != "silu":
        yield f"its experts use '{config.hidden_act}', and ours silu", "hidden_act: silu"


def _hint(model: Any, settings: list[str]) -> str:
    others = [name for name in TARGETS if name != model.config.model_type and not any(_reasons(model, name))]
    if others:
        return f"--to {' or '.join(others)} can tell it"
    return f"it takes a model with {', '.join(dict.fromkeys(settings))}"


def _config(model: Any, to: str, head: str) -> Any:
    from transformers import AutoConfig

    config = model.config
    settings = {name: getattr(config, name) for name in SAME}
    settings["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    settings["rope_parameters"] = copy.deepcopy(dict(config.rope_parameters))
    if head != "causal-lm":
        settings |= {name: getattr(config, name) for name in LABELS}
    told = AutoConfig.for_model(to, **TARGETS[to].settings(model, settings))
    if to != "pikv":
        told.rope_theta = settings["rope_parameters"]["rope_theta"]  # where readers older than transformers 5 look
    return told


def _mixtral(model: Any, settings: dict[str, Any]) -> dict[str, Any]:
    return (
        settings | _experts(model, "num_local_experts") | {"intermediate_size": _width(model), "sliding_window": None}
    )


def _qwen3_moe(model: Any, settings: dict[str, Any]) -> dict[str, Any]:
    weights = {_top_k_weights(model.config, layer.mlp) for layer in model.base_model.layers}
    return settings | {
        **_experts(model, "num_experts"),
        "intermediate_size": _width(model),
        "moe_intermediate_size": _width(model),
        "norm_topk_prob": weights == {"renormalised"},
        "attention_bias": bool(_biases(model)),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
        "sliding_window": None,
    }


def _llama(model: Any, settings: dict[str, Any]) -> dict[str, Any]:
    return settings | {"intermediate_size": _width(model), "attention_bias": bool(_biases(model)), "mlp_bias": False}


def _pikv(model: Any, settings: dict[str, Any]) -> dict[str, Any]:
    experts = _experts(model, "num_experts")
    with_biases = bool(_biases(model))
    del settings["hidden_act"]
    return settings | {
        "num_experts": experts["num_experts"],
        "num_experts_per_tok": experts["num_experts_per_tok"],
        "balance_loss": experts["router_aux_loss_coef"],
        "intermediate_size": _width(model),
        "qk_bias": with_biases,
        "vo_bias": with_biases,
        "qk_norm": _has_norms(model),
    }


TARGETS = {
    "mixtral": Target(_mixtral, biases=False, norms=(False,)),
    "qwen3_moe": Target(_qwen3_moe, biases=True, norms=(True,), top_k_weights=("renormalised", "plain")),
    "llama": Target(_llama, biases=True, norms=(False,), experts=False),
    "pikv": Target(_pikv, biases=True, norms=(False, True)),
}


def _experts(model: Any, num_experts: str) -> dict[str, Any]:
    """Return the number of experts, under the name it has there, of those a token goes to, and the loss's factor."""
    config = model.config
    balance = config.balance_loss if config.model_type == "pikv" else config.router_aux_loss_coef
    return {
        num_experts: len(model.base_model.layers[0].mlp.gate.weight),
        "num_experts_per_tok": config.num_experts_per_tok,
        "router_aux_loss_coef": balance,
        "output_router_logits": config.output_router_logits,
    }


def _width(model: Any) -> int:
    return model.base_model.layers[0].mlp.experts.down_proj.shape[-1]


def _decoder_weights(model: Any, told: Any) -> dict[str, Tensor]:
    """Return the weights of the decoder as those of `told` are named and shaped."""
    weights = {name: weight for name, weight in model.base_model.state_dict().items() if ".mlp." not in name}
    for index, layer in enumerate(model.base_model.layers):
        dense = not hasattr(told.base_model.layers[index].mlp, "experts")
        parts = _block(layer.mlp) if dense else _experts_block(layer.mlp)
        weights |= {f"layers.{index}.mlp.{name}": weight for name, weight in parts.items()}
    places = told.base_model.state_dict()
    zeros = {name: torch.zeros_like(place) for name, place in places.items() if name.endswith(".bias")}
    return zeros | {name: weight for name, weight in weights.items() if name in places or not name.endswith(".bias")}


def _experts_block(block: Any) -> dict[str, Tensor]:
    experts = _whole(block.experts)
    return {
        "gate.weight": block.gate.weight,
        "experts.gate_up_proj": experts.gate_up_proj,
        "experts.down_proj": experts.down_proj,
    }


def _block(block: Any) -> dict[str, Tensor]:
    """Return a single expert, [1, 2·F, D] and [1, D, F], as a dense block."""
    experts = _whole(block.experts)
    gate, up = experts.gate_up_proj[0].chunk(2)
    return {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": experts.down_proj[0]}


def _whole(experts: Any) -> Any:
    return copy.deepcopy(experts).float().merged() if isinstance(experts, LoRAExperts) else experts


def _biases(model: Any) -> list[str]:
    """Return the names of the attention's biases that are not zero."""
    return [
        name
        for name, weight in model.named_parameters()
        if ".self_attn." in name and name.endswith(".bias") and weight.any()
    ]


def _has_norms(model: Any) -> bool:
    return any(".self_attn.q_norm." in name for name, _ in model.named_parameters())


def _top_k_weights(config: Any, block: Any) -> str:
    """Return how a block weighs its experts: "renormalised", "plain" or "otherwise"; a single one is both."""
    if isinstance(block, MoE):
        weights = block.gate.top_k_weights
    else:
        weights = "renormalised" if getattr(config, "norm_topk_prob", True) else "plain"
    return "renormalised" if weights and len(block.gate.weight) == 1 else weights or "otherwise"


def _router(config: Any) -> str:
    if config.model_type != "pikv":
        return f"of '{config.model_type}'"
    return f"'{Component(config.router, config.router_options).label()}'"


def _family(head: str) -> str:
    return HEADS[head].removeprefix("AutoModel")
