"""Which implementation of an operation runs, its plain definition or its Triton kernel, and why.

Chosen once for an operation, device and dtype, or forced by the caller's `backend`.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch

try:
    import triton
    import triton.language as tl

    jit, constexpr = triton.jit, tl.constexpr
except ImportError:  # no wheels for this platform: the decorated functions are never called

    def jit(function: Any) -> Any:
        return function

    triton = tl = None
    constexpr = str

# Read by Triton's decorators at import too. The interpreter multiplies bfloat16 bit patterns: kernels upcast under it.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
BACKENDS = ("torch", "triton")


class Choice(NamedTuple):
    """The backend of an operation on one kind of device and dtype, and the reason."""

    op: str
    device: str
    dtype: str
    backend: str
    reason: str


_choices: dict[tuple[str, str, torch.dtype, str | None], Choice] = {}


def choose(op: str, tensor: torch.Tensor, backend: str | None = None) -> str:
    """Return the backend for an operation over a tensor; `backend` forces one.

    Raises ValueError where the forced one is unknown or cannot run there.
    """
    key = (op, tensor.device.type, tensor.dtype, backend)
    if key not in _choices:
        chosen, reason = _decide(tensor.device.type, backend)
        _choices[key] = Choice(op, tensor.device.type, str(tensor.dtype).removeprefix("torch."), chosen, reason)
    return _choices[key].backend


def backend_report() -> list[Choice]:
    """Return what was chosen so far, in the order of the first calls."""
    return list(_choices.values())


def _decide(device: str, backend: str | None) -> tuple[str, str]:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"unknown backend '{backend}', known: {', '.join(BACKENDS)}")
    if backend == "triton":
        if triton is None:
            raise ValueError("backend 'triton' needs the package triton, which is not installed")
        if device != "cuda" and not INTERPRETED:
            raise ValueError(f"backend 'triton' needs a GPU, the tensors are on '{device}'")
        return backend, "forced, run by Triton's interpreter" if INTERPRETED else "forced"
    if backend == "torch":
        return backend, "forced"
    if device != "cuda":
        return "torch", f"no kernel for device '{device}'"
    if triton is None:
        return "torch", "the package triton is not installed"
    return "triton", "a GPU and triton are there"
