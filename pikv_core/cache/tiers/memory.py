"""The memories behind the device: what a tier gives out, and how long a simulated one takes."""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from dataclasses import dataclass

import torch

from pikv_core.errors import PiKVError


@dataclass(frozen=True)
class Tier:
    """A memory; `limit_bytes` of the whole cache, None for any. seconds_per_byte, latency_s: of a simulated one."""

    name: str
    limit_bytes: int | None
    is_pinned: bool = False
    folder: str | None = None
    latency_s: float = 0.0
    seconds_per_byte: float = 0.0

    @property
    def is_simulated(self) -> bool:
        return self.seconds_per_byte > 0

    @property
    def about(self) -> str:
        """Say what memory this is."""
        if self.is_simulated:
            speed = f"{1e-9 / self.seconds_per_byte:g} GB/s, {self.latency_s * 1e6:g} µs"
            return f"simulated in host memory: transfers take {speed} at least"
        if self.folder is not None:
            return f"files mapped into memory in {self.folder}, through the system's page cache"
        return "pinned host memory" if self.is_pinned else "ordinary memory, as the device's is here"

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Return uint8 [num_bytes] of this memory, which is given back when nothing holds it."""
        if self.folder is not None:
            return _mapped(self.folder, num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self.is_pinned)

    def wait(self, num_bytes: int, spent_s: float) -> None:
        """Let a transfer that has taken `spent_s` take as long as it does in a simulated memory."""
        if self.is_simulated:
            time.sleep(max(0.0, self.latency_s + num_bytes * self.seconds_per_byte - spent_s))


def _mapped(folder: str, num_bytes: int) -> torch.Tensor:
    """Return uint8 [num_bytes] of a file that has no name any more: it is gone with its last user, killed or not."""
    try:
        with tempfile.TemporaryFile(dir=folder, prefix="pikv-", buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)  # a full disk is told here, not by a signal later
            return torch.frombuffer(mmap.mmap(file.fileno(), num_bytes), dtype=torch.uint8)
    except OSError as error:
        raise PiKVError(
            f"{folder}: cannot keep {num_bytes:,} bytes of the cache here: {error.strerror}",
            hint="give cache.tiers.disk a folder with room, or cache.tiers.disk_bytes what there is",
        ) from error
