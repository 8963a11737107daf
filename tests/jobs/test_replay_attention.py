"""`simulate-cache` of recorded attention as a job, and `generate` that records it."""

import itertools
import json

import numpy as np
import pytest
import torch
import transformers
from small_models import CONFIGS
from typer.testing import CliRunner

from pikv_cli.app import app
from pikv_core import recipes
from pikv_core.data.attention import Attention
from pikv_core.data.recall import Recall
from pikv_core.errors import PiKVError, RecipeError, UsageError
from pikv_core.jobs import generate, replay_attention
from pikv_core.runs import Reporter, Run
from pikv_core.schema.simulate import AttentionReplayRecipe
from pikv_core.simulation.attention.trace import load

PROMPT = "f1 f2 k3 v4 f5 f6 f7 k3"


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attention")
    Attention(num_layers=2, num_heads=4, prompt_tokens=64).write(folder, 20, 0, [], None, Reporter())
    return str(folder / "attention.safetensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    source = Recall().open(None, 0, [], None, Reporter())
    config = CONFIGS["mistral"]()
    config.vocab_size, config.sliding_window = source.vocab_size, 6
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(run / "model")
    source.save(run / "model")
    return str(run)


@pytest.fixture
def replay(tmp_path):
    """Return a function: flags → the job's result."""
    numbers = itertools.count()

    def replay(trace, **flags):
        flags = {"trace": trace, "out": str(tmp_path / f"replay-{next(numbers)}"), **flags}
        recipe = recipes.load("simulate-cache", None, (), flags)
        assert isinstance(recipe, AttentionReplayRecipe) and recipe.job == "replay_attention"
        return replay_attention.run(recipe, Run(recipe))

    return replay


def test_one_row_per_policy_and_budget_and_the_details_agree(synthetic, replay, tmp_path):
    result = replay(synthetic, policies=["full", "h2o", "switch:h2o+tova"], budgets=[0.25, 10], plot=True)
    named = [(row["policy"], row["budget"]) for row in result.results]
    switch = "switch:h2o+tova"
    assert named == [("full", 1.0), ("h2o", 0.25), ("h2o", 10), (switch, 0.25), (switch, 10)]
    with np.load(result.details) as details:
        assert list(details["rows"]) == [f"{policy}, {budget}" for policy, budget in named]
        for name in ("attention_recall", "top_token_hit_ratio", "resident_tokens", "read_tokens", "oracle_recall"):
            assert details[name].shape == (5, 20, 2, 2)
            np.testing.assert_allclose([row[name] for row in result.results], details[name].mean((1, 2, 3)), rtol=1e-4)
    full, _, ten, *_ = result.results
    assert full["attention_recall"] == pytest.approx(1) and full["resident_tokens"] == 74.5
    assert (ten["resident_tokens"], ten["read_tokens"], ten["pages_read"]) == (10, 11, None)
    assert all(0 < row["attention_recall"] <= row["oracle_recall"] + 1e-9 for row in result.results)
    written = json.loads((tmp_path / "replay-0" / "result.json").read_text())
    assert written["result"]["results"] == result.results
    assert (tmp_path / "replay-0" / "recall.png").read_bytes().startswith(b"\x89PNG")
    assert 0.999 <= result.recorded_mass <= 1 and (result.num_steps, result.num_prompt_tokens) == (20, 64)


def test_bytes_and_allocations_are_the_caches_own(synthetic, replay):
    one = 2 * 64 * 2 + 4 + 4  # keys and values in bfloat16, position, column of h2o
    result = replay(synthetic, policies=["h2o"], budgets=[16], allocation="ada-kv")
    assert result.allocation == "ada-kv" and result.results[0]["resident_tokens"] == 16
    with np.load(result.details) as details:
        by_head = details["resident_tokens"][0].mean(axis=0)
    assert (by_head[:, 0] != by_head[:, 1]).any()
    assert replay(synthetic, policies=["h2o"], budgets=[f"{2 * 2 * 16 * one}B"]).results[0]["resident_tokens"] == 16


def test_what_cannot_be_replayed_is_refused_before_anything_runs(synthetic, replay, tmp_path):
    with pytest.raises(UsageError, match="policy 'quest' goes by keys, queries"):
        replay(synthetic, policies=["h2o", "quest"], budgets=[0.5])
    with pytest.raises(PiKVError, match="no such file"):
        replay(str(tmp_path / "none.safetensors"), policies=["h2o"], budgets=[0.5])
    assert not (tmp_path / "replay-0" / "result.json").exists()


def record(model, tmp_path, *overrides, **flags):
    flags = {"model": model, "prompt": PROMPT, "max_new_tokens": 6, "out": str(tmp_path / "run"), **flags}
    recipe = recipes.load("generate", None, overrides, flags)
    return generate.run(recipe, Run(recipe))


def test_generate_records_what_it_attends_to_and_says_the_same(model, replay, tmp_path):
    path = str(tmp_path / "sub" / "trace.safetensors")
    plain = record(model, tmp_path, out=str(tmp_path / "plain"))
    recorded = record(model, tmp_path, record_attention=path)
    assert recorded.token_ids == plain.token_ids
    assert (plain.attention_trace, recorded.attention_trace) == (None, path)
    trace, num_prompt = load(path), recorded.num_prompt_tokens
    header = trace.header
    assert (header.num_layers, header.num_heads, header.num_kv_heads, header.windows) == (3, 4, 2, (6, 6, 6))
    assert (header.num_prompt_tokens, header.num_steps) == (num_prompt, 5)
    assert trace.holds == {"attention", "keys", "queries"}

    source = transformers.AutoModelForCausalLM.from_pretrained(f"{model}/model", attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{model}/model")
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    ids = torch.cat([ids, torch.tensor([recorded.token_ids[:5]])], dim=1)
    with torch.no_grad():
        expected = source(ids, output_attentions=True).attentions
    for layer in range(3):
        found = trace.rows(layer, 0, num_prompt + 5)
        np.testing.assert_allclose(found, expected[layer][0].numpy(), atol=2e-3)
    assert replay(path, policies=["h2o", "knorm", "oracle"], budgets=[4]).results[0]["resident_tokens"] == 4


def test_how_much_is_recorded_can_be_chosen(model, tmp_path):
    path = str(tmp_path / "trace.safetensors")
    chosen = ("record.vectors=false", "record.prompt_queries=3", "record.top_p=0.5", "record.dtype=float32")
    num_prompt = record(model, tmp_path, *chosen, record_attention=path).num_prompt_tokens
    trace = load(path)
    assert trace.holds == {"attention"}
    assert (trace.header.first_query, trace.header.top_p) == (num_prompt - 3, 0.5)
    assert 0.5 <= trace.recorded_mass() < 0.95


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"cache.policy": "h2o", "cache.budget": 0.5}, "record_attention needs policy 'full'"),
        ({"cache.codec": "int8"}, "record_attention needs codec 'none'"),
        ({"prompts": "many.jsonl", "prompt": None}, "record_attention takes one prompt"),
    ],
)
def test_a_record_is_of_one_whole_sequence(flags, message, model, tmp_path):
    with pytest.raises(RecipeError, match=message):
        record(model, tmp_path, record_attention=str(tmp_path / "t.safetensors"), **flags)


