"""Checkpoints: weights in safetensors and everything else that the next step depends on, whole or absent."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pikv_core.errors import PiKVError
from pikv_core.files import replacing, write_text

WEIGHTS = "weights.safetensors"
STATE = "state.pt"


@dataclass(frozen=True)
class Checkpoint:
    """The state after `step` steps."""

    step: int
    weights: dict[str, torch.Tensor]
    optimizers: list[dict[str, Any]]
    curriculum: dict[str, Any]
    random_state: torch.Tensor
    beside: dict[str, torch.Tensor] = field(default_factory=dict)  # weights that are no part of the model


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write `folder/checkpoint/<step>`, then drop the older ones: at any moment one is complete."""
    parent = folder / "checkpoint"
    with replacing(parent / str(checkpoint.step)) as temporary:
        temporary.mkdir()
        save_file(_apart(checkpoint.weights), temporary / WEIGHTS)
        torch.save(
            {
                "step": checkpoint.step,
                "optimizers": checkpoint.optimizers,
                "curriculum": checkpoint.curriculum,
                "random_state": checkpoint.random_state,
                "beside": checkpoint.beside,
            },
            temporary / STATE,
        )
    for entry in parent.iterdir():
        if entry.name != str(checkpoint.step):
            shutil.rmtree(entry, ignore_errors=True)


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint of a run folder, or None where there is none."""
    steps = [int(entry.name) for entry in folder.glob("checkpoint/*") if entry.name.isdigit()]
    if not steps:
        return None
    path = folder / "checkpoint" / str(max(steps))
    try:
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
        return Checkpoint(weights=load_file(path / WEIGHTS), **state)
    except Exception as error:
        raise PiKVError(
            f"{path}: the checkpoint cannot be read: {error}",
            hint="delete it, and the run starts from its first step",
        ) from error


def _apart(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights with a copy of each that has its memory from another, as tied ones have."""
    seen: set[int] = set()
    found = {}
    for name, value in weights.items():
        found[name] = value.clone() if value.data_ptr() in seen else value.contiguous()
        seen.add(value.data_ptr())
    return found


def drop_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a run that is finished."""
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)


def drop_metrics_after(folder: Path, step: int) -> None:
    """Keep the lines of metrics.jsonl up to `step` steps: later ones come again, and a torn one is no line."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except ValueError:
            break
        kept.append(line + "\n")
    write_text(path, "".join(kept))
