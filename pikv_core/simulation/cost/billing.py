"""What a study needs of a recipe's `serving` section: bytes of blocks, and times where the hardware is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pikv_core.schema.simulate import ServingSettings
from pikv_core.simulation.cost.hardware import Hardware
from pikv_core.simulation.cost.kv_model import KvModel
from pikv_core.simulation.cost.prefill import compute_s
from pikv_core.simulation.cost.serving import serve
from pikv_core.simulation.cost.serving_row import ServingRow, serving_row
from pikv_core.simulation.trace import Trace


@dataclass(frozen=True)
class Bill:
    """A model, and the hardware that computes its prompts; settings: those of the recipe."""

    model: KvModel
    hardware: Hardware | None
    settings: ServingSettings

    @staticmethod
    def of(settings: ServingSettings) -> Bill | None:
        """Load what the settings name, None where no model is named; raise PiKVError where it is not known."""
        if settings.kv_model is None:
            return None
        hardware = None if settings.hardware is None else Hardware.load(settings.hardware)
        return Bill(KvModel.load(settings.kv_model, settings.kv_dtype), hardware, settings)

    def told(self) -> dict[str, Any]:
        """Return what a result has to say of it."""
        return {
            "kv_model": self.model.name,
            "kv_dtype": self.model.kv_dtype,
            "bytes_per_token": self.model.bytes_per_token,
            "num_active_params": self.model.num_active_params,
            "hardware": None if self.hardware is None else self.hardware.model_dump(),
            "servers": self.settings.servers,
            "overlap": self.settings.overlap,
        }

    def serving_row(self, trace: Trace, hit_tokens: NDArray[np.integer], warm_up: int) -> ServingRow:
        """Serve the trace with so many tokens of each prompt [R] in the GPU's memory."""
        assert self.hardware is not None
        settings = self.settings
        return serving_row(trace, hit_tokens, self.model, self.hardware, settings.servers, settings.slo_s, warm_up)

    def ttft_s(self, trace: Trace, hit_tokens: NDArray[np.integer]) -> NDArray[np.float64]:
        """Return the time to first token of each request [R] when it is served so."""
        assert self.hardware is not None
        service_s = compute_s(self.model, self.hardware, trace.input_tokens, hit_tokens)
        return serve(trace.timestamps_ms / 1000, service_s, self.settings.servers).ttft_s
