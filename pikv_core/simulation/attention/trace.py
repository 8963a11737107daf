"""A trace of recorded attention: of one sequence, what each query of each layer and head attended to.

The file is one of safetensors. Per layer i it holds, as sparse rows in the order of query, then head:
`layers.i.indices` and `layers.i.values` of all rows, `layers.i.row_starts` int64; and, where they were recorded,
`layers.i.sinks` [N,H], `layers.i.keys` [G,S,D] and `layers.i.queries` [H,S,D]. The metadata has one
key, the format, with version and header as JSON.
Shapes: H query heads, G key/value heads, N recorded queries, S tokens, D head dim.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pikv_core.errors import PiKVError

FORMAT = "pikv-attention"
VERSION = "1"
HINT = "`pikv generate --record-attention FILE` and `pikv gen-data attention --out DIR` write one"


@dataclass(frozen=True)
class Header:
    """What was recorded: of which model, how many tokens, and how much of each row.

    windows: tokens that a layer's query looks back, None for all. first_query: position of the first one recorded.
    top_p: the share of a row's mass that its recorded entries hold at least; 1.0 is all of it.
    """

    model: str
    dtype: Literal["float32", "bfloat16", "float16"]  # of the model's keys
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    num_prompt_tokens: int
    num_tokens: int  # the prompt's and those of the decode steps
    first_query: int
    top_p: float

    @property
    def num_steps(self) -> int:
        """Decode steps: queries after the prompt."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_queries(self) -> int:
        return self.num_tokens - self.first_query


@dataclass(frozen=True)
class AttentionTrace:
    """A header and the tensors of the file, by name."""

    header: Header
    tensors: dict[str, NDArray[Any]]

    @property
    def holds(self) -> frozenset[str]:
        """Return what a policy can be told: attention, and keys and queries where they were recorded."""
        return frozenset({"attention"} | {name for name in ("keys", "queries") if f"layers.0.{name}" in self.tensors})

    def rows(self, layer: int, first: int, end: int) -> NDArray[np.float32]:
        """Return the attention [H, end-first, end] of the queries at positions `first` to `end`, as recorded."""
        H, N = self.header.num_heads, end - first
        starts = self._of(layer, "row_starts")
        low, high = (first - self.header.first_query) * H, (end - self.header.first_query) * H
        entries = slice(starts[low], starts[high])
        row = np.repeat(np.arange(N * H), np.diff(starts[low : high + 1]))
        dense = np.zeros((N * H, end), np.float32)
        dense[row, self._of(layer, "indices")[entries]] = self._of(layer, "values")[entries]
        return dense.reshape(N, H, end).swapaxes(0, 1)

    def sinks(self, layer: int, first: int, end: int) -> NDArray[np.float32]:
        """Return the share [H, end-first] of these queries' attention that no token gets: of the model's own sinks."""
        name = f"layers.{layer}.sinks"
        if name not in self.tensors:
            return np.zeros((self.header.num_heads, end - first), np.float32)
        return self.tensors[name][first - self.header.first_query : end - self.header.first_query].T

    def vectors(self, layer: int, kind: Literal["keys", "queries"]) -> NDArray[np.float32] | None:
        """Return the keys [G,S,D] or queries [H,S,D] of all tokens, None where they were not recorded."""
        found = self.tensors.get(f"layers.{layer}.{kind}")
        return None if found is None else found.astype(np.float32)

    def recorded_mass(self) -> float:
        """Return the share of the decode steps' attention that the recorded entries hold; storage rounds, too."""
        h = self.header
        first = (h.num_prompt_tokens - h.first_query) * h.num_heads
        held = left = 0.0
        for layer in range(h.num_layers):
            held += float(self._of(layer, "values")[self._of(layer, "row_starts")[first] :].sum(dtype=np.float64))
            left += float(self.sinks(layer, h.num_prompt_tokens, h.num_tokens).sum(dtype=np.float64))
        return held / (h.num_layers * h.num_steps * h.num_heads - left)

    def _of(self, layer: int, name: str) -> NDArray[Any]:
        return self.tensors[f"layers.{layer}.{name}"]


