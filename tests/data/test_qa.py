"""Questions and answer spans: stories are understood again by a plain reading of their sentences."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pikv_core.data import linear_spans, parameters, span_candidates, stories
from pikv_core.data.qa import QA
from pikv_core.data.qa_rows import Row
from pikv_core.errors import PiKVError, UsageError
from pikv_core.runs import Reporter

TOLD = {
    r"(\w+) (?:went|moved|walked|ran) to the (\w+)": "move",
    r"(\w+) (?:took|picked up|grabbed) the (\w+)": "take",
    r"(\w+) (?:dropped|put down|left) the (\w+)(?: there)?": "drop",
    r"(\w+) (?:gave|handed|passed) the (\w+) to (\w+)": "give",
}


def write(folder: Path, task: QA, num: int = 400, seed: int = 3) -> dict[str, Any]:
    counts = task.write(folder, num, seed, [], None, Reporter())
    read = {
        split: [json.loads(line) for line in (folder / f"samples.{split}.jsonl").read_text("utf-8").split("\n")[:-1]]
        for split in ("train", "test")
    }
    assert counts == {f"samples.{split}.jsonl": len(rows) for split, rows in read.items()}
    return {**read, "corpus": json.loads((folder / "corpus.json").read_text())}


def understand(story: str) -> tuple[dict[str, list[tuple[str, int]]], dict[str, tuple[str, int, int]], dict[str, Any]]:
    """Return trails {person: [(place, start)]}, held {thing: (person, its start, the thing's)} and where things lie."""
    trails: dict[str, list[tuple[str, int]]] = {}
    held: dict[str, tuple[str, int, int]] = {}
    lies: dict[str, tuple[str, int]] = {}
    for sentence in re.finditer(r"[^.]+\.", story):
        for pattern, event in TOLD.items():
            told = re.fullmatch(rf" ?{pattern}\.", sentence[0])
            if not told:
                continue
            who, what = told[1], told[2]
            places = [sentence.start() + told.start(group) for group in range(1, len(told.groups()) + 1)]
            if event == "move":
                trails.setdefault(who, []).append((what, places[1]))
                assert len(trails[who]) == 1 or trails[who][-2][0] != what
            elif event == "take":
                assert what not in held and (what not in lies or lies[what][0] == trails[who][-1][0])
                held[what] = (who, places[0], places[1])
                lies.pop(what, None)
            elif event == "drop":
                assert held.pop(what)[0] == who
                lies[what] = trails[who][-1]
            else:
                assert held[what][0] == who and trails[who][-1][0] == trails[told[3]][-1][0]
                held[what] = (told[3], places[2], places[1])
    return trails, held, lies


def answer(story: str, question: str) -> tuple[str, int]:
    """Answer by the plain reading: the word, and where it stands."""
    trails, held, lies = understand(story)
    if asked := re.fullmatch(r"Where was (\w+) before (\w+)'s last move\?", question):
        assert asked[1] == asked[2]
        return trails[asked[1]][-2]
    if asked := re.fullmatch(r"What is (\w+) carrying\?", question):
        [(thing, start)] = [(thing, one[2]) for thing, one in held.items() if one[0] == asked[1]]
        return thing, start
    if asked := re.fullmatch(r"Who has the (\w+)\?", question):
        return held[asked[1]][:2]
    if asked := re.fullmatch(r"Where is the (\w+)\?", question):
        return trails[held[asked[1]][0]][-1] if asked[1] in held else lies[asked[1]]
    asked = re.fullmatch(r"Where is (\w+)\?", question)
    assert asked
    return trails[asked[1]][-1]


@pytest.mark.parametrize(("facts", "distractors", "size"), [(1, 0, 12), (3, 9, 2), (10, 5, 4), (300, 40, 12)])
def test_answers_are_those_of_a_plain_reading(facts: int, distractors: int, size: int) -> None:
    kinds = Counter()
    for seed in range(60):
        story, asked = stories.draw(np.random.default_rng(seed), facts, distractors, size, size, size)
        assert (asked.answer.word, asked.answer.start) == answer(story, asked.text)
        assert story[asked.answer.start :].startswith(asked.answer.word)
        sentences = story.split(". ")
        assert len(sentences) == facts + distractors
        is_told = [any(re.match(pattern, one) for pattern in TOLD) for one in sentences]
        assert sum(is_told) == facts
        kinds[asked.kind] += 1
    assert set(kinds) == ({"person"} if facts == 1 else {"person", "before", "carrying", "holder", "thing"})


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write(tmp_path_factory.mktemp("stories"), QA(num_facts=12))


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write(tmp_path_factory.mktemp("docstrings"), QA(source="docstrings"), num=300)


@pytest.mark.parametrize("name", ["drawn", "read"])
def test_splits_hold_spans_and_share_no_context(name: str, request: pytest.FixtureRequest) -> None:
    found = request.getfixturevalue(name)
    for row in found["train"] + found["test"]:
        assert list(row) == ["context", "question", "answer", "start", "kind"]
        assert row["answer"] and row["answer"] == row["answer"].strip()
        assert row["context"][row["start"] : row["start"] + len(row["answer"])] == row["answer"]
    contexts = [{row["context"] for row in found[split]} for split in ("train", "test")]
    assert not contexts[0] & contexts[1]
    number = len(found["train"]) + len(found["test"])
    assert number == (400 if name == "drawn" else 300)
    assert len(found["test"]) == pytest.approx(number / 5, abs=0 if name == "drawn" else 10)
    for kind, told in found["corpus"]["kinds"].items():
        for split in ("train", "test"):
            assert told[f"num_{split}"] == sum(row["kind"] == kind for row in found[split])


def test_stories_are_told_once(drawn: dict[str, Any]) -> None:
    contexts = [row["context"] for split in ("train", "test") for row in drawn[split]]
    assert len(set(contexts)) == len(contexts)


def test_baselines_of_stories_are_those_of_a_plain_count(drawn: dict[str, Any]) -> None:
    baselines, test = drawn["corpus"]["baselines"], drawn["test"]
    counts = Counter(row["answer"] for row in drawn["train"])
    most = min(counts, key=lambda word: (-counts[word], word))
    last = [[word for word in re.findall(r"\w+", row["context"]) if word in stories.PLACES][-1] for row in test]
    given = {"most_frequent_answer": [most] * len(test), "last_mentioned_place": last}
    assert baselines.keys() == {*given, "linear_spans"}
    for name, answers in given.items():
        right = [one == row["answer"] for one, row in zip(answers, test)]
        assert baselines[name]["exact_match"] == baselines[name]["token_f1"] == np.mean(right)
        assert np.mean(right) < 0.35
        for kind, share in baselines[name]["exact_match_by_kind"].items():
            assert share == np.mean([one for one, row in zip(right, test) if row["kind"] == kind])


def test_docstrings_are_not_told_by_the_question_alone(read: dict[str, Any]) -> None:
    scores = {name: one["token_f1"] for name, one in read["corpus"]["baselines"].items()}
    assert scores["most_frequent_answer"] < scores["most_frequent_of_the_parameter"] < scores["rest_of_the_line"] < 0.9


def test_the_linear_reader_finds_what_one_sentence_tells_and_the_layout_of_descriptions(
    drawn: dict[str, Any], read: dict[str, Any]
) -> None:
    linear = drawn["corpus"]["baselines"]["linear_spans"]
    by_kind = linear["exact_match_by_kind"]
    assert min(by_kind["person"], by_kind["carrying"], by_kind["holder"]) > 0.7
    assert by_kind["thing"] < 0.6  # it takes two sentences
    scores = read["corpus"]["baselines"]
    assert scores["rest_of_the_line"]["token_f1"] + 0.1 < scores["linear_spans"]["token_f1"] <= 1


def test_the_gradient_of_the_linear_reader_is_that_of_its_loss() -> None:
    rng = np.random.default_rng(0)
    choices = linear_spans.Choices(
        columns=np.array([0, 1, 2, 0, 3, 3, 1, 2]),
        of_candidates=np.array([0, 2, 3, 5, 6]),  # features 01 2 | 03 3 12
        of_questions=np.array([0, 2]),
        right=np.array([1, 2]),
    )
    weight = rng.normal(size=4)
    scores = [weight[0] + weight[1], weight[2], weight[0] + weight[3], weight[3], weight[1] + weight[2]]
    expected = np.mean([np.log(np.exp(scores[:2]).sum()) - scores[1], np.log(np.exp(scores[2:]).sum()) - scores[2]])
    loss, gradient = linear_spans.loss_and_gradient(weight, choices, 0.1)
    assert loss == pytest.approx(expected + 0.05 * (weight**2).sum())
    for place in range(4):
        step = np.eye(4)[place] * 1e-6
        up, down = (linear_spans.loss_and_gradient(weight + sign * step, choices, 0.1)[0] for sign in (1, -1))
        assert gradient[place] == pytest.approx((up - down) / 2e-6, abs=1e-8)


def test_a_linear_reader_with_nothing_to_choose_from_says_nothing() -> None:
    row = Row("no such word", "Where is Mary?", "such", 3, "person")
    reader = linear_spans.fit([row], span_candidates.words({"attic"}, {"Where", "is"}))
    assert reader.answer(row) == ""


def test_phrases_are_lines_sentences_and_blocks() -> None:
    context = "Head.\n  x -- a number. More\n     of it\n  y: text"
    found = span_candidates.phrases({"What"})(context, "What x")
    assert [context[one.start : one.end] for one in found] == [
        "Head.",
        "Head.\n  x -- a number. More\n     of it\n  y: text",
        "Head.",
        "x -- a number. More",
        "x -- a number. More\n     of it",
        "x -- a number.",
        "a number. More",
        "a number. More\n     of it",
        "a number.",
        "of it",
        "y: text",
        "text",
    ]


def test_stories_to_learn_from_may_be_shorter_and_those_of_the_test_are_not(tmp_path: Path) -> None:
    found = write(tmp_path, QA(num_facts=8, num_distractors=4, fewest_facts=1), num=300)
    lengths = {split: {row["context"].count(".") for row in found[split]} for split in ("train", "test")}
    assert lengths["test"] == {12}
    assert lengths["train"] == {facts + round(facts / 2) for facts in range(1, 9)}


DOCSTRING = '''
def connect(host, port, timeout, retries, *names, secret, name=None):
    """Connect to a host, port: any.

    host -- the name,
            or the address
    port: a number (1 to 65535)

    - timeout -- seconds
    :param retries: how often
    name - one of them
    other -- is no parameter
    names: within (brackets
    secret: once
    secret: and again
    """
'''


def test_descriptions_are_found_by_their_layout() -> None:
    node = ast.parse(DOCSTRING).body[0]
    assert isinstance(node, ast.FunctionDef)
    text = ast.get_docstring(node)
    assert text
    found = parameters.describe(text, "connect", parameters.parameters(node))
    assert {one.parameter: text[one.start : one.end] for one in found} == {
        "host": "the name,\n        or the address",
        "port": "a number (1 to 65535)",
        "timeout": "seconds",
        "retries": "how often",
        "name": "one of them",
    }


def test_the_parameters_of_a_class_are_those_of_its_init() -> None:
    tree = ast.parse("class A:\n  def f(self, x): ...\n  def __init__(self, a, /, b, *c, d, **e): ...")
    assert parameters.parameters(tree.body[0]) == set("abcde")  # type: ignore[arg-type]
    assert parameters.parameters(tree) == set()


def test_too_few_stories_are_refused(tmp_path: Path) -> None:
    task = QA(num_facts=1, num_distractors=0)
    most = len(stories.PEOPLE) * len(stories.PLACES) * len(stories.MOVES)
    with pytest.raises(PiKVError, match="brought nothing new") as caught:
        task.write(tmp_path, most + 1, 0, [], None, Reporter())
    assert caught.value.hint


@pytest.mark.parametrize(
    ("task", "given", "message"),
    [
        (lambda: QA(), {"text": ["x.txt"]}, "made without text"),
        (lambda: QA(), {"num": 1}, "too few for two splits"),
        (lambda: QA(source="docstrings"), {"num": 1}, "too few for two splits"),
        (lambda: QA(num_facts=3, fewest_facts=4), {}, "fewest_facts: 4 exceeds num_facts, 3"),
        (lambda: QA(source="docstrings", num_facts=3), {}, "source 'docstrings' has no option 'num_facts'"),
    ],
)
def test_what_makes_no_sense_is_refused(task: Any, given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        task().write(tmp_path, given.get("num", 100), 0, given.get("text", []), None, Reporter())


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for source in ("stories", "docstrings"):
        data = []
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            folder = tmp_path / source / name
            write(folder, QA(source=source), 50, seed)
            data.append([(folder / f"samples.{split}.jsonl").read_bytes() for split in ("train", "test")])
        assert data[0] == data[1]
        assert data[0][0] != data[2][0] and data[0][1] != data[2][1]
