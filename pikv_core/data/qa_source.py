"""The task qa, opened: questions as tokens, and the scores to compare a model with."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from pikv_core.data import json_lines, token_rows, tokenizer
from pikv_core.data.corpus import DESCRIPTION
from pikv_core.data.manifest import read_json
from pikv_core.data.qa_rows import Row
from pikv_core.data.rereading import Question, Reading, lay_out, newest_first
from pikv_core.files import write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from pikv_core.data.qa import QA
    from pikv_core.runs import Reporter

OPTIONS = "qa.json"
SPLITS = ("train", "test")
SENTENCE_END = re.compile(r"\.")


@dataclass(frozen=True)
class QASource:
    """Both splits by name, as they are and as tokens. baselines: scores of the test without a model."""

    lesson: ClassVar[str] = "spans"

    task: QA
    tokenizer: Tokenizer
    rows: dict[str, list[Row]]
    questions: dict[str, list[Question]]
    baselines: dict[str, float]

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    @property
    def pad_id(self) -> int:
        return token_rows.pad_id(self.tokenizer)

    def reading(self, split: str, row: int, length: int) -> Reading:
        """Return a row as `length` tokens at most."""
        return lay_out(self.questions[split][row], self.task.num_reads, length)

    def text(self, split: str, row: int, first: int, last: int) -> str:
        """Return the characters of a row's context that its tokens first to last stand for."""
        offsets = self.questions[split][row].offsets
        return self.rows[split][row].context[offsets[first, 0] : offsets[last, 1]].strip()

    def save(self, folder: Path) -> None:
        """Write the tokenizer and the options into a model folder."""
        tokenizer.save(self.tokenizer, folder)
        write_json(folder / OPTIONS, asdict(self.task))


def read(folder: Path, task: QA, given: Tokenizer | None, reporter: Reporter) -> QASource:
    """Return the source whose files the task wrote into a folder; without a tokenizer, one is trained."""
    rows = {split: [Row(**row) for row in json_lines.read(folder / f"samples.{split}.jsonl")] for split in SPLITS}
    if given is None:
        reporter.status(f"training a tokenizer on {len(rows['train'])} contexts")
        texts = (f" {text}" for row in rows["train"] for text in (row.context, row.question))
        given = tokenizer.train_bpe(texts, task.vocab_size)
    told = read_json(folder / DESCRIPTION)["baselines"]
    baselines = {
        f"{name}_{short}": scores[measure]
        for name, scores in told.items()
        for short, measure in (("f1", "token_f1"), ("exact_match", "exact_match"))
    }
    questions = {split: encode(given, some, task.newest_first) for split, some in rows.items()}
    return QASource(task, given, rows, questions, baselines)


def encode(tokens: Tokenizer, rows: list[Row], from_the_end: bool) -> list[Question]:
    """Return the rows as tokens; the answer's are those that hold a character of it.

    A space comes before each context and each question, so that a word is the same token wherever it stands.
    """
    contexts = tokens.encode_batch([f" {row.context}" for row in rows], add_special_tokens=False)
    asked = token_rows.encode(tokens, [f" {row.question}" for row in rows])
    found = []
    for row, context, question in zip(rows, contexts, asked, strict=True):
        offsets = np.maximum(0, np.array(context.offsets, np.int64).reshape(-1, 2) - 1)
        held = np.flatnonzero((offsets[:, 0] < row.start + len(row.answer)) & (offsets[:, 1] > row.start))
        asked_row = Question(np.array(context.ids, np.int64), offsets, question, (int(held[0]), int(held[-1])))
        if from_the_end:
            ends = [one.end() for one in SENTENCE_END.finditer(row.context)]
            asked_row = newest_first(asked_row, np.array(ends, np.int64))
        found.append(asked_row)
    return found