def load(path: str | Path) -> AttentionTrace:
    """Read a trace; raise PiKVError where the file is none, is of another version or damaged."""
    from safetensors import SafetensorError, safe_open

    if str(path) == "-" or Path(path).is_dir():
        kind = "stdin" if str(path) == "-" else "a folder"
        raise PiKVError(f"{path}: recorded attention is read from a file, and this is {kind}", hint=HINT)
    try:
        with safe_open(path, framework="numpy") as file:
            header = _header(path, file.metadata() or {})
            trace = AttentionTrace(header, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            _check(trace)
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        raise PiKVError(f"{path}: cannot read the trace: {reason.lower()}", hint=HINT) from error
    except SafetensorError as error:
        raise PiKVError(f"{path}: not a trace of attention, or a damaged one: {error}", hint=HINT) from error
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise PiKVError(f"{path}: the trace of attention is damaged: {error}", hint=HINT) from error
    return trace


def _header(path: str | Path, metadata: dict[str, str]) -> Header:
    from pydantic import TypeAdapter

    if FORMAT not in metadata:
        raise PiKVError(f"{path}: this file of safetensors is not a trace of attention", hint=HINT)
    told = json.loads(metadata[FORMAT])
    version = told.pop("version")
    if version != VERSION:
        raise PiKVError(
            f"{path}: the trace is of version '{version}', and this program reads '{VERSION}'", hint="record it again"
        )
    return TypeAdapter(Header).validate_python(told)


def _check(trace: AttentionTrace) -> None:
    """Raise ValueError or KeyError where header and tensors do not go together."""
    h, tensors = trace.header, trace.tensors
    if not (0 <= h.first_query < h.num_prompt_tokens <= h.num_tokens and len(h.windows) == h.num_layers >= 1):
        raise ValueError("its numbers of tokens or layers contradict each other")
    if h.head_dim < 1:
        raise ValueError(f"a head of {h.head_dim} channels is none")
    if not 0 < h.top_p <= 1:
        raise ValueError(f"top_p {h.top_p} is no share of a row")
    windows = {window for window in h.windows if window is not None}
    if len(windows) > 1 or min(windows, default=1) < 1:
        raise ValueError(f"its windows of {sorted(windows)} tokens are not of one model")
    if h.num_heads < 1 or h.num_kv_heads < 1 or h.num_heads % h.num_kv_heads:
        raise ValueError(f"{h.num_heads} query heads are no groups for {h.num_kv_heads} key/value heads")
    expected = {
        "sinks": (h.num_queries, h.num_heads),
        "keys": (h.num_kv_heads, h.num_tokens, h.head_dim),
        "queries": (h.num_heads, h.num_tokens, h.head_dim),
    }
    for layer in range(h.num_layers):
        starts, indices, values = (tensors[f"layers.{layer}.{name}"] for name in ("row_starts", "indices", "values"))
        if (starts.dtype.kind, indices.dtype.kind, values.dtype.kind) not in (("i", "i", "f"), ("i", "u", "f")):
            raise ValueError(f"the rows of layer {layer} are {starts.dtype}, {indices.dtype} and {values.dtype}")
        sizes = np.diff(starts)
        fits = starts.shape == (h.num_queries * h.num_heads + 1,) and indices.shape == values.shape
        if not fits or starts[0] != 0 or starts[-1] != len(indices) or (sizes < 0).any():
            raise ValueError(f"the rows of layer {layer} do not fit its entries")
        query = np.repeat(np.arange(h.first_query, h.num_tokens), h.num_heads)
        if (indices < 0).any() or (indices > np.repeat(query, sizes)).any():
            raise ValueError(f"a query of layer {layer} attends to tokens after it")
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise ValueError(f"layer {layer} has attention that is negative or not finite")
        for name, shape in expected.items():
            key = f"layers.{layer}.{name}"
            if key in tensors and (tensors[key].shape != shape or tensors[key].dtype.kind != "f"):
                raise ValueError(f"{key} is {tensors[key].dtype} {tensors[key].shape}, not {shape} of floats")
            if key in tensors and not np.isfinite(tensors[key]).all():
                raise ValueError(f"{key} is not finite")
            if (key in tensors) != (f"layers.0.{name}" in tensors) and name != "sinks":
                raise ValueError(f"only some layers have {name}")
