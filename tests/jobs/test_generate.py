"""`generate` on a random model with the recall task's words, once as a user runs it, else through its job."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small_calibration
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pikv_cli import app
from pikv_core import recipes
from pikv_core.cache import calibration
from pikv_core.components import Component
from pikv_core.errors import PiKVError, UsageError
from pikv_core.jobs import generate
from pikv_core.runs import Reporter, Run

ROOT = Path(__file__).parent.parent.parent
PROMPT = "f1 f2 k3 v4 f5 f6 f7 k3"


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
    assert "torch for float32 on cpu: too few tokens" in stored["backends"]["attend_tokens"]


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
    with pytest.raises(UsageError, match="'kvzip' scores a prompt before its last token"):
        run("cache.policy=kvzip", "cache.budget=0.5", prompt="f1")


@pytest.fixture(scope="module")
def calibrated(folder, tmp_path_factory):
    """A folder with every calibrated codec, fitted to the model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    return small_calibration.write(model, tmp_path_factory.mktemp("made") / "made", small_calibration.codecs(model))


@pytest.mark.parametrize("codec", ["svd", "lora-int8", "auto"])
def test_a_calibrated_codec_generates(run, calibrated, codec):
    long = PROMPT + " f1 f2 f3" * 50
    full, _ = run(prompt=long)
    result, _ = run(f"cache.codec={codec}", prompt=long, **{"cache.calibration": [calibrated]})
    assert result.codec == codec and len(result.token_ids) == 6
    assert result.resident_bytes < 0.9 * full.resident_bytes and result.full_bytes == full.full_bytes


def test_a_basis_of_all_channels_changes_nothing(run, folder, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    samples = small_calibration.collect(model, torch.randint(1, 97, (2, 64)), 2)
    fitted = small_calibration.build(small_calibration.CODECS, Component("svd", {"rank": 16})).fit(samples)
    member = calibration.Member("svd", "codec", {"rank": 16}, fitted.tensors, fitted.notes)
    made = small_calibration.write(model, tmp_path / "made", [member])
    exact, _ = run(prompt=PROMPT, max_new_tokens=20)
    result, _ = run("cache.codec=svd", prompt=PROMPT, max_new_tokens=20, **{"cache.calibration": [made]})
    assert result.token_ids == exact.token_ids


def pikv(monkeypatch, capsys, *arguments):
    """Run the command in this process; return its exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["pikv", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        app.main()
    told = capsys.readouterr()
    return stop.value.code, told.out, told.err


def test_missing_and_foreign_calibrations_are_refused(folder, calibrated, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    other = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoModelForCausalLM.from_pretrained(folder / "model").config
    )
    foreign = small_calibration.write(other, tmp_path / "foreign", small_calibration.codecs(other)[:1])
    asked = ("generate", PROMPT, "--model", folder, "--codec", "svd")
    name = small_calibration.codecs(other)[0].name
    for more, message, command in (
        ((), "codec 'svd' runs only with a calibration", "pikv compress --calibrate --method svd"),
        (("--calibration", tmp_path / "none"), "no calibration here", "pikv compress --calibrate"),
        (
            ("--calibration", foreign, "--codec", name),
            "this model has other weights",
            f"pikv compress --calibrate --method {name}",
        ),
        (("--policy", "duo-attention", "--budget", "0.5", "--calibration", calibrated), "duo-attention", "pikv train"),
    ):
        code, out, error = pikv(monkeypatch, capsys, *asked, *more)
        assert code == 2 and out == "" and message in error and "hint: make one" in error and command in error
    assert [entry.name for entry in tmp_path.iterdir()] == ["foreign"]


def test_the_command_takes_calibrations_and_rerotation(folder, calibrated, tmp_path, monkeypatch, capsys):
    asked = ("generate", PROMPT, "--model", folder, "--max-new-tokens", 4, "--json", "--out", tmp_path / "out")
    more = ("--policy", "streaming-llm", "--budget", "0.5", "--rerotate", "--codec", "svd", "--calibration", calibrated)
    code, out, error = pikv(monkeypatch, capsys, *asked, *more)
    assert code == 0, error
    assert json.loads(out)["codec"] == "svd"
    resolved = recipes.load("generate", tmp_path / "out" / "recipe.yaml")
    assert resolved.cache.rerotate and resolved.cache.calibration == [calibrated]


def test_switches_are_in_the_result_and_in_tensorboard(run, tmp_path):
    overrides = ("cache.policy=switch:h2o+streaming-llm", "cache.budget=12", "seed=3")
    eager = ("cache.policy.margin=0", "cache.policy.patience=1", "cache.policy.decay=0")
    result, _ = run(*overrides, *eager, prompt=PROMPT * 3, max_new_tokens=40)
    assert result.events and all(event["event"] == "switch" for event in result.events)
    stored = json.loads((tmp_path / "0" / "result.json").read_text())["result"]["events"]
    assert stored == result.events
    logged = EventAccumulator(str(tmp_path / "0" / "tb"))
    logged.Reload()
    for layer in {event["layer"] for event in result.events}:
        own = [event for event in result.events if event["layer"] == layer]
        for name in ("h2o", "streaming-llm"):
            scalars = logged.Scalars(f"generate/switch/layer{layer}/recall/{name}")
            assert [scalar.step for scalar in scalars] == [event["step"] for event in own]
            assert [scalar.value for scalar in scalars] == pytest.approx([event["recall"][name] for event in own])
    assert [scalar.value for scalar in logged.Scalars("generate/events")] == [len(result.events)]
    assert run(*overrides, "cache.policy.margin=10", prompt=PROMPT * 3, max_new_tokens=40)[0].events == []
