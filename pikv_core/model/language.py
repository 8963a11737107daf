"""The PiKV decoder with a language-model head."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from pikv_core.model.config import PiKVConfig
from pikv_core.model.decoder import PiKVModel, PiKVPreTrainedModel


class PiKVForCausalLM(PiKVPreTrainedModel, GenerationMixin):
    """Predict the next token; generate() works with every transformers cache."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: PiKVConfig):
        super().__init__(config)
        self.model = PiKVModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast | tuple[Any, ...]:
        """Return logits [B, T, V] for the last `logits_to_keep` positions (0: all; or a tensor of positions).

        With labels, the loss is the next-token cross-entropy, plus the routers' loss in training or with
        output_router_logits.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        with_aux = output_router_logits or self.training
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
            if with_aux:
                loss = loss + outputs.aux_loss
        result = MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=outputs.aux_loss if with_aux else None,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
        )
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return result if wants_dict else result.to_tuple()
