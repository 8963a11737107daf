"""Fresh memory that tells what nobody wrote, and what was written beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch

GUARD = 256  # numbers before and behind
FRESH_BYTE = 0xA5


@contextmanager
def guarded_memory() -> Iterator[None]:
    """Within, `torch.empty`, `empty_like` and `new_empty` return NaN (or 0xA5) between guards of the same.

    Fails at its end where a guard was overwritten.
    """
    buffers: list[torch.Tensor] = []

    def filled(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*arguments: object, **options: object) -> torch.Tensor:
            tensor = make(*arguments, **options)
            fresh = torch.nan if tensor.is_floating_point() else FRESH_BYTE
            if not tensor.is_contiguous():
                return tensor.fill_(fresh)
            buffer = tensor.new_full((tensor.numel() + 2 * GUARD,), fresh)
            buffers.append(buffer)
            return buffer[GUARD:-GUARD].view(tensor.shape)

        return made

    with ExitStack() as patches:
        for place, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patches.enter_context(patch.object(place, name, filled(getattr(place, name))))
        yield
    for buffer in buffers:
        guards = torch.cat([buffer[:GUARD], buffer[-GUARD:]])
        whole = guards.isnan() if buffer.is_floating_point() else guards == torch.tensor(FRESH_BYTE).to(buffer.dtype)
        assert whole.all(), f"{(~whole).sum()} numbers were written beside fresh memory of {len(buffer) - 2 * GUARD}"
