"""Collect attention rows as they come, the largest entries of each alone, and write them as a trace.

Shapes: H query heads, G key/value heads, N queries, P tokens up to the last of them, T tokens, D head dim.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pikv_core.errors import PiKVError
from pikv_core.files import replacing
from pikv_core.simulation.attention.trace import FORMAT, VERSION, Header

LEAST_SINK = 1e-5  # what is less is the rounding of a softmax


class AttentionWriter:
    """Take the rows of each layer in order of their queries.

    top_p: share of a row's mass to keep, by its largest entries; 1.0 keeps all that `dtype` does not round to 0.
    """

    def __init__(self, top_p: float = 0.999, dtype: Literal["float16", "float32"] = "float16"):
        self.top_p, self.dtype = top_p, np.dtype(dtype)
        self._parts: dict[str, list[NDArray[Any]]] = defaultdict(list)

    def add_rows(self, layer: int, probs: NDArray[np.float32]) -> None:
        """Take the softmax rows [H,N,P] of the layer's next N queries; a sum below 1 is what the model's sinks took."""
        rows = np.ascontiguousarray(probs.swapaxes(0, 1))  # [N,H,P]
        keep = rows.astype(self.dtype) > 0
        if self.top_p < 1:
            keep &= rows >= self._least(rows)
        place = f"layers.{layer}."
        self._parts[place + "sizes"].append(keep.sum(axis=2).reshape(-1))
        self._parts[place + "indices"].append(np.nonzero(keep)[2].astype(np.int32))
        self._parts[place + "values"].append(rows[keep].astype(self.dtype))
        sinks = 1 - rows.sum(axis=2, dtype=np.float64)
        self._parts[place + "sinks"].append(np.where(sinks > LEAST_SINK, sinks, 0).astype(np.float32))

    def add_vectors(self, layer: int, kind: Literal["keys", "queries"], vectors: NDArray[np.float32]) -> None:
        """Take the keys [G,T,D] or queries [H,T,D] of the layer's next T tokens; raises PiKVError on overflow."""
        with np.errstate(over="ignore"):
            stored = vectors.astype(self.dtype)
        if not np.isfinite(stored).all():
            raise PiKVError(
                f"layer {layer}: its {kind} are too large for a trace in {self.dtype}",
                hint="record in float32 (--set record.dtype=float32) or without them (--set record.vectors=false)",
            )
        self._parts[f"layers.{layer}.{kind}"].append(stored)

    def write(self, path: str | Path, header: Header) -> None:
        """Write the trace, whole or not at all."""
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        tensors: dict[str, NDArray[Any]] = {}
        for name, parts in self._parts.items():
            whole = np.concatenate(parts, axis=1 if name.endswith((".keys", ".queries")) else 0)
            if name.endswith(".sizes"):
                starts = np.zeros(len(whole) + 1, np.int64)
                np.cumsum(whole, out=starts[1:])
                tensors[name.removesuffix("sizes") + "row_starts"] = starts
            elif name.endswith(".indices"):
                tensors[name] = whole.astype(np.uint16 if header.num_tokens <= 2**16 else np.int32)
            elif not name.endswith(".sinks") or whole.any():
                tensors[name] = np.ascontiguousarray(whole)
        told = json.dumps({"version": VERSION, **dataclasses.asdict(header)})
        with replacing(path) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode  # as of any file; safetensors would let its owner alone read it
            try:
                save_file(tensors, temporary, {FORMAT: told})  # one key: several would come in any order
            except SafetensorError as error:
                raise PiKVError(f"{path}: cannot be written: {error}") from error
            temporary.chmod(mode)

    def _least(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return, for each row, the smallest of the largest entries that hold `top_p` of it. [N,H,1]"""
        falling = -np.sort(-rows, axis=2)
        held = falling.cumsum(axis=2, dtype=np.float64)
        last = (held < self.top_p * held[:, :, -1:]).sum(axis=2, keepdims=True)
        return np.take_along_axis(falling, np.minimum(last, rows.shape[2] - 1), axis=2)
