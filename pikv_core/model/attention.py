"""Grouped-query attention behind transformers' attention interface. B batch, H heads, T tokens, D size."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb, eager_attention_forward

from pikv_core.model.config import PiKVConfig


class PiKVAttention(nn.Module):
    """Project, rotate, store in the cache, and attend as the configuration names."""

    def __init__(self, config: PiKVConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        wide, narrow = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, wide, bias=config.qk_bias)
        self.k_proj = nn.Linear(config.hidden_size, narrow, bias=config.qk_bias)
        self.v_proj = nn.Linear(config.hidden_size, narrow, bias=config.vo_bias)
        self.o_proj = nn.Linear(wide, config.hidden_size, bias=config.vo_bias)
        self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output [B, T, hidden] and the attention weights, where there are any."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        q_BHTD = self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2)
        k_BHTD = self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2)
        v_BHTD = self.v_proj(x).view(heads).transpose(1, 2)
        q_BHTD, k_BHTD = apply_rotary_pos_emb(q_BHTD, k_BHTD, *position_embeddings)
        if past_key_values is not None:
            k_BHTD, v_BHTD = past_key_values.update(k_BHTD, v_BHTD, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, attention = attend(
            self,
            q_BHTD,
            k_BHTD,
            v_BHTD,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(out.reshape(*x.shape[:-1], -1).contiguous()), attention
