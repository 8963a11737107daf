"""Data that come inside packages of the extra `tasks`: the packages are imported where they are read."""

from __future__ import annotations

import importlib
from types import ModuleType

from pikv_core.errors import PiKVError


def module(name: str, package: str, source: str) -> ModuleType:
    """Import a module of the extra, or raise PiKVError that names the package and the extra."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PiKVError(
            f"source '{source}' is read from {package}, which cannot be imported: {error}",
            hint="install it with `pip install 'pikv[tasks]'`",
        ) from error
