"""The task vision as training sees it: two sources, what is missing, runs that resume, folders that load."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from test_train import InterruptedAt, assert_same_end
from transformers import AutoModelForImageClassification

from pikv_core.data import tensor_files
from pikv_core.data.vision import Vision
from pikv_core.errors import PiKVError, UsageError
from pikv_core.jobs import gen_data, train
from pikv_core.model import PiKVForModalityClassification
from pikv_core.recipes import load
from pikv_core.runs import Reporter, Run
from pikv_core.training.lessons import LESSONS
from pikv_core.training.lessons.modalities import hide
from pikv_core.training.lessons.whole_samples import label_metrics

TINY = [
    "model.arch=pikv",
    "model.num_layers=1",
    "model.hidden_size=16",
    "model.num_experts=8",
    "model.expert_size=8",
    "dtype=float32",
    "train.warmup_steps=3",
    "train.decay_steps=4",
    "train.max_steps=20",
    "train.log_every=2",
    "train.checkpoint_every=4",
]
DIGITS = ["data.task={name: vision, patch: 4}", "train.curriculum=[4]", "train.batch_tokens=1024"]
MODALITIES = [
    "data.task={name: vision, source: modalities, missing_share: 0.4, hide_share: 0.3}",
    "model.router=flex",
    "train.curriculum=[3]",
    "train.batch_tokens=300",
]
SHARED = "source: modalities, missing_share: 0.4"
SOURCES = {"digits": DIGITS, "modalities": MODALITIES}


def train_to(folder, *overrides, reporter=None, resume=False):
    recipe = load("train", None, [*TINY, *overrides], {"out": str(folder)})
    return train.run(recipe, Run(recipe, reporter, folder if resume else None))


def opened(**options):
    source = Vision(**options).open(None, 0, [], None, Reporter())
    settings = load("train", None, ["train.batch_tokens=300"]).train
    return source, LESSONS[source.lesson](source, settings)


@pytest.mark.parametrize("source", SOURCES)
def test_a_run_resumed_in_mid_epoch_equals_one_that_was_not_cut(tmp_path, source):
    train_to(tmp_path / "whole", *SOURCES[source])
    with pytest.raises(PiKVError, match="interrupted at step 10"):
        train_to(tmp_path / "cut", *SOURCES[source], reporter=InterruptedAt(10))
    torch.manual_seed(99)
    train_to(tmp_path / "cut", *SOURCES[source], resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "cut")


def test_the_image_folder_loads_and_reproduces_the_held_out_metrics(tmp_path):
    result = train_to(tmp_path / "run", *DIGITS)
    model = AutoModelForImageClassification.from_pretrained(result.model).eval()
    assert model.config.id2label == {number: str(number) for number in range(10)}
    held_out = load_file(tmp_path / "run" / "model" / "vision.test.safetensors")
    patches = held_out["patches"].reshape(-1, 2, 2, 4, 4).transpose(0, 1, 3, 2, 4).reshape(-1, 1, 8, 8)
    with torch.no_grad():
        logits = model(pixel_values=torch.from_numpy(np.ascontiguousarray(patches))).logits
    assert (logits.argmax(-1).numpy() == held_out["labels"]).mean() == result.metrics["accuracy"]
    log_loss = -logits.log_softmax(-1)[torch.arange(len(logits)), held_out["labels"]].mean().item()
    assert result.metrics["log_loss"] == pytest.approx(log_loss, rel=1e-5)
    assert {"macro_f1", "majority_accuracy", "nearest_mean_accuracy", "load_cv"} <= set(result.metrics)


def test_the_modality_folder_loads_and_reproduces_the_held_out_metrics(tmp_path):
    result = train_to(tmp_path / "run", *MODALITIES)
    model = PiKVForModalityClassification.from_pretrained(result.model).eval()
    assert model.config.id2label == {0: "malignant", 1: "benign"}
    held_out = load_file(tmp_path / "run" / "model" / "vision.test.safetensors")
    with torch.no_grad():
        logits = model(*(torch.from_numpy(held_out[name]) for name in ("modalities", "present"))).logits
    assert (logits.argmax(-1).numpy() == held_out["labels"]).mean() == result.metrics["accuracy"]
    described = json.loads((tmp_path / "run" / "model" / "vision.json").read_text())
    assert (described["missing_share"], np.shape(described["data"]["mean"])) == (0.4, (3, 10))


@pytest.mark.parametrize("missing", ["bank", "zero", "drop"])
def test_what_is_missing_is_filled_told_or_left_out(missing):
    source, lesson = opened(source="modalities", missing_share=0.4, missing=missing)
    present = source.splits["train"]["present"]
    batches = [lesson.batch(0, step, 3).inputs["present"] for step in range(8)]
    assert lesson.model_options["missing_modalities"] == ("bank" if missing == "bank" else "zero")
    assert len(source.train_rows) == (present.all(1).sum() if missing == "drop" else len(present))
    assert all(batch.all() == (missing == "drop") for batch in batches)
    assert not lesson.test_inputs()["present"].all(1).all()


def test_dropping_every_sample_is_told(tmp_path):
    source, lesson = opened(source="modalities", missing_share=0.99, missing="drop")
    assert not source.splits["train"]["present"].all(1).any()
    with pytest.raises(PiKVError, match="every sample of the training split lacks a modality"):
        lesson.batch(0, 0, 3)


def test_hiding_leaves_every_sample_something():
    rng = np.random.default_rng(0)
    present = rng.random((20_000, 3)) < 0.6
    present = present[present.any(1)]
    hidden = hide(rng, present, 0.5)
    assert hidden.any(1).all() and not (hidden & ~present).any()
    complete = present.all(1)
    # all three are there where none is hidden, and where all would be
    assert hidden[complete].all(1).mean() == pytest.approx(0.25, abs=0.02)
    assert np.array_equal(hide(rng, present, 0.0), present)


def test_batches_are_functions_of_seed_and_step_and_go_through_every_sample():
    source, lesson = opened(source="digits", augment=False)
    images, labels = source.images("train"), source.labels("train")
    batches = [lesson.batch(3, step, 16) for step in range(80)]
    assert all(batch.labels.shape == (18,) for batch in batches)
    seen = np.concatenate([batch.inputs["pixel_values"][:, 0] for batch in batches])[: len(labels)]
    assert sorted(map(bytes, seen.reshape(len(seen), -1))) == sorted(map(bytes, images.reshape(len(images), -1)))
    _, changed = opened(source="digits")
    one, again, other = (changed.batch(3, step, 16).inputs["pixel_values"] for step in (5, 5, 6))
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert not np.array_equal(one, batches[5].inputs["pixel_values"])
    assert np.array_equal(changed.batch(3, 5, 16).labels, batches[5].labels)
    assert changed.num_tokens(batches[0]) == 18 * 16


def test_data_of_gen_data_train_as_those_made_on_the_spot(tmp_path):
    recipe = load("gen-data", None, [], {"task": "vision", "num_samples": 1797, "out": str(tmp_path / "data")})
    gen_data.run(recipe, Run(recipe))
    read = Vision(augment=False).open(str(tmp_path / "data"), 5, [], None, Reporter())
    made, _ = opened(source="digits")
    assert read.task == Vision(augment=False)
    for split in ("train", "test"):
        assert np.array_equal(read.images(split), made.images(split))
    assert read.described == made.described
    with pytest.raises(PiKVError, match="patch: the data were written with 2, the task asks for 4"):
        Vision(patch=4).open(str(tmp_path / "data"), 0, [], None, Reporter())
    with pytest.raises(UsageError, match="bring their own"):
        Vision().open(str(tmp_path / "data"), 0, ["a.txt"], None, Reporter())
    (tmp_path / "data" / "vision.test.safetensors").write_bytes(b"no tensors")
    with pytest.raises(PiKVError, match=r"vision.test.safetensors: no safetensors file"):
        Vision().open(str(tmp_path / "data"), 0, [], None, Reporter())
    with pytest.raises(PiKVError, match="cannot be read"):
        tensor_files.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*DIGITS, "model.arch=llama"], "model.arch: 'llama' reads tokens"),
        ([*DIGITS, "train.curriculum=[2]"], "length 2 is too short for a sample of 4 tokens"),
    ],
)
def test_an_impossible_recipe_is_refused(tmp_path, overrides, message):
    with pytest.raises(PiKVError, match=message):
        train_to(tmp_path / "run", *overrides)


def test_options_of_training_are_no_options_of_the_data(tmp_path):
    with pytest.raises(UsageError, match="missing"):
        Vision(source="modalities", missing="zero").write(tmp_path, 100, 0, [], None, Reporter())


def test_metrics_by_hand():
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.0], [1.0, 3.0], [4.0, 1.0]])
    metrics = label_metrics(logits, np.array([0, 1, 1, 1]), ["a", "b"])
    p = [1 / (1 + np.exp(-2)), 0.5, 1 / (1 + np.exp(-2)), 1 / (1 + np.exp(3))]
    assert metrics["log_loss"] == pytest.approx(-np.log(p).mean())
    assert metrics["accuracy"] == 0.5
    assert metrics["macro_f1"] == pytest.approx((2 * 1 / 4 + 2 * 1 / 4) / 2)


@pytest.mark.slow
def test_the_recipe_for_digits_reaches_what_it_says(tmp_path):
    recipe = load("train", "recipes/train/digits.yaml", [], {"out": str(tmp_path / "run"), "threads": 1})
    assert train.run(recipe, Run(recipe)).metrics["accuracy"] > 0.96


@pytest.mark.slow
def test_a_bank_for_what_is_missing_beats_training_on_complete_samples_alone(tmp_path):
    def accuracy(seed, missing):
        overrides = [] if missing == "bank" else [f"data.task={{name: vision, {SHARED}, missing: {missing}}}"]
        out = str(tmp_path / f"{missing}-{seed}")
        recipe = load("train", "recipes/train/modalities.yaml", overrides, {"out": out, "seed": seed, "threads": 1})
        return train.run(recipe, Run(recipe)).metrics["accuracy"]

    gains = [accuracy(seed, "bank") - accuracy(seed, "drop") for seed in range(4)]
    assert np.mean(gains) > 0.02
