"""Text classification: splits, hidden names and labelled text of users, and a linear baseline that is an optimum."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pikv_core.data import bag_of_words
from pikv_core.data.classification import HIDDEN, Classification, docstrings, hider, most_frequent, unambiguous
from pikv_core.errors import PiKVError, UsageError
from pikv_core.runs import Reporter


def write(folder: Path, task: Classification, num: int = 400, seed: int = 3, **given: Any) -> dict[str, Any]:
    counts = task.write(folder, num, seed, given.get("text", []), given.get("column"), Reporter())
    read = {
        split: [json.loads(line) for line in (folder / f"samples.{split}.jsonl").read_text("utf-8").split("\n")[:-1]]
        for split in ("train", "test")
    }
    assert counts == {f"samples.{split}.jsonl": len(rows) for split, rows in read.items()}
    return {**read, "corpus": json.loads((folder / "corpus.json").read_text())}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write(tmp_path_factory.mktemp("library"), Classification(num_classes=5))


def test_classes_have_their_share_of_both_splits(library: dict[str, Any]) -> None:
    assert (len(library["train"]), len(library["test"])) == (320, 80)
    by_split = [Counter(row["label"] for row in library[split]) for split in ("train", "test")]
    told = library["corpus"]["classes"]
    assert list(told) == most_frequent(unambiguous(docstrings()), 5)
    assert {name: (row["num_train"], row["num_test"]) for name, row in told.items()} == {
        name: tuple(counts[name] for counts in by_split) for name in told
    }
    for name in told:
        assert by_split[1][name] == pytest.approx((by_split[0][name] + by_split[1][name]) / 5, abs=1)


def test_no_text_is_in_both_splits_or_twice(library: dict[str, Any]) -> None:
    texts = [" ".join(row["text"].split()) for split in ("train", "test") for row in library[split]]
    assert len(set(texts)) == len(texts)


def test_no_text_tells_a_class_by_name(library: dict[str, Any], tmp_path: Path) -> None:
    def told(rows: list[dict[str, str]]) -> int:
        names = [name.lstrip("_") for name in library["corpus"]["classes"]]
        return sum(name in row["text"].lower().replace("_", " ").split() for row in rows for name in names)

    assert told(library["train"] + library["test"]) == 0
    assert any(HIDDEN in row["text"] for row in library["test"])
    open_names = write(tmp_path, Classification(num_classes=5, hide_names=False))
    assert told(open_names["train"] + open_names["test"]) > 5


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("a turtle, Turtles; RawTurtle", "a <module>, <module>; Raw<module>"),
        ("TurtleScreen turtle.forward", "<module>Screen <module>.forward"),
        ("test_turtle TURTLE", "test_<module> <module>"),
        ("Decimal('1') isodecimal decimally", "<module>('1') isodecimal decimally"),
    ],
)
def test_names_are_hidden_where_they_are_words(text: str, hidden: str) -> None:
    assert hider(["turtle", "_pydecimal", "decimal"])(text) == hidden


def test_a_text_under_two_labels_is_left_out() -> None:
    samples = [("a  b", "x"), ("a b", "x"), ("c", "x"), ("c\n", "y"), ("d", "y")]
    assert unambiguous(samples) == [("a  b", "x"), ("d", "y")]


def test_the_baselines_are_those_of_a_plain_count(library: dict[str, Any]) -> None:
    baselines = library["corpus"]["baselines"]
    most = Counter(row["label"] for row in library["train"]).most_common(1)[0][0]
    assert baselines["majority_accuracy"] == np.mean([row["label"] == most for row in library["test"]])
    # The words tell the modules apart, yet not all of them.
    assert baselines["majority_accuracy"] + 0.2 < baselines["bag_of_words_accuracy"] < 0.98


def test_labels_of_users_come_from_a_column(tmp_path: Path) -> None:
    rows = [{"body": f"{kind} number {n} of {name}", "sort": name} for n in range(30) for name, kind in KINDS.items()]
    rows += [{"body": "no label", "sort": ""}, {"body": "", "sort": "metal"}]
    file = tmp_path / "in" / "rows.jsonl"
    file.parent.mkdir()
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (file.parent / "notes.txt").write_text("no labels here")
    task = Classification(label_column="sort")
    for number, path in enumerate((file, file.parent)):
        found = write(tmp_path / f"out{number}", task, text=[str(path)], column="body")
        assert len(found["train"]) + len(found["test"]) == 60
        assert all(row["text"].startswith(KINDS[row["label"]]) for row in found["train"] + found["test"])
        assert found["corpus"]["baselines"] == {
            "majority_accuracy": 0.5,
            "majority_f1": pytest.approx(1 / 3),
            "bag_of_words_accuracy": 1.0,
            "bag_of_words_f1": 1.0,
        }


KINDS = {"metal": "copper", "tree": "walnut"}


@pytest.mark.parametrize(
    ("content", "column", "message"),
    [
        ('{"text": "a", "label": 3}', None, "label: expected text, got int"),
        ('{"text": "a"}', None, "no column 'label'"),
        ('{"text": "a", "label": "x"}\n{"text": "b", "label": "x"}', None, "1 label"),
        ('{"text": "a", "label": "x"}', "body", "no column 'body'"),
        (None, None, "no file with a column of labels"),
        (None, "body", "names a column"),
    ],
)
def test_what_has_no_labels_is_refused(content: str | None, column: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / ("rows.jsonl" if content else "rows.txt")
    file.write_text(content or "plain")
    text = [str(file)] if content or column is None else []
    with pytest.raises(PiKVError) as caught:
        Classification().write(tmp_path / "out", 100, 0, text, column, Reporter())
    assert message in caught.value.message
    assert caught.value.hint


def test_too_few_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too few for two splits"):
        Classification().write(tmp_path, 1, 0, [], None, Reporter())


def test_the_gradient_is_that_of_the_loss() -> None:
    rng = np.random.default_rng(0)
    inputs, weight = rng.normal(size=(7, 4)), rng.normal(size=(4, 3))
    targets = np.eye(3)[rng.integers(3, size=7)]
    _, gradient = bag_of_words.loss_and_gradient(weight, inputs, targets, 0.1)
    for place in np.ndindex(weight.shape):
        step = np.zeros_like(weight)
        step[place] = 1e-6
        up, down = (bag_of_words.loss_and_gradient(weight + sign * step, inputs, targets, 0.1)[0] for sign in (1, -1))
        assert gradient[place] == pytest.approx((up - down) / 2e-6, abs=1e-8)


def test_the_fit_is_the_minimum() -> None:
    rng = np.random.default_rng(1)
    words = np.array(["ash", "bee", "cat", "dog", "elk", "fox"])
    labels = rng.integers(3, size=60)
    texts = [" ".join(rng.choice(words, size=6, p=np.roll([0.4, 0.3, 0.1, 0.1, 0.05, 0.05], k))) for k in 2 * labels]
    fitted = bag_of_words.fit(texts, labels, 3)
    inputs = bag_of_words.features(texts, fitted.columns, fitted.rarity)
    assert np.allclose((inputs[:, :-1] ** 2).sum(1), 1)
    _, gradient = bag_of_words.loss_and_gradient(fitted.weight, inputs, np.eye(3)[labels], 1 / 60)
    assert np.abs(gradient).max() < 1e-4
    assert np.mean(fitted.predict(texts) == labels) > 0.7
    assert fitted.predict([]).tolist() == []


def test_a_row_is_tf_idf_by_hand() -> None:
    fitted = bag_of_words.fit(["ash ash bee", "ash cat"], np.array([0, 1]), 2)
    assert list(fitted.columns) == ["ash", "bee", "cat"]
    rare = 1 + np.log(3 / 2)
    assert np.allclose(fitted.rarity, [1, rare, rare])
    row = bag_of_words.features(["Ash ASH, bee yak"], fitted.columns, fitted.rarity)[0]
    assert np.allclose(row, [2 / np.hypot(2, rare), rare / np.hypot(2, rare), 0, 1])
