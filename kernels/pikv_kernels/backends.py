"""Which implementation of an operation runs, its plain definition, its Triton kernel or numba's, and why.

Chosen once for an operation, device and dtype, or forced by the caller's `backend` or by `forced`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
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
CPU_DTYPES = (torch.float32, torch.bfloat16, torch.uint8)
LEAST_NUMBERS = 2**15  # stored keys from which numba's kernels are faster; calling one takes 40 µs


class BackendError(ValueError):
    """Tell that a forced backend is unknown or cannot run there."""


class Choice(NamedTuple):
    """The backend of an operation on one kind of device and dtype, and the reason."""

    op: str
    device: str
    dtype: str
    backend: str
    reason: str


_choices: dict[tuple[Any, ...], Choice] = {}
_newest_forced: str | None = None


def choose(op: str, tensor: torch.Tensor, backend: str | None = None) -> str:
    """Return the backend for an operation over a tensor; `backend` forces one.

    Raises BackendError where the forced one is unknown or cannot run there.
    """
    key = (op, tensor.device.type, tensor.dtype, backend)
    if key not in _choices:
        chosen, reason = _decide(tensor.device.type, backend)
        _choices[key] = Choice(op, tensor.device.type, str(tensor.dtype).removeprefix("torch."), chosen, reason)
    return _choices[key].backend


def choose_for_newest(op: str, query: torch.Tensor, stored: torch.Tensor, backend: str | None = None) -> str:
    """Return "numba" or "torch" for the query of one new token over `stored` keys or what stands for them.

    Raises BackendError where the forced backend cannot run there.
    """
    backend = backend or _newest_forced
    is_small = stored.numel() < LEAST_NUMBERS
    learns = torch.is_grad_enabled() and (query.requires_grad or stored.requires_grad)
    key = (op, stored.device.type, stored.dtype, backend, is_small, learns)
    if key not in _choices:
        chosen, reason = _decide_newest(stored, backend, is_small, learns)
        _choices[key] = Choice(op, stored.device.type, str(stored.dtype).removeprefix("torch."), chosen, reason)
    return _choices[key].backend


@contextmanager
def forced(backend: str) -> Iterator[None]:
    """Force "numba" or "torch" for the attention of new tokens within."""
    global _newest_forced
    before, _newest_forced = _newest_forced, backend
    try:
        yield
    finally:
        _newest_forced = before


def newest_forced() -> str | None:
    """Return the backend that is forced for the attention of new tokens, None where it is chosen."""
    return _newest_forced


def refuse_forced(what: str) -> None:
    """Raise BackendError where a kernel is forced for `what`, which has none, such as "codec 'fp8'"."""
    if _newest_forced not in (None, "torch"):
        raise BackendError(f"backend '{_newest_forced}': no kernel for {what}")


def backend_report() -> list[Choice]:
    """Return what was chosen so far, in the order of the first calls."""
    return list(_choices.values())


def _decide(device: str, backend: str | None) -> tuple[str, str]:
    if backend is not None and backend not in BACKENDS:
        raise BackendError(f"unknown backend '{backend}', known: {', '.join(BACKENDS)}")
    if backend == "triton":
        if triton is None:
            raise BackendError("backend 'triton' needs the package triton, which is not installed")
        if device != "cuda" and not INTERPRETED:
            raise BackendError(f"backend 'triton' needs a GPU, the tensors are on '{device}'")
        return backend, "forced, run by Triton's interpreter" if INTERPRETED else "forced"
    if backend == "torch":
        return backend, "forced"
    if device != "cuda":
        return "torch", f"no kernel for device '{device}'"
    if triton is None:
        return "torch", "the package triton is not installed"
    return "triton", "a GPU and triton are there"


def _decide_newest(stored: torch.Tensor, backend: str | None, is_small: bool, learns: bool) -> tuple[str, str]:
    if backend not in (None, "torch", "numba"):
        raise BackendError(f"backend '{backend}' does not attend with one new token, known: torch, numba")
    reason = None
    if stored.device.type != "cpu":
        reason = f"no kernel for device '{stored.device.type}'"
    elif stored.dtype not in CPU_DTYPES:
        reason = f"no kernel for {str(stored.dtype).removeprefix('torch.')}"
    elif learns:
        reason = "no kernel has gradients"
    if backend == "torch":
        return backend, "forced"
    if backend is None and (reason or is_small):
        return "torch", reason or "too few tokens for a kernel to pay"
    if reason:
        raise BackendError(f"backend 'numba': {reason}")
    return "numba", "forced" if backend else "a CPU and one new token"
