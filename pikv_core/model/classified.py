"""What a classification of whole samples returns, and its loss. B batch, L labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import ImageClassifierOutput


@dataclass
class PiKVClassifierOutput(ImageClassifierOutput):
    """As of transformers' classifiers; aux_loss is the routers' weighted loss, router_logits those of each layer."""

    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


def classified(
    model: Any,
    outputs: Any,
    logits: Tensor,
    labels: Tensor | None,
    output_router_logits: bool | None,
    return_dict: bool | None,
) -> PiKVClassifierOutput | tuple[Any, ...]:
    """Return a model's answer from its decoder's PiKVModelOutput and logits [B, L].

    With labels [B], the loss is the cross-entropy, plus the routers' loss in training or with output_router_logits.
    """
    config = model.config
    with_router = config.output_router_logits if output_router_logits is None else output_router_logits
    with_aux = with_router or model.training
    loss = None
    if labels is not None:
        loss = F.cross_entropy(logits.float(), labels)
        if with_aux:
            loss = loss + outputs.aux_loss
    result = PiKVClassifierOutput(
        loss=loss,
        logits=logits,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
        aux_loss=outputs.aux_loss if with_aux else None,
        router_logits=outputs.router_logits if with_router else None,
    )
    wants_dict = config.return_dict if return_dict is None else return_dict
    return result if wants_dict else result.to_tuple()
