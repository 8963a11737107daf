"""A corpus of documents in two splits: the text of users, or what CPython's own library holds.

Documents are split as a whole after duplicates are removed, so that no text is in both splits.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pikv_core.data import stdlib_text, text_files, tokens
from pikv_core.errors import PiKVError, UsageError
from pikv_core.files import write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from pikv_core.runs import Reporter

TEST_SHARE = 0.1  # of the documents
DESCRIPTION = "corpus.json"
HELD_OUT = "held_out.npy"  # in a model folder


@dataclass(frozen=True)
class Corpus:
    """Documents by split, and where they come from."""

    train: list[str]
    test: list[str]
    source: str

    def describe(self) -> dict[str, Any]:
        """Return what a manifest says of the corpus."""
        return {
            "source": self.source,
            "num_train_documents": len(self.train),
            "num_test_documents": len(self.test),
            "num_train_characters": sum(map(len, self.train)),
            "num_test_characters": sum(map(len, self.test)),
        }


def load(
    text: list[str], column: str | None, seed: int, reporter: Reporter, max_documents: int | None = None
) -> Corpus:
    """Read `text` (files and folders; none: the embedded corpus) and split it; a tenth is held out.

    max_documents: how many to keep, chosen by the seed. Raises PiKVError where there is too little.
    """
    if text:
        documents, source = text_files.read(text, column), ", ".join(text)
    else:
        if column is not None:
            raise UsageError(
                f"column: '{column}' names a column of jsonl and parquet files", hint="give them with --text"
            )
        reporter.status("reading the standard library's documentation")
        documents, source = stdlib_text.read(), f"standard library of Python {platform.python_version()}"
    documents = list(dict.fromkeys(stripped for document in documents if (stripped := document.strip("\n"))))
    order = np.random.default_rng(seed).permutation(len(documents))[:max_documents]
    if len(order) < 2:
        raise PiKVError(
            f"{source}: {len(order)} document: a training and a held-out split need 2",
            hint="give more text with --text, or a larger --num-samples",
        )
    num_test = max(1, round(TEST_SHARE * len(order)))
    test, train = ([documents[number] for number in sorted(part)] for part in (order[:num_test], order[num_test:]))
    return Corpus(train, test, source)


def encode(corpus: Corpus, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Return the token stream of each split."""
    return {
        "train": tokens.encode(tokenizer, corpus.train),
        "test": tokens.encode(tokenizer, corpus.test),
    }


def save(corpus: Corpus, streams: dict[str, np.ndarray], folder: Path) -> dict[str, int]:
    """Write the token streams and corpus.json; return the number of documents by file."""
    write_json(
        folder / DESCRIPTION,
        {**corpus.describe(), **{f"num_{split}_tokens": len(stream) for split, stream in streams.items()}},
    )
    for split, stream in streams.items():
        tokens.save(stream, folder / _stream_file(split))
    return {_stream_file("train"): len(corpus.train), _stream_file("test"): len(corpus.test)}


def load_streams(folder: Path) -> dict[str, np.ndarray]:
    """Read the token stream of each split from a folder of gen-data."""
    return {split: tokens.load(folder / _stream_file(split)) for split in ("train", "test")}


def save_held_out(streams: dict[str, np.ndarray], folder: Path) -> None:
    """Write the held-out tokens into a model folder."""
    tokens.save(streams["test"], folder / HELD_OUT)


def held_out(folder: Path) -> np.ndarray | None:
    """Return the token stream that a model folder holds out, or None where it carries no real text."""
    file = folder / HELD_OUT
    return tokens.load(file) if file.is_file() else None


def _stream_file(split: str) -> str:
    return f"tokens.{split}.npy"
