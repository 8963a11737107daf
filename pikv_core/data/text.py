"""The text task: a BPE tokenizer and token streams of a corpus, for plain next-token training."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from pydantic import Field

from pikv_core.data import TASKS, corpus, tokenizer, tokens
from pikv_core.data.manifest import agree, read_manifest, read_options
from pikv_core.data.source import Batch
from pikv_core.data.tokenizer import load as load_tokenizer
from pikv_core.errors import PiKVError, UsageError
from pikv_core.files import write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from pikv_core.runs import Reporter

OPTIONS = "text.json"


@TASKS.register("text")
@dataclass(frozen=True)
class Text:
    """Options of the task; a folder of gen-data wins over what is left at its default."""

    vocab_size: Annotated[int, Field(ge=tokenizer.MIN_BPE_TOKENS)] = 4096  # tokens at most

    def open(
        self,
        path: str | None,
        seed: int,
        text: list[str],
        column: str | None,
        reporter: Reporter,
        *,
        tokenizer: Tokenizer | None = None,
    ) -> TextSource:
        """Return the source: from a folder of gen-data at `path`, or made on the spot.

        tokenizer: in place of one that is trained on the text; a folder keeps its own.
        """
        if path is None:
            return self._make(corpus.load(text, column, seed, reporter), reporter, tokenizer)
        if text or column is not None:
            raise UsageError(f"text: the data in {path} bring their own", hint="drop the text, or the path")
        folder = Path(path)
        read_manifest(folder, "text")
        written = read_options(folder / OPTIONS, Text)
        agree(self, written, folder / OPTIONS)
        return TextSource(written, load_tokenizer(folder / "tokenizer"), corpus.load_streams(folder))

    def write(
        self,
        folder: Path,
        num_samples: int,
        seed: int,
        text: list[str],
        column: str | None,
        reporter: Reporter,
    ) -> dict[str, int]:
        """Write the tokenizer and both splits' tokens of at most `num_samples` documents.

        Returns the number of documents by file.
        """
        documents = corpus.load(text, column, seed, reporter, max_documents=num_samples)
        source = self._make(documents, reporter)
        tokenizer.save(source.tokenizer, folder / "tokenizer")
        write_json(folder / OPTIONS, asdict(self))
        return corpus.save(documents, source.streams, folder)

    def _make(self, documents: corpus.Corpus, reporter: Reporter, given: Tokenizer | None = None) -> TextSource:
        if given is None:
            reporter.status(f"training a tokenizer on {len(documents.train)} documents")
            given = tokenizer.train_bpe(documents.train, self.vocab_size)
        return TextSource(self, given, corpus.encode(documents, given))


@dataclass(frozen=True)
class TextSource:
    """The corpus as token streams by split, documents ended by <eos>."""

    lesson: ClassVar[str] = "next-token"

    task: Text
    tokenizer: Tokenizer
    streams: dict[str, np.ndarray]

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    def batch(self, rng: np.random.Generator, num_samples: int, length: int, split: str = "train") -> Batch:
        """Draw windows at random places; every token but the first is predicted."""
        ids = tokens.windows(rng, tokens.of_split(self.streams, split), num_samples, length)
        text_mask = np.ones(ids.shape, bool)
        text_mask[:, -1] = False
        return Batch(ids, np.zeros(ids.shape, bool), text_mask)

    def save(self, folder: Path) -> None:
        """Write tokenizer, options and the held-out tokens into a model folder."""
        tokenizer.save(self.tokenizer, folder)
        write_json(folder / OPTIONS, asdict(self.task))
        corpus.save_held_out(self.streams, folder)

    @classmethod
    def load(cls, folder: Path) -> TextSource:
        """Rebuild the source from a model folder; only the split "test" is there."""
        if not has_text(folder):
            raise PiKVError(
                f"{folder}: the model was not trained on text: no {OPTIONS} beside it",
                hint="train one with the task 'text'",
            )
        streams = {} if (stream := corpus.held_out(folder)) is None else {"test": stream}
        return cls(read_options(folder / OPTIONS, Text), tokenizer.load(folder), streams)


def has_text(folder: Path) -> bool:
    """Return whether a model folder carries the text task it was trained on."""
    return (folder / OPTIONS).is_file()
