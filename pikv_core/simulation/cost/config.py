"""The config.json of a model: where it is, and its keys read with errors that name key and file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pikv_core.errors import PiKVError, closest
from pikv_core.strict_yaml import parse_yaml

BUILT_IN = Path(__file__).with_name("models.yaml")


@dataclass(frozen=True)
class Config:
    """The keys of a language model; of a model of several kinds of input, those of its text part."""

    source: str
    keys: Mapping[str, Any]

    @staticmethod
    def load(name: str) -> Config:
        """Read a config.json, that of a folder, or a model of the built-in list; raise PiKVError if it is none."""
        path = Path(name)
        if path.is_dir():
            path = path / "config.json"
        if path.is_file() or path.name == "config.json" or path.suffix == ".json":
            return Config(str(path), _text_part(_read(path), path))
        known = built_in()
        if name.lower() not in known:
            raise PiKVError(
                f"kv_model: no such file or known model '{name}'{closest(name.lower(), known)}",
                hint=f"give a config.json, a folder that has one, or one of: {', '.join(known)}",
            )
        return Config(f"{BUILT_IN.name}: {name.lower()}", known[name.lower()])

    def whole(self, *names: str, default: int | None = None, least: int = 0) -> int:
        """Return the number under the first of the keys that is given; without a default one must be."""
        for name in names:
            value = self.keys.get(name)
            if value is None:
                continue
            if type(value) is not int or value < least:
                raise PiKVError(
                    f"{self.source}: {name}: expected a whole number of at least {least}, got {value!r}",
                    hint="give the config.json as the model's authors published it",
                )
            return value
        if default is None:
            raise PiKVError(
                f"{self.source}: {' or '.join(names)}: required, but not given",
                hint=f"bytes and costs follow from it; a built-in model: {', '.join(built_in())}",
            )
        return default

    def has(self, name: str) -> bool:
        return self.keys.get(name) is not None


@cache
def built_in() -> dict[str, dict[str, Any]]:
    """Return the built-in configs by name."""
    configs: dict[str, dict[str, Any]] = parse_yaml(BUILT_IN.read_text(encoding="utf-8"), str(BUILT_IN))
    return configs


def _read(path: Path) -> dict[str, Any]:
    try:
        keys = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PiKVError(
            f"{path}: cannot read the model's config: {(error.strerror or str(error)).lower()}",
            hint=f"give a config.json, a folder that has one, or one of: {', '.join(built_in())}",
        ) from error
    except ValueError as error:
        raise PiKVError(f"{path}: not a JSON file", hint="a model's config.json is wanted") from error
    if not isinstance(keys, dict):
        raise PiKVError(f"{path}: expected a JSON object", hint="a model's config.json is wanted")
    return keys


def _text_part(keys: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the keys of the language model where a config wraps those of several models."""
    text = keys.get("text_config")
    if text is None:
        return keys
    if not isinstance(text, dict):
        raise PiKVError(f"{path}: text_config: expected a JSON object", hint="a model's config.json is wanted")
    return text
