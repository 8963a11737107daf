"""Experts from a dense model (sparse upcycling, 2212.05055): each begins as a copy of the dense feed-forward block.

All experts being equal, a router whose weights sum to 1 changes nothing at first; `time`, and `fast` with the gate
switch, weigh with plain probabilities and so begin with less than the dense block's output. E experts, F expert
width, D hidden.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from pikv_core.cache.support import windows
from pikv_core.errors import PiKVError, UsageError
from pikv_core.moe.layer import MoE
from pikv_core.schema import ModelRecipe
from pikv_core.training.architectures import build_model

DENSE = ("llama", "mistral", "qwen2", "qwen3")
SAME = ("vocab_size", "rms_norm_eps", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
LABELS = ("id2label", "label2id", "problem_type")


def upcycle(dense: Any, recipe: ModelRecipe, head: str) -> Any:
    """Return a model with experts, all the dense model's weights in it and its router drawn from torch's generator.

    Sizes are the dense model's; the architecture, experts and router are the recipe's. A shared expert beside them
    begins with no output. Raises UsageError where the recipe gives other sizes, or the architecture has no place for
    what the dense model has.
    """
    _check_dense(dense, recipe)
    sizes = _sizes(dense)
    _check_sizes(recipe, sizes)
    config = dense.config
    options = {name: getattr(config, name) for name in SAME}
    options["rope_parameters"] = copy.deepcopy(dict(config.rope_parameters))
    if head != "causal-lm":
        options |= {name: value for name in LABELS if (value := getattr(config, name, None)) is not None}
    if recipe.arch == "pikv":
        options["vo_bias"] = any(_has_bias(dense, name) for name in ("v_proj", "o_proj"))
    model = build_model(recipe.model_copy(update=sizes), head, **options)
    with torch.no_grad():
        _copy_around_experts(dense, model, recipe.arch)
        for block, layer in zip(dense.base_model.layers, model.base_model.layers, strict=True):
            _copy_into_experts(block.mlp, layer.mlp)
    return model


def _check_dense(dense: Any, recipe: ModelRecipe) -> None:
    if recipe.arch == "llama":
        raise UsageError(
            "model.arch: 'llama' has no experts to make of a dense model",
            hint="set model.arch to mixtral, qwen3_moe or pikv; without a section model, the trained one goes on",
        )
    kind = dense.config.model_type
    if kind not in DENSE:
        raise UsageError(
            f"train.init_from: a model of type '{kind}' cannot be made into experts",
            hint=f"it takes a dense one: {', '.join(DENSE)}; without a section model, the trained one goes on",
        )
    if dense.config.hidden_act != "silu":
        raise UsageError(
            f"train.init_from: its feed-forward blocks use '{dense.config.hidden_act}', and experts silu",
            hint="without a section model, the trained one goes on",
        )
    if any(window is not None for window in windows(dense.config)):
        raise UsageError(
            "train.init_from: it has layers with a sliding window, which the models with experts here have not",
            hint="without a section model, the trained one goes on",
        )


def _sizes(dense: Any) -> dict[str, Any]:
    """Return the fields of ModelRecipe that a dense model settles."""
    config = dense.config
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "ffn_size": config.intermediate_size,
        "expert_size": config.intermediate_size,
        "rope_theta": config.rope_parameters["rope_theta"],
        "max_positions": config.max_position_embeddings,
        "attention_bias": _has_bias(dense, "q_proj"),
        "qk_norm": hasattr(dense.base_model.layers[0].self_attn, "q_norm"),
    }


def _check_sizes(recipe: ModelRecipe, sizes: dict[str, Any]) -> None:
    given = {name: getattr(recipe, name) for name in sizes if name in recipe.model_fields_set}
    wrong = [name for name, value in given.items() if value not in (sizes[name], None)]
    if wrong:
        told = ", ".join(f"model.{name} {given[name]} (it has {sizes[name]})" for name in wrong)
        raise UsageError(
            f"the sizes of a model made of a dense one are those of train.init_from, not {told}",
            hint=f"drop {', '.join(wrong)}",
        )


def _copy_around_experts(dense: Any, model: Any, arch: str) -> None:
    """Copy all but the feed-forward blocks; biases that the dense model lacks are zero."""
    source, target = dense.base_model.state_dict(), model.base_model.state_dict()
    around = [name for name in source if ".mlp." not in name]
    no_place = [name for name in around if name not in target and source[name].any()]
    if no_place:
        raise UsageError(
            f"model.arch: '{arch}' has no place for {len(no_place)} weights of train.init_from, such as {no_place[0]}",
            hint="biases of attention have one in pikv, norms of queries and keys in pikv and qwen3_moe",
        )
    lacking = [name for name in target if ".mlp." not in name and name not in source]
    no_source = [name for name in lacking if not name.endswith(".bias")]
    if no_source:
        raise UsageError(
            f"model.arch: '{arch}' norms queries and keys, which train.init_from does not, and no weights of these "
            "norms would leave them as they are",
            hint="set model.arch: pikv",
        )
    for name in around:
        if name in target:
            target[name].copy_(source[name])
    for name in lacking:
        target[name].zero_()
    for name, part in dense.named_children():
        if part is not dense.base_model:
            model.get_submodule(name).load_state_dict(part.state_dict())


def _copy_into_experts(block: Any, layer: Any) -> None:
    """Make every expert the dense block: stacked weights [E, 2·F, D] and [E, D, F], or the base that they share."""
    if any(bool(bias.any()) for name, bias in block.named_parameters() if name.endswith("bias")):
        raise PiKVError(
            "train.init_from: its feed-forward blocks have biases, and experts have none",
            hint="without a section model, the trained one goes on",
        )
    layer.experts.gate_up_proj.copy_(torch.cat([block.gate_proj.weight, block.up_proj.weight]))
    layer.experts.down_proj.copy_(block.down_proj.weight)
    if isinstance(layer, MoE) and layer.shared_expert is not None:
        nn.init.zeros_(layer.shared_expert.down_proj.weight)


def _has_bias(dense: Any, projection: str) -> bool:
    return getattr(dense.base_model.layers[0].self_attn, projection).bias is not None
