"""Needles for a trained model: samples whose answers lie far back, in the model's own tokens.

A model that was trained on the recall task gets that; any other one RULER's sentences with numbers (arXiv 2404.06654).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pikv_core.data import corpus, tokens
from pikv_core.data.recall import RecallSource, has_recall
from pikv_core.data.ruler_parts import Material
from pikv_core.data.ruler_tasks import samples
from pikv_core.data.source import Batch
from pikv_core.errors import PiKVError, UsageError

if TYPE_CHECKING:
    from pikv_core.model.loading import LoadedModel
    from pikv_core.runs import Reporter

TASK = "niah-multiquery"
MOST_ANSWER_TOKENS = len(" 1234567,") * 4 + 1  # one for each character, and one that opens the text


class Needles(Protocol):
    """What draws samples of a split, of exactly `length` tokens."""

    def batch(self, rng: np.random.Generator, num_samples: int, length: int, split: str = "train") -> Batch: ...


@dataclass(frozen=True)
class SentenceNeedles:
    """Numbers of four keys in sentences, all of them asked for; what they lie in, by split."""

    tokenizer: Any
    material: Mapping[str, Material]

    @classmethod
    def of(cls, tokenizer: Any, documents: Mapping[str, Sequence[str]]) -> SentenceNeedles:
        """Return needles among the sentences of each split's documents."""

        def count(text: str) -> int:
            return len(_encode(tokenizer, text))

        return cls(tokenizer, {split: Material.of(texts, "text", count) for split, texts in documents.items()})

    def batch(self, rng: np.random.Generator, num_samples: int, length: int, split: str = "train") -> Batch:
        """Return samples whose answers are several tokens; what follows them is filler.

        Raises PiKVError where the length has no room for the needles, or the tokenizer does not know them.
        """
        ids_BT = np.zeros((num_samples, length), np.int64)
        mask_BT = np.zeros((num_samples, length), bool)
        for ids_T, mask_T in zip(ids_BT, mask_BT, strict=True):
            question, answer, filler = self._draw(int(rng.integers(2**31)), length, split)
            end = len(question) + len(answer)
            ids_T[:end] = question + answer
            ids_T[end:] = np.resize(filler, length - end)
            mask_T[len(question) - 1 : end - 1] = True
        return Batch(ids_BT, mask_BT, np.zeros_like(mask_BT))

    def _draw(self, seed: int, length: int, split: str) -> tuple[list[int], list[int], list[int]]:
        """Return the tokens of a question after its context, of its answer, and more of the context's text."""
        opening = [one for one in _encode(self.tokenizer, "", marks=True) if one == self.tokenizer.bos_token_id]
        room = length - len(opening) - MOST_ANSWER_TOKENS
        [sample] = samples([TASK], self.material[split], lambda text: len(self._ids(text)), 1, room, seed)
        question = opening + self._ids(sample.context) + self._ids(sample.question + sample.opening)
        answer = self._ids(" " + ", ".join(sample.answers))
        if self.tokenizer.unk_token_id in {*question, *answer} - {None}:
            raise PiKVError(
                "the model's tokenizer knows no sentences or numbers to ask for",
                hint="choose a model with a tokenizer of text, or one that was trained on recall",
            )
        return question, answer, self._ids(sample.more)

    def _ids(self, text: str) -> list[int]:
        return _encode(self.tokenizer, text)


def open_needles(
    loaded: LoadedModel, text: list[str], column: str | None, seed: int, reporter: Reporter
) -> tuple[Needles, str]:
    """Return what draws the model's needles, and what it is called.

    The text around them is the user's or the embedded corpus's, and trains on nothing that the model's folder holds
    out: that is what a sweep scores.
    """
    source = RecallSource.load(loaded.folder) if loaded.folder is not None and has_recall(loaded.folder) else None
    if source is not None and source.task.filler == "synthetic":
        if text or column is not None:
            raise UsageError("text: the model's recall task has no text around its needles", hint="drop the text")
        return source, "recall, synthetic filler"
    found = corpus.load(text, column, seed, reporter)
    if source is None:
        documents = {"train": found.train, "test": found.test}
        return SentenceNeedles.of(loaded.tokenizer, documents), f"sentences with numbers in {found.source}"
    kept_apart = source.tokenizer.decode(source.streams["test"].tolist())
    train = [document for document in found.train if document not in kept_apart]
    if not train:
        raise PiKVError(f"{found.source}: the model's folder holds all of it out", hint="give other text")
    streams = {**source.streams, "train": tokens.encode(source.tokenizer, train)}
    return dataclasses.replace(source, streams=streams), f"recall in {found.source}"


def _encode(tokenizer: Any, text: str, marks: bool = False) -> list[int]:
    return tokenizer(text, add_special_tokens=marks, verbose=False)["input_ids"]
