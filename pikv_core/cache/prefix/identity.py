"""What stored blocks of prompts belong to, and which caches can begin with them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pikv_core.cache.cache import PiKVCache
from pikv_core.compression import CODECS
from pikv_core.errors import UsageError
from pikv_core.files import sha256
from pikv_core.observation import ALL, Observer
from pikv_core.scheduling.base import ShardSelector
from pikv_core.schema import CacheRecipe
from pikv_core.simulation.policies.base import RequestPolicy

# Of a model's config, what says nothing of its keys and values.
APART = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache")
LENGTH_DEPENDENT = ("dynamic", "longrope")  # rotations that go by the length of the whole prompt


def check_block_policy(policy: RequestPolicy) -> None:
    """Raise UsageError where a policy of the simulation cannot decide which blocks stay."""
    reason = None
    if policy.knows_future:
        reason = "knows the requests to come, and here they have not come yet"
    elif policy.unbounded:
        reason = "never evicts, and a store has a budget"
    if reason is not None:
        raise UsageError(
            f"prefix policy '{policy.name}' {reason}",
            hint="choose another; `pikv simulate-cache` replays this one on the store's log, requests.jsonl",
        )


def least_fed(cache: PiKVCache, config: Any) -> int:
    """Return how many of a prompt's last tokens have to be fed to an empty cache that begins with stored blocks.

    Raises UsageError where its policy, allocation, codec or model needs the whole prompt.
    """
    layer = cache.own_layers[0]
    evictor, codec = layer.evictor, cache.recipe.codec.name
    watchers: list[tuple[str, Observer]] = [("allocation", layer.allocation)]
    if evictor is not None:
        watchers.append(("policy", evictor))
        if evictor.sees_queries or evictor.looks is not None:
            _refuse(f"policy '{evictor.name}'", "goes by all of a prompt's queries")
        if evictor.prompt_reach(torch.ones(1, 1, dtype=torch.int64), layer.run) is not None:
            _refuse(f"policy '{evictor.name}'", "changes what a prompt computes, by its length")
    for kind, watcher in watchers:
        if watcher.observes == ALL:
            _refuse(f"{kind} '{watcher.name}'", "goes by the attention of all of a prompt's queries")
    if isinstance(layer.policy, ShardSelector):
        _refuse(f"policy '{layer.policy.name}'", "goes by the shards of its tokens")
    if CODECS[codec].columns:
        _refuse(f"codec '{codec}'", "goes by the attention of all of a prompt's queries")
    rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if kinds & {*LENGTH_DEPENDENT}:
        _refuse("the model", "rotates keys by the length of the whole prompt")
    is_seen = layer.policy.name != "full"  # a single token would be a step to a policy, and no end of a prompt
    return max(1 + is_seen, *(watcher.observes for _, watcher in watchers))


def identity(model: nn.Module, recipe: CacheRecipe) -> dict[str, Any]:
    """Return what blocks have to agree in to serve one another's prompts."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in APART}  # type: ignore[operator, union-attr]
    fitted = [sha256(file) for path in recipe.calibration for file in sorted(Path(path).rglob("*.safetensors"))]
    return {
        "weights": weights_digest(model),
        "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "codec": recipe.codec.plain(),
        "calibration": fitted,
    }


def weights_digest(model: nn.Module) -> str:
    """Return a digest of every weight: its name, its shape, and sums of its bytes, eight at once."""
    digest = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        parts = x.detach().contiguous().view(-1).view(torch.uint8)
        parts = parts if len(parts) % 8 else parts.view(torch.int64)
        sums = [part.sum(dtype=torch.int64).item() for part in (parts, parts[::3])]
        digest.update(json.dumps([name, list(x.shape), sums]).encode())
    return digest.hexdigest()


def _refuse(what: str, reason: str) -> None:
    raise UsageError(
        f"{what} {reason}, of which a stored prefix holds none",
        hint="leave out --prefix-cache, or choose what needs less, such as snapkv, tova, knorm, keydiff, "
        "streaming-llm or quest",
    )
