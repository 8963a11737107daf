"""Blocks of prompts: keys and values of consecutive tokens in all layers, as a codec stores them, each a file's bytes.

A block is known by a hash over its tokens and those of all blocks before it: prompts that begin alike share blocks.
Shapes: G key/value heads, T tokens, D head dim; a batch of one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors

from pikv_core.cache.cache import PiKVCache
from pikv_core.cache.lane import SCORE, Lane
from pikv_core.cache.store import Slots

UNCHECKED = "0" * 64  # stands in for the checksum while it is taken

Block = dict[str, torch.Tensor]  # codes of all layers, by `LAYER.NAME`


class Damaged(Exception):
    """Say what is wrong with a block's bytes."""


def chain(tokens: Sequence[int], block_tokens: int, root: str) -> list[str]:
    """Return the hash of each whole block of a prompt; root: what all of them hang on, such as the model's."""
    found, before = [], root.encode()
    for end in range(block_tokens, len(tokens) + 1, block_tokens):
        own = b"".join(token.to_bytes(8, "little") for token in tokens[end - block_tokens : end])
        found.append(hashlib.sha256(before + own).hexdigest())
        before = found[-1].encode()
    return found


def pack(block: Block, key: str) -> bytes:
    """Return a block as a safetensors file with its hash, and the SHA-256 of the file with zeros in its place."""
    tensors = {name: x.cpu().contiguous() for name, x in block.items()}
    data = safetensors.save(tensors, metadata={"block": f"{UNCHECKED} {key}"})
    return data.replace(UNCHECKED.encode(), hashlib.sha256(data).hexdigest().encode(), 1)


def unpack(data: bytes, key: str) -> Block:
    """Return the block of this hash; raise Damaged where a byte is not as it was written."""
    try:
        size = int.from_bytes(data[:8], "little")
        sha256, own = json.loads(data[8 : 8 + size])["__metadata__"]["block"].split(" ")
        if hashlib.sha256(data.replace(sha256.encode(), UNCHECKED.encode(), 1)).hexdigest() != sha256:
            raise Damaged("its checksum differs")
        if own != key:
            raise Damaged("it is another block")
        return safetensors.load(data)
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError, RecursionError) as error:
        raise Damaged("it is no block") from error


def take(cache: PiKVCache, tokens: slice) -> Block:
    """Return what a cache that is held took in of these tokens, since it was held; not a view of it."""
    block: Block = {}
    for layer in cache.own_layers:
        lane = layer.lanes[0]
        before = 0 if lane.body is None else lane.body.num_slots
        part = slice(tokens.start - before, tokens.stop - before)
        assert part.start >= 0 and part.stop <= lane.tail.num_slots and layer.held
        keys, values = (x[:, :, part] for x in lane.tail.decoded())
        codes = lane.plan.codec.encode(keys, values, lane.tail.position[:, :, part])
        block |= {f"{layer.index}.{name}": x.clone() for name, x in codes.items()}
    return block


def dimensions(cache: PiKVCache) -> list[list[int]]:
    """Return heads and channels [G,D] of each layer's keys, once there are tokens."""
    return [list(layer.dimensions[1:]) for layer in cache.own_layers]


def put(
    cache: PiKVCache, blocks: Sequence[Block], num_tokens: int, sizes: Sequence[Sequence[int]], like: torch.Tensor
) -> None:
    """Make an empty cache hold the first tokens of these blocks, as if it had been fed them.

    num_tokens: a multiple of the codec's unit. sizes: see `dimensions`. like: of the keys' dtype, on their device.
    """
    for layer, (G, D) in zip(cache.own_layers, sizes, strict=True):
        nothing = like.new_empty(1, G, 0, D)
        layer.lazy_initialization(nothing, nothing)
        lane = layer.lanes[0]
        rows = num_tokens // lane.plan.codec.unit_tokens
        prefix = f"{layer.index}."
        names = [name.removeprefix(prefix) for name in blocks[0] if name.startswith(prefix)]
        codes = {name: torch.cat([block[prefix + name] for block in blocks], dim=2)[:, :, :rows] for name in names}
        codes = {name: x.to(like.device) for name, x in codes.items()}
        position = layer.seen.advance(num_tokens, None)
        if lane.body is None or layer.evictor is not None or layer.window is not None:
            # Decoded, for tokens to go one by one: of a first prompt that is chosen before anything is encoded.
            by_head = position[:, None].expand(1, G, -1)
            lane.arrive(*lane.plan.codec.decode(codes, by_head, like.dtype), position)
        else:
            _put_codes(lane, codes, position, like.dtype)
        layer.seen_length += num_tokens
        layer.note_bytes()


def _put_codes(lane: Lane, codes: dict[str, torch.Tensor], position: torch.Tensor, dtype: torch.dtype) -> None:
    """Hold codes of tokens at `position` [1,T] in a lane's body."""
    assert lane.body is not None
    by_head = position[:, None].expand(1, lane.head.shape[1], -1)
    columns = {name: torch.zeros_like(by_head, dtype=torch.float32) for name in lane.plan.columns(scoring=True)}
    if SCORE in columns:
        columns[SCORE] = by_head.float()
    columns["position"] = by_head.to(torch.int32)
    lane.body.put(Slots(lane.body.unit, dtype, codes, columns))
    if lane.bounds is not None:
        lane.bounds.append(lane.body.decoded()[0], None)
