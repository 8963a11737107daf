"""Configurations of small random models, one per architecture that the cache is checked on."""

import transformers

from pikv_core.model import PiKVConfig

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "qwen3": lambda: transformers.Qwen3Config(head_dim=16, **SMALL),
    "mistral": lambda: transformers.MistralConfig(sliding_window=24, **SMALL),
    "mixtral": lambda: transformers.MixtralConfig(num_local_experts=4, sliding_window=None, **SMALL),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, **SMALL
    ),
    "gemma2": lambda: transformers.Gemma2Config(
        head_dim=16, sliding_window=24, query_pre_attn_scalar=16, attn_logit_softcapping=3.0, **SMALL
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=24, **SMALL
    ),
    "pikv": lambda: PiKVConfig(num_experts=4, num_experts_per_tok=2, **SMALL),
}


def use_stock_attention(model):
    """Switch to transformers' own attention: SDPA, where it knows all that the model does."""
    special = model.config.model_type in ("gemma2", "gpt_oss")
    model.set_attn_implementation("eager" if special else "sdpa")
