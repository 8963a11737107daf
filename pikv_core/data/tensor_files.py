"""Samples as safetensors, one row of every tensor a sample; the same tensors give the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pikv_core.errors import PiKVError
from pikv_core.files import replacing


def save(tensors: Mapping[str, NDArray[Any]], path: Path) -> None:
    """Write tensors by name, whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # as of any file; safetensors would let its owner alone read it
        try:
            # Other layouts would be written as they lie in memory, and read back wrong.
            save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, temporary)
        except SafetensorError as error:
            raise PiKVError(f"{path}: cannot be written: {error}") from error
        temporary.chmod(mode)


def load(path: Path) -> dict[str, NDArray[Any]]:
    """Return the tensors of a file by name; raise PiKVError where it cannot be read."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except OSError as error:
        raise PiKVError(f"{path}: cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise PiKVError(f"{path}: no safetensors file: {error}") from error
