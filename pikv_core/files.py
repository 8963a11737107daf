"""Files that are either whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pikv_core.errors import PiKVError


def make_folder(path: str | Path) -> Path:
    """Create a folder, or say in one line why it cannot be written."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PiKVError(
            f"{path}: cannot create the folder: {error.strerror or error}",
            hint="choose another place with --out",
        ) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise PiKVError(f"{path}: the folder cannot be written", hint="choose another place with --out")
    return path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, renamed over it on success and removed on any failure.

    What is written there may be a file or a folder; a folder that stood at `path` is replaced as a whole.
    """
    path = Path(path)
    make_folder(path.parent)
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise PiKVError(f"{path}: cannot be written: {error.strerror or error}") from error
    written = temporary / path.name
    try:
        yield written
        if path.is_dir() and not path.is_symlink():
            if not written.is_dir():
                raise PiKVError(f"{path}: is a folder, and a file is to be written", hint="give the name of a file")
            os.rename(path, temporary / "replaced")
        os.replace(written, path)
    except OSError as error:
        raise PiKVError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file as a whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON, indented, as a whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256(path: str | Path) -> str:
    """Return the hex SHA-256 of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
