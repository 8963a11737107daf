"""Force what computes the attention of new tokens, and tell before any work where it cannot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from pikv_core.cache.budget import Shape
from pikv_core.compression.base import Codec
from pikv_core.errors import UsageError
from pikv_kernels.backends import INTERPRETED, BackendError, forced

OTHER_BACKEND = "leave out --backend for what runs here, or choose another one, dtype or codec"


@contextmanager
def attending_by(backend: str, device: torch.device) -> Iterator[None]:
    """Let new tokens attend by `backend` alone within, "auto" for what is there; raise UsageError off its device."""
    if backend == "triton" and device.type != "cuda" and not INTERPRETED:
        raise UsageError(f"backend 'triton' needs a GPU, and this run is on '{device.type}'", hint=OTHER_BACKEND)
    if backend == "numba" and device.type != "cpu":
        raise UsageError(f"backend 'numba' needs a CPU, and this run is on '{device.type}'", hint=OTHER_BACKEND)
    if backend == "auto":
        yield
        return
    with forced(backend):
        yield


@torch.no_grad()
def check_forced(codecs: Iterable[Codec], num_heads: int, shape: Shape, device: torch.device) -> None:
    """Attend over a unit of zeros of each codec; raise UsageError where the forced backend has no kernel for it.

    num_heads: of the query.
    """
    query = torch.zeros(1, shape.num_kv_heads, num_heads // shape.num_kv_heads, shape.head_dim, dtype=shape.dtype)
    for codec in codecs:
        zeros = query.new_zeros(1, shape.num_kv_heads, codec.unit_tokens, shape.head_dim, device=device)
        position = torch.arange(codec.unit_tokens, device=device).expand(zeros.shape[:3])
        encoded = codec.encode(zeros, zeros, position)
        try:
            codec.attend(query.to(device), encoded, position, None, 1.0, None, False)
        except BackendError as error:
            raise UsageError(str(error), hint=OTHER_BACKEND) from error
