"""Training with a teacher: what is learnt of it, that it resumes exactly, and that it leaves no trace."""

import pytest
import torch
from safetensors.torch import load_file
from training.test_train import InterruptedAt, assert_same_end, logged, train_to

from pikv_core.errors import PiKVError, RecipeError, UsageError
from pikv_core.recipes import load


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "run"
    train_to(folder, "model.hidden_size=64", "train.max_steps=60", "train.lr=0.01", "dtype=float32")
    return folder


def taught(teacher, *more):
    return [f"train.distill.teacher={teacher}", "train.distill.hidden=0.5", "train.log_every=1", *more]


@pytest.mark.parametrize("arch", ["llama", "pikv"])
def test_a_student_of_another_size_resumes_exactly_and_carries_no_trace(tmp_path, teacher, arch):
    overrides = taught(teacher, f"model.arch={arch}")
    train_to(tmp_path / "whole", *overrides)
    with pytest.raises(PiKVError, match="interrupted at step 10"):
        train_to(tmp_path / "cut", *overrides, reporter=InterruptedAt(10))
    torch.manual_seed(99)
    train_to(tmp_path / "cut", *overrides, resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "cut")
    train_to(tmp_path / "alone", f"model.arch={arch}")
    names = [set(load_file(tmp_path / run / "model" / "model.safetensors")) for run in ("whole", "alone")]
    assert names[0] == names[1]
    configs = [(tmp_path / run / "model" / "config.json").read_text() for run in ("whole", "alone")]
    assert configs[0] == configs[1]


def test_a_student_comes_nearer_to_its_teacher(tmp_path, teacher):
    train_to(tmp_path / "run", *taught(teacher, "train.max_steps=60", "dtype=float32"))
    lines = [line for line in logged(tmp_path / "run") if "train/loss/distill_logits" in line]
    for name in ("train/loss/distill_logits", "train/loss/distill_hidden"):
        first, last = (sum(line[name] for line in part) / 10 for part in (lines[:10], lines[-10:]))
        assert 0 < last < 0.9 * first, name
    total = sum(value for name, value in lines[0].items() if name.startswith("train/loss/"))
    assert lines[0]["train/loss"] == pytest.approx(total, rel=1e-5)


def test_the_teacher_stays_as_it_is(tmp_path, teacher):
    before = (teacher / "model" / "model.safetensors").read_bytes()
    train_to(tmp_path / "run", *taught(teacher))
    assert (teacher / "model" / "model.safetensors").read_bytes() == before


def test_a_teacher_of_other_tokens_is_refused(tmp_path, teacher):
    task = "data.task={name: recall, num_keys: 16, num_values: 9, num_filler: 16}"
    with pytest.raises(UsageError, match="its vocab_size is 43, the student's 44"):
        train_to(tmp_path / "run", *taught(teacher, task))
    assert not (tmp_path / "run").exists()


def test_nothing_to_learn_is_refused():
    with pytest.raises(RecipeError, match="logits and hidden are both 0"):
        load("train", None, ["train.distill.teacher=x", "train.distill.logits=0"])


@pytest.mark.parametrize("arch", ["llama", "pikv"])
def test_a_compressed_cache_trains_along_and_resumes_exactly(tmp_path, teacher, arch):
    cache = ["train.cache.policy=h2o", "train.cache.budget=0.5", "train.cache.codec=int8", "train.selection_loss=1"]
    overrides = taught(teacher, f"model.arch={arch}", *cache)
    train_to(tmp_path / "whole", *overrides)
    with pytest.raises(PiKVError, match="interrupted at step 10"):
        train_to(tmp_path / "cut", *overrides, reporter=InterruptedAt(10))
    train_to(tmp_path / "cut", *overrides, resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "cut")
    lines = [line for line in logged(tmp_path / "whole") if "train/loss" in line]
    assert all(0.3 < line["cache/kept_share"] <= 0.6 for line in lines)
    assert all(0 < line["cache/resident_bytes"] for line in lines)
    assert all(line["train/loss/selection"] > 0 for line in lines)
    train_to(tmp_path / "full", *taught(teacher, f"model.arch={arch}"))
    assert logged(tmp_path / "full")[0]["train/loss/answers"] != lines[0]["train/loss/answers"]
