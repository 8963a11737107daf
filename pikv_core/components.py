"""Types of recipe fields that name a registered member: `h2o`, `{name: h2o, heavy_share: 0.3}`, `switch:h2o+snapkv`."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, create_model
from pydantic_core import PydanticCustomError, core_schema

from pikv_core.errors import UsageError, closest
from pikv_core.registry import Registry


@dataclass(frozen=True)
class Component:
    """A member of a registry, by name, with options of its class's typed fields."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def plain(self) -> Any:
        return {"name": self.name, **self.options} if self.options else self.name

    def label(self, *said: str) -> str:
        """Return it as on the command line, with what the command line cannot say, and `said`, in brackets."""
        listed = {key: value for key, value in self.options.items() if isinstance(value, list | tuple)}
        name = ":".join([self.name, *("+".join(map(str, value)) for value in listed.values())])
        options = [f"{key}={value}" for key, value in self.options.items() if key not in listed]
        return f"{name}({', '.join([*options, *said])})" if options or said else name


@dataclass(frozen=True)
class MemberOf:
    """Mark a recipe field of type Component: `name`, `name:a+b` or `{name: ..., option: ...}` of a registry."""

    registry: str

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.validate, serialization=core_schema.plain_serializer_function_ser_schema(Component.plain)
        )

    def validate(self, value: Any) -> Component:
        if isinstance(value, Component):
            return value
        registry = find_registry(self.registry)
        options = dict(value) if isinstance(value, Mapping) else {"name": value}
        name = options.pop("name", None)
        if not isinstance(name, str):
            beside = f" beside {', '.join(map(repr, options))}" if options else ""
            text = f"expected the name of a {registry.kind}{beside}"
            raise PydanticCustomError("component", "{text}", {"text": text})
        name, colon, listed = name.partition(":")
        component_check(registry, name)
        if colon:
            options = {**_listed(registry, name, listed), **options}
        if options:
            check_options(registry[name], options, registry.kind)
        return Component(name, options)


@dataclass(frozen=True)
class NameIn:
    """Mark a recipe field of type str: a plain name known to the registry `module:NAME`."""

    registry: str

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self.validate, handler(source))

    def validate(self, name: str) -> str:
        component_check(find_registry(self.registry), name)
        return name


def _listed(registry: Registry, name: str, listed: str) -> dict[str, list[str]]:
    """Return the option that a member lists after `name:`, or raise pydantic's error."""
    option = getattr(registry[name], "listed", None)
    if option is None:
        text = f"{registry.kind} '{name}' takes nothing after ':', got '{listed}'"
        raise PydanticCustomError("component", "{text}", {"text": text})
    return {option: [part.strip() for part in listed.split("+")]}


def find_registry(path: str) -> Registry:
    """Return the registry at `module:VARIABLE`."""
    module, variable = path.split(":")
    return getattr(importlib.import_module(module), variable)


def check_options(member: Any, options: Mapping[str, Any], kind: str) -> None:
    """Validate options against a member's typed fields, or raise pydantic's error."""
    types = option_types(member)
    allowed = list(types)
    unknown = [name for name in options if name not in allowed]
    if unknown:
        raise PydanticCustomError(
            "component",
            "{text}",
            {
                "text": "; ".join(
                    f"{kind} '{member.name}' has no option '{name}'{closest(name, allowed)}" for name in unknown
                )
                + f"; it takes: {', '.join(allowed) or 'none'}"
            },
        )
    try:
        if dataclasses.is_dataclass(member):
            TypeAdapter(member).validate_python(dict(options))
        else:
            fields: Any = {name: (kind, None) for name, kind in types.items()}
            schema = create_model(member.name, **fields)
            schema.model_validate(dict(options), strict=True)
    except UsageError as error:
        raise as_pydantic(error) from None


def option_types(member: Any) -> dict[str, Any]:
    """Return the options of a member and their types: a dataclass's fields, or what __init__ takes.

    Of arguments, those that `member.sizes` names are no options, and those handed on to its bases are.
    """
    if dataclasses.is_dataclass(member):
        return {field.name: field.type for field in dataclasses.fields(member)}
    types: dict[str, Any] = {}
    for base in member.__mro__:
        if "__init__" not in vars(base):
            continue
        given = inspect.signature(vars(base)["__init__"], eval_str=True).parameters.values()
        types = {one.name: one.annotation for one in given if one.kind is not one.VAR_KEYWORD} | types
        if all(one.kind is not one.VAR_KEYWORD for one in given):
            break
    return {name: kind for name, kind in types.items() if name not in ("self", *member.sizes)}


def build(registry: Registry, component: Component) -> Any:
    """Build the registered class from a component's options."""
    return TypeAdapter(registry[component.name]).validate_python(dict(component.options))


def component_check(registry: Registry, name: str) -> None:
    """Raise pydantic's error where a name is not registered."""
    try:
        registry.check(name)
    except UsageError as error:
        raise as_pydantic(error) from None


def as_pydantic(error: UsageError) -> PydanticCustomError:
    """Return the error as pydantic's, which is told with its place in the recipe."""
    return PydanticCustomError("component", "{text}", {"text": f"{error.message}; {error.hint}"})
