"""The train job: what it leaves behind, and that an interrupted run ends as if it had not been."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pikv_core.errors import PiKVError, RecipeError
from pikv_core.jobs import train
from pikv_core.moe.routers import ROUTERS
from pikv_core.recipes import load
from pikv_core.runs import Reporter, Run

TINY = [
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_size=48",
    "model.num_experts=4",
    "model.expert_size=24",
    "data.task={name: recall, num_keys: 16, num_values: 8, num_filler: 16}",
    "train.batch_tokens=128",
    "train.max_steps=20",
    "train.curriculum=[16, 32]",
    "train.stage_accuracy=0.0001",
    "train.stage_steps=7",
    "train.decay_steps=4",
    "train.warmup_steps=3",
    "train.log_every=2",
    "train.checkpoint_every=4",
    "train.eval_samples=8",
    "train.eval_lengths=[24, 32]",
]


class InterruptedAt(Reporter):
    """Sends Ctrl-C to this process in the given step, and keeps what it is told."""

    def __init__(self, step=None):
        self.step = step
        self.lines = []

    def status(self, text):
        self.lines.append(text)

    def progress(self, text, done, total):
        if done == self.step:
            signal.raise_signal(signal.SIGINT)


def train_to(folder, *overrides, reporter=None, resume=False):
    recipe = load("train", None, [*TINY, *overrides], {"out": str(folder)})
    run = Run(recipe, reporter, folder if resume else None)
    return train.run(recipe, run)


def write_corpus(folder):
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(30):
        (corpus / f"{number}.txt").write_text(f"the cat {number} sat on the mat and the dog saw it\n" * 20)
    return corpus


def logged(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "train/tokens_per_s"} for line in lines]


def assert_same_end(one, other):
    results = [json.loads((folder / "result.json").read_text())["result"] for folder in (one, other)]
    for key in ("metrics", "num_steps", "stages"):
        assert results[0][key] == results[1][key]
    assert logged(one) == logged(other)
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (one, other)]
    assert set(weights[0]) == set(weights[1])
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize("arch", ["llama", "pikv"])
@pytest.mark.parametrize("step", [4, 10, 18])
def test_a_run_interrupted_and_resumed_equals_one_that_was_not(tmp_path, arch, step):
    train_to(tmp_path / "whole", f"model.arch={arch}")
    with pytest.raises(PiKVError, match=f"interrupted at step {step}") as caught:
        train_to(tmp_path / "cut", f"model.arch={arch}", reporter=InterruptedAt(step))
    assert f"--resume {tmp_path / 'cut'}" in caught.value.hint
    assert not (tmp_path / "cut" / "model").exists()
    torch.manual_seed(99)
    train_to(tmp_path / "cut", f"model.arch={arch}", resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("router", ROUTERS.names())
def test_every_router_trains_resumes_and_is_saved(tmp_path, router):
    overrides = ["model.arch=pikv", f"model.router={router}", "train.max_steps=12"]
    train_to(tmp_path / "whole", *overrides)
    with pytest.raises(PiKVError, match="interrupted at step 6"):
        train_to(tmp_path / "cut", *overrides, reporter=InterruptedAt(6))
    torch.manual_seed(99)
    train_to(tmp_path / "cut", *overrides, resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "cut")
    layers = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model").model.layers
    assert all(layer.mlp.gate.name == router for layer in layers)
    assert router != "balanced" or all(layer.mlp.gate.bias.any() for layer in layers)


def test_a_run_on_text_resumes_with_the_same_tokenizer(tmp_path):
    corpus = write_corpus(tmp_path)
    overrides = ["data.task={name: recall, filler: text, num_keys: 16, num_values: 8, vocab_size: 400}"]
    overrides += [f"data.text=[{corpus}]", "train.filler_loss=0.5", "train.curriculum=[32, 48]"]
    result = train_to(tmp_path / "whole", *overrides)
    assert {"recall_32", "answer_loss", "perplexity"} <= set(result.metrics)
    with pytest.raises(PiKVError, match="interrupted"):
        train_to(tmp_path / "cut", *overrides, reporter=InterruptedAt(9))
    train_to(tmp_path / "cut", *overrides, resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "cut")


def test_a_checkpoint_of_another_model_is_refused_and_nothing_is_lost(tmp_path):
    with pytest.raises(PiKVError, match="interrupted"):
        train_to(tmp_path / "cut", reporter=InterruptedAt(9))
    before = (tmp_path / "cut" / "metrics.jsonl").read_text()
    with pytest.raises(PiKVError, match="the checkpoint does not fit the run's recipe"):
        train_to(tmp_path / "cut", "model.hidden_size=64", resume=True)
    assert (tmp_path / "cut" / "metrics.jsonl").read_text() == before


def test_a_run_without_a_checkpoint_starts_from_its_first_step(tmp_path):
    train_to(tmp_path / "whole")
    with pytest.raises(PiKVError):
        train_to(tmp_path / "cut", reporter=InterruptedAt(3))
    for entry in (tmp_path / "cut").iterdir():
        if entry.name not in ("recipe.yaml", "metrics.jsonl"):
            subprocess.run(["rm", "-r", entry], check=True)
    train_to(tmp_path / "cut", resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "cut")


def test_a_finished_run_gives_its_stored_result(tmp_path):
    expected = train_to(tmp_path / "run")
    reporter = InterruptedAt()
    assert train_to(tmp_path / "run", resume=True, reporter=reporter) == expected
    assert reporter.lines == [f"{tmp_path / 'run'}: the run is finished; this is its result"]


@pytest.mark.parametrize("arch", ["llama", "mixtral", "qwen3_moe", "pikv"])
def test_the_model_folder_loads_and_reproduces_the_held_out_recall(tmp_path, arch):
    result = train_to(tmp_path / "run", f"model.arch={arch}", "dtype=float32", "train.lr=0.01")
    model = AutoModelForCausalLM.from_pretrained(result.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(result.model)
    assert len(tokenizer) == model.config.vocab_size
    assert model.config.model_type == arch
    from pikv_core.data.recall import RecallSource
    from pikv_core.training.lessons.base import EVALUATION_SEED

    batch = RecallSource.load(tmp_path / "run" / "model").batch(
        np.random.default_rng([EVALUATION_SEED, 32]), 8, 32, "test"
    )
    guesses = model(torch.from_numpy(batch.ids)).logits.argmax(-1).numpy()
    right = guesses[:, :-1] == batch.ids[:, 1:]
    assert result.metrics["recall_32"] == pytest.approx(right[batch.answer_mask[:, :-1]].mean())
    assert ("load_cv" in result.metrics) == (arch != "llama")
    assert result.num_steps == 18
    assert [stage["length"] for stage in result.stages] == [16, 32]


def test_reaching_max_steps_first_is_told(tmp_path):
    reporter = InterruptedAt()
    result = train_to(tmp_path / "run", "train.stage_accuracy=1.0", reporter=reporter)
    assert result.num_steps == 20
    assert result.stages == []
    assert "max_steps reached before the curriculum's end: 0 of 2 lengths mastered" in reporter.lines


def test_training_lowers_the_loss_on_text(tmp_path):
    corpus = write_corpus(tmp_path)
    overrides = [
        "data.task={name: text, vocab_size: 300}",
        f"data.text=[{corpus}]",
        "train.curriculum=[32]",
        "train.max_steps=40",
        "train.eval_lengths=[32]",
    ]
    result = train_to(tmp_path / "run", *overrides)
    assert set(result.metrics) == {"perplexity"}
    lines = logged(tmp_path / "run")
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < losses[0] - 1
    assert all(line.get("train/length_tokens", 32) == 32 for line in lines)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.curriculum=[4]", "length 4 is too short for recall"),
        ("train.eval_lengths=[8]", "length 8 is too short for recall"),
        ("dtype=float16", "loss scaling"),
        ("data.path=/nowhere/at/all", "/nowhere/at/all"),
    ],
)
def test_an_impossible_recipe_leaves_nothing_on_disk(tmp_path, override, message):
    with pytest.raises(PiKVError, match=message):
        train_to(tmp_path / "run", override)
    assert not (tmp_path / "run").exists()


def test_a_length_beyond_the_positions_is_refused():
    with pytest.raises(RecipeError, match="max_positions"):
        load("train", None, ["train.curriculum=[16, 8192]"])


def command(folder, *more):
    return [sys.executable, "-m", "pikv_cli", "train", *more, "--threads", "1"] + (
        ["--out", str(folder), *(part for item in TINY for part in ("--set", item))] if not more else []
    )


def test_resuming_what_is_no_run_is_a_usage_error(tmp_path):
    done = subprocess.run(command(None, "--resume", str(tmp_path)), capture_output=True, text=True)
    assert done.returncode == 2
    assert "no run to go on with" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.05, 0.4])
def test_a_killed_run_resumes_to_the_same_end(tmp_path, delay):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True, env=environment)
    process = subprocess.Popen(command(tmp_path / "cut"), stderr=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "cut" / "checkpoint").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    process.wait()
    resume = command(None, "--resume", str(tmp_path / "cut"))
    subprocess.run(resume, check=True, capture_output=True, env=environment)
    assert_same_end(tmp_path / "whole", tmp_path / "cut")
