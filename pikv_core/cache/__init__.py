"""The cache runtime; `from pikv_core.cache import PiKVCache`."""

from pikv_core.cache.cache import PiKVCache
from pikv_core.cache.shards.expert_kv_cache import ExpertKVCache

__all__ = ["ExpertKVCache", "PiKVCache"]