def test_the_file_may_lie_in_the_run_folder_and_is_no_folder(model, tmp_path):
    inside = tmp_path / "run" / "sub" / "trace.safetensors"
    record(model, tmp_path, record_attention=str(inside))
    assert load(inside).header.num_steps == 5 and (tmp_path / "run" / "result.json").exists()
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "notes").write_text("mine")
    with pytest.raises(UsageError, match="is a folder"):
        record(model, tmp_path, out=str(tmp_path / "other"), record_attention=str(kept))
    with pytest.raises(PiKVError, match="cannot create the folder") as caught:
        record(model, tmp_path, out=str(tmp_path / "other"), record_attention=str(kept / "notes" / "x"))
    assert "--record-attention" in caught.value.hint
    assert not (tmp_path / "other").exists()
    notes = str(kept / "notes")
    with pytest.raises(UsageError, match="would replace the prompt"):
        record(model, tmp_path, out=str(tmp_path / "third"), prompt=None, prompt_file=notes, record_attention=notes)
    assert (kept / "notes").read_text() == "mine"


def test_the_command_takes_the_file(model, tmp_path):
    path = tmp_path / "trace.safetensors"
    words = ["generate", PROMPT, "--model", model, "--max-new-tokens", "3", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, [*words, "--record-attention", str(path)])
    assert result.exit_code == 0, result.exception or result.output
    assert load(path).header.num_steps == 2 and str(path) in result.stderr
