"""Checkpoints: everything that the next step depends on, whole or absent, written and read by any number of ranks.

The format is that of torch.distributed.checkpoint, beside which progress.json says how far the run was.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from pikv_core.errors import PiKVError
from pikv_core.files import write_json, write_text
from pikv_core.training.team import Team

PROGRESS = "progress.json"


@dataclass(frozen=True)
class Checkpoint:
    """The state after `step` steps, as one rank has it.

    weights: of the model, by name. optimizers: by the weight's name, then by that of the state. beside: weights that
    are no part of the model. random_state: None where it was saved by another number of ranks.
    """

    step: int
    weights: dict[str, Tensor]
    optimizers: dict[str, dict[str, Tensor]]
    curriculum: dict[str, Any]
    random_state: Tensor | None
    beside: dict[str, Tensor] = field(default_factory=dict)


def save_checkpoint(folder: Path | None, checkpoint: Checkpoint, team: Team | None = None) -> None:
    """Write `folder/checkpoint/<step>`, then drop the older ones: at any moment one is complete.

    Every rank of a team gives what it has, and rank 0 alone the folder, which has to be one that all of them see.
    """
    from torch.distributed.checkpoint import FileSystemWriter, save

    team = team or Team()
    path = None if folder is None else folder / "checkpoint" / str(checkpoint.step)
    state = {f"random_state/{team.rank}": checkpoint.random_state}
    state |= {f"beside/{name}": value for name, value in checkpoint.beside.items()}
    state |= {f"weights/{name}": team.as_whole(name, value) for name, value in checkpoint.weights.items()}
    for name, states in checkpoint.optimizers.items():
        state |= {f"optimizers/{name}/{key}": team.as_whole(name, value) for key, value in states.items()}
    with team.writing(path) as temporary, _of_one_process():
        save(state, storage_writer=FileSystemWriter(temporary), no_dist=team.count == 1)
        if team.leads:
            progress = {"step": checkpoint.step, "num_ranks": team.count, "curriculum": checkpoint.curriculum}
            write_json(temporary / PROGRESS, progress)
    for entry in path.parent.iterdir() if path is not None else ():
        if entry.name != str(checkpoint.step):
            shutil.rmtree(entry, ignore_errors=True)


def load_checkpoint(folder: Path, team: Team | None = None) -> Checkpoint | None:
    """Return a rank's part of the newest checkpoint of a run folder, or None where there is none."""
    steps = [int(entry.name) for entry in folder.glob("checkpoint/*") if entry.name.isdigit()]
    if not steps:
        return None
    from torch.distributed.checkpoint.api import CheckpointException

    path = folder / "checkpoint" / str(max(steps))
    try:
        return _read(path, team or Team())
    except (Exception, CheckpointException) as error:
        of_ranks = error.failures.values() if isinstance(error, CheckpointException) else ()
        reason = next((one for one, _ in of_ranks), error)
        raise PiKVError(
            f"{path}: the checkpoint cannot be read: {str(reason) or type(reason).__name__}",
            hint="delete it, and the run starts from its first step",
        ) from error


def _read(path: Path, team: Team) -> Checkpoint:
    from torch.distributed.checkpoint import FileSystemReader, load

    progress = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
    reader = FileSystemReader(path)
    state = {}
    stored: Any
    for key, stored in reader.read_metadata().state_dict_metadata.items():
        kind, _, name = key.partition("/")
        if kind == "random_state" and int(name) != team.rank:
            continue
        weight = name.rpartition("/")[0] if kind == "optimizers" else name
        state[key] = team.room_for(weight, stored.size, stored.properties.dtype)
    with _of_one_process():
        load(state, storage_reader=reader, no_dist=team.count == 1)
    parts: dict[str, dict[str, Any]] = {"weights": {}, "beside": {}, "random_state": {}, "optimizers": {}}
    for key, value in state.items():
        kind, _, name = key.partition("/")
        parts[kind][name] = team.own_part(value)
    optimizers: dict[str, dict[str, Tensor]] = {}
    for key, value in parts["optimizers"].items():
        name, _, state_name = key.rpartition("/")
        optimizers.setdefault(name, {})[state_name] = value
    same_ranks = progress["num_ranks"] == team.count
    random_state = parts["random_state"][str(team.rank)] if same_ranks else None
    return Checkpoint(
        progress["step"], parts["weights"], optimizers, progress["curriculum"], random_state, parts["beside"]
    )


@contextmanager
def _of_one_process() -> Iterator[None]:
    """Keep torch from warning that one process alone reads or writes, as is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


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
