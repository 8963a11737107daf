"""The task classification, opened: texts as tokens, their labels, and the scores to compare a model with."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from pikv_core.data import json_lines, token_rows, tokenizer
from pikv_core.data.corpus import DESCRIPTION
from pikv_core.data.manifest import read_json
from pikv_core.files import write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from pikv_core.data.classification import Classification
    from pikv_core.runs import Reporter

OPTIONS = "classification.json"
SPLITS = ("train", "test")


@dataclass(frozen=True)
class LabelledTokens:
    """ids: of each text. labels [N]: numbers of its class."""

    ids: list[token_rows.Ids]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class ClassificationSource:
    """Both splits by name; classes: in the order of their numbers. baselines: scores of the test without a model."""

    lesson: ClassVar[str] = "classification"

    task: Classification
    tokenizer: Tokenizer
    classes: list[str]
    splits: dict[str, LabelledTokens]
    baselines: dict[str, float]

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    @property
    def pad_id(self) -> int:
        return token_rows.pad_id(self.tokenizer)

    @property
    def hidden_id(self) -> int:
        return token_rows.hidden_id(self.tokenizer)

    def save(self, folder: Path) -> None:
        """Write the tokenizer, and the options with the classes, into a model folder."""
        tokenizer.save(self.tokenizer, folder)
        write_json(folder / OPTIONS, asdict(self.task) | {"classes": self.classes})


def read(folder: Path, task: Classification, given: Tokenizer | None, reporter: Reporter) -> ClassificationSource:
    """Return the source whose files the task wrote into a folder; without a tokenizer, one is trained."""
    told = read_json(folder / DESCRIPTION)
    classes = list(told["classes"])
    rows = {split: json_lines.read(folder / f"samples.{split}.jsonl") for split in SPLITS}
    if given is None:
        reporter.status(f"training a tokenizer on {len(rows['train'])} texts")
        given = tokenizer.train_bpe((row["text"] for row in rows["train"]), task.vocab_size)
    splits = {
        split: LabelledTokens(
            token_rows.encode(given, [row["text"] for row in some]),
            np.array([classes.index(row["label"]) for row in some], np.int64),
        )
        for split, some in rows.items()
    }
    return ClassificationSource(task, given, classes, splits, told["baselines"])
