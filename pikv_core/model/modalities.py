"""The PiKV decoder as a classifier of samples with several modalities, any of which may be missing.

After Flex-MoE (2410.08245). B batch, M modalities, F features of each, D hidden size, L labels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from pikv_core.errors import UsageError
from pikv_core.model.classified import PiKVClassifierOutput, classified
from pikv_core.model.decoder import PiKVModel, PiKVPreTrainedModel
from pikv_core.moe.routers.flex import ModalityBank


class PiKVForModalityClassification(PiKVPreTrainedModel):
    """Make one token of each modality, by a linear map of its own; the mean over tokens is classified.

    config.missing_modalities says what stands for a missing one: "bank", a learned vector for each combination of
    what is missing, which the routers are told too; "zero", the token of features that are all 0.
    """

    main_input_name = "modalities"

    def __init__(self, config: Any):
        super().__init__(config)
        if config.missing_modalities not in ("bank", "zero"):
            raise UsageError(f"missing_modalities: expected bank or zero, got '{config.missing_modalities}'")
        self.num_labels = config.num_labels
        self.model = PiKVModel(config)
        # The rows of one matrix: D for each modality.
        self.modality_proj = nn.Linear(config.modality_size, config.num_modalities * config.hidden_size)
        self.bank = (
            ModalityBank(config.num_modalities, config.hidden_size) if config.missing_modalities == "bank" else None
        )
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ModalityBank):
            init.normal_(module.embeddings, mean=0.0, std=1.0)

    def forward(
        self,
        modalities: Tensor,
        present: Tensor | None = None,
        labels: Tensor | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> PiKVClassifierOutput | tuple[Any, ...]:
        """Classify samples [B, M, F] whose modalities `present` [B, M] are there, by default all; labels [B]."""
        outputs = self.decode(modalities, present, **kwargs)
        logits = self.classify(outputs.last_hidden_state)
        return classified(self, outputs, logits, labels, output_router_logits, return_dict)

    def decode(self, modalities: Tensor, present: Tensor | None = None, **kwargs: Any) -> Any:
        """Return the decoder's PiKVModelOutput for the modalities, its last_hidden_state [B, M, D].

        What `modalities` holds where one is missing is read by nothing, NaN neither.
        """
        expected = (self.config.num_modalities, self.config.modality_size)
        if tuple(modalities.shape[1:]) != expected:
            got = " x ".join(map(str, modalities.shape[1:]))
            raise UsageError(f"modalities: expected samples of {expected[0]} x {expected[1]} numbers, got {got}")
        if present is None:
            present = torch.ones(modalities.shape[:2], dtype=torch.bool, device=modalities.device)
        present = present.bool()
        x_BMD = self._embed(torch.where(present[..., None], modalities, 0))
        told = {}
        if self.bank is not None:
            x_BMD, combination_B = self.bank(x_BMD, present)
            told["modality_info"] = combination_B[:, None].expand(present.shape)
        return self.model(inputs_embeds=x_BMD, use_cache=False, router_info=told, **kwargs)

    def classify(self, hidden_BMD: Tensor) -> Tensor:
        """Return the logits [B, L]."""
        return self.classifier(hidden_BMD.mean(1))

    def _embed(self, values_BMF: Tensor) -> Tensor:
        num_modalities, size = self.config.num_modalities, self.config.hidden_size
        weight_MDF = self.modality_proj.weight.view(num_modalities, size, -1)
        return torch.einsum("bmf,mdf->bmd", values_BMF, weight_MDF) + self.modality_proj.bias.view(num_modalities, size)
