"""Text classification: which module of the standard library a docstring is of, or labelled text of users.

A module's own name would give it away, and its absence would rule it out: every class's name is hidden in every text.
"""

from __future__ import annotations

import functools
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pikv_core.data import (
    TASKS,
    bag_of_words,
    classification_source,
    json_lines,
    stdlib_text,
    strata,
    text_files,
)
from pikv_core.data.class_f1 import f1_by_class
from pikv_core.data.classification_source import OPTIONS, SPLITS, ClassificationSource
from pikv_core.data.corpus import DESCRIPTION
from pikv_core.data.opened import opened, refuse_of_training
from pikv_core.data.tokenizer import MIN_BPE_TOKENS
from pikv_core.errors import PiKVError, UsageError
from pikv_core.files import write_json
from pikv_core.runs import Reporter

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HIDDEN = "<module>"
OF_TRAINING = ["hide_share"]
ALL_SAMPLES = 1_000_000  # more than the standard library has

Labelled = Sequence[tuple[str, str]]  # text, label
Indices = NDArray[np.intp]


@TASKS.register("classification")
@dataclass(frozen=True)
class Classification:
    num_classes: Annotated[int, Field(ge=2)] = 10  # the most frequent labels; fewer where there are fewer
    hide_names: bool = True  # of the modules, in the texts; text of users stays as it is
    label_column: str = "label"  # of the jsonl and parquet files of users
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.2  # of each class
    vocab_size: Annotated[int, Field(ge=MIN_BPE_TOKENS)] = 2048  # tokens at most, of a model that is trained
    hide_share: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of the tokens that are hidden, anew in each training step

    def open(
        self,
        path: str | None,
        seed: int,
        text: list[str],
        column: str | None,
        reporter: Reporter,
        *,
        tokenizer: Tokenizer | None = None,
    ) -> ClassificationSource:
        """Return the source: from a folder of gen-data at `path`, or made on the spot of all samples there are.

        tokenizer: in place of one that is trained on the training split.
        """
        with opened(self, path, seed, text, column, reporter, ALL_SAMPLES, OF_TRAINING) as (folder, task):
            return classification_source.read(folder, task, tokenizer, reporter)

    def write(
        self,
        folder: Path,
        num_samples: int,
        seed: int,
        text: list[str],
        column: str | None,
        reporter: Reporter,
    ) -> dict[str, int]:
        """Write samples.train.jsonl and samples.test.jsonl, num_samples together at most, and corpus.json."""
        refuse_of_training(self, OF_TRAINING)
        if text:
            found, source = read_labelled(text, column, self.label_column), ", ".join(text)
        elif column is not None:
            raise UsageError(
                f"column: '{column}' names a column of jsonl and parquet files", hint="give them with --text"
            )
        else:
            reporter.status("reading the standard library's docstrings")
            found, source = docstrings(), f"standard library of Python {platform.python_version()}"
        classes = most_frequent(unambiguous(found), self.num_classes)
        if len(classes) < 2:
            raise PiKVError(f"{source}: {len(classes)} label: a classification needs 2", hint="give more labelled text")
        kept = [(one, label) for one, label in unambiguous(found) if label in classes]
        if not text and self.hide_names:
            hide = hider(classes)
            kept = list(unambiguous((hide(one), label) for one, label in kept))
        texts = [one for one, _ in kept]
        labels = np.array([classes.index(label) for _, label in kept])
        split = self.split(labels, num_samples, seed)
        files = {}
        for name, part in zip(SPLITS, split, strict=True):
            file = f"samples.{name}.jsonl"
            rows = ({"text": texts[index], "label": classes[labels[index]]} for index in part)
            files[file] = json_lines.write(rows, folder / file)
        reporter.status("fitting a linear classifier for comparison")
        write_json(folder / OPTIONS, asdict(self))
        write_json(folder / DESCRIPTION, self.describe(source, texts, labels, classes, split))
        return files

    def split(self, labels: NDArray[np.int64], num_samples: int, seed: int) -> tuple[Indices, Indices]:
        """Draw the training and the test samples of labels [N], each class in its share of both."""
        number = min(num_samples, len(labels))
        num_test = max(1, round(self.test_share * number))
        if num_test >= number:
            raise UsageError(f"num_samples: too few for two splits, with {num_test} for the test: got {num_samples}")
        return strata.split(labels, number, num_test, np.random.default_rng(seed))

    def describe(
        self,
        source: str,
        texts: list[str],
        labels: NDArray[np.int64],
        classes: list[str],
        split: tuple[Indices, Indices],
    ) -> dict[str, Any]:
        """Return what the manifest says: classes, their samples by split, and the test scores without a model."""
        train, test = split
        counts = [np.bincount(labels[part], minlength=len(classes)) for part in split]
        # In a drawn order, as only the first are fitted to.
        drawn = np.random.default_rng(0).permutation(train)
        linear = bag_of_words.fit([texts[index] for index in drawn], labels[drawn], len(classes))
        guesses = linear.predict([texts[index] for index in test])
        expected = [classes[label] for label in labels[test]]
        return {
            "source": source,
            "classes": {
                name: {"num_train": int(counts[0][number]), "num_test": int(counts[1][number])}
                for number, name in enumerate(classes)
            },
            "num_available": len(texts),
            "num_train": len(train),
            "num_test": len(test),
            "baselines": {
                f"{name}_{measure}": value
                for name, given in (("majority", np.full(len(test), counts[0].argmax())), ("bag_of_words", guesses))
                for measure, value in scores([classes[one] for one in given], expected).items()
            },
        }


