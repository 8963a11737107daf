"""A registry of named classes, found by file: adding a policy, codec, router, reader or task is one new file.

A class joins by `@POLICIES.register("h2o")` in any module of the registry's package. Names are read from the
source text, so that a recipe can be checked, and a misspelt name refused, before anything heavy is imported.
Packages of others join through the entry-point group `pikv.plugins`, single files through `load_plugin`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pikv_core.errors import PiKVError, UsageError, closest

PLUGIN_GROUP = "pikv.plugins"


class Registry:
    """Map names to classes; a class's typed fields are its recipe schema.

    kind: what a member is called in messages ("policy"). variable: the registry's exported name ("POLICIES").
    package: where its files are.
    """

    def __init__(self, kind: str, variable: str, package: str):
        self.kind = kind
        self.variable = variable
        self.package = package
        self._classes: dict[str, Any] = {}
        self._modules: dict[str, str] | None = None

    def register(self, name: str) -> Callable[[Any], Any]:
        def decorate(member: Any) -> Any:
            present = self._classes.get(name)
            if present is not None and present.__module__ != member.__module__:
                raise PiKVError(f"{self.kind} '{name}' is defined in {present.__module__} and {member.__module__}")
            member.name = name
            self._classes[name] = member
            return member

        return decorate

    def names(self) -> list[str]:
        """Return every known name, sorted, without importing the members."""
        return sorted({*self._files(), *self._classes})

    def check(self, name: str) -> None:
        """Raise UsageError where `name` is not known."""
        if name not in self._files() and name not in self._classes:
            names = self.names()
            raise UsageError(
                f"unknown {self.kind} '{name}'{closest(name, names)}",
                hint=f"{self.kind} is one of: {', '.join(names)}",
            )

    def __getitem__(self, name: str) -> Any:
        self.check(name)
        if name not in self._classes:
            importlib.import_module(self._files()[name])
        return self._classes[name]

    def _files(self) -> dict[str, str]:
        if self._modules is None:
            pattern = re.compile(rf'^@{self.variable}\.register\("([^"]+)"\)', re.MULTILINE)
            self._modules = {}
            spec = importlib.util.find_spec(self.package)
            assert spec is not None and spec.submodule_search_locations is not None
            for folder in spec.submodule_search_locations:
                for file in sorted(Path(folder).glob("*.py")):
                    for name in pattern.findall(file.read_text(encoding="utf-8")):
                        self._modules[name] = f"{self.package}.{file.stem}"
        return self._modules


def load_plugin(file: str | Path) -> None:
    """Run a Python file that registers members of its own; running it twice is harmless."""
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"{path}: no such plugin file", hint="give the path of a Python file")
    name = f"pikv_plugin_{path.resolve().as_posix().replace('/', '_').removesuffix('.py')}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise PiKVError(f"{path}: the plugin failed to load: {type(error).__name__}: {error}") from error


def load_installed_plugins() -> None:
    """Import what installed packages offer under `pikv.plugins`."""
    for point in importlib.metadata.entry_points(group=PLUGIN_GROUP):
        point.load()
