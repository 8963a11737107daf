"""Models of the supported architectures from a recipe, initialised so that small ones learn to retrieve.

Embeddings and query/key biases at standard deviation 0.5, projections at 1/sqrt(fan in), half of that for the
ones that write to the residual.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pikv_core.errors import UsageError
from pikv_core.schema import ModelRecipe

EMBEDDING_STD = 0.5
QK_BIAS_STD = 0.5


# What a model does: the family of transformers' Auto classes that loads it, or the class of ours that loads itself.
HEADS = {
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "image-classification": "AutoModelForImageClassification",
    "modality-classification": "PiKVForModalityClassification",
    "time-series": "AutoModelForTimeSeriesPrediction",
}
# What our own architecture alone has.
WITHOUT_TOKENS = {"image-classification", "modality-classification", "time-series"}


def build_model(recipe: ModelRecipe, head: str = "causal-lm", **options: Any) -> Any:
    """Return a float32 model of transformers with a head of HEADS, its weights drawn from torch's generator.

    options: what the configuration is told beside the recipe's sizes, such as vocab_size and num_labels.
    Raises UsageError where the architecture has no such head.
    """
    import transformers

    import pikv_core.model  # registers our own architecture

    if head in WITHOUT_TOKENS and recipe.arch != "pikv":
        raise UsageError(
            f"model.arch: '{recipe.arch}' reads tokens, and the task has none for {head}", hint="set model.arch: pikv"
        )

    sizes = {
        "hidden_size": recipe.hidden_size,
        "intermediate_size": recipe.ffn_size if recipe.arch == "llama" else recipe.expert_size,
        "num_hidden_layers": recipe.num_layers,
        "num_attention_heads": recipe.num_heads,
        "num_key_value_heads": recipe.num_kv_heads,
        "head_dim": recipe.head_dim or recipe.hidden_size // recipe.num_heads,
        "max_position_embeddings": recipe.max_positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": recipe.rope_theta},
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **options,
    }
    config = _CONFIGS[recipe.arch](recipe, sizes)
    family = getattr(transformers, HEADS[head], None)
    model = getattr(pikv_core.model, HEADS[head])(config) if family is None else family.from_config(config)
    initialise(model)
    return model


def _llama(recipe: ModelRecipe, sizes: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(attention_bias=recipe.attention_bias, **sizes)


def _mixtral(recipe: ModelRecipe, sizes: dict[str, Any]) -> Any:
    from transformers import MixtralConfig

    return MixtralConfig(
        num_local_experts=recipe.num_experts,
        num_experts_per_tok=recipe.top_k,
        router_aux_loss_coef=recipe.balance_loss,
        **sizes,
    )


def _qwen3_moe(recipe: ModelRecipe, sizes: dict[str, Any]) -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        num_experts=recipe.num_experts,
        num_experts_per_tok=recipe.top_k,
        moe_intermediate_size=recipe.expert_size,
        norm_topk_prob=True,
        router_aux_loss_coef=recipe.balance_loss,
        attention_bias=recipe.attention_bias,
        **sizes,
    )


def _pikv(recipe: ModelRecipe, sizes: dict[str, Any]) -> Any:
    from pikv_core.model import PiKVConfig

    return PiKVConfig(
        num_experts=recipe.num_experts,
        num_experts_per_tok=recipe.top_k,
        router=recipe.router.name,
        router_options=dict(recipe.router.options),
        expert_rank=recipe.expert_rank,
        expert_alpha=recipe.expert_alpha,
        train_base=recipe.train_base,
        shared_expert=recipe.shared_expert,
        balance_loss=recipe.balance_loss,
        z_loss=recipe.z_loss,
        qk_bias=recipe.attention_bias,
        qk_norm=recipe.qk_norm,
        **sizes,
    )


_CONFIGS = {"llama": _llama, "mixtral": _mixtral, "qwen3_moe": _qwen3_moe, "pikv": _pikv}


@torch.no_grad()
def initialise(model: Any) -> None:
    """Draw the weights anew; every architecture names its parts as Llama and Mixtral do."""
    if model.config.vocab_size:
        nn.init.normal_(model.get_input_embeddings().weight, std=EMBEDDING_STD)
    for name, weight in model.named_parameters():
        if name.endswith(("_proj.weight", "experts.gate_up_proj", "experts.down_proj")):
            writes = "o_proj" in name or "down_proj" in name
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5 * (0.5 if writes else 1.0))
        elif name.endswith(("q_proj.bias", "k_proj.bias")):
            nn.init.normal_(weight, std=QK_BIAS_STD)
