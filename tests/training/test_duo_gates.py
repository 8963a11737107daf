"""Head gates: learned where a head's role is known, repeatable, and without a trace in the model."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from small_models import SMALL

from pikv_core.cache import PiKVCache, calibration
from pikv_core.components import Component
from pikv_core.data.recall import Recall, RecallSource
from pikv_core.data.tokenizer import build_word_level
from pikv_core.errors import PiKVError, RecipeError, UsageError
from pikv_core.jobs import duo_gates as job
from pikv_core.recipes import dump, load
from pikv_core.runs import Reporter, Run
from pikv_core.schema import DuoGateSettings
from pikv_core.training.duo_gates import learn, measure
from pikv_core.training.gated_attention import gated_attention

ROOT = Path(__file__).parents[2]
TASK = Recall(num_keys=16, num_values=8, num_filler=16)
SETTINGS = DuoGateSettings(sinks=2, recent=8, length=64, steps=60, batch_tokens=256, lr=0.1, l1=0.05, eval_samples=8)


class InterruptedAt(Reporter):
    """Sends Ctrl-C to this process in the given step."""

    def __init__(self, step):
        self.step = step

    def progress(self, text, done, total):
        if done == self.step:
            signal.raise_signal(signal.SIGINT)


@pytest.fixture
def source():
    return RecallSource(TASK, build_word_level(TASK.words()))


@pytest.fixture
def model(source):
    return llama(source.vocab_size)


def llama(vocab_size, num_layers=2, num_heads=4, num_kv_heads=2):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        intermediate_size=32,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def run_in(folder, seed=0, reporter=None):
    overrides = [f"seed={seed}", "start=given", "duo_gates={}"]
    return Run(load("train", None, overrides, {"out": str(folder)}), reporter)


def changed(**settings):
    """Return SETTINGS with other values, unchecked: a test may look at what a recipe may not ask for."""
    return SETTINGS.model_copy(update=settings)


def save_with_task(model, source, folder):
    model.save_pretrained(folder)
    source.save(folder)
    return folder


def recipe_for(folder, *overrides):
    settings = SETTINGS.model_dump(include={"sinks", "recent", "length", "batch_tokens", "lr", "eval_samples"})
    given = [f"duo_gates.{name}={value}" for name, value in settings.items()]
    return load("train", None, [f"start={folder}", *given, "duo_gates.steps=6", "duo_gates.log_every=3", *overrides])


def start(folder, out, *overrides, reporter=None):
    recipe = recipe_for(folder, f"out={out}", *overrides)
    return job.run(recipe, Run(recipe, reporter))


def test_heads_that_see_all_anyway_lose_their_gates(tmp_path, model, source):
    learned = learn(model, source, changed(sinks=20, recent=44), run_in(tmp_path))
    assert torch.equal(learned.gates, torch.zeros(2, 2))


def test_without_a_price_no_gate_falls(tmp_path, model, source):
    learned = learn(model, source, changed(l1=0.0, steps=20), run_in(tmp_path))
    assert torch.equal(learned.gates, torch.ones(2, 2))


def test_a_head_that_is_not_listened_to_loses_its_gate_alone(tmp_path, source):
    model = llama(source.vocab_size, num_layers=1, num_heads=4, num_kv_heads=2)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[:, 16:] = 0  # query heads 2 and 3, of key/value head 1
    learned = learn(model, source, changed(l1=0.01), run_in(tmp_path))
    assert learned.gates[0, 1] == 0
    assert learned.gates[0, 0] > 0.5


def test_the_learned_gate_is_where_the_loss_is_least(tmp_path, source):
    class Fixed:
        def batch(self, rng, num_samples, length, split="train"):
            return source.batch(np.random.default_rng(5), num_samples, length)

    model = llama(source.vocab_size, num_layers=1, num_heads=1, num_kv_heads=1)
    settings = changed(l1=0.5, lr=0.05, steps=100, eval_samples=4)
    learned = learn(model, Fixed(), settings, run_in(tmp_path))
    grid = torch.linspace(0, 1, 51)
    losses = [measure(model, Fixed(), settings, torch.full((1, 1), gate))["loss"] for gate in grid.tolist()]
    best = float(grid[int(np.argmin(losses))])
    assert 0.1 < best < 0.9
    assert float(learned.gates) == pytest.approx(best, abs=0.02)


def test_the_model_is_left_as_it_was(tmp_path, model, source):
    model.train()
    model.lm_head.weight.requires_grad_(False)
    weights = {name: weight.clone() for name, weight in model.named_parameters()}
    asks = [weight.requires_grad for weight in model.parameters()]
    before = model.config._attn_implementation
    learned = learn(model, source, changed(steps=3), run_in(tmp_path))
    measure(model, source, SETTINGS, learned.gates)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters())
    assert all(weight.grad is None for weight in model.parameters())
    assert [weight.requires_grad for weight in model.parameters()] == asks
    assert model.training
    assert model.config._attn_implementation == before


def test_a_seed_gives_the_same_gates_twice_and_another_one_others(tmp_path, model, source):
    settings = changed(steps=8, l1=2.0)
    runs = [learn(model, source, settings, run_in(tmp_path / str(i), seed)) for i, seed in enumerate([3, 3, 4])]
    assert torch.equal(runs[0].gates, runs[1].gates)
    assert runs[0].sha256 == runs[1].sha256
    assert runs[0].sha256 != runs[2].sha256
    assert not torch.equal(runs[0].gates, runs[2].gates)
    assert runs[0].num_tokens == 8 * 256


def test_measuring_tells_streaming_heads_from_full_ones(model, source):
    opened = measure(model, source, SETTINGS, torch.ones(2, 2))
    closed = measure(model, source, SETTINGS, torch.zeros(2, 2))
    assert opened["hidden_difference"] < 1e-10 < closed["hidden_difference"]
    assert (opened["mean_gate"], closed["mean_gate"]) == (1, 0)
    assert opened["accuracy_gates"] == opened["accuracy_full"] == closed["accuracy_full"]
    assert closed["accuracy_gates"] == closed["accuracy_all_streaming"]


@pytest.mark.parametrize("arch", ["llama", "qwen3", "mixtral", "qwen3_moe", "pikv"])
def test_every_architecture_learns(tmp_path, small_model, source, arch):
    assert source.vocab_size <= 97
    run = run_in(tmp_path)
    learned = learn(small_model(arch), source, changed(steps=4, log_every=2, l1=2.0), run)
    assert learned.gates.shape == (3, 2)
    assert bool(((learned.gates > 0) & (learned.gates < 1)).any())
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    assert rows[-1]["gate/mean"] == pytest.approx(float(learned.gates.mean()))
    assert rows[-1]["gate/layer_1"] == pytest.approx(float(learned.gates[1].mean()))


def test_only_layers_without_a_sliding_window_have_gates(tmp_path, source):
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Qwen2Config(**{**SMALL, "use_sliding_window": True, "sliding_window": 12}, layer_types=kinds)
    model = transformers.Qwen2ForCausalLM(config).eval()
    ids = torch.randint(43, (1, 64), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model.model(ids, use_cache=False).last_hidden_state
        with gated_attention(model, 2, 8):
            assert torch.allclose(model.model(ids, use_cache=False).last_hidden_state, expected, atol=1e-5)
    learned = learn(model, source, changed(steps=4, l1=2.0), run_in(tmp_path))
    assert learned.gates[0].tolist() == learned.gates[2].tolist() == [1, 1]
    assert bool((learned.gates[1] < 1).all())
    measured = measure(model, source, SETTINGS, learned.gates)
    assert measured["mean_gate"] == pytest.approx(float(learned.gates[1].mean()))


def test_a_model_of_sliding_windows_alone_is_refused(tmp_path, small_model, source):
    with pytest.raises(PiKVError, match="sliding window"):
        learn(small_model("mistral"), source, SETTINGS, run_in(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_job_saves_what_the_policy_goes_by(tmp_path, model, source):
    folder = save_with_task(model, source, tmp_path / "model")
    result = start(folder, tmp_path / "run")
    assert result.calibration == str(tmp_path / "run" / "calibration")
    fitted = calibration.fitted([result.calibration], "policy", Component("duo-attention"), model.config)[1]
    assert fitted["gates"].tolist() == [pytest.approx(heads, abs=1e-6) for heads in result.gates]
    asked = Component("duo-attention", {"sinks": 4})
    with pytest.raises(UsageError, match="fitted with sinks 2, not 4"):
        calibration.fitted([result.calibration], "policy", asked, model.config)
    stored = json.loads((tmp_path / "run" / "result.json").read_text())["result"]
    assert stored["metrics"] == result.metrics
    assert set(result.metrics) >= {"loss", "hidden_difference", "mean_gate", "accuracy_full"}
    assert list((tmp_path / "run" / "tb").iterdir())

    policy = {"name": "duo-attention", "sinks": 2, "recent": 8}
    cache = PiKVCache.for_model(model.eval(), {"policy": policy, "budget": 0.5, "calibration": [result.calibration]})
    with torch.no_grad():
        model(torch.arange(64)[None] % source.vocab_size, past_key_values=cache)
    assert cache.resident_bytes < 0.75 * cache.full_bytes


def test_the_same_recipe_gives_the_same_calibration(tmp_path, model, source):
    folder = save_with_task(model, source, tmp_path / "model")
    results = [start(folder, tmp_path / name) for name in ("one", "other")]
    assert results[0].gates == results[1].gates
    manifests = [calibration.read(result.calibration) for result in results]
    assert manifests[0] == manifests[1]


def test_the_shipped_recipe_runs_from_the_command_line(tmp_path, model, source):
    folder = save_with_task(model, source, tmp_path / "model")
    recipe = ROOT / "recipes" / "train" / "duo-gates.yaml"
    small = ["duo_gates.steps=3", "duo_gates.length=128", "duo_gates.batch_tokens=128", "duo_gates.eval_samples=2"]
    command = [sys.executable, "-m", "pikv_cli", "train", "--recipe", str(recipe), "--start", str(folder)]
    command += ["--threads", "1", "--out", str(tmp_path / "run"), *(part for item in small for part in ("--set", item))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"calibration: {tmp_path / 'run' / 'calibration'}" in done.stdout
    manifest = calibration.read(tmp_path / "run" / "calibration")
    assert manifest.members["duo-attention"].options == {"sinks": 16, "recent": 64}
    assert manifest.corpus.num_tokens == 3 * 128


def test_an_interrupted_run_says_so_and_is_not_resumed(tmp_path, model, source):
    folder = save_with_task(model, source, tmp_path / "model")
    with pytest.raises(PiKVError, match="interrupted at step 4 of 6"):
        start(folder, tmp_path / "run", reporter=InterruptedAt(3))
    assert not (tmp_path / "run" / "calibration").exists()
    recipe = load("train", tmp_path / "run" / "recipe.yaml")
    with pytest.raises(UsageError, match="no checkpoints") as caught:
        job.run(recipe, Run(recipe, resume=tmp_path / "run"))
    assert str(tmp_path / "run" / "recipe.yaml") in caught.value.hint


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["start=DIR"], "start and duo_gates, token_scorer or policy_router go together"),
        (["duo_gates.steps=3"], "start and duo_gates, token_scorer or policy_router go together"),
        (["start=DIR", "duo_gates.length=320"], "length must exceed sinks \\+ recent, 320"),
        (["start=DIR", "duo_gates={}", "model.num_layers=2"], "model: nothing of the model itself"),
        (["start=DIR", "duo_gates={}", "train.lr=0.1", "data.text=[x]"], "data, train: nothing of the model itself"),
        (["start=DIR", "duo_gates.sink=3"], "did you mean 'sinks'"),
    ],
)
def test_a_contradictory_recipe_is_refused(overrides, message):
    with pytest.raises(RecipeError, match=message):
        load("train", None, overrides)


def test_a_recipe_shows_only_what_it_goes_by():
    with_gates = dump(load("train", None, ["start=DIR", "duo_gates={}"]))
    assert "duo_gates:" in with_gates
    assert "curriculum" not in with_gates
    assert "duo_gates" not in dump(load("train"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["duo_gates.length=12"], "length 12 is too short for recall"),
        (["duo_gates.text=[notes.txt]"], "no text around its needles"),
        (["start=/nowhere/at/all"], "no such model folder"),
    ],
)
def test_what_cannot_be_learned_leaves_nothing_on_disk(tmp_path, model, source, overrides, message):
    folder = save_with_task(model, source, tmp_path / "model")
    with pytest.raises(PiKVError, match=message):
        start(folder, tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()
