"""The cache runtime; `from pikv_core.cache import PiKVCache`."""

from pikv_core.cache.cache import PiKVCache

__all__ = ["PiKVCache"]
