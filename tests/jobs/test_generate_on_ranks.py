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
import small_calibration
import torch
import transformers
from small_models import SMALL
from thread_ranks import on_ranks

from pikv_cli import app
from pikv_core.data.recall import Recall
from pikv_core.errors import PiKVError, UsageError
from pikv_core.model.ranks import Agreement, _told_once
from pikv_core.runs import Reporter

PROMPT = " ".join(f"f{number} k{number % 7} v{number % 5}" for number in range(40))
ONE_NODE = ["--nnodes", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
SIZES = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
LAYERS, HEADS, HEAD_DIM = SMALL["num_hidden_layers"], 8, 16
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "PYTHONPATH": str(Path(__file__).parents[2]),
}
STREAMS = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
DRIVER = Path(__file__).parent / "run_on_ranks.py"


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


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """Return a function: arguments of `generate` → the result of one process, which runs in this one."""

    def alone(*words):
        out = tmp_path_factory.mktemp("alone")
        with pytest.MonkeyPatch.context() as patched, pytest.raises(SystemExit) as stop:
            patched.setattr(sys, "argv", ["pikv", "generate", *map(str, words), "--out", str(out)])
            app.main()
        assert stop.value.code == 0
        return result(out)

    return alone


def result(out):
    return json.loads((out / "result.json").read_text(encoding="utf-8"))["result"]


def start(count, *words):
    """Start a module's or file's command line on so many ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", *ONE_NODE, "--nproc-per-node", str(count)]
    return subprocess.Popen([*command, *map(str, words)], env=ENVIRONMENT, text=True, **STREAMS)


def run_all(count, lines):
    """Run `generate` for each of the command lines on the same ranks."""
    process = start(count, DRIVER, json.dumps([[str(word) for word in words] for words in lines]))
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors


def sent_per_token(split, count):
    """Return what comes to each rank in a step of one sequence, by the formula of docs/ranks.md; float32."""
    if split == "heads":
        return LAYERS * HEADS * HEAD_DIM * 4 * (count - 1) // count + 8 * (count - 1)
    return LAYERS * HEADS * (HEAD_DIM * 4 + 4) * (count - 1) + 8 * (count - 1)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_give_the_tokens_of_one_process_and_save_as_one(folder, tmp_path, alone, count):
    given = [PROMPT, "--model", folder, "--seed", 3]
    temperatures = (0, 1) if count == 4 else (1,)
    cases = [(split, temperature) for split in ("heads", "tokens") for temperature in temperatures]
    runs = []
    for number, (split, temperature) in enumerate(cases):
        words = [*given, "--temperature", temperature, "--max-new-tokens", 25, "--split", split, "--save-every", 4]
        runs.append([*words, "--save-state", tmp_path / f"state{number}", "--out", tmp_path / f"run{number}"])
    other = {"heads": "tokens", "tokens": "heads"}
    for number, (split, _) in enumerate(cases):
        words = ["--resume", tmp_path / f"state{number}", "--split", other[split], "--max-new-tokens", 40]
        runs.append([*words, "--out", tmp_path / f"again{number}"])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    fitted = small_calibration.write(model, tmp_path / "fitted", small_calibration.policies(model))
    routed = [*given, "--policy", "moe-router", "--calibration", fitted, "--budget", 30]
    words = [*routed, "--max-new-tokens", 10, "--split", "heads", "--save-every", 4]
    runs.append([*words, "--save-state", tmp_path / "routed", "--out", tmp_path / "run"])
    words = ["--resume", tmp_path / "routed", "--split", "heads", "--max-new-tokens", 20]
    runs.append([*words, "--out", tmp_path / "again"])
    run_all(count, runs)
    whole = alone(*routed, "--max-new-tokens", 20)["token_ids"]
    found = result(tmp_path / "run")
    assert found["token_ids"] == whole[:10]
    assert found["communicated_bytes_per_token"] == sent_per_token("heads", count)
    assert found["resident_bytes"] < found["full_bytes"] / 3
    assert result(tmp_path / "again")["token_ids"] == whole
    assert alone("--resume", tmp_path / "routed", "--max-new-tokens", 20)["token_ids"] == whole
    for number, (split, temperature) in enumerate(cases):
        whole = alone(*given, "--temperature", temperature, "--max-new-tokens", 40)
        assert result(tmp_path / f"again{number}")["token_ids"] == whole["token_ids"]
        assert alone("--resume", tmp_path / f"state{number}", "--max-new-tokens", 40)["token_ids"] == whole["token_ids"]
        found = result(tmp_path / f"run{number}")
        assert found["token_ids"] == whole["token_ids"][:25]
        assert found["communicated_bytes_per_token"] == sent_per_token(split, count)
        assert (found["ranks"], found["split"]) == (count, split)
        full = alone(*given, "--temperature", temperature, "--max-new-tokens", 25)
        assert found["full_bytes"] == full["full_bytes"]
        assert full["communicated_bytes_per_token"] is None
        slack = 1 if split == "heads" else 1 + 16 * count / (len(PROMPT.split()) + 25)  # a block of tokens
        assert max(found["resident_bytes_by_rank"]) <= slack * full["resident_bytes"] / count
        assert sum(found["resident_bytes_by_rank"]) == found["resident_bytes"]
        assert found["resident_bytes"] == pytest.approx(full["resident_bytes"], rel=0.1)


class Store(dict):
    """Stand for the store of ranks, of which nobody waits in vain."""

    def add(self, key, amount):
        self[key] = self.get(key, 0) + amount
        return self[key]

    def set(self, key, value):
        self[key] = value

    def wait(self, keys, patience):
        if not self.keys() >= {*keys}:
            raise torch.distributed.DistStoreError("timed out")


def outcome(rank, store, error):
    """Return what ends a rank that ran into an error."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(BaseException) as stop, _told_once(rank, store, "go on"):
            raise error
    finally:
        signal.signal(signal.SIGTERM, before)
    return stop.value


