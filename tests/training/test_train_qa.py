"""Training on questions: windows and spans, what is measured and saved, and that a resumed run ends as a whole one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_train import InterruptedAt, assert_same_end, logged, train_to
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from pikv_core.data.qa import QA
from pikv_core.data.rereading import Question, lay_out, newest_first
from pikv_core.data.tokenizer import build_word_level
from pikv_core.errors import PiKVError, UsageError
from pikv_core.evaluation import spans
from pikv_core.jobs import gen_data
from pikv_core.runs import Reporter, Run
from pikv_core.schema import GenDataRecipe
from pikv_core.training.lessons.spans import best_span

LENGTH = 96
OVERRIDES = ["data.task=qa", f"train.curriculum=[64, {LENGTH}]", "train.eval_lengths=[96]", "dtype=float32"]
OVERRIDES += ["train.batch_tokens=512", "train.filler_loss=0.5"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stories") / "data"
    task = {"name": "qa", "num_facts": 4, "num_distractors": 2, "fewest_facts": 1, "vocab_size": 1000}
    recipe = GenDataRecipe.model_validate({"task": task, "out": str(folder), "num_samples": 200})
    gen_data.run(recipe, Run(recipe))
    return folder


def train_on(data: Path, folder: Path, *more: str, **options: Any) -> Any:
    return train_to(folder, *OVERRIDES, f"data.path={data}", *more, **options)


@pytest.mark.parametrize("arch", ["llama", "pikv"])
def test_a_run_interrupted_and_resumed_equals_one_that_was_not(data: Path, tmp_path: Path, arch: str) -> None:
    more = [f"model.arch={arch}"]
    train_on(data, tmp_path / "whole", *more)
    with pytest.raises(PiKVError, match="interrupted at step 10"):
        train_on(data, tmp_path / "cut", *more, reporter=InterruptedAt(10))
    torch.manual_seed(99)
    train_on(data, tmp_path / "cut", *more, resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "cut")
    assert {line.get("train/length_tokens") for line in logged(tmp_path / "whole")} == {64, LENGTH, None}


@pytest.mark.parametrize("arch", ["llama", "mixtral", "qwen3_moe", "pikv"])
def test_the_model_folder_loads_and_gives_the_measured_answers(data: Path, tmp_path: Path, arch: str) -> None:
    result = train_on(data, tmp_path / "run", f"model.arch={arch}", "train.max_steps=6")
    model = AutoModelForQuestionAnswering.from_pretrained(result.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(result.model)
    assert model.config.model_type == arch
    source = QA().open(str(data), 0, [], None, Reporter())
    assert {first == last for first, last in (one.answer for one in source.questions["train"])} == {True}
    rows = source.rows["test"]
    given = []
    for row in rows:
        context = tokenizer(f" {row.context}", return_offsets_mapping=True)
        ids = tokenizer(f" {row.question} {row.context} {row.context}")["input_ids"]
        num_tokens = len(context["input_ids"])
        with torch.no_grad():
            output = model(input_ids=torch.tensor([ids]))
        place = int((output.start_logits + output.end_logits)[0, -num_tokens:].argmax())
        given.append(f" {row.context}"[slice(*context["offset_mapping"][place])].strip())
    score = spans.score(given, [[row.answer] for row in rows], [row.kind for row in rows])
    assert result.metrics["exact_match"] == pytest.approx(score.overall.exact_match)
    assert result.metrics["token_f1"] == pytest.approx(score.overall.token_f1)
    for kind, share in score.by_kind.items():
        assert result.metrics[f"exact_match_{kind}"] == pytest.approx(share.exact_match)
    assert result.metrics["cut_share"] == 0
    assert {"linear_spans_f1", "linear_spans_exact_match", "last_mentioned_place_f1"} <= result.metrics.keys()
    assert ("load_cv" in result.metrics) == (arch != "llama")


def test_training_finds_answers_in_short_stories(tmp_path: Path) -> None:
    task = {"name": "qa", "num_facts": 1, "num_distractors": 1, "vocab_size": 1000}
    recipe = GenDataRecipe.model_validate({"task": task, "out": str(tmp_path / "data"), "num_samples": 300})
    gen_data.run(recipe, Run(recipe))
    more = ["train.max_steps=80", "train.decay_steps=30", "train.stage_accuracy=1.0", "train.curriculum=[48]"]
    result = train_on(tmp_path / "data", tmp_path / "run", *more)
    assert next(iter(result.metrics)) == "token_f1"
    assert result.metrics["exact_match"] > 0.8


def test_lengths_without_a_question_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(PiKVError, match="no question to learn from has 6 to 10 tokens"):
        train_on(data, tmp_path / "run", f"train.curriculum=[10, {LENGTH}]")
    with pytest.raises(PiKVError, match="length 5 is too short for a question of"):
        train_on(data, tmp_path / "other", "train.curriculum=[5]")


def question(context: list[int], asked: list[int], answer: tuple[int, int]) -> Question:
    offsets = np.stack([np.arange(len(context)), np.arange(1, len(context) + 1)], axis=1)
    return Question(np.array(context), offsets, np.array(asked), answer)


def test_a_context_comes_after_its_question_as_often_as_asked() -> None:
    reading = lay_out(question([5, 6, 7, 8], [1, 2], (2, 3)), 2, 10)
    assert reading.ids.tolist() == [1, 2, 5, 6, 7, 8, 5, 6, 7, 8]
    assert (reading.starts, reading.skipped, reading.answer) == ([2, 6], 0, (2, 3))
    assert lay_out(question([5, 6, 7, 8], [1, 2], (2, 3)), 1, 10).ids.tolist() == [1, 2, 5, 6, 7, 8]


def test_a_context_that_is_too_long_is_cut_where_it_is_least_like_the_question() -> None:
    context = [9, 9, 3, 9, 9, 9, 9, 4, 9, 9]
    reading = lay_out(question(context, [4, 9], (8, 8)), 2, 8)
    assert reading.ids.tolist() == [4, 9, 9, 4, 9, 9, 4, 9]
    assert (reading.starts, reading.skipped, reading.answer) == ([2, 5], 6, (2, 2))
    # What is kept does not depend on the answer.
    assert lay_out(question(context, [4, 9], (2, 2)), 2, 8).ids.tolist() == reading.ids.tolist()
    assert lay_out(question(context, [4, 9], (2, 2)), 2, 8).answer is None
    assert lay_out(question(context, [4, 9], (8, 9)), 2, 8).answer is None


def test_sentences_are_read_from_the_last_to_the_first(data: Path) -> None:
    turned = newest_first(question([5, 6, 7, 8, 9], [1], (3, 4)), np.array([2, 3, 5]))
    assert turned.context.tolist() == [8, 9, 7, 5, 6]
    assert turned.answer == (0, 1)
    source = QA(newest_first=True, num_reads=1).open(str(data), 0, [], None, Reporter())
    for number, (row, asked) in enumerate(zip(source.rows["test"], source.questions["test"], strict=True)):
        backwards = " ".join(f"{one}." for one in reversed(row.context.removesuffix(".").split(". ")))
        assert source.tokenizer.decode(asked.context.tolist()) == f" {backwards}"
        assert source.text("test", number, *asked.answer) == row.answer


@pytest.mark.parametrize("longest", [1, 3, 50])
def test_the_best_span_is_that_of_all_pairs(longest: int) -> None:
    rng = np.random.default_rng(longest)
    first, last = rng.normal(size=(2, 20, 11))
    found = best_span(torch.from_numpy(first), torch.from_numpy(last), longest).tolist()
    for row, span in enumerate(found):
        pairs = [(a, b) for a in range(11) for b in range(a, min(11, a + longest))]
        assert tuple(span) == max(pairs, key=lambda pair: first[row, pair[0]] + last[row, pair[1]])


def test_data_are_read_as_they_were_written(data: Path) -> None:
    given = build_word_level(["Mary"])
    source = QA().open(str(data), 0, [], None, Reporter(), tokenizer=given)
    assert source.tokenizer is given
    own = QA().open(str(data), 0, [], None, Reporter())
    assert own.vocab_size <= 1000
    for split in ("train", "test"):
        for number, (row, asked) in enumerate(zip(own.rows[split], own.questions[split], strict=True)):
            assert own.text(split, number, *asked.answer) == row.answer
    with pytest.raises(UsageError, match="bring their own"):
        QA().open(str(data), 0, ["x.txt"], None, Reporter())
    with pytest.raises(PiKVError, match="num_facts: the data were written with 4"):
        QA(num_facts=5).open(str(data), 0, [], None, Reporter())
