"""The names that users of PiKV know, over the cache, policies and codecs of this package.

Compressors and schedulers take tensors and need no model; `PiKVEnhancedModel` has one.
"""

from pikv_core.classic.compressors import (
    Compressor,
    FastVCompressor,
    LoRACompressor,
    PyramidCompressor,
    QuantizedCompressor,
    SVDCompressor,
)
from pikv_core.classic.enhanced_model import PiKVEnhancedModel
from pikv_core.classic.pikv_compressor import PiKVCompressor
from pikv_core.classic.scheduling import (
    CacheSchedulingManager,
    H2OScheduler,
    LRUScheduler,
    QUESTScheduler,
    SchedulingPolicy,
)

__all__ = [
    "CacheSchedulingManager",
    "Compressor",
    "FastVCompressor",
    "H2OScheduler",
    "LRUScheduler",
    "LoRACompressor",
    "PiKVCompressor",
    "PiKVEnhancedModel",
    "PyramidCompressor",
    "QUESTScheduler",
    "QuantizedCompressor",
    "SVDCompressor",
    "SchedulingPolicy",
]
