"""Low-rank weights beside frozen ones (2106.09685), which peft puts into a model: it stays what transformers made.

Linear maps are wrapped as such; of stacked experts [E, out, in] each gets low-rank weights of its own.
"""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, LoraModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from pikv_core.errors import UsageError, closest
from pikv_core.moe.layer import MoE
from pikv_core.schema import LoRASettings

WEIGHTS = "adapter_model.safetensors"
TASK_TYPES = {
    "causal-lm": "CAUSAL_LM",
    "sequence-classification": "SEQ_CLS",
    "question-answering": "QUESTION_ANS",
}
ROUTERS = ("gate", "router")  # beside `experts`
SMALL = (*ROUTERS, "shared_expert_gate")  # linear maps of a few rows, left alone by default


@dataclass(frozen=True)
class Targets:
    """Names, whole or the end of one. modules: linear maps. weights: stacked. whole: what learns without a low rank."""

    modules: list[str]
    weights: list[str]
    whole: list[str]


@dataclass(frozen=True)
class Adapter:
    """The low-rank weights in a model, whose other weights are frozen but for what the task puts beside the decoder."""

    model: Any
    tuner: LoraModel
    settings: LoRASettings

    def save(self, folder: Path, base: str | None) -> int:
        """Write what peft.PeftModel.from_pretrained adds to the model `base`; return the bytes of its weights."""
        weights = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {f"base_model.model.{name}": weight.contiguous() for name, weight in weights.items()},
            folder / WEIGHTS,
            metadata={"format": "pt"},
        )
        config = copy.copy(self.tuner.peft_config["default"])
        config.base_model_name_or_path, config.inference_mode = base, True
        for names in ("target_modules", "target_parameters"):  # sets, of any order
            setattr(config, names, sorted(getattr(config, names) or []) or None)
        config.save_pretrained(str(folder))
        return (folder / WEIGHTS).stat().st_size

    def merge(self) -> None:
        """Add the low-rank products to the weights beside them; what the model returns stays."""
        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                module.merge()

    def take_out(self) -> Any:
        """Return the plain model: with what was learned where the settings merge it, else as it was."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All adapters are already merged")
            return self.tuner.merge_and_unload() if self.settings.merge else self.tuner.unload()


def add_adapter(model: Any, settings: LoRASettings, head: str) -> Adapter:
    """Freeze a model with a head of HEADS and put low-rank weights into it, drawn from torch's generator.

    Raises UsageError for targets that it does not have, and for dropout of stacked weights.
    """
    targets = find_targets(model, settings.targets)
    if settings.dropout and targets.weights:
        raise UsageError(
            "train.lora.dropout: stacked experts are adapted as whole weights, before anything goes into them",
            hint=f"drop it, or set train.lora.targets to linear maps alone: {', '.join(targets.modules)}",
        )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # a number of any kind
        lora_dropout=settings.dropout,
        target_modules=targets.modules,
        target_parameters=targets.weights or None,
        modules_to_save=targets.whole or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type=TASK_TYPES.get(head),
    )
    tuner = LoraModel(model, config, "default")
    for layer in model.modules():
        if isinstance(layer, MoE) and isinstance(layer.experts, LoraLayer):
            experts: Any = layer.experts
            experts.get_stats = experts.get_base_layer().get_stats  # which a MoE asks its experts for
    return Adapter(model, tuner, settings)


def find_targets(model: Any, names: list[str]) -> Targets:
    """Return what `names` mean in a model; of none, attention and feed-forward blocks, routers left as they are."""
    routers, stacked = _routers(model), _stacked(model)
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding | Conv1D) and name not in routers
    ]
    whole = [
        name
        for name, child in model.named_children()
        if child is not model.base_model and child is not model.get_output_embeddings() and list(child.parameters())
    ]
    if not names:
        in_blocks = {_last(name) for name in linear if re.search(r"\.\d+\.", name)}
        experts = {".".join(name.split(".")[-3:]) for name in stacked}
        return Targets(sorted(in_blocks.difference(SMALL)), sorted(experts), whole)
    everything = [*linear, *stacked, *routers]
    for name in names:
        if not _matching(name, everything):
            known = sorted({_last(each) for each in everything})
            raise UsageError(
                f"train.lora.targets: the model has no '{name}'{closest(name, known)}",
                hint=f"it has: {', '.join(known)}",
            )
    return Targets(
        [name for name in names if _matching(name, linear)],
        [name for name in names if _matching(name, stacked)],
        [*whole, *(router for name in names for router in _matching(name, routers))],
    )


def _routers(model: nn.Module) -> list[str]:
    """Return the names of the modules that lie beside experts and choose them."""
    return [
        f"{name}.{each}"
        for name, module in model.named_modules()
        if hasattr(module, "experts")
        for each in ROUTERS
        if hasattr(module, each)
    ]


def _stacked(model: nn.Module) -> list[str]:
    """Return the names of experts' weights [E, out, in]; experts that are low-rank by themselves have none."""
    return [
        name
        for name, weight in model.named_parameters()
        if weight.dim() == 3 and re.search(r"\.experts\.\w+_proj$", name)
    ]


def _matching(end: str, names: list[str]) -> list[str]:
    return [name for name in names if name == end or name.endswith(f".{end}")]


def _last(name: str) -> str:
    return name.rpartition(".")[2]
