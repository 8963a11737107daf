"""The PiKV decoder as a transformers model; importing this registers it with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTimeSeriesPrediction,
)

from pikv_core.model.config import PiKVConfig
from pikv_core.model.decoder import PiKVModel
from pikv_core.model.forecasting import PiKVForTimeSeriesPrediction
from pikv_core.model.images import PiKVForImageClassification
from pikv_core.model.language import PiKVForCausalLM
from pikv_core.model.modalities import PiKVForModalityClassification
from pikv_core.model.text_heads import PiKVForQuestionAnswering, PiKVForSequenceClassification

AutoConfig.register(PiKVConfig.model_type, PiKVConfig, exist_ok=True)
AutoModel.register(PiKVConfig, PiKVModel, exist_ok=True)
AutoModelForCausalLM.register(PiKVConfig, PiKVForCausalLM, exist_ok=True)
AutoModelForImageClassification.register(PiKVConfig, PiKVForImageClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(PiKVConfig, PiKVForQuestionAnswering, exist_ok=True)
AutoModelForSequenceClassification.register(PiKVConfig, PiKVForSequenceClassification, exist_ok=True)
AutoModelForTimeSeriesPrediction.register(PiKVConfig, PiKVForTimeSeriesPrediction, exist_ok=True)

__all__ = [
    "PiKVConfig",
    "PiKVForCausalLM",
    "PiKVForImageClassification",
    "PiKVForModalityClassification",
    "PiKVForQuestionAnswering",
    "PiKVForSequenceClassification",
    "PiKVForTimeSeriesPrediction",
    "PiKVModel",
]