def test_an_error_is_told_by_one_rank():
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    store = Store()
    first = outcome(2, store, lost)
    assert (first.message, first.hint) == ("rank 2: another rank is lost, and the run ends", "go on")
    for rank in (0, 1):
        assert outcome(rank, store, lost).code == 1
    store = Store()
    assert outcome(1, store, PiKVError("disk full")).message == "disk full"
    assert outcome(0, store, lost).code == 1
    assert isinstance(outcome(0, Store(), ValueError("a fault")), ValueError)
    assert str(outcome(0, Store(), RuntimeError("a fault"))) == "a fault"


def test_a_mistake_in_the_call_is_the_first_rank_s_to_tell():
    store, mistake = Store(), UsageError("no such policy")
    assert outcome(0, store, mistake) is mistake
    assert outcome(1, store, mistake).code == 2  # what the command line does not print for this rank
    other = outcome(1, Store(), mistake)  # the first rank has not made it
    assert (type(other), other.message) == (PiKVError, "no such policy")


def test_ranks_that_come_to_different_tokens_end_together():
    def agree(wire):
        agreement = Agreement(wire)
        agreement(torch.tensor([[5, 6, 7]]), None)
        with pytest.raises(PiKVError, match=r"the ranks part after 4 tokens: .* \[\[8\], \[8\], \[9\]\]"):
            agreement(torch.tensor([[5, 6, 7, 9 if wire.rank == 2 else 8]]), None)
        return agreement.received_bytes

    assert on_ranks(3, agree) == [[16]] * 3


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_with_one_error_and_it_goes_on(folder, tmp_path, alone):
    given = [PROMPT, "--model", folder, "--codec", "int4", "--max-new-tokens", 400, "--temperature", 1, "--seed", 3]
    state = tmp_path / "state"
    begin, draw = [*given, "--split", "tokens"], random.Random(0)
    for number in range(2):
        saves = ["--save-state", state, "--save-every", 2, "--out", tmp_path / f"run{number}"]
        process = start(2, "-m", "pikv_cli", "generate", *begin, *saves)
        await_state(process, state)
        time.sleep(draw.random())
        ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True).stdout.split()
        assert len(ranks) == 2
        os.kill(int(draw.choice(ranks)), signal.SIGKILL)
        begun = time.monotonic()
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - begun < 20
        assert process.returncode == 1
        told = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert len(told) == 1 and "another rank is lost" in told[0], errors
        assert f"hint: go on with `pikv generate --resume {state}`, on any number of ranks" in errors
        begin = ["--resume", state, "--split", "tokens"]
    assert alone("--resume", state)["token_ids"] == alone(*given)["token_ids"]


def await_state(process, state):
    """Wait until there is a state, or, where there was one before, another."""
    manifest = state / "manifest.json"
    before = manifest.read_bytes() if manifest.exists() else None
    deadline = time.monotonic() + 120
    while not manifest.exists() or manifest.read_bytes() == before:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
