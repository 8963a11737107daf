"""Run folders: where one command's recipe, result, events and products lie, and how its progress is told."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

from pikv_core import __version__
from pikv_core.errors import PiKVError
from pikv_core.files import make_folder, write_json, write_text
from pikv_core.recipes import dump
from pikv_core.schema import Recipe
from pikv_core.telemetry import Telemetry

RUNS = Path("runs")


def num_processes() -> int:
    """Return how many processes torchrun started, 1 for one alone."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank() -> int:
    """Return which of the processes that torchrun started this is, 0 for one alone; 0 writes and reports."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


class Reporter:
    """Tell how far a job is; this one is silent, the command line's writes to stderr."""

    def status(self, text: str) -> None:
        """Say one line."""

    def progress(self, text: str, done: float, total: float) -> None:
        """Show `done` of `total` for the activity `text`."""

    def text(self, piece: str) -> None:
        """Pass on a piece of the product itself (streamed tokens)."""


class Run:
    """One execution of a verb. The folder is made when first asked for: check the input before."""

    def __init__(self, recipe: Recipe, reporter: Reporter | None = None, resume: Path | None = None):
        self.recipe = recipe
        self.reporter = reporter or Reporter()
        self.resumed = resume is not None
        self._folder: Path | None = resume
        self._telemetry: Telemetry | None = None
        if resume is None and recipe.out is not None and rank() == 0:
            _check_free(Path(recipe.out))

    @property
    def folder(self) -> Path:
        """The run folder, made on first use, with the resolved recipe in it."""
        if self._folder is None:
            self._folder = self._make()
            write_text(self._folder / "recipe.yaml", dump(self.recipe))
        return self._folder

    @property
    def telemetry(self) -> Telemetry:
        if self._telemetry is None:
            self._telemetry = Telemetry(self.folder)
        return self._telemetry

    def finish(self, result: Any, backends: dict[str, str] | None = None) -> None:
        """Write result.json: the result, versions, seed, device and chosen backends."""
        write_json(
            self.folder / "result.json",
            {
                "verb": self.recipe.verb,
                "result": plain(result),
                "seed": self.recipe.seed,
                "device": self.recipe.device,
                "backends": backends or {},
                "versions": versions(),
            },
        )
        if self._telemetry is not None:
            self._telemetry.close()

    def _make(self) -> Path:
        if self.recipe.out is not None:
            folder = Path(self.recipe.out)
            if folder.is_dir() and any(folder.iterdir()):
                raise PiKVError(
                    f"{folder}: the folder is not empty",
                    hint="give --out a new folder; nothing is overwritten",
                )
            return make_folder(folder)
        name = self.recipe.name or self.recipe.verb
        make_folder(RUNS)
        taken = [
            int(match[1])
            for entry in RUNS.iterdir()
            if (match := re.fullmatch(rf"{re.escape(name)}-(\d+)", entry.name))
        ]
        number = max(taken, default=0) + 1
        while True:
            folder = RUNS / f"{name}-{number}"
            try:
                folder.mkdir()
                break
            except FileExistsError:
                number += 1
        latest = RUNS / f"{name}-latest"
        link = RUNS / f".{name}-latest.{os.getpid()}"
        link.symlink_to(folder.name)
        os.replace(link, latest)
        return folder


def _check_free(folder: Path) -> None:
    """Raise where a run folder is taken or cannot be made, before any work is done."""
    if folder.is_dir() and any(folder.iterdir()):
        raise PiKVError(f"{folder}: the folder is not empty", hint="give --out a new folder; nothing is overwritten")
    standing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not standing.is_dir() or not os.access(standing, os.W_OK | os.X_OK):
        raise PiKVError(f"{folder}: the folder cannot be written", hint="choose another place with --out")


def find_model(name: str) -> str:
    """Return the model folder of a run folder or model folder, or a hub id as it is."""
    path = Path(name)
    for folder in (path / "model", path):
        if (folder / "config.json").is_file():
            return str(folder)
    if path.is_dir():
        raise PiKVError(
            f"{name}: no model here: neither config.json nor model/config.json",
            hint="give a folder that `pikv train` or save_pretrained wrote",
        )
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise PiKVError(
            f"{name}: no such model folder", hint="`pikv train` writes one; a hub id has the form owner/name"
        )
    return name


def plain(value: Any) -> Any:
    """Return dataclasses, paths and numbers as JSON values; a number that is not finite becomes null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value


def versions() -> dict[str, str]:
    """Return the versions a result depends on."""
    found = {"python": platform.python_version(), "pikv": __version__}
    for name in ("torch", "transformers", "numpy", "numba"):
        if name in sys.modules:
            found[name] = importlib.metadata.version(name)
    return found
