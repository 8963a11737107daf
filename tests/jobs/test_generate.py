"""`generate` on a random model with the recall task's words, once as a user runs it, else through its job."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from small_models import CONFIGS

from pikv_core import recipes
from pikv_core.data.recall import Recall
from pikv_core.errors import PiKVError, UsageError
from pikv_core.jobs import generate
from pikv_core.runs import Reporter, Run

ROOT = Path(__file__).parent.parent.parent
PROMPT = "f1 f2 k3 v4 f5 f6 f7 k3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder with a model."""
    run = tmp_path_factory.mktemp("run")
    source = Recall().open(None, 0, [], None, Reporter())
    config = CONFIGS["llama"]()
    config.vocab_size = source.vocab_size
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(run / "model")
    source.save(run / "model")
    return run


class Collected(Reporter):
    """Keep the streamed text."""

    def __init__(self):
        self.streamed = ""

    def text(self, piece):
        self.streamed += piece


@pytest.fixture
def run(folder, tmp_path):
    """Return a function: overrides → the job's result and what it streamed."""
    numbers = itertools.count()

    def run(*overrides, **flags):
        flags = {"model": str(folder), "max_new_tokens": 6, "out": str(tmp_path / str(next(numbers))), **flags}
        recipe = recipes.load("generate", None, overrides, flags)
        reporter = Collected()
        return generate.run(recipe, Run(recipe, reporter)), reporter.streamed

    return run


def test_the_command_streams_text_on_stdout_and_reports_on_stderr(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :])
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", "pikv_cli", "generate", "--model", str(folder), "--max-new-tokens", "6", "-"]
    done = subprocess.run(command, cwd=folder, input=PROMPT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected.strip()
    assert "bytes resident" in done.stderr


def test_the_report_is_of_this_run(run, tmp_path):
    (tmp_path / "prompt.txt").write_text(PROMPT)
    result, streamed = run(prompt_file=str(tmp_path / "prompt.txt"))
    assert streamed.strip() == result.text.strip() != ""
    assert result.num_prompt_tokens == len(PROMPT.split()) and len(result.token_ids) == 6
    assert result.full_bytes == (result.num_prompt_tokens + 5) * 3 * 2 * 2 * 16 * 4
    assert result.full_bytes <= result.resident_bytes <= result.peak_bytes
    stored = json.loads((tmp_path / "0" / "result.json").read_text())
    assert stored["result"]["token_ids"] == result.token_ids


def test_a_batch_of_prompts_gives_what_each_gives_alone(run, tmp_path):
    prompts = [PROMPT, "f9 k1 v2 k1", "f1 " * 40 + "k7 v7 f2 k7"]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    h2o = ("cache.policy=h2o", "cache.budget=0.5")
    together, streamed = run(*h2o, prompts=str(file), batch_size=2)
    assert [completion.prompt for completion in together.completions] == prompts
    for prompt, completion in zip(prompts, together.completions):
        assert completion.token_ids == run(*h2o, prompt=prompt)[0].token_ids
    lines = [json.loads(line) for line in streamed.splitlines()]
    assert [line["text"] for line in lines] == [completion.text for completion in together.completions]


def test_sampling_is_seeded(run):
    def sampled(seed):
        return run(prompt=PROMPT, temperature=2.0, top_k=50, seed=seed)[0].token_ids

    assert sampled(1) == sampled(1) != sampled(2)


def test_errors_name_file_and_line(run, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "f1 k1"}\n{"prompt": "f1\n')
    with pytest.raises(PiKVError, match=r"bad\.jsonl:2: not a JSON object"):
        run(prompts=str(tmp_path / "bad.jsonl"))
    with pytest.raises(UsageError, match="no chat template"):
        run(prompt=PROMPT, chat=True)
    with pytest.raises(UsageError, match="policy 'full' keeps every token"):
        run("cache.budget=0.5", prompt=PROMPT)
    with pytest.raises(PiKVError, match="holds no token"):
        run("cache.policy=h2o", "cache.budget=100B", prompt=PROMPT)
