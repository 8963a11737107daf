"""Compile a function with numba, once per version of the source it is made of, kept on disk."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any


def compiled(function: Callable[..., Any], name: str, *parts: type) -> Callable[..., Any]:
    """Return the function compiled; parts: classes from other files whose functions it calls.

    It must not allocate: numba's reference counts are off, which cost four times the work itself in a loop that
    takes a state of five arrays apart. numba's cache notices a change of the function's own file alone; the name it
    is kept under therefore carries a digest of the other files.
    """
    from numba import njit

    texts = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
    texts = [text for text in texts if b"register_jitable" in text] + [_text(part) for part in parts]
    digest = hashlib.sha256(b"".join(texts)).hexdigest()[:12]
    function.__qualname__ = f"{name}_{digest}"
    options: dict[str, Any] = {"_nrt": False, "nogil": True}
    try:
        return njit(**options, cache=True)(function)
    except RuntimeError:  # no folder for the cache can be written
        return njit(**options)(function)


def _text(part: type) -> bytes:
    return Path(inspect.getfile(part)).read_bytes()
