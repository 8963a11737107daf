"""The PiKV decoder: RMSNorm, rotary grouped-query attention, a mixture of experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from pikv_core.model.attention import PiKVAttention
from pikv_core.model.config import PiKVConfig
from pikv_core.model.masks import causal_mask
from pikv_core.moe import create_moe
from pikv_core.moe.experts import Experts, compute_dtype
from pikv_core.moe.layer import MoE
from pikv_core.moe.lora import LoRAExperts
from pikv_core.moe.routing import Routing
from pikv_kernels.rms_norm import rms_norm


@dataclass
class PiKVModelOutput(MoeModelOutputWithPast):
    """The decoder's output; aux_loss is the routers' weighted loss, the mean over the layers, aux_losses its parts."""

    aux_loss: Tensor | None = None
    aux_losses: dict[str, Tensor] | None = None


class PiKVDecoderLayer(GradientCheckpointingLayer):
    """Attention, then experts, each on the normalised residual."""

    def __init__(self, config: PiKVConfig, layer_idx: int):
        super().__init__()
        self.self_attn = PiKVAttention(config, layer_idx)
        self.mlp = create_moe(
            config.router,
            config.hidden_size,
            config.num_experts,
            config.num_experts_per_tok,
            config.intermediate_size,
            rank=config.expert_rank,
            alpha=config.expert_alpha,
            train_base=config.train_base,
            shared_expert=config.shared_expert,
            **{"balance_weight": config.balance_loss, "z_weight": config.z_loss, **config.router_options},
        )
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        token_mask: Tensor | None = None,
        router_info: Mapping[str, Tensor] | None = None,
        learns: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Routing]:
        """Return x [B, T, hidden] further on, the attention weights and the routing; learns: as of PiKVModel."""
        first, second = self.input_layernorm, self.post_attention_layernorm
        if learns:
            attention = None
            with torch.autocast(x.device.type, enabled=False):
                normed = rms_norm(x, first.weight, first.variance_epsilon)
                x = x + self.self_attn.attend_causally(normed, kwargs["position_embeddings"])
                normed = rms_norm(x, second.weight, second.variance_epsilon)
        else:
            out, attention = self.self_attn(hidden_states=first(x), **kwargs)
            x = x + out
            normed = second(x)
        told = {name: info for name, info in (router_info or {}).items() if name == self.mlp.gate.told}
        out, routing = self.mlp(normed, token_mask, **told)
        return x + out, attention, routing


class PiKVPreTrainedModel(PreTrainedModel):
    """What transformers needs to know to load, split and run the decoder."""

    config_class = PiKVConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PiKVDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, LoRAExperts):
            for weight in (module.gate_up_proj, module.down_proj):
                init.normal_(weight, mean=0.0, std=std)
            for weight in (module.gate_up_A, module.down_A):
                init.normal_(weight, mean=0.0, std=weight.shape[-1] ** -0.5)
            for weight in (module.gate_up_B, module.down_B):
                init.zeros_(weight)
        elif isinstance(module, MoE):
            init.normal_(module.gate.weight, mean=0.0, std=std)


class PiKVModel(PiKVPreTrainedModel):
    """Map token ids, or embeddings, to hidden states; with a vocab_size of 0 embeddings alone."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.embed_tokens = (
            nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id) if config.vocab_size else None
        )
        self.layers = nn.ModuleList(PiKVDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        router_info: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> PiKVModelOutput:
        """Run [B, T] ids, or embeddings [B, T, D], after the tokens in `past_key_values`.

        router_info: what routers may be told of the new tokens [B, T], such as `time_info`; each takes its own.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            if self.embed_tokens is None:
                raise ValueError("a model without a vocabulary takes inputs_embeds")
            inputs_embeds = self.embed_tokens(input_ids)
        x = inputs_embeds
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache(config=self.config)
        if kwargs.get("cache_position") is None:  # what hooks on attention, such as kvpress's, tell prompts by
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            kwargs["cache_position"] = torch.arange(x.shape[1], device=x.device) + seen
        if position_ids is None:
            position_ids = kwargs["cache_position"][None]
        mask = causal_mask(self.config, x, attention_mask, past_key_values, position_ids)
        rotary = self.rotary_emb(x, position_ids=position_ids)
        learns = mask is None and past_key_values is None and self._may_learn_fast()
        if learns:
            x = x.to(compute_dtype(x))
        hidden_states, attentions, routings = [x], [], []
        for layer in self.layers:
            x, attention, routing = layer(
                x,
                token_mask=_token_mask(attention_mask, x.shape[1]),
                router_info=router_info,
                learns=learns,
                attention_mask=mask,
                position_embeddings=rotary,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
            hidden_states.append(x)
            attentions.append(attention)
            routings.append(routing)
        x = rms_norm(x, self.norm.weight, self.norm.variance_epsilon, inputs_embeds.dtype) if learns else self.norm(x)
        hidden_states[-1] = x
        parts = [routing.weighted_losses for routing in routings]
        aux_losses = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
        with_hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        with_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        return PiKVModelOutput(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=tuple(hidden_states) if with_hidden else None,
            attentions=tuple(attentions) if with_attentions else None,
            router_logits=tuple(routing.logits for routing in routings),
            aux_loss=sum(aux_losses.values(), x.new_zeros((), dtype=torch.float32)),
            aux_losses=aux_losses,
        )

    def _may_learn_fast(self) -> bool:
        """Whether a pass over all tokens, with gradients, may go round the modules inside a layer's attention."""
        if self.config._attn_implementation != "sdpa" or not torch.is_grad_enabled():
            return False
        return all(module.is_plain for module in self.modules() if isinstance(module, PiKVAttention))


def _token_mask(attention_mask: Any, num_tokens: int) -> Tensor | None:
    """Return [B, T] of bool, True for the new tokens that are no padding, where a mask [B, S] tells."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return None
    return attention_mask[:, -num_tokens:].bool()
