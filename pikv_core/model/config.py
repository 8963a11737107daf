"""The configuration of the PiKV decoder."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig


class PiKVConfig(PreTrainedConfig):
    """Describe a decoder with grouped-query attention and a mixture of experts in every layer.

    qk_bias, vo_bias: a bias on the query and key, on the value and output projections. qk_norm: whether each head's
    queries and keys are normalised before they are rotated, as in Qwen3. intermediate_size: width of one expert.
    router: a name in ROUTERS, router_options what it takes beside sizes, balance_loss and z_loss the factors of
    its losses.
    expert_rank: experts that share one base and differ by weights of this rank, scaled by expert_alpha / expert_rank;
    train_base: whether the base learns. shared_expert: as of create_moe. image_size, patch_size: of a side, in pixels,
    and num_channels, for images. num_modalities, modality_size: their number and the features of each, and
    missing_modalities what stands for those not there, bank or zero, for samples of several modalities. horizons: the
    steps ahead that a forecaster has heads for; anchor: what their predictions are added to, none, the last value, or
    that of the season before, of season_length steps.
    """

    model_type = "pikv"
    keys_to_ignore_at_inference: ClassVar[Any] = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 256,
        intermediate_size: int = 512,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 2,
        head_dim: int | None = None,
        num_experts: int = 8,
        num_experts_per_tok: int = 2,
        router: str = "base",
        router_options: dict[str, Any] | None = None,
        expert_rank: int | None = None,
        expert_alpha: float = 1.0,
        train_base: bool = True,
        shared_expert: bool | None = None,
        balance_loss: float = 0.01,
        z_loss: float = 0.001,
        qk_bias: bool = False,
        qk_norm: bool = False,
        vo_bias: bool = False,
        attention_dropout: float = 0.0,
        max_position_embeddings: int = 4096,
        rope_parameters: dict[str, Any] | None = None,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        output_router_logits: bool = False,
        image_size: int = 8,
        patch_size: int = 2,
        num_channels: int = 1,
        num_modalities: int = 3,
        modality_size: int = 10,
        missing_modalities: str = "bank",
        horizons: list[int] | None = None,
        anchor: str = "last",
        season_length: int | None = None,
        tie_word_embeddings: bool = False,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.router = router
        self.router_options = router_options or {}
        self.expert_rank = expert_rank
        self.expert_alpha = expert_alpha
        self.train_base = train_base
        self.shared_expert = shared_expert
        self.balance_loss = balance_loss
        self.z_loss = z_loss
        self.qk_bias = qk_bias
        self.qk_norm = qk_norm
        self.vo_bias = vo_bias
        self.attention_dropout = attention_dropout
        self.max_position_embeddings = max_position_embeddings
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        self.hidden_act = "silu"
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.output_router_logits = output_router_logits
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.num_modalities = num_modalities
        self.modality_size = modality_size
        self.missing_modalities = missing_modalities
        self.horizons = horizons or [1]
        self.anchor = anchor
        self.season_length = season_length
        self.tie_word_embeddings = tie_word_embeddings
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        super().__init__(**kwargs)
