"""Set the interpreter before triton is imported, and one small random model per architecture."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import transformers

transformers.logging.set_verbosity_error()

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
}


@pytest.fixture(scope="session")
def small_model():
    """Return a function: architecture name → a random float32 model with attention that is not flat."""
    made = {}

    def make(arch):
        if arch not in made:
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(CONFIGS[arch]()).eval()
            for weight in model.parameters():
                if weight.dim() > 1:
                    torch.nn.init.normal_(weight, std=0.2)
            made[arch] = model
        return made[arch]

    return make


@pytest.fixture(autouse=True)
def _two_threads_at_most():
    torch.set_num_threads(min(2, torch.get_num_threads()))
