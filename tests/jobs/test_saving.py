"""`generate --save-state` and `--resume`: a run that ended at any moment goes on token for token."""

import io
import json
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers

from pikv_cli import app
from pikv_core.model import generation

PROMPT = " ".join(f"f{number} k{number % 7} v{number % 5}" for number in range(20))
METHODS = [("full", "1.0"), ("h2o", "0.4"), ("quest", "48")]


@pytest.fixture
def generate(tmp_path, monkeypatch, capsys):
    """Return a function: arguments of `generate` → exit code, the result, stderr; runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def generate(*arguments):
        monkeypatch.setattr(sys, "argv", ["pikv", "generate", "--json", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            app.main()
        told = capsys.readouterr()
        return stop.value.code, json.loads(told.out) if told.out else None, told.err

    return generate


class Interrupted(Exception):
    pass


def interrupt_at(monkeypatch, num_tokens):
    """Let a run end as it is about to go on from its token of this number."""
    counted = generation._Clock.__call__

    def count(self, input_ids, scores, **kwargs):
        if len(self.times) == num_tokens:
            raise Interrupted
        return counted(self, input_ids, scores, **kwargs)

    monkeypatch.setattr(generation._Clock, "__call__", count)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("codec", ["none", "int4"])
@pytest.mark.parametrize(("policy", "budget"), METHODS, ids=[name for name, _ in METHODS])
def test_a_run_that_ended_goes_on_token_for_token(
    folder, generate, monkeypatch, tmp_path, policy, budget, codec, temperature
):
    given = [PROMPT, "--model", folder, "--policy", policy, "--codec", codec, "--max-new-tokens", 40, "--seed", 5]
    given += ["--temperature", temperature, *([] if policy == "full" else ["--budget", budget])]
    _, whole, _ = generate(*given)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 23)
        patched.setattr(
            sys, "argv", ["pikv", "generate", "--json", *map(str, given), "--save-state", "state", "--save-every", "4"]
        )
        with pytest.raises(Interrupted):
            app.main()
    code, found, _ = generate("--resume", "state")
    assert code == 0
    assert found["token_ids"] == whole["token_ids"]
    assert found["text"] == whole["text"]
    assert found["num_prompt_tokens"] == whole["num_prompt_tokens"]
    assert found["state"] is None


def test_a_finished_run_has_nothing_left_to_do_but_takes_more(folder, generate):
    given = ["--model", folder, "--max-new-tokens", 9, "--policy", "h2o", "--budget", "0.5"]
    _, whole, _ = generate(PROMPT, *given, "--save-state", "state")
    assert whole["state"] == "state"
    assert whole["state_bytes"] > 0
    _, again, _ = generate("--resume", "state", "--save-state", "state")
    assert again["token_ids"] == whole["token_ids"]
    assert again["time_to_first_token_s"] is None
    _, more, _ = generate("k3 v4", "--resume", "state", "--max-new-tokens", 5)
    assert len(more["token_ids"]) == 5
    assert more["num_prompt_tokens"] == whole["num_prompt_tokens"] + 9 + 2
    _, other, _ = generate("k3 v4", "--resume", "state", "--max-new-tokens", 5)
    assert other["token_ids"] == more["token_ids"]  # who reads a state leaves it as it is


def test_what_comes_behind_a_state_may_come_on_stdin(folder, generate, monkeypatch):
    generate(PROMPT, "--model", folder, "--max-new-tokens", 4, "--save-state", "state")
    _, given, _ = generate("k3 v4", "--resume", "state")
    monkeypatch.setattr(sys, "stdin", io.StringIO("k3 v4\n"))
    _, piped, _ = generate("-", "--resume", "state")
    assert piped["token_ids"] == given["token_ids"]
    assert piped["num_prompt_tokens"] == given["num_prompt_tokens"]


def test_a_place_that_cannot_hold_a_state_is_told(folder, generate, tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    code, _, error = generate(PROMPT, "--model", folder, "--save-state", tmp_path / "file")
    assert code == 1
    assert "cannot be made" in error and "hint: give another folder" in error
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_a_run_that_goes_on_saves_in_its_own_place(folder, generate):
    generate(PROMPT, "--model", folder, "--max-new-tokens", 8, "--save-state", "state")
    _, longer, _ = generate("--resume", "state", "--max-new-tokens", 20, "--save-state", "state")
    _, whole, _ = generate(PROMPT, "--model", folder, "--max-new-tokens", 20)
    assert longer["token_ids"] == whole["token_ids"]
    _, again, _ = generate("--resume", "state")
    assert again["token_ids"] == whole["token_ids"]  # the state is of the longer run now
    code, _, error = generate(PROMPT, "--model", folder, "--save-state", "state")
    assert code == 2
    assert "holds a state already" in error


def test_what_a_state_cannot_go_on_with_is_refused(folder, generate, tmp_path):
    generate(PROMPT, "--model", folder, "--max-new-tokens", 4, "--save-state", "state")
    for words in (["--policy", "h2o"], ["--seed", 3], ["--temperature", 1], ["--set", "top_k=3"], ["--shards", 3]):
        code, _, error = generate("--resume", "state", *words)
        assert (code, error.splitlines()[0]) == (2, f"error: --resume takes the recipe of its state, not {words[0]}")
    code, _, error = generate("--resume", "state", "--tiers", "device=1MiB")
    assert (code, error.splitlines()[0]) == (2, "error: --resume takes the recipe of its state, not --tiers")
    code, _, error = generate("--resume", "nowhere")
    assert code == 2
    assert "no state here" in error
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "k1"}\n', encoding="utf-8")
    code, _, error = generate("--prompts", prompts, "--model", folder, "--save-state", "other")
    assert code == 2
    assert "a state is of one sequence" in error


def test_another_model_is_refused(folder, generate, tmp_path):
    generate(PROMPT, "--model", folder, "--max-new-tokens", 4, "--save-state", "state")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    whole = {file: file.read_bytes() for file in (folder / "model").iterdir()}
    torch.nn.init.normal_(model.model.layers[0].self_attn.k_proj.weight)
    model.save_pretrained(folder / "model")
    code, _, error = generate("--resume", "state")
    for file, data in whole.items():
        file.write_bytes(data)
    assert code == 1
    assert "the state is of another model" in error


@pytest.mark.slow
def test_killed_at_any_moment(folder, tmp_path):
    draw = random.Random(0)
    words = [
        sys.executable,
        "-m",
        "pikv_cli",
        "generate",
        PROMPT,
        "--model",
        folder,
        "--json",
        "--max-new-tokens",
        "200",
    ]
    words += ["--policy", "h2o", "--budget", "0.4", "--codec", "int4", "--temperature", "1", "--save-every", "2"]
    whole = json.loads(subprocess.run([*words, "--out", tmp_path / "whole"], capture_output=True, check=True).stdout)
    for number in range(5):
        state = tmp_path / f"state{number}"
        run = subprocess.Popen([*words, "--save-state", state, "--out", tmp_path / f"run{number}"])
        while not (state / "manifest.json").exists():
            time.sleep(0.01)
        time.sleep(draw.random())
        run.send_signal(signal.SIGKILL)
        run.wait()
        resumed = [*words[:4], "--json", "--resume", state, "--out", tmp_path / f"again{number}"]
        found = json.loads(subprocess.run(resumed, capture_output=True, check=True).stdout)
        assert found["token_ids"] == whole["token_ids"]