def scores(given: list[str], expected: list[str]) -> dict[str, float]:
    """Return the share of right labels, and the F1 averaged over the classes."""
    return {
        "accuracy": float(np.mean([one == other for one, other in zip(given, expected, strict=True)])),
        "f1": float(np.mean(list(f1_by_class(given, expected).values()))),
    }


@functools.cache
def docstrings() -> tuple[tuple[str, str], ...]:
    """Return each docstring of the standard library and its module; a package is one module."""
    return tuple(
        (text, module.split(".")[0])
        for module, tree in stdlib_text.trees()
        for node in stdlib_text.definitions(tree)
        if (text := stdlib_text.docstring(node))
    )


def read_labelled(paths: list[str], column: str | None, label_column: str) -> Labelled:
    """Read texts and labels out of two columns of jsonl and parquet files; rows without text are left out."""
    files = [file for path in paths for file in _tables(Path(path))]
    texts = text_files.read(files, column)
    try:
        labels = text_files.read(files, label_column)
    except PiKVError as error:
        raise PiKVError(
            error.message, hint="a label is a text; name its column with --set task.label_column=NAME"
        ) from error
    return [(text.strip("\n"), label) for text, label in zip(texts, labels, strict=True) if text.strip() and label]


def unambiguous(samples: Iterable[tuple[str, str]]) -> Labelled:
    """Return one of each text, in order; texts that stand under two labels are left out.

    Texts that differ in spaces alone are the same.
    """
    labels: dict[str, set[str]] = {}
    first: dict[str, str] = {}
    for text, label in samples:
        key = " ".join(text.split())
        labels.setdefault(key, set()).add(label)
        first.setdefault(key, text)
    return [(first[key], next(iter(found))) for key, found in labels.items() if len(found) == 1]


def most_frequent(samples: Labelled, number: int) -> list[str]:
    """Return the labels of the most samples, most first."""
    counts = Counter(label for _, label in samples)
    return sorted(counts, key=lambda label: (-counts[label], label))[:number]


def hider(modules: list[str]) -> Callable[[str], str]:
    """Return what hides the names of modules in a text, whole or part of a name: `turtle`, `turtles`, `RawTurtle`."""
    names = sorted({re.sub("^_(py)?", "", module) for module in modules})
    any_case, capital = ("|".join(map(re.escape, some)) for some in (names, map(str.capitalize, names)))
    end = "s?(?![a-z])"
    pattern = re.compile(f"(?<![A-Za-z])(?i:{any_case}){end}|(?<=[a-z])(?:{capital}){end}")
    return lambda text: pattern.sub(HIDDEN, text)


def _tables(path: Path) -> list[str]:
    """Return a table, or the tables in a folder; raise UsageError where there is no column of labels."""
    inside = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    tables = [str(file) for file in inside if file.suffix.lower() in text_files.TABLES]
    if not tables and path.exists():
        raise UsageError(
            f"{path}: no file with a column of labels", hint=f"give one of: {', '.join(text_files.TABLES)}"
        )
    return tables or [str(path)]
