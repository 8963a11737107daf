"""Where a training run computes, and in which precision."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from pikv_core.errors import UsageError

_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


@dataclass(frozen=True)
class Hardware:
    """A device and the type that products run in; weights and optimizer states stay float32."""

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context in which a forward pass runs."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def describe(self) -> dict[str, str]:
        """Return what runs where, for result.json."""
        products = str(self.dtype).removeprefix("torch.")
        precision = products if self.dtype == torch.float32 else f"{products} autocast over float32 weights"
        return {
            "device": self.device.type,
            "precision": precision,
            "threads": str(torch.get_num_threads()),
        }


def choose(device: str, dtype: str) -> Hardware:
    """Return the hardware of a recipe; "auto" is CUDA where there is one, and bfloat16 where it is native."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device: no CUDA device is available", hint="run with --device cpu")
    if dtype == "float16":
        raise UsageError(
            "dtype: training in 'float16' would need loss scaling",
            hint="train in 'bfloat16' or 'float32'",
        )
    chosen = torch.device("cuda" if device == "cuda" or _auto_cuda(device) else "cpu")
    if dtype == "auto":
        return Hardware(chosen, torch.bfloat16 if _has_bfloat16(chosen) else torch.float32)
    return Hardware(chosen, getattr(torch, dtype))


def _auto_cuda(device: str) -> bool:
    return device == "auto" and torch.cuda.is_available()


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = Path("/proc/cpuinfo")
    return cpu.is_file() and not _BFLOAT16_FLAGS.isdisjoint(cpu.read_text().split())
