"""Training on classes of texts: what is measured, what is saved, and that a resumed run ends as a whole one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_train import InterruptedAt, assert_same_end, logged, train_to
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pikv_core.data.classification import Classification
from pikv_core.data.tokenizer import build_word_level
from pikv_core.errors import PiKVError, UsageError
from pikv_core.jobs import gen_data
from pikv_core.runs import Reporter, Run
from pikv_core.schema import GenDataRecipe
from pikv_core.training.lessons.by_length import rows_of_step

WORDS = {"metal": ["copper", "iron", "zinc"], "tree": ["walnut", "ash", "elm", "yew"], "fish": ["cod", "eel"]}
LENGTH = 24
OVERRIDES = ["data.task={name: classification, vocab_size: 300}", f"train.curriculum=[{LENGTH}]", "dtype=float32"]
OVERRIDES += ["train.eval_lengths=[24]", "train.stage_accuracy=1.0", "train.filler_loss=0.5"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("labelled") / "rows.jsonl"
    with file.open("w") as stream:
        for number in range(150):
            label = list(WORDS)[number % 3]
            words = [str(number), *rng.choice(WORDS[label], rng.integers(1, 12)).tolist()]
            stream.write(json.dumps({"text": " ".join(words), "label": label}) + "\n")
    return file


def train_on(rows: Path, folder: Path, *more: str, **options: Any) -> Any:
    return train_to(folder, *OVERRIDES, f"data.text=[{rows}]", *more, **options)


def open_rows(rows: Path, **options: Any) -> Any:
    return Classification(vocab_size=300).open(None, 0, [str(rows)], None, Reporter(), **options)


@pytest.mark.parametrize("arch", ["llama", "pikv"])
def test_a_run_interrupted_and_resumed_equals_one_that_was_not(rows: Path, tmp_path: Path, arch: str) -> None:
    more = [f"model.arch={arch}"]
    train_on(rows, tmp_path / "whole", *more)
    with pytest.raises(PiKVError, match="interrupted at step 10"):
        train_on(rows, tmp_path / "cut", *more, reporter=InterruptedAt(10))
    torch.manual_seed(99)
    train_on(rows, tmp_path / "cut", *more, resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("arch", ["llama", "mixtral", "qwen3_moe", "pikv"])
def test_the_model_folder_loads_and_gives_the_measured_labels(rows: Path, tmp_path: Path, arch: str) -> None:
    result = train_on(rows, tmp_path / "run", f"model.arch={arch}", "train.max_steps=6")
    model = AutoModelForSequenceClassification.from_pretrained(result.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(result.model)
    assert model.config.model_type == arch
    source = open_rows(rows)
    assert model.config.id2label == dict(enumerate(source.classes))
    assert model.config.label2id == {name: number for number, name in enumerate(source.classes)}
    test = source.splits["test"]
    texts = [source.tokenizer.decode(ids.tolist()) for ids in test.ids]
    inputs = tokenizer(texts, truncation=True, max_length=LENGTH, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
        alone = torch.cat(
            [model(**tokenizer(text, truncation=True, max_length=LENGTH, return_tensors="pt")).logits for text in texts]
        )
    torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)
    right = logits.argmax(-1).numpy() == test.labels
    assert result.metrics["accuracy"] == pytest.approx(right.mean())
    assert result.metrics["majority_accuracy"] == pytest.approx(1 / 3)
    assert {"macro_f1", "majority_f1", "bag_of_words_accuracy", "bag_of_words_f1"} <= result.metrics.keys()
    assert ("load_cv" in result.metrics) == (arch != "llama")
    names = {"labels", "prefixes", "text"} | (set() if arch == "llama" else {"balance", "z"})
    assert {f"train/loss/{name}" for name in names} <= logged(tmp_path / "run")[0].keys()


def test_training_tells_the_classes_apart(rows: Path, tmp_path: Path) -> None:
    result = train_on(rows, tmp_path / "run", "train.max_steps=60", "train.lr=0.01", "train.decay_steps=20")
    assert next(iter(result.metrics)) == "macro_f1"
    assert result.metrics["macro_f1"] > 0.9


def test_a_folder_of_data_is_the_same_as_data_made_on_the_spot(rows: Path, tmp_path: Path) -> None:
    task = {"name": "classification", "vocab_size": 300}
    recipe = {"task": task, "out": str(tmp_path / "data"), "num_samples": 1000, "text": [str(rows)]}
    written = GenDataRecipe.model_validate(recipe)
    gen_data.run(written, Run(written))
    made, read = open_rows(rows), Classification().open(str(tmp_path / "data"), 5, [], None, Reporter())
    assert made.classes == read.classes
    assert made.baselines == read.baselines
    assert made.tokenizer.to_str() == read.tokenizer.to_str()
    for split in ("train", "test"):
        assert made.splits[split].labels.tolist() == read.splits[split].labels.tolist()
        assert [ids.tolist() for ids in made.splits[split].ids] == [ids.tolist() for ids in read.splits[split].ids]
    with pytest.raises(UsageError, match="bring their own"):
        Classification().open(str(tmp_path / "data"), 0, [str(rows)], None, Reporter())
    with pytest.raises(PiKVError, match="vocab_size: the data were written with 300, the task asks for 400"):
        Classification(vocab_size=400).open(str(tmp_path / "data"), 0, [], None, Reporter())


def test_a_given_tokenizer_is_used(rows: Path) -> None:
    given = build_word_level(["copper", "ash", "cod"])
    source = open_rows(rows, tokenizer=given)
    assert source.tokenizer is given
    assert source.vocab_size == 6
    assert source.pad_id == given.token_to_id("<pad>")


def test_rows_of_a_step_are_of_like_length_and_every_row_has_its_turn() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, size=64)
    steps = [rows_of_step(3, step, 4, lengths) for step in range(16)]
    assert sorted(np.concatenate(steps).tolist()) == list(range(64))
    waste = sum(lengths[rows].max() * len(rows) - lengths[rows].sum() for rows in steps)
    unsorted = lengths.reshape(16, 4)
    assert waste < 0.5 * (unsorted.max(1).sum() * 4 - unsorted.sum())
    assert steps[5].tolist() == rows_of_step(3, 5, 4, lengths).tolist()
    assert steps[5].tolist() != rows_of_step(4, 5, 4, lengths).tolist()
