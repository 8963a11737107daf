"""The PiKV decoder with transformers' own heads for texts: a class for each, or the span that answers."""

from __future__ import annotations

from transformers.modeling_layers import GenericForQuestionAnswering, GenericForSequenceClassification

from pikv_core.model.decoder import PiKVPreTrainedModel


class PiKVForSequenceClassification(GenericForSequenceClassification, PiKVPreTrainedModel):
    """Score the classes of a text [B, num_labels] at its last token that is not `pad_token_id`."""


class PiKVForQuestionAnswering(GenericForQuestionAnswering, PiKVPreTrainedModel):
    """Score each token as the first, and as the last, of the answer [B, T]."""
