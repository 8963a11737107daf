"""The PiKV decoder as a transformers model; importing this registers it with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from pikv_core.model.config import PiKVConfig
from pikv_core.model.decoder import PiKVModel
from pikv_core.model.language import PiKVForCausalLM

AutoConfig.register(PiKVConfig.model_type, PiKVConfig, exist_ok=True)
AutoModel.register(PiKVConfig, PiKVModel, exist_ok=True)
AutoModelForCausalLM.register(PiKVConfig, PiKVForCausalLM, exist_ok=True)

__all__ = ["PiKVConfig", "PiKVForCausalLM", "PiKVModel"]
