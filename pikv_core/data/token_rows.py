"""Texts as rows of token ids, padded on the right. B rows, T tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pikv_core.data.tokenizer import EOS, PAD, UNK
from pikv_core.errors import PiKVError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Ids = NDArray[np.int64]
PADS = (PAD, "[PAD]", "<|endoftext|>", "<|end_of_text|>", EOS, "</s>")  # the first one that a tokenizer has


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Ids]:
    """Return the ids of each text, without any of the tokenizer's own at its ends."""
    return [np.array(one.ids, np.int64) for one in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def pad_id(tokenizer: Tokenizer) -> int:
    """Return the token to pad with; raise PiKVError where the tokenizer has none."""
    if tokenizer.padding is not None:
        return int(tokenizer.padding["pad_id"])
    for word in PADS:
        if (number := tokenizer.token_to_id(word)) is not None:
            return number
    raise PiKVError("the tokenizer has no token to pad with", hint=f"it needs one of: {', '.join(PADS)}")


def hidden_id(tokenizer: Tokenizer) -> int:
    """Return the token that stands for a hidden one: the unknown one, or else what rows are padded with."""
    number = tokenizer.token_to_id(UNK)
    return pad_id(tokenizer) if number is None else number


def pad(rows: Sequence[Ids], filler: int) -> tuple[Ids, NDArray[np.bool_]]:
    """Return ids [B, T] and a mask that is True for tokens of the rows; T is the longest row's length, 1 at least."""
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(max(1, lengths.max(initial=0))) < lengths[:, None]
    ids = np.full(mask.shape, filler, np.int64)
    ids[mask] = np.concatenate(rows) if len(rows) else []
    return ids, mask
