"""What computes a prompt: a device of the built-in list, or its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from pikv_core.errors import UsageError, closest
from pikv_core.recipes import validate
from pikv_core.schema.base import Section
from pikv_core.strict_yaml import parse_yaml

BUILT_IN = Path(__file__).with_name("hardware.yaml")
Above = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Hardware(Section):
    """One server: `gpus` devices that share every prompt; the sizes of memory and link are None where not told."""

    peak_tflops: Above  # of one device, dense bfloat16
    mfu: Annotated[float, Field(gt=0, le=1)] = 0.5  # share of the peak that prefill reaches
    gpus: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1
    hbm_gib: Above | None = None
    hbm_gb_per_s: Above | None = None
    host_link_gb_per_s: Above | None = None

    @staticmethod
    def load(spec: str | Mapping[str, Any]) -> Hardware:
        """Return the hardware of a name, of numbers by name, or of text such as `h100,mfu=0.4`; raise UsageError."""
        numbers = _parse(spec) if isinstance(spec, str) else dict(spec)
        hint = f"for example h100, `h100,mfu=0.4` or `peak_tflops=400,mfu=0.4`; known: {', '.join(built_in())}"
        hardware: Hardware = validate(Hardware, numbers, "hardware", hint=hint)
        return hardware

    @property
    def flops_per_s(self) -> float:
        return self.peak_tflops * 1e12 * self.mfu * self.gpus


@cache
def built_in() -> dict[str, dict[str, Any]]:
    """Return the figures of the known devices by name."""
    devices: dict[str, dict[str, Any]] = parse_yaml(BUILT_IN.read_text(encoding="utf-8"), str(BUILT_IN))
    return devices


def _parse(text: str) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    for position, part in enumerate(text.split(",")):
        key, separator, value = (word.strip() for word in part.partition("="))
        if separator:
            numbers[key] = parse_yaml(value, f"hardware: {key}")
        elif position == 0 and key.lower() in built_in():
            numbers = dict(built_in()[key.lower()])
        else:
            known = built_in()
            raise UsageError(
                f"hardware: expected a known device or numbers by name, got '{key}'{closest(key.lower(), known)}",
                hint=f"known: {', '.join(known)}; or for example peak_tflops=400,mfu=0.4",
            )
    return numbers
