"""The manifest of a folder that gen-data wrote: its task, options, seed and the sha256 of every file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pikv_core.errors import PiKVError

MANIFEST = "manifest.json"


def read_json(file: Path) -> Any:
    """Return a JSON file's value, or raise PiKVError naming it."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise PiKVError(f"{file}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise PiKVError(f"{file}: not valid JSON: {error}") from error


def read_manifest(folder: Path, task: str) -> dict[str, Any]:
    """Return the manifest of a folder whose data are for `task`; raise PiKVError where they are not."""
    file = folder / MANIFEST
    if not file.is_file():
        raise PiKVError(
            f"{file}: no such file: the folder holds no complete data",
            hint=f"write them with `pikv gen-data {task} --out DIR`",
        )
    manifest = read_json(file)
    found = manifest.get("task") if isinstance(manifest, dict) else None
    if found != task:
        raise PiKVError(
            f"{file}: task: these data are for '{found}', not for '{task}'",
            hint=f"write data for it with `pikv gen-data {task} --out DIR`",
        )
    return manifest


def read_options(file: Path, task: type[Any]) -> Any:
    """Build a task from the options in a JSON file."""
    values = read_json(file)
    try:
        return TypeAdapter(task).validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise PiKVError(f"{file}: {key}: {first['msg'][0].lower()}{first['msg'][1:]}") from error


def agree(given: Any, written: Any, file: Path) -> None:
    """Raise PiKVError where an option that is given (not at its default) differs from the written one."""
    for name, field in given.__dataclass_fields__.items():
        value, stands = getattr(given, name), getattr(written, name)
        if value not in (field.default, stands):
            raise PiKVError(
                f"{file}: {name}: the data were written with {stands!r}, the task asks for {value!r}",
                hint=f"drop the option {name}, or write new data",
            )
