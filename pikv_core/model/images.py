"""The PiKV decoder as a classifier of images, cut into patches as by ViT (2010.11929).

B batch, C channels, H and W pixels, P patches, F numbers a patch, D hidden size, L labels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pikv_core.errors import UsageError
from pikv_core.model.classified import PiKVClassifierOutput, classified
from pikv_core.model.decoder import PiKVModel, PiKVPreTrainedModel


class PiKVForImageClassification(PiKVPreTrainedModel):
    """Embed patches by one linear map and their places by learned vectors; the mean over patches is classified."""

    main_input_name = "pixel_values"

    def __init__(self, config: Any):
        super().__init__(config)
        if config.patch_size < 1 or config.image_size % config.patch_size:
            text = f"image_size: expected a multiple of patch_size {config.patch_size}, got {config.image_size}"
            raise UsageError(text)
        self.num_labels = config.num_labels
        num_patches = (config.image_size // config.patch_size) ** 2
        self.model = PiKVModel(config)
        self.patch_proj = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        self.places = nn.Embedding(num_patches, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> PiKVClassifierOutput | tuple[Any, ...]:
        """Classify images [B, C, H, W], with numbers as in training; labels [B]."""
        outputs = self.decode(pixel_values, **kwargs)
        logits = self.classify(outputs.last_hidden_state)
        return classified(self, outputs, logits, labels, output_router_logits, return_dict)

    def decode(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        """Return the decoder's PiKVModelOutput for the patches, its last_hidden_state [B, P, D]."""
        x_BPD = self.patch_proj(self.patches(pixel_values)) + self.places.weight
        return self.model(inputs_embeds=x_BPD, use_cache=False, **kwargs)

    def classify(self, hidden_BPD: Tensor) -> Tensor:
        """Return the logits [B, L]."""
        return self.classifier(hidden_BPD.mean(1))

    def patches(self, pixel_values: Tensor) -> Tensor:
        """Cut images into patches [B, P, F], row by row; raise UsageError where they are of another size."""
        config = self.config
        expected = (config.num_channels, config.image_size, config.image_size)
        if tuple(pixel_values.shape[1:]) != expected:
            got = " x ".join(map(str, pixel_values.shape[1:]))
            raise UsageError(f"pixel_values: expected images of {' x '.join(map(str, expected))}, got {got}")
        return nn.functional.unfold(pixel_values, config.patch_size, stride=config.patch_size).transpose(1, 2)
