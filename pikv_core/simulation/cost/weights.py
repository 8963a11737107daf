"""Count from a config what a token is multiplied with in prefill, and what it leaves in the cache.

Counted: projections of attention, feed-forward layers, of a mixture the router, the shared experts and the experts
that one token goes to. Not counted: embeddings and the output head, norms and biases (below 0.1 %).
"""

from __future__ import annotations

from dataclasses import dataclass

from pikv_core.errors import PiKVError
from pikv_core.simulation.cost.config import Config

TWO_MATRICES = ("arcee", "gpt_neox", "nemotron", "phi", "starcoder2")  # model types without a gate in feed-forward
KEEPS_TOKENS = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True)
class AttentionShape:
    """The attention of one layer."""

    num_heads: int  # of queries
    qk_head_dim: int
    v_head_dim: int
    kept_per_token: int  # numbers in the cache
    num_params: int


def attention_shape(config: Config) -> AttentionShape:
    """Return the attention of a layer, grouped or over a latent; raise PiKVError where layers keep something else."""
    _check_layers(config)
    hidden, heads = config.whole("hidden_size", least=1), config.whole("num_attention_heads", least=1)
    if config.has("kv_lora_rank"):
        return _latent(config, hidden, heads)
    head_dim = config.whole("head_dim", default=hidden // heads, least=1)
    groups = config.whole("num_key_value_heads", default=heads, least=1)
    params = 2 * hidden * head_dim * (heads + groups)
    return AttentionShape(heads, head_dim, head_dim, 2 * groups * head_dim, params)


def _latent(config: Config, hidden: int, heads: int) -> AttentionShape:
    latent, rope = config.whole("kv_lora_rank", least=1), config.whole("qk_rope_head_dim")
    nope, value = config.whole("qk_nope_head_dim", least=1), config.whole("v_head_dim", least=1)
    q_rank = config.whole("q_lora_rank", default=0)
    query = q_rank * (hidden + heads * (nope + rope)) if q_rank else hidden * heads * (nope + rope)
    params = query + hidden * (latent + rope) + latent * heads * (nope + value) + heads * value * hidden
    return AttentionShape(heads, nope + rope, value, latent + rope, params)


def num_active_params(config: Config) -> int:
    """Return the weights that one token is multiplied with in all layers."""
    num_layers = config.whole("num_hidden_layers")
    num_sparse = _num_sparse_layers(config, num_layers)
    total = num_layers * attention_shape(config).num_params
    if num_sparse:
        total += num_sparse * _mixture_params(config)
    if num_sparse < num_layers:
        total += (num_layers - num_sparse) * _feed_forward(config, config.whole("intermediate_size"))
    return total


def _num_experts(config: Config) -> int:
    return config.whole("num_local_experts", "n_routed_experts", "num_experts", default=0)


def _num_sparse_layers(config: Config, num_layers: int) -> int:
    if not _num_experts(config):
        return 0
    told = config.keys.get("mlp_only_layers")
    dense = told if isinstance(told, list) else []
    first, step = (
        config.whole("first_k_dense_replace", default=0),
        config.whole("decoder_sparse_step", default=1, least=1),
    )
    return sum(layer >= first and layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers))


def _mixture_params(config: Config) -> int:
    width = config.whole("moe_intermediate_size", "intermediate_size")
    chosen = config.whole("num_experts_per_tok", "experts_per_token")
    shared = config.whole(
        "shared_expert_intermediate_size", default=width * config.whole("n_shared_experts", default=0)
    )
    router = config.whole("hidden_size") * _num_experts(config)
    return router + _feed_forward(config, chosen * width + shared)


def _feed_forward(config: Config, width: int) -> int:
    matrices = 2 if config.keys.get("model_type") in TWO_MATRICES else 3
    return matrices * config.whole("hidden_size") * width


def _check_layers(config: Config) -> None:
    """Refuse layers whose memory does not grow with the prompt, and mixtures laid out in another way."""
    kinds = config.keys.get("layer_types")
    strange = sorted({*map(str, kinds)} - KEEPS_TOKENS) if isinstance(kinds, list) else []
    if strange:
        raise PiKVError(
            f"{config.source}: layer_types: cannot count layers of '{strange[0]}'",
            hint=f"known layers: {', '.join(sorted(KEEPS_TOKENS))}",
        )
    if config.has("interleave_moe_layer_step"):
        raise PiKVError(
            f"{config.source}: interleave_moe_layer_step: cannot count a mixture that is laid out so",
            hint="give the config of another model of about its size",
        )
