"""Extractive question answering: drawn stories (`stories.py`), or parameters in docstrings (`parameters.py`).

The answer is `context[start : start + len(answer)]`; no context is in both splits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from pikv_core.data import TASKS, json_lines, parameters, source_options, stories, text_files
from pikv_core.data.answers import exact_match, token_f1
from pikv_core.data.corpus import DESCRIPTION
from pikv_core.errors import PiKVError, UsageError
from pikv_core.files import write_json
from pikv_core.runs import Reporter

TRIES = 100  # to draw a story that was not told before
Number = Annotated[int, Field(ge=stories.LEAST, le=stories.MOST)]


@dataclass(frozen=True)
class Row:
    """context: a story or a docstring. start: the character at which the answer begins. kind: of the question."""

    context: str
    question: str
    answer: str
    start: int
    kind: str


@TASKS.register("qa")
@dataclass(frozen=True)
class QA:
    source: Literal["stories", "docstrings"] = "stories"
    num_facts: Annotated[int, Field(ge=1)] = 10  # of a story, a sentence each
    num_distractors: Annotated[int, Field(ge=0)] = 5  # sentences among them that change nothing
    num_people: Number = 4
    num_places: Number = 6
    num_things: Number = 4
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.2

    def __post_init__(self) -> None:
        if self.source == "docstrings":
            source_options.refuse(self, ["num_facts", "num_distractors", "num_people", "num_places", "num_things"])

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
        text_files.refuse("qa", text, column)
        reporter.status(f"{'drawing' if self.source == 'stories' else 'reading'} {self.source}")
        split = (self.draw if self.source == "stories" else self.read)(num_samples, seed)
        files = {}
        for name, rows in zip(("train", "test"), split, strict=True):
            file = f"samples.{name}.jsonl"
            files[file] = json_lines.write(map(vars, rows), folder / file)
        write_json(folder / DESCRIPTION, self.describe(*split))
        return files

    def draw(self, num_samples: int, seed: int) -> tuple[list[Row], list[Row]]:
        """Draw stories, each with one question; raise PiKVError where there are too few different ones."""
        num_test = self._num_test(num_samples)
        told: set[str] = set()
        parts = []
        for stream, number in enumerate((num_samples - num_test, num_test)):
            rng = np.random.default_rng([seed, stream])
            parts.append([self._fresh(rng, told) for _ in range(number)])
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
        return {
            "source": self.source,
            "kinds": {
                kind: {"num_train": counts[0][kind], "num_test": counts[1][kind]}
                for kind in sorted(sum(counts, Counter()))
            },
            "num_train": len(train),
            "num_test": len(test),
            "baselines": {name: score(guess, test) for name, guess in self.guesses(train).items()},
        }

    def guesses(self, train: list[Row]) -> dict[str, Callable[[Row], str]]:
        """Return rules that answer without reading the question or without understanding the context."""
        most = _most_frequent([row.answer for row in train])
        rules: dict[str, Callable[[Row], str]] = {"most_frequent_answer": lambda row: most}
        if self.source == "stories":
            return {**rules, "last_mentioned_place": lambda row: stories.last_place(row.context)}
        answers: dict[str, list[str]] = {}
        for row in train:
            answers.setdefault(_quoted(row), []).append(row.answer)
        return {
            **rules,
            "most_frequent_of_the_parameter": lambda row: _most_frequent(answers.get(_quoted(row), [most])),
            "rest_of_the_line": lambda row: row.context.partition(_quoted(row))[2].split("\n")[0],
        }

    def _num_test(self, number: int) -> int:
        num_test = max(1, round(self.test_share * number))
        if num_test >= number:
            raise UsageError(f"num_samples: too few for two splits, with {num_test} for the test: got {number}")
        return num_test

    def _fresh(self, rng: np.random.Generator, told: set[str]) -> Row:
        """Draw a story that is not among those told, and add it to them."""
        sizes = (self.num_facts, self.num_distractors, self.num_people, self.num_places, self.num_things)
        for _ in range(TRIES):
            context, asked = stories.draw(rng, *sizes)
            if context not in told:
                told.add(context)
                return Row(context, asked.text, asked.answer.word, asked.answer.start, asked.kind)
        raise PiKVError(
            f"after {len(told)} stories, {TRIES} more brought nothing new",
            hint="ask for fewer samples, or for more facts or distractors (task.num_facts)",
        )


def score(guess: Callable[[Row], str], rows: list[Row]) -> dict[str, Any]:
    """Return a rule's exact match and token F1, overall, and its exact match by kind."""
    matches = [exact_match(guess(row), row.answer) for row in rows]
    kinds = sorted({row.kind for row in rows})
    return {
        "exact_match": float(np.mean(matches)),
        "token_f1": float(np.mean([token_f1(guess(row), row.answer) for row in rows])),
        "exact_match_by_kind": {
            kind: float(np.mean([match for match, row in zip(matches, rows) if row.kind == kind])) for kind in kinds
        },
    }


def _most_frequent(answers: list[str]) -> str:
    """Return the most frequent answer, of equals the first in the alphabet."""
    counts = Counter(answers)
    return min(counts, key=lambda answer: (-counts[answer], answer))


def _quoted(row: Row) -> str:
    """Return the parameter that a question asks for."""
    return row.question.split("'")[1]
