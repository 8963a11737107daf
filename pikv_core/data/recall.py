"""The recall task: key-value needles in filler, then questions that only the context can answer.

Filler is drawn words (the smoke test) or real text (the benchmark: there, attention alone no longer finds the
needles for a policy).
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import PositiveInt
from pydantic_core import PydanticCustomError

from pikv_core.data import TASKS, corpus, samples, tokenizer, tokens
from pikv_core.data.manifest import agree, read_manifest, read_options
from pikv_core.data.needles import Layout, RecallBatch, sample
from pikv_core.data.words import KEYS, VALUES
from pikv_core.errors import PiKVError, UsageError
from pikv_core.files import write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from pikv_core.runs import Reporter

__all__ = ["Recall", "RecallBatch", "RecallSource", "has_recall"]

NEEDLE, QUESTION = "<note>", "<ask>"
OPTIONS = "recall.json"


@TASKS.register("recall")
@dataclass(frozen=True)
class Recall:
    """Options of the task; a folder of gen-data wins over what is left at its default."""

    filler: Literal["synthetic", "text"] = "synthetic"
    num_keys: PositiveInt = 128
    num_values: PositiveInt = 64
    num_filler: PositiveInt = 256  # words of the synthetic filler
    vocab_size: PositiveInt = 2048  # tokens of all kinds, with filler "text"
    max_pairs: PositiveInt = 32  # needles in a long sample; 16 are many for a small model in real text
    max_questions: PositiveInt = 16
    length: PositiveInt = 512  # tokens of a sample that gen-data writes; batches have any length

    def __post_init__(self) -> None:
        if self.filler == "synthetic":
            return
        least = tokenizer.MIN_BPE_TOKENS + len(self.words())
        if self.num_keys > len(KEYS):
            raise _problem(f"num_keys is at most {len(KEYS)} with filler 'text', got {self.num_keys}")
        if self.num_values > len(VALUES):
            raise _problem(f"num_values is at most {len(VALUES)} with filler 'text', got {self.num_values}")
        if self.vocab_size < least:
            raise _problem(f"vocab_size is at least {least} with these keys, got {self.vocab_size}")

    def words(self) -> list[str]:
        """Return the words that are one token each: markers (in real text), keys, values, drawn filler."""
        if self.filler == "text":
            ours = [*KEYS[: self.num_keys], *VALUES[: self.num_values]]
            return [NEEDLE, QUESTION, *(f" {word}" for word in ours)]
        kinds = {"k": self.num_keys, "v": self.num_values, "f": self.num_filler}
        return [f"{kind}{number}" for kind, count in kinds.items() for number in range(count)]

    def open(
        self, path: str | None, seed: int, text: list[str], column: str | None, reporter: Reporter
    ) -> RecallSource:
        """Return the source: from a folder of gen-data at `path`, or made on the spot."""
        if path is None:
            return self._make(seed, text, column, reporter)[0]
        if text or column is not None:
            raise UsageError(f"text: the data in {path} bring their own", hint="drop the text, or the path")
        folder = Path(path)
        read_manifest(folder, "recall")
        written = read_options(folder / OPTIONS, Recall)
        agree(self, written, folder / OPTIONS)
        streams = corpus.load_streams(folder) if written.filler == "text" else {}
        return RecallSource(written, tokenizer.load(folder / "tokenizer"), streams)

    def write(
        self,
        folder: Path,
        num_samples: int,
        seed: int,
        text: list[str],
        column: str | None,
        reporter: Reporter,
    ) -> dict[str, int]:
        """Write samples of both splits, the tokenizer, the options and the token streams.

        Returns the number of samples by file; those of a token file are its documents.
        """
        source, documents = self._make(seed, text, column, reporter)
        files = samples.write(source, folder, num_samples, self.length, seed, reporter)
        tokenizer.save(source.tokenizer, folder / "tokenizer")
        write_json(folder / OPTIONS, asdict(self))
        if documents is not None:
            files |= corpus.save(documents, source.streams, folder)
        return files

    def _make(
        self, seed: int, text: list[str], column: str | None, reporter: Reporter
    ) -> tuple[RecallSource, corpus.Corpus | None]:
        if self.filler == "synthetic":
            if text or column is not None:
                raise UsageError(
                    "text: the synthetic filler uses no text", hint="choose filler 'text', or drop the text"
                )
            return RecallSource(self, tokenizer.build_word_level(self.words())), None
        documents = corpus.load(text, column, seed, reporter)
        reporter.status(f"training a tokenizer on {len(documents.train)} documents")
        trained = tokenizer.train_bpe(documents.train, self.vocab_size - len(self.words()))
        streams = corpus.encode(documents, trained)
        # Only now, so that no filler token is a key or a value.
        tokenizer.add_words(trained, self.words())
        return RecallSource(self, trained, streams), documents


@dataclass(frozen=True)
class RecallSource:
    """The task with its tokenizer and, for filler "text", the token streams by split."""

    lesson: ClassVar[str] = "next-token"

    task: Recall
    tokenizer: Tokenizer
    streams: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    def batch(self, rng: np.random.Generator, num_samples: int, length: int, split: str = "train") -> RecallBatch:
        """Draw samples of `length` tokens; longer ones hold more needles and questions, up to the limits.

        Filler of a split comes from its own documents. Raises PiKVError where the length or the text is too
        short.
        """
        natural = self.task.filler == "text"
        pairs, questions = self._count(rng, length)
        needle_tokens = 3 if natural else 2
        if length < needle_tokens * (pairs + questions):
            raise PiKVError(
                f"length {length} is too short for recall: {pairs} pairs and {questions} questions take "
                f"{needle_tokens * (pairs + questions)} tokens"
            )

        def fill(count: int) -> np.ndarray:
            if natural:
                return tokens.windows(rng, tokens.of_split(self.streams, split), num_samples, count)
            first = self._layout.values[-1] + 1
            return rng.integers(first, first + self.task.num_filler, size=(num_samples, count))

        return sample(rng, self._layout, fill, natural, num_samples, length, pairs, questions)

    def save(self, folder: Path) -> None:
        """Write tokenizer, options and the held-out tokens into a model folder."""
        tokenizer.save(self.tokenizer, folder)
        write_json(folder / OPTIONS, asdict(self.task))
        if self.streams:
            corpus.save_held_out(self.streams, folder)

    @classmethod
    def load(cls, folder: Path) -> RecallSource:
        """Rebuild the source from a model folder; of real text, only the split "test" is there."""
        if not has_recall(folder):
            raise PiKVError(
                f"{folder}: the model was not trained on recall: no {OPTIONS} beside it",
                hint="train one with the task 'recall'",
            )
        task = read_options(folder / OPTIONS, Recall)
        streams = {} if (stream := corpus.held_out(folder)) is None else {"test": stream}
        return cls(task, tokenizer.load(folder), streams)

    def _count(self, rng: np.random.Generator, length: int) -> tuple[int, int]:
        """Return the number of pairs and of questions; in real text the pairs of long samples vary."""
        task = self.task
        limit = min(task.max_pairs, task.num_keys)
        if task.filler == "synthetic":
            pairs = min(max(4, length // 4), limit)
            return pairs, min(task.max_questions, pairs)
        if length < 256:
            pairs = min(max(2, length // 8 if length > 64 else length // 5), limit)
        else:
            limit = min(limit, length // 8)
            pairs = int(rng.integers(min(4, limit), limit + 1))
        return pairs, max(1, min(pairs, task.max_questions, length // 8))

    @functools.cached_property
    def _layout(self) -> Layout:
        ids = self.tokenizer.get_vocab()
        ours = np.array([ids[word] for word in self.task.words()])
        num_markers = 2 if self.task.filler == "text" else 0
        keys, values, _ = np.split(ours[num_markers:], np.cumsum([self.task.num_keys, self.task.num_values]))
        return Layout(keys, values, *((int(marker),) for marker in ours[:num_markers]))


def has_recall(folder: Path) -> bool:
    """Return whether a model folder carries the recall task it was trained on."""
    return (folder / OPTIONS).is_file()


def _problem(text: str) -> PydanticCustomError:
    return PydanticCustomError("sizes", "{text}", {"text": text})
