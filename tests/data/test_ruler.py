"""RULER's tasks, read back from their prompts by independent parsers: lengths, answers, counts, seeds."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pikv_core import recipes
from pikv_core.data import TASKS, stdlib_text, tokenizer
from pikv_core.data.ruler import Ruler
from pikv_core.data.ruler_parts import NOISE, Material
from pikv_core.data.ruler_tasks import DRAFTS, samples
from pikv_core.errors import PiKVError
from pikv_core.jobs import gen_data
from pikv_core.runs import Reporter, Run
from pikv_core.schema import GenDataRecipe


@pytest.fixture(scope="module")
def english() -> list[str]:
    return stdlib_text.read()[:1500]


@pytest.fixture(scope="module")
def tokens(english: list[str]) -> Any:
    return tokenizer.train_bpe(english, 2000)


@pytest.fixture(scope="module")
def draw(english: list[str], tokens: Any) -> Any:
    def count(text: str) -> int:
        return len(tokens.encode(text).ids)

    made = {filler: Material.of(english, filler, count) for filler in ("text", "noise")}

    def draw(tasks: list[str], length: int, num_samples: int = 6, seed: int = 0, filler: str = "text") -> list[Any]:
        return list(samples(tasks, made[filler], count, num_samples, length, seed))

    draw.count = count
    return draw


def answers_of(prompt: str, task: str) -> set[str]:
    """Read a prompt as a perfect reader does: only what stands after the last instruction, by its own rules."""
    if task == "vt":
        text = prompt.rsplit("Memorize and track", 1)[1]
        value = re.search(r"assigned the value (\d+) in the text", text)[1]
        assignments = re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)", text)
        found = {value}
        for _ in assignments:
            found |= {name for name, of in assignments if of in found}
        return found - {value}
    if task == "cwe":
        text = prompt.rsplit("Below is a numbered list", 1)[1].split("Question:")[0]
        ranked = Counter(re.findall(r"\d+\. (\w+)", text)).most_common()
        assert ranked[9][1] > ranked[10][1]
        return {word for word, _ in ranked[:10]}
    if task == "fwe":
        text = prompt.split("coded words. ", 1)[1].split("\nQuestion:")[0]
        ranked = Counter(text.split()).most_common()
        assert ranked[0][0] == "..."
        assert ranked[3][1] > ranked[4][1]
        return {word for word, _ in ranked[1:4]}
    asked = re.search(r"\nWhat .* for (.*) mentioned in the provided text\?", prompt)[1]
    keys = re.split(r", and |, ", asked)
    return {
        number
        for key, number in re.findall(r"One of the special magic numbers for (\S+) is: (\d+)\.", prompt)
        if key in keys
    }


@pytest.mark.parametrize("length", [128, 512, 2000, 5000])
@pytest.mark.parametrize("task", list(DRAFTS))
def test_a_prompt_has_the_length_asked_for_and_a_reader_finds_the_answers(task: str, length: int, draw: Any) -> None:
    try:
        drawn = draw([task], length)
    except PiKVError as error:
        least = int(re.search(r"it takes (\d+) tokens", error.message)[1])
        assert f"length {length} is too short for the task '{task}'" in error.message
        assert length < least < 560
        return
    for sample in drawn:
        short = length - draw.count(sample.prompt)
        assert 0 <= short <= max(0.01 * length, 100), short  # a cut sentence has 40 words
        assert set(sample.answers) == answers_of(sample.prompt, task)
        assert len(set(sample.answers)) == len(sample.answers)
        for answer in sample.answers:
            assert answer in sample.context
            assert answer not in sample.question + sample.opening
        assert draw.count(", ".join(sample.answers)) <= sample.answer_tokens
        assert draw.count(sample.more) >= 0.01 * length
        assert answers_of(sample.context + sample.more + sample.question, task) == set(sample.answers)


@pytest.mark.parametrize(("task", "least"), [("niah-single", 128), ("niah-multiquery", 256), ("fwe", 256)])
def test_short_lengths_are_served_where_the_task_fits(task: str, least: int, draw: Any) -> None:
    assert draw([task], max(least, 320))


def test_numbers_of_needles_are_rulers(draw: Any) -> None:
    found = {}
    for sample in draw(list(DRAFTS), 1500, len(DRAFTS)):
        needles = re.findall(r"special magic numbers for (\S+) is: \d+", sample.context)
        found[sample.task] = (len(needles), len(set(needles)), len(sample.answers))
    assert found == {
        "niah-single": (1, 1, 1),
        "niah-multikey": (4, 4, 1),
        "niah-multivalue": (4, 1, 4),
        "niah-multiquery": (4, 4, 4),
        "vt": (0, 0, 5),
        "cwe": (0, 0, 10),
        "fwe": (0, 0, 3),
    }


@pytest.mark.parametrize(("length", "common", "other"), [(600, 6, 1), (2000, 6, 1), (5000, 30, 3)])
def test_common_words_are_repeated_as_in_ruler(length: int, common: int, other: int, draw: Any) -> None:
    for sample in draw(["cwe"], length):
        text = sample.context.rsplit("Below is a numbered list", 1)[1]
        numbers, words = zip(*re.findall(r"(\d+)\. (\w+)", text))
        assert list(map(int, numbers)) == list(range(1, len(words) + 1))
        counts = Counter(words)
        assert {counts.pop(word) for word in sample.answers} == {common}
        assert set(counts.values()) == {other}
        assert not any(answer in word for answer in sample.answers for word in counts)
        assert (sample.context.count("Below is a numbered list") == 2) == (length >= 1024)


def test_a_list_that_outgrows_the_words_repeats_them_all(draw: Any) -> None:
    few = Material.of([" ".join([*words, *words]) for words in [WORDS]], "noise", draw.count)
    sample = next(samples(["cwe"], few, draw.count, 1, 12000, 0))
    text = sample.context.rsplit("Below is a numbered list", 1)[1]
    ranked = Counter(re.findall(r"\d+\. (\w+)", text)).most_common()
    assert {word for word, _ in ranked[:10]} == set(sample.answers)
    assert ranked[0][1] == ranked[9][1] == 10 * ranked[10][1] > 30
    assert draw.count(sample.prompt) > 11800
    with pytest.raises(PiKVError, match="30 different words, the task 'cwe' needs 160"):
        next(samples(["cwe"], Material([NOISE], "\n", few.keys, few.words[:30]), draw.count, 1, 5000, 0))


WORDS = [
    f"{first}{middle}{last}" for first in "bdfghklmprs" for middle in ("arap", "elin", "onuv") for last in "aeioumt"
]


def test_frequent_words_follow_zipf(draw: Any) -> None:
    (sample,) = draw(["fwe"], 5000, 1)
    counts = [number for _, number in Counter(sample.context.split("coded words. ")[1].split()).most_common()]
    for rank in range(1, 8):
        assert counts[rank] / counts[0] == pytest.approx((rank + 1) ** -2, abs=1 / counts[0])


def test_needles_lie_anywhere_and_the_text_goes_on_around_them(draw: Any, english: list[str]) -> None:
    depths = []
    for sample in draw(["niah-single"], 1000, 200):
        found = re.search(r" ?One of the special magic numbers for \S+ is: \d+\.", sample.context)
        depths.append(found.start() / len(sample.context))
    assert min(depths) < 0.15
    assert max(depths) > 0.9
    assert sum(depths) / len(depths) == pytest.approx(0.5, abs=0.07)
    hay = re.sub(r" ?One of the special magic numbers for \S+ is: \d+\.", "", sample.context).split("afterwards.\n")[1]
    everything = " ".join(" ".join(document.split()) for document in english)
    assert len(hay) > 1000
    assert " ".join(hay.split()[5:60]) in everything


def test_noise_is_one_sentence_repeated(draw: Any) -> None:
    for sample in draw(["niah-multikey", "vt"], 1500, 4, filler="noise"):
        lines = Counter(sample.context.split("\n"))
        assert lines[NOISE] > 20
        assert len(lines) < 30


def test_seeds_decide_and_tasks_do_not_disturb_each_other(draw: Any) -> None:
    assert draw(list(DRAFTS), 1200, 14, seed=3) == draw(list(DRAFTS), 1200, 14, seed=3)
    alone = draw(["cwe"], 1200, 2, seed=3)
    among = [sample for sample in draw(list(DRAFTS), 1200, 14, seed=3) if sample.task == "cwe"]
    assert alone == among
    assert alone[0] != alone[1]
    assert alone != draw(["cwe"], 1200, 2, seed=4)


def test_questions_of_a_task_take_equally_many_tokens(draw: Any) -> None:
    for task in ("niah-single", "niah-multiquery", "cwe", "fwe"):
        assert len({draw.count(sample.question + sample.opening) for sample in draw([task], 600, 30)}) == 1


def test_written_lines_are_whole_prompts_in_the_tokens_of_a_model(
    tmp_path: Path, tokens: Any, english: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stdlib_text, "read", lambda: english)
    tokenizer.save(tokens, tmp_path / "run" / "model")
    options = {"name": "ruler", "length": 700, "tasks": ["vt", "niah-multikey"], "tokenizer": str(tmp_path / "run")}
    recipe = GenDataRecipe(task=options, num_samples=5, out=str(tmp_path / "out"))
    result = gen_data.run(recipe, Run(recipe))
    assert {row["file"]: row["num_samples"] for row in result.files} == {"corpus.json": None, "ruler.jsonl": 5}
    rows = [json.loads(line) for line in (tmp_path / "out" / "ruler.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rows] == ["vt", "niah-multikey", "vt", "niah-multikey", "vt"]
    for row in rows:
        assert row["prompt"].endswith(row["question"])
        assert row["length_tokens"] == len(tokens.encode(row["prompt"]).ids)
        assert 590 <= row["length_tokens"] <= 700
        assert set(row["answers"]) == answers_of(row["prompt"], row["task"])
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["options"] == {
        **{name: value for name, value in options.items() if name != "name"},
        "filler": "text",
    }
    assert manifest["corpus"]["num_train_documents"] > 1000


def test_without_a_tokenizer_one_is_trained_and_kept(
    tmp_path: Path, english: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stdlib_text, "read", lambda: english)
    Ruler(length=600, tasks=["fwe"]).write(tmp_path, 2, 0, [], None, Reporter())
    kept = tokenizer.load(tmp_path / "tokenizer")
    for line in (tmp_path / "ruler.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["length_tokens"] == len(kept.encode(row["prompt"]).ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["cwe", "fwee"]}, "unknown task of RULER 'fwee'; did you mean 'fwe'?"),
        ({"tasks": []}, "expected at least one entry"),
        ({"length": 10}, "expected a value greater than or equal to 64"),
        ({"filler": "essay"}, "expected 'text' or 'noise'"),
    ],
)
def test_bad_options_are_refused_with_the_recipe(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PiKVError) as caught:
        recipes.load("gen-data", None, [], {"task": {"name": "ruler", **options}})
    assert message in str(caught.value)


def test_missing_tokenizers_and_useless_text_are_refused(tmp_path: Path, tokens: Any) -> None:
    with pytest.raises(PiKVError, match="no tokenizer here"):
        Ruler(tokenizer=str(tmp_path)).write(tmp_path, 2, 0, [], None, Reporter())
    with pytest.raises(PiKVError, match="'nobody/nothing': no such folder, and the hub did not give it"):
        Ruler(tokenizer="nobody/nothing").write(tmp_path, 2, 0, [], None, Reporter())
    tokenizer.save(tokens, tmp_path)
    with pytest.raises(PiKVError, match="these tasks among noise use no text"):
        task = Ruler(tokenizer=str(tmp_path), filler="noise", tasks=["vt"])
        task.write(tmp_path, 2, 0, ["book.txt"], None, Reporter())
    assert "ruler" in TASKS.names()
