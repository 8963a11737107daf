"""Recipes: the settings of one experiment, read from strict YAML, `--set` and flags.

Every problem is reported at once with its key path, what was got and what is allowed. Flags win over `--set`,
`--set` over the recipe file.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from pikv_core.errors import RecipeError, UsageError, closest
from pikv_core.registry import load_installed_plugins, load_plugin
from pikv_core.schema import RECIPES, Recipe, Section
from pikv_core.strict_yaml import parse_yaml


def load(
    verb: str,
    file: str | Path | Mapping[str, Any] | None = None,
    overrides: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> Any:
    """Return the verb's frozen recipe from a YAML file, `key=value` overrides and flags (dotted key → value).

    file: or the mapping that one holds.

    Raises RecipeError with every problem found.
    """
    tree: dict[str, Any] = {}
    source = "recipe"
    origin: dict[str, str] = {}
    if isinstance(file, Mapping):
        tree = copy.deepcopy(dict(file))
    elif file is not None:
        source = str(file)
        tree = _read(Path(file), verb)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise UsageError(f"--set {override}: expected key=value", hint="for example --set train.lr=3e-4")
        _assign(tree, key.strip(), parse_yaml(text, f"--set {key.strip()}"))
        origin[key.strip()] = "--set"
    for key, value in (flags or {}).items():
        if value is not None and value != []:
            _assign(tree, key, value)
            origin[key] = "command line"
    load_installed_plugins()
    for plugin in tree.get("plugins") or []:
        load_plugin(str(plugin))
    hint = f"`pikv {verb} --check` validates a recipe without running it"
    return validate(RECIPES[verb].of(tree), tree, source, origin, hint)


def validate(
    schema: type[Section],
    tree: Mapping[str, Any],
    source: str,
    origin: Mapping[str, str] | None = None,
    hint: str | None = None,
) -> Any:
    """Return the frozen section of `schema`, or raise RecipeError; `source` and `origin` (by key) say where from."""
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(_problems(error, schema, source, origin or {}), hint) from None


def _read(path: Path, verb: str) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(
            [f"{path}: cannot read the recipe: {error.strerror}"],
            hint="shipped recipes are in the folder recipes/",
        ) from error
    except UnicodeDecodeError as error:
        raise RecipeError([f"{path}: not a UTF-8 text file"]) from error
    tree = parse_yaml(text, str(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise RecipeError([f"{path}: expected keys and values, got {_shown(tree)}"])
    of = tree.get("verb", verb)
    if of != verb:
        hint = f"run it with `pikv {of} --recipe {path}`" if of in RECIPES else f"verb is one of: {', '.join(RECIPES)}"
        raise RecipeError([f"{path}: verb: this recipe is for '{of}', not for '{verb}'"], hint=hint)
    tree.setdefault("name", path.stem)
    return tree


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; a component given by name takes options, before or after: `codec=int8`, `codec.group=32`."""
    *path, last = key.split(".")
    for part in path:
        below = tree.get(part)
        if isinstance(below, str):
            below = {"name": below}
        elif not isinstance(below, dict):
            below = {}
        tree[part] = below
        tree = below
    options = tree.get(last)
    if isinstance(value, str) and isinstance(options, dict) and options.get("name", value) == value:
        value = {**options, "name": value}
    tree[last] = value


def _shown(value: Any) -> str:
    text = f"'{value}'" if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "string": "a string",
    "bool": "true or false",
    "list": "a list",
    "model": "keys and values",
    "dict": "keys and values",
}


def _problems(error: ValidationError, schema: type[BaseModel], source: str, origin: Mapping[str, str]) -> list[str]:
    lines = []
    for item in error.errors(include_url=False):
        path = ".".join(str(part) for part in item["loc"])
        where = next((flag for key, flag in origin.items() if path == key or path.startswith(key + ".")), source)
        kind = item["type"]
        got = f", got {_shown(item.get('input'))}"
        if kind == "extra_forbidden":
            allowed = _keys_at(schema, item["loc"][:-1])
            text = f"unknown key{closest(str(item['loc'][-1]), allowed)}; allowed: {', '.join(allowed)}"
        elif kind == "missing":
            text = "required, but not given"
        elif kind == "literal_error":
            allowed_text = item["ctx"]["expected"]
            words = re.findall(r"'([^']+)'", allowed_text)
            text = f"expected {allowed_text}{got}{closest(str(item['input']), words)}"
        elif kind in ("greater_than_equal", "greater_than", "less_than_equal", "less_than", "too_short"):
            text = item["msg"].removeprefix("Input should be ").replace("List should have", "expected")
            text = f"expected a value {text}{got}" if kind != "too_short" else "expected at least one entry, got none"
        elif kind.removesuffix("_type").removesuffix("_parsing") in _KINDS:
            text = f"expected {_KINDS[kind.removesuffix('_type').removesuffix('_parsing')]}{got}"
        elif kind == "int_from_float":
            text = f"expected a whole number{got}"
        elif kind in ("component", "sizes"):
            text = item["msg"]
        else:
            text = f"{item['msg']}{got}"
        lines.append(f"{where}: {path}: {text}" if path else f"{where}: {text}")
    return lines


def _keys_at(schema: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    for part in path:
        if isinstance(part, int):
            continue
        annotation = schema.model_fields[str(part)].annotation
        if get_origin(annotation) is list:
            entry = get_args(annotation)[0]
            annotation = getattr(entry, "__origin__", entry)
        elif get_origin(annotation) is UnionType:
            annotation = get_args(annotation)[0]
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        schema = annotation
    return list(schema.model_fields)


def dump(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML, valid by itself."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True)
