"""The folder of a prefix store: its lock, its manifest, and files that are whole or absent."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from pikv_core.errors import PiKVError, UsageError
from pikv_core.schema import PrefixSettings

FORMAT = "pikv-prefix-1"
LOCK = ".lock"
ANEW = "give another folder, or remove this one: it fills anew"


def remove(path: Path) -> None:
    """Remove a file, if it is there and can be."""
    with contextlib.suppress(OSError):
        os.remove(path)


def write(path: Path, data: bytes) -> None:
    """Write a file under a temporary name and rename it."""
    temporary = path.with_name(f".{secrets.token_hex(8)}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise PiKVError(
            f"{path}: cannot be written: {error.strerror or error}", hint="what was stored before is intact"
        ) from error


def write_manifest(file: Path, about: dict[str, Any]) -> None:
    """Write what a store is, under a checksum."""
    data = json.dumps({"format": FORMAT, **about}).encode()
    write(file, hashlib.sha256(data).hexdigest().encode() + b"\n" + data)


def read_manifest(file: Path) -> dict[str, Any]:
    """Return what a store is; raise PiKVError where the file is not as it was written."""
    try:
        check, _, data = file.read_bytes().partition(b"\n")
    except OSError as error:
        raise PiKVError(f"{file}: cannot be read: {error.strerror or error}", hint=ANEW) from error
    if check != hashlib.sha256(data).hexdigest().encode():
        raise PiKVError(f"{file}: damaged: its checksum differs", hint=ANEW)
    about = json.loads(data)
    if about.get("format") != FORMAT:
        raise PiKVError(
            f"{file}: format '{about.get('format')}' is unknown, known: {FORMAT}", hint="give another folder"
        )
    return about


def check_same(path: Path, about: dict[str, Any], settings: PrefixSettings, identity: dict[str, Any]) -> None:
    """Raise UsageError where a store is of another model, dtype or codec, or is kept by other settings than asked."""
    for name, held in about["identity"].items():
        if identity[name] != held:
            what = "another model" if name in ("weights", "config") else f"another {name.replace('_', ' ')}"
            told = "" if len(str(held)) > 40 else f": {held}"
            raise UsageError(f"{path}: the prefix store is of {what}{told}", hint="give each its own folder")
    asked = settings.model_dump(mode="json")
    for name in settings.model_fields_set:
        if asked[name] != about["settings"][name]:
            raise UsageError(
                f"{path}: the prefix store was made with {name} {about['settings'][name]}, not {asked[name]}",
                hint="leave it out to take the store's own, or give another folder",
            )


def locked(path: Path) -> int:
    """Hold the store's lock, which a process leaves when it ends, however it ends."""
    try:
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise PiKVError(f"{path}: cannot be written: {error.strerror or error}", hint="give another folder") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise UsageError(
            f"{path}: another run has this prefix store", hint="wait for it, or give another folder"
        ) from error
    return lock
