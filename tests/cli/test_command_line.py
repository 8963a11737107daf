"""The contracts of the command line, run as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
VERBS = ["gen-data", "train", "compress", "simulate-cache", "generate"]


def pikv(*arguments, cwd=ROOT, stdin=""):
    return subprocess.run(
        [sys.executable, "-m", "pikv_cli", *map(str, arguments)], cwd=cwd, input=stdin, capture_output=True, text=True
    )


def fails(code, *arguments, cwd=ROOT, stdin=""):
    """Run, check that only `error:` and `hint:` lines came, and return them."""
    done = pikv(*arguments, cwd=cwd, stdin=stdin)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert errors and "Traceback" not in done.stderr
    return errors, [line for line in lines if line.startswith("hint: ")]


def test_transformers_imports_beside_the_folder_kernels():
    for code in ("import transformers, transformers.integrations", "from transformers import LlamaForCausalLM"):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_help_of_every_verb_loads_nothing_heavy():
    code = (
        "import sys; sys.argv = ['pikv', {!r}, '--help']\n"
        "from pikv_cli.app import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "heavy = {{'torch', 'transformers', 'numba', 'matplotlib', 'tensorboard'}} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    for verb in VERBS:
        done = subprocess.run([sys.executable, "-c", code.format(verb)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_a_bad_recipe_is_reported_whole_before_anything_runs(tmp_path):
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(
        "verb: train\ntrain:\n  lr: fast\n  lrr: 3\n  clip_norm: -1\nmodel:\n  arch: lama\n  top_k: 1.5\nseed: x\n"
    )
    errors, hints = fails(2, "train", "--recipe", recipe, "--set", "train.warmup_steps=0", cwd=tmp_path)
    text = "\n".join(errors)
    for part in (
        f"{recipe}: train.lr: expected a number, got 'fast'",
        f"{recipe}: train.lrr: unknown key; did you mean 'lr'?",
        f"{recipe}: train.clip_norm: expected a value greater than 0, got -1",
        f"{recipe}: model.arch: expected 'llama'",
        "did you mean 'llama'?",
        f"{recipe}: model.top_k: expected a whole number, got 1.5",
        f"{recipe}: seed: expected a whole number, got 'x'",
        "--set: train.warmup_steps: expected a value greater than or equal to 1, got 0",
    ):
        assert part in text, f"{part!r} is not in\n{text}"
    assert len(errors) == 7 and hints
    assert list(tmp_path.iterdir()) == [recipe]


@pytest.mark.parametrize(
    "text, message",
    [
        ("verb: train\nseed: 1\nseed: 2\n", "the key 'seed' is repeated"),
        ("verb: compress\nmodel: x\n", "this recipe is for 'compress', not for 'train'"),
        ("- a\n- b\n", "expected keys and values"),
        ("train: {lr: [}\n", "bad.yaml:1"),
    ],
)
def test_recipes_that_are_no_recipes(tmp_path, text, message):
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(text)
    errors, _ = fails(2, "train", "--recipe", recipe, cwd=tmp_path)
    assert message in errors[0]


def test_scientific_numbers_and_words_keep_their_kind(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("verb: train\nname: off\ntrain:\n  lr: 3e-4\n")
    done = pikv("train", "--recipe", recipe, "--set", "train.weight_decay=1e-2", "--check")
    resolved = yaml.safe_load(done.stdout)
    assert resolved["train"]["lr"] == 3e-4 and resolved["train"]["weight_decay"] == 1e-2
    assert resolved["name"] == "off"


def test_flags_win_over_set_and_set_over_the_recipe(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("verb: generate\nmodel: a\nseed: 1\ncache: {policy: h2o, budget: 0.5}\n")
    options = ("--set", "seed=2", "--set", "cache.policy.heavy_share=0.3", "--set", "cache.budget=64")
    done = pikv("generate", "--recipe", recipe, *options, "--seed", 3, "--check")
    resolved = yaml.safe_load(done.stdout)
    assert resolved["seed"] == 3 and resolved["cache"]["budget"] == 64
    assert resolved["cache"]["policy"] == {"name": "h2o", "heavy_share": 0.3}
    again = tmp_path / "again.yaml"
    again.write_text(done.stdout)
    assert pikv("generate", "--recipe", again, "--check").stdout == done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_unknown_flags(verb):
    errors, hints = fails(2, verb, "--nonsense")
    assert "--nonsense" in errors[0] and hints


def test_bad_input_has_one_error_and_a_hint(tmp_path):
    cases = [
        (1, ["generate", "hello", "--model", "nowhere/at/all"], "no such model folder"),
        (1, ["compress", "--model", tmp_path], "no model here"),
        (1, ["generate", "--prompt-file", "none.txt", "--model", "x"], "none.txt: cannot be read"),
        (2, ["generate", "", "--model", "x"], "the prompt is empty"),
        (2, ["generate", "--model", "x"], "the prompt is empty (stdin)"),
        (2, ["generate", "a", "--prompt-file", "b", "--model", "x"], "more than one source"),
        (2, ["generate", "a", "--model", "x", "--policy", "h3o"], "did you mean 'h2o'?"),
        (2, ["generate", "a", "--model", "x", "--policy", "h2o", "--budget", "1.5"], "expected a share in (0, 1]"),
        (2, ["compress", "--model", "x", "--method", "h2o+h2o"], "at most one policy"),
        (2, ["train", "--resume", tmp_path], "no run to go on with"),
        (2, ["simulate-cache", "--policy", "lru"], "trace: required"),
        (2, ["train", "--set", "data.task=requests"], "no task to train on"),
    ]
    for code, arguments, message in cases:
        errors, hints = fails(code, *arguments, cwd=tmp_path)
        assert len(errors) == 1 and message in errors[0], errors
        assert hints, arguments
    assert not list(tmp_path.iterdir())


def test_a_taken_folder_is_refused_before_any_work(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    errors, _ = fails(1, "gen-data", "requests", "--out", tmp_path / "taken")
    assert "not empty" in errors[0]
    (tmp_path / "file").touch()
    errors, _ = fails(1, "gen-data", "requests", "--out", tmp_path / "file" / "below")
    assert "cannot be written" in errors[0]


def test_runs_are_numbered_and_the_latest_is_linked(tmp_path):
    for number in (1, 2):
        done = pikv("gen-data", "requests", "--num-samples", "20", "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["task"] == "requests"
        folder = tmp_path / "runs" / f"gen-data-{number}"
        assert (folder / "result.json").is_file() and (folder / "recipe.yaml").is_file()
        assert (tmp_path / "runs" / "gen-data-latest").resolve() == folder
    again = pikv("gen-data", "--recipe", folder / "recipe.yaml", "--check", cwd=tmp_path)
    assert again.returncode == 0, again.stderr


def test_a_plugin_file_adds_a_policy(tmp_path):
    plugin = tmp_path / "newest.py"
    plugin.write_text(
        "from dataclasses import dataclass\n"
        "from pikv_core.scheduling import POLICIES\n"
        "from pikv_core.scheduling.base import Evictor\n\n"
        '@POLICIES.register("newest")\n'
        "@dataclass(frozen=True)\n"
        "class Newest(Evictor):\n"
        "    def score(self, tokens):\n"
        "        return tokens.position.float()\n"
    )
    arguments = ("generate", "a", "--model", "x", "--policy", "newest", "--check")
    fails(2, *arguments)
    done = pikv(*arguments, "--plugin", plugin)
    assert done.returncode == 0 and yaml.safe_load(done.stdout)["cache"]["policy"] == "newest"
