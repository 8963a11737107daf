"""Token streams: a split's documents, each ended by <eos>, as one array of the narrowest type."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pikv_core.data.tokenizer import EOS
from pikv_core.errors import PiKVError
from pikv_core.files import replacing

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DOCUMENTS_AT_A_TIME = 1000
ENDS = (EOS, "</s>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>")  # of ours, and of others


def encode(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """Return the token ids of all documents, uint16 [N] where the vocabulary allows, else uint32.

    A tokenizer that knows none of ENDS leaves documents one after the other.
    """
    kind = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    end = [number for word in ENDS if (number := tokenizer.token_to_id(word)) is not None][:1]
    parts = []
    for start in range(0, len(documents), DOCUMENTS_AT_A_TIME):
        for encoding in tokenizer.encode_batch_fast(
            documents[start : start + DOCUMENTS_AT_A_TIME], add_special_tokens=False
        ):
            parts.append(np.asarray([*encoding.ids, *end], kind))
    return np.concatenate(parts)


def windows(rng: np.random.Generator, stream: np.ndarray, num_samples: int, length: int) -> np.ndarray:
    """Return int64 [num_samples, length], slices at random places; raise PiKVError on too short a text."""
    if len(stream) < length:
        raise PiKVError(
            f"the text has {len(stream)} tokens, too few for a slice of {length}",
            hint="give more text with --text, or ask for shorter samples",
        )
    starts = rng.integers(len(stream) - length + 1, size=num_samples)
    return stream[starts[:, None] + np.arange(length)].astype(np.int64)


def of_split(streams: Mapping[str, np.ndarray], split: str) -> np.ndarray:
    """Return a split's stream; raise PiKVError where it is not at hand."""
    if split not in streams:
        raise PiKVError(f"no text of the split '{split}' is at hand; there is: {', '.join(streams) or 'none'}")
    return streams[split]


def save(stream: np.ndarray, file: Path) -> None:
    """Write a stream as .npy."""
    with replacing(file) as temporary, temporary.open("wb") as handle:
        np.save(handle, stream)


def load(file: Path) -> np.ndarray:
    """Read what `save` wrote."""
    try:
        return np.load(file)
    except (OSError, ValueError, EOFError) as error:
        raise PiKVError(f"{file}: not a readable token file: {error}") from error
