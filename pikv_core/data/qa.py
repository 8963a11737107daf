"""Extractive question answering: drawn stories (`stories.py`), or parameters in docstrings (`parameters.py`).

The answer is `context[start : start + len(answer)]`; no context is in both splits.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from pikv_core.data import TASKS, json_lines, parameters, qa_source, source_options, stories, text_files
from pikv_core.data.corpus import DESCRIPTION
from pikv_core.data.opened import opened, refuse_of_training
from pikv_core.data.qa_rows import Row, rules_of_docstrings, rules_of_stories, score
from pikv_core.data.qa_source import OPTIONS, SPLITS, QASource
from pikv_core.data.tokenizer import MIN_BPE_TOKENS
from pikv_core.errors import PiKVError, UsageError
from pikv_core.files import write_json
from pikv_core.runs import Reporter

if TYPE_CHECKING:
    from tokenizers import Tokenizer

OF_STORIES = ["num_facts", "num_distractors", "fewest_facts", "num_people", "num_places", "num_things", "newest_first"]
OF_TRAINING = ["num_reads", "newest_first"]
MADE_NOW = 20_000  # samples
TRIES = 100  # to draw a story that was not told before
Number = Annotated[int, Field(ge=stories.LEAST, le=stories.MOST)]


@TASKS.register("qa")
@dataclass(frozen=True)
class QA:
    source: Literal["stories", "docstrings"] = "stories"
    num_facts: Annotated[int, Field(ge=1)] = 10  # of a story, a sentence each
    num_distractors: Annotated[int, Field(ge=0)] = 5  # sentences among them that change nothing
    fewest_facts: Annotated[int, Field(ge=1)] | None = None  # of a story of the training split, drawn from here up to
    # num_facts and its distractors in proportion, so that one can begin with short ones; by default all are as long
    num_people: Number = 4
    num_places: Number = 6
    num_things: Number = 4
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    vocab_size: Annotated[int, Field(ge=MIN_BPE_TOKENS)] = 2048  # tokens at most, of a model that is trained
    # Of training alone:
    num_reads: Annotated[int, Field(ge=1)] = 2  # copies of the context after the question; answers are in the last one
    newest_first: bool = False  # whether a story's sentences are read from the last to the first

    def __post_init__(self) -> None:
        if self.source == "docstrings":
            source_options.refuse(self, OF_STORIES)
        if self.fewest_facts is not None and self.fewest_facts > self.num_facts:
            raise UsageError(
                f"fewest_facts: {self.fewest_facts} exceeds num_facts, {self.num_facts}", hint="lower fewest_facts"
            )

    def open(
        self,
        path: str | None,
        seed: int,
        text: list[str],
        column: str | None,
        reporter: Reporter,
        *,
        tokenizer: Tokenizer | None = None,
    ) -> QASource:
        """Return the source: from a folder of gen-data at `path`, or of 20,000 stories, or all docstrings, made now.

        tokenizer: in place of one that is trained on the training split.
        """
        with opened(self, path, seed, text, column, reporter, MADE_NOW, OF_TRAINING) as (folder, task):
            return qa_source.read(folder, task, tokenizer, reporter)

    def write(
        self,
        folder: Path,
        num_samples: int,
        seed: int,
        text: list[str],
        column: str | None,
        reporter: Reporter,
    ) -> dict[str, int]:
        """Write samples.train.jsonl and samples.test.jsonl, num_samples together (at most), and corpus.json."""
        refuse_of_training(self, OF_TRAINING)
        text_files.refuse("qa", text, column)
        reporter.status(f"{'drawing' if self.source == 'stories' else 'reading'} {self.source}")
        split = (self.draw if self.source == "stories" else self.read)(num_samples, seed)
        files = {}
        for name, rows in zip(SPLITS, split, strict=True):
            file = f"samples.{name}.jsonl"
            files[file] = json_lines.write(map(vars, rows), folder / file)
        reporter.status("fitting a linear reader for comparison")
        write_json(folder / OPTIONS, asdict(self))
        write_json(folder / DESCRIPTION, self.describe(*split))
        return files

    def draw(self, num_samples: int, seed: int) -> tuple[list[Row], list[Row]]:
        """Draw stories, each with one question; raise PiKVError where there are too few different ones."""
        num_test = self._num_test(num_samples)
        told: set[str] = set()
        parts = []
        for stream, number in enumerate((num_samples - num_test, num_test)):
            rng = np.random.default_rng([seed, stream])
            fewest = None if stream else self.fewest_facts
            parts.append([self._fresh(rng, told, fewest) for _ in range(number)])
        return parts[0], parts[1]

    def read(self, num_samples: int, seed: int) -> tuple[list[Row], list[Row]]:
        """Read docstrings, a question a parameter, and split them by docstring."""
        by_context: dict[str, list[Row]] = {}
        for one in parameters.read():
            of = "" if one.function.startswith("__") else f" of {one.function}"
            question = f"What is the parameter '{one.parameter}'{of}?"
            row = Row(one.context, question, one.context[one.start : one.end], one.start, "parameter")
            by_context.setdefault(one.context, []).append(row)
        contexts = list(by_context)
        order = np.random.default_rng(seed).permutation(len(contexts))
        rows = [row for number in order for row in by_context[contexts[number]]][:num_samples]
        num_test = self._num_test(len(rows))
        # Of the docstring on the border, all goes to the test.
        while num_test < len(rows) and rows[num_test].context == rows[num_test - 1].context:
            num_test += 1
        if num_test == len(rows):
            raise UsageError(f"num_samples: too few for two splits of docstrings: got {num_samples}")
        return rows[num_test:], rows[:num_test]

    def describe(self, train: list[Row], test: list[Row]) -> dict[str, Any]:
        """Return what the manifest says: samples by kind and split, and the test scores without a model."""
        counts = [Counter(row.kind for row in rows) for rows in (train, test)]
        rules = rules_of_stories(train) if self.source == "stories" else rules_of_docstrings(train)
        return {
            "source": self.source,
            "kinds": {
                kind: {"num_train": counts[0][kind], "num_test": counts[1][kind]}
                for kind in sorted(sum(counts, Counter()))
            },
            "num_train": len(train),
            "num_test": len(test),
            "baselines": {name: score(guess, test) for name, guess in rules.items()},
        }

    def _num_test(self, number: int) -> int:
        num_test = max(1, round(self.test_share * number))
        if num_test >= number:
            raise UsageError(f"num_samples: too few for two splits, with {num_test} for the test: got {number}")
        return num_test

    def _fresh(self, rng: np.random.Generator, told: set[str], fewest: int | None) -> Row:
        """Draw a story that is not among those told, and add it to them."""
        cast = (self.num_people, self.num_places, self.num_things)
        for _ in range(TRIES):
            facts = self.num_facts if fewest is None else int(rng.integers(fewest, self.num_facts + 1))
            distractors = round(self.num_distractors * facts / self.num_facts)
            context, asked = stories.draw(rng, facts, distractors, *cast)
            if context not in told:
                told.add(context)
                return Row(context, asked.text, asked.answer.word, asked.answer.start, asked.kind)
        raise PiKVError(
            f"after {len(told)} stories, {TRIES} more brought nothing new",
            hint="ask for fewer samples, or for more facts or distractors (task.num_facts)",
        )
