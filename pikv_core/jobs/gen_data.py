"""Write the data of one task, with a manifest that says what they are and how they came about."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pikv_core.components import build
from pikv_core.data import TASKS
from pikv_core.data.corpus import DESCRIPTION
from pikv_core.data.manifest import MANIFEST, read_json
from pikv_core.errors import PiKVError
from pikv_core.files import sha256, write_json
from pikv_core.runs import Run, plain
from pikv_core.schema import GenDataRecipe


@dataclass(frozen=True)
class Result:
    """What was written; a row of `files` has file, num_samples (null: it holds none), num_bytes and sha256."""

    task: str
    folder: str
    files: list[dict[str, Any]]


def run(recipe: GenDataRecipe, run: Run) -> Result:
    """Write the task's files into the run folder, the manifest last; a failure leaves no folder behind."""
    task = build(TASKS, recipe.task)
    with tempfile.TemporaryDirectory() as temporary:
        stage = Path(temporary)
        counts = task.write(stage, recipe.num_samples, recipe.seed, recipe.text, recipe.column, run.reporter)
        names = sorted(file.relative_to(stage).as_posix() for file in stage.rglob("*") if file.is_file())
        assert counts.keys() <= set(names)
        files = [_row(stage, name, counts.get(name)) for name in names]
        corpus = read_json(stage / DESCRIPTION) if DESCRIPTION in names else None
        _move(stage, run.folder)
    write_json(
        run.folder / MANIFEST,
        {
            "task": recipe.task.name,
            "options": plain(task),
            "seed": recipe.seed,
            "num_samples": recipe.num_samples,
            "corpus": corpus,
            "files": files,
            "versions": _versions(),
        },
    )
    run.telemetry.scalar("bytes/written", sum(row["num_bytes"] for row in files))
    result = Result(recipe.task.name, str(run.folder), files)
    run.finish(result)
    return result


def _move(stage: Path, folder: Path) -> None:
    try:
        for entry in sorted(stage.iterdir()):
            shutil.move(entry, folder / entry.name)
    except OSError as error:
        raise PiKVError(f"{folder}: cannot be written: {error.strerror or error}") from error


def _versions() -> dict[str, str]:
    """Return the versions that the bytes of the data depend on."""
    packages = {name: importlib.metadata.version(name) for name in ("pikv", "numpy", "tokenizers")}
    return {"python": platform.python_version(), **packages}


def _row(folder: Path, name: str, num_samples: int | None) -> dict[str, Any]:
    file = folder / name
    return {
        "file": name,
        "num_samples": num_samples,
        "num_bytes": file.stat().st_size,
        "sha256": sha256(file),
    }
