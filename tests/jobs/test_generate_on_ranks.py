"""`generate` under torchrun: ranks give one process's tokens, save as one, and end when one of them dies."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from small_models import SMALL

from pikv_core.data.recall import Recall
from pikv_core.runs import Reporter

PROMPT = " ".join(f"f{number} k{number % 7} v{number % 5}" for number in range(40))
ONE_NODE = ["--nnodes", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
SIZES = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
LAYERS, HEADS, HEAD_DIM = SMALL["num_hidden_layers"], 8, 16
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder with a random llama of four key/value heads that has the recall task's words."""
    run = tmp_path_factory.mktemp("run")
    source = Recall().open(None, 0, [], None, Reporter())
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SMALL, **SIZES, "vocab_size": source.vocab_size})
    model = transformers.AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.15)
    model.save_pretrained(run / "model")
    source.save(run / "model")
    return run


def start(count, *words):
    """Start `generate` on so many ranks, alone for a count of 0."""
    torchrun = ["-m", "torch.distributed.run", *ONE_NODE, "--nproc-per-node", str(count)] if count else []
    command = [sys.executable, *torchrun, "-m", "pikv_cli", "generate", *map(str, words), "--json"]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=ENVIRONMENT, text=True, **streams)


def generate(count, *words):
    """Return the result of `generate` on so many ranks."""
    process = start(count, *words)
    told, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    return json.loads(told)


def workers(process):
    """Return the ids of the ranks that torchrun has started, in their order."""
    return [int(word) for word in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True).stdout.split()]


def sent_per_token(split, count):
    """Return what comes to each rank in a step of one sequence, by the formula of docs/ranks.md; float32."""
    if split == "heads":
        return LAYERS * HEADS * HEAD_DIM * 4 * (count - 1) // count + 8 * (count - 1)
    return LAYERS * HEADS * (HEAD_DIM * 4 + 4) * (count - 1) + 8 * (count - 1)


def test_two_ranks_give_the_tokens_of_one_process(folder, tmp_path, monkeypatch):
    given = [PROMPT, "--model", folder, "--max-new-tokens", 20]
    found = generate(2, *given, "--split", "tokens", "--out", tmp_path / "run")
    assert (tmp_path / "run" / "result.json").exists()
    assert found["ranks"] == 2
    assert found["communicated_bytes_per_token"] == sent_per_token("tokens", 2)
    alone = generate(0, *given, "--out", tmp_path / "alone")
    assert alone["ranks"] == 1
    assert alone["communicated_bytes_per_token"] is None
    assert found["token_ids"] == alone["token_ids"]
    assert sum(found["resident_bytes_by_rank"]) == found["resident_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize(("split", "count"), [("heads", 1), ("heads", 2), ("heads", 4), ("tokens", 2), ("tokens", 4)])
def test_ranks_give_the_tokens_of_one_process(folder, tmp_path, split, count, temperature):
    given = [PROMPT, "--model", folder, "--max-new-tokens", 40, "--temperature", temperature, "--seed", 3]
    alone = generate(0, *given, "--out", tmp_path / "alone")
    found = generate(count, *given, "--split", split, "--out", tmp_path / "run")
    assert found["token_ids"] == alone["token_ids"]
    assert found["text"] == alone["text"]
    assert found["full_bytes"] == alone["full_bytes"]
    if count == 1:
        assert found["split"] is None
        return
    assert found["communicated_bytes_per_token"] == sent_per_token(split, count)
    assert found["split"] == split
    slack = 1 if split == "heads" else 1 + 16 * count / (len(PROMPT.split()) + 40)  # a block of tokens
    assert max(found["resident_bytes_by_rank"]) <= slack * alone["resident_bytes"] / count
    assert found["resident_bytes"] == pytest.approx(alone["resident_bytes"], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("split", "method"), [("heads", ["--policy", "h2o", "--budget", "0.4"]), ("tokens", [])])
def test_a_rank_that_dies_ends_the_run_with_one_error_and_any_number_goes_on(folder, tmp_path, split, method):
    given = [PROMPT, "--model", folder, "--codec", "int4", *method, "--max-new-tokens", 400, "--temperature", 1]
    alone = generate(0, *given, "--out", tmp_path / "alone")
    state, draw = tmp_path / "state", random.Random(split)
    process = start(4, *given, "--split", split, "--save-state", state, "--save-every", 2, "--out", tmp_path / "run")
    await_state(process, state)
    time.sleep(draw.random())
    ranks = workers(process)
    assert len(ranks) == 4
    os.kill(draw.choice(ranks), signal.SIGKILL)
    begun = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - begun < 20
    assert process.returncode == 1
    told = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "another rank is lost" in told[0], errors
    assert f"hint: go on with `pikv generate --resume {state}`, on any number of ranks" in errors
    for count in (0, 2):
        split_of = ["--split", split] if count else []
        again = generate(count, "--resume", state, *split_of, "--out", tmp_path / f"again{count}")
        assert again["token_ids"] == alone["token_ids"]


@pytest.mark.slow
def test_killed_at_any_moment_all_go_on(folder, tmp_path):
    given = [PROMPT, "--model", folder, "--max-new-tokens", 300, "--temperature", 1]
    alone = generate(0, *given, "--out", tmp_path / "alone")
    state, draw = tmp_path / "state", random.Random(1)
    begin = [*given, "--split", "heads"]
    for number, (count, split) in enumerate([(2, "heads"), (4, "tokens"), (2, "tokens")]):
        words = [*begin, "--save-state", state, "--save-every", 3, "--out", tmp_path / f"run{number}"]
        process = start(count, *words)
        await_state(process, state, after=number)
        time.sleep(draw.random() / 2)
        for rank in workers(process):
            os.kill(rank, signal.SIGKILL)
        process.communicate(timeout=60)
        begin = ["--resume", state, "--split", ["tokens", "tokens", "heads"][number]]
    assert generate(0, "--resume", state, "--out", tmp_path / "end")["token_ids"] == alone["token_ids"]


def await_state(process, state, after=0):
    """Wait until there is a state, or, where there was one before, another."""
    manifest = state / "manifest.json"
    before = manifest.read_bytes() if after else None
    deadline = time.monotonic() + 120
    while not manifest.exists() or manifest.read_bytes() == before:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_what_cannot_be_split_is_told_once(folder, tmp_path):
    given = [PROMPT, "--model", folder, "--out", tmp_path / "run"]
    for words, message in [
        ([], "the processes that torchrun started have to be told how they split the cache"),
        (["--split", "heads", "--policy", "tova", "--budget", "30"], "policy 'tova' does not judge each head by itself"),
    ]:
        process = start(2, *given, *words)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert errors.count("error: ") == 1 and f"error: {message}" in errors and "hint: " in errors
        assert not Path(tmp_path / "run").exists()
