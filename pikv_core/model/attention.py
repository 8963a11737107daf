"""Grouped-query attention behind transformers' attention interface. B batch, H heads, T tokens, D size."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb, eager_attention_forward

from pikv_core.model.config import PiKVConfig
from pikv_kernels.block_causal_attention import block_causal_attention
from pikv_kernels.rms_norm import rms_norm
from pikv_kernels.rotary import rotate

MOST_BLOCK_TOKENS = 2048  # above, the T²/2 probabilities that block_causal_attention keeps outgrow all else


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
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output [B, T, hidden] and the attention weights, where there are any."""
        x = hidden_states
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

    @property
    def is_plain(self) -> bool:
        """Whether `attend_causally` does what the modules would: nothing is put in their place or hung on them."""
        projections = (self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        dropout = self.attention_dropout if self.training else 0.0
        return not dropout and all(type(linear) is nn.Linear and not has_hooks(linear) for linear in projections)

    def attend_causally(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """Return the output [B, T, hidden] of normalised x for training: all tokens are new, each sees those up to it.

        The products are in the type of x, outside of autocast; each weight is cast once.
        """
        B, T, _ = x.shape
        G = self.config.num_key_value_heads
        projections = (self.q_proj, self.k_proj, self.v_proj)
        weights: list[Tensor] = [linear.weight for linear in projections]
        biases: list[Tensor] = [
            linear.bias if linear.bias is not None else x.new_zeros(len(linear.weight)) for linear in projections
        ]
        bias = None if all(linear.bias is None for linear in projections) else torch.cat(biases).to(x.dtype)
        heads_BTHD = F.linear(x, torch.cat(weights).to(x.dtype), bias).unflatten(-1, (-1, self.head_dim))
        H = heads_BTHD.shape[2] - 2 * G
        rotated, v_BTGD = heads_BTHD.split([H + G, G], 2)
        if isinstance(self.q_norm, LlamaRMSNorm) and isinstance(self.k_norm, LlamaRMSNorm):
            q_BTHD, k_BTGD = rotated.split([H, G], 2)
            q_BTHD = rms_norm(q_BTHD, self.q_norm.weight, self.q_norm.variance_epsilon)
            k_BTGD = rms_norm(k_BTGD, self.k_norm.weight, self.k_norm.variance_epsilon)
            rotated = torch.cat([q_BTHD, k_BTGD], 2)
        # A table for every head, which spares loops over short rows; its two halves are the same. The queries are
        # scaled along with their rotation.
        scales = x.new_tensor([self.scaling] * H + [1.0] * G, dtype=position_embeddings[0].dtype)[:, None]
        cos, sin = (table[:, :, None, : self.head_dim // 2] * scales for table in position_embeddings)
        q_BTHD, k_BTGD = rotate(rotated, cos, sin).split([H, G], 2)
        if x.device.type == "cpu" and T <= MOST_BLOCK_TOKENS:
            query, keys, values = (_fold(heads, G) for heads in (q_BTHD, k_BTGD, v_BTGD))
            out = _unfold(block_causal_attention(query, keys, values), B, T)
        else:
            query, keys, values = (heads.transpose(1, 2) for heads in (q_BTHD, k_BTGD, v_BTGD))
            out = sdpa_attention_forward(self, query, keys, values, None, scaling=1.0)[0].reshape(B, T, -1)
        bias = None if self.o_proj.bias is None else self.o_proj.bias.to(x.dtype)
        return F.linear(out, self.o_proj.weight.to(x.dtype), bias)


def _fold(x_BTHD: Tensor, num_groups: int) -> Tensor:
    """Return [B·G, T·R, D], R heads of a group: the rows of one token side by side."""
    B, T, H, D = x_BTHD.shape
    rows = x_BTHD.reshape(B, T, num_groups, H // num_groups, D).transpose(1, 2)
    return rows.reshape(B * num_groups, T * (H // num_groups), D)


def _unfold(x: Tensor, batch: int, num_tokens: int) -> Tensor:
    """Return [B, T, H·D] of [B·G, T·R, D]."""
    heads = x.view(batch, -1, num_tokens, x.shape[1] // num_tokens, x.shape[2])
    return heads.transpose(1, 2).reshape(batch, num_tokens, -1)


def has_hooks(module: nn.Module) -> bool:
    """Return whether something is called with a module's forward pass."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
