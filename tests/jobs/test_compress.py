"""`pikv compress` as a job: rows, pictures, what is skipped, going on, and ranks that share."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from small_models import CONFIGS

from pikv_core.data import stdlib_text, tokenizer
from pikv_core.data.recall import Recall
from pikv_core.errors import PiKVError, UsageError
from pikv_core.evaluation import measure as measuring
from pikv_core.jobs import compress
from pikv_core.recipes import load
from pikv_core.runs import Reporter, Run

TIMES = ("ms_per_token", "prefill_ms")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "model"
    source = Recall().open(None, 0, [], None, Reporter())
    config = CONFIGS["llama"]()
    config.vocab_size = source.vocab_size
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    source.save(folder)
    return folder


def recipe(model_folder, out, **keys):
    small = {"context_tokens": 96, "num_queries": 32, "budgets": [0.25], "num_texts": 4}
    return load("compress", None, (), {"model": str(model_folder.parent), "out": str(out), **small, **keys})


def without_times(row):
    return {name: value for name, value in row.items() if name not in TIMES}


def test_the_job_writes_rows_and_pictures(model_folder, tmp_path):
    asked = recipe(model_folder, tmp_path / "out", methods=["h2o", "h2o+int8", "quest"], target="agreement=0.999")
    result = compress.run(asked, Run(asked))
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert rows == result.results and [row["method"] for row in rows] == ["full", "h2o", "h2o+int8", "quest"]
    for row in rows:
        assert row["resident_bytes"] > 0 and row["full_bytes"] == rows[0]["full_bytes"]
        assert all(math.isfinite(row[name]) for name in ("perplexity", "recall", "attention_error", *TIMES))
        assert len(row["attention_error_by_layer"]) == len(row["attention_mass_by_layer"]) == 3
        assert row["ruler"] is None
    assert rows[0]["attention_error"] == rows[0]["agreement_kl"] == 0 and rows[0]["agreement"] == 1
    assert rows[2]["resident_bytes"] <= rows[1]["resident_bytes"] < 0.4 * rows[0]["full_bytes"]
    assert rows[1]["attention_mass"] < 1 < 1.001 * rows[3]["attention_mass"]
    assert result.cheapest in result.results and result.cheapest["agreement"] >= 0.999 and result.skipped == []
    for picture in ("pareto.png", "layers.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "out" / "result.json").read_text())
    assert written["versions"]["torch"] and written["result"]["cheapest"] == result.cheapest
    assert list((tmp_path / "out" / "tb").iterdir())


def test_only_the_tasks_that_are_asked_for_are_measured(model_folder, tmp_path):
    asked = recipe(model_folder, tmp_path / "out", methods=["tova"], tasks=["recall"])
    row = compress.run(asked, Run(asked)).results[1]
    assert row["recall"] is not None and row["resident_bytes"] > 0
    assert all(row[name] is None for name in ("perplexity", "agreement", "agreement_kl", "attention_error", "ruler"))
    assert not (tmp_path / "out" / "layers.png").exists()


def test_a_model_of_text_is_measured_on_the_users_text_and_on_ruler(tmp_path, monkeypatch):
    english = stdlib_text.read()[:400]
    monkeypatch.setattr(stdlib_text, "read", lambda: english)
    trained = tokenizer.train_bpe(english, 600)
    tokenizer.save(trained, tmp_path / "model")
    config = CONFIGS["llama"]()
    config.vocab_size = trained.get_vocab_size()
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    (tmp_path / "notes.txt").write_text("\n".join(english[-40:]))
    keys = {"tasks": ["perplexity", "ruler"], "ruler_tasks": ["vt"], "ruler_samples": 2, "context_tokens": 400}
    keys |= {"text": [str(tmp_path / "notes.txt")], "methods": ["snapkv", "int4"], "continuation_tokens": 8}
    asked = recipe(tmp_path / "model", tmp_path / "out", **{**keys, "model": str(tmp_path / "model")})
    result = compress.run(asked, Run(asked))
    assert result.perplexity_of == str(tmp_path / "notes.txt") and result.recall_of is None
    for row in result.results:
        assert set(row["ruler_by_task"]) == {"vt"} and 0 <= row["ruler"] <= 1 and row["ruler_interval"] > 0
        assert row["perplexity"] > 1 and row["attention_error"] is not None
        assert row["recall"] is row["agreement"] is None


def test_what_is_refused_is_skipped_unless_it_is_all_there_is(model_folder, tmp_path):
    alone = recipe(model_folder, tmp_path / "alone", methods=["quest"], budgets=["1MiB"])
    with pytest.raises(UsageError, match="drops nothing"):
        compress.run(alone, Run(alone))
    assert not (tmp_path / "alone").exists()
    among = recipe(model_folder, tmp_path / "among", methods=["quest", "h2o"], budgets=["1MiB", 0.5])
    result = compress.run(among, Run(among))
    assert [(row["method"], row["budget"]) for row in result.results] == [
        ("full", 1.0),
        ("quest", 0.5),
        ("h2o", "1MiB"),
        ("h2o", 0.5),
    ]
    (skipped,) = result.skipped
    assert (skipped["method"], skipped["budget"]) == ("quest", "1MiB") and "drops nothing" in skipped["reason"]
    later = recipe(model_folder, tmp_path / "later", methods=["fastv"], budgets=[0.1])
    with pytest.raises(PiKVError, match="fastv"):
        compress.run(later, Run(later))


def test_an_interrupted_sweep_goes_on_where_it_was(model_folder, tmp_path, monkeypatch):
    keys = {"methods": ["h2o", "tova", "int8"], "tasks": ["recall", "agreement"]}
    whole = recipe(model_folder, tmp_path / "whole", **keys)
    expected = compress.run(whole, Run(whole)).results
    measured, measure = [], measuring.measure

    def interrupted(loaded, cell, work):
        measured.append(cell.label)
        if cell.label == "tova":
            raise KeyboardInterrupt
        return measure(loaded, cell, work)

    monkeypatch.setattr(measuring, "measure", interrupted)
    torn = recipe(model_folder, tmp_path / "torn", **keys)
    with pytest.raises(PiKVError, match="interrupted after 2 of 4 cells") as error:
        compress.run(torn, Run(torn))
    assert f"pikv compress --resume {tmp_path / 'torn'}" in error.value.hint
    with (tmp_path / "torn" / "results.jsonl").open("a") as stream:
        stream.write('{"key": "cut o')
    monkeypatch.setattr(
        measuring, "measure", lambda *given, **named: (measured.append("again"), measure(*given, **named))[1]
    )
    recipe_again = load("compress", tmp_path / "torn" / "recipe.yaml")
    result = compress.run(recipe_again, Run(recipe_again, resume=tmp_path / "torn"))
    assert measured == ["full", "h2o", "tova", "again", "again"]
    assert [without_times(row) for row in result.results] == [without_times(row) for row in expected]
    lines = (tmp_path / "torn" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.results


def test_flags_do_not_go_with_resume(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("verb: compress\nmodel: m\n")
    for flags, message in (
        (["--resume", tmp_path], "no sweep to go on with"),
        (["--resume", tmp_path / "run", "--method", "h2o", "--seed", "1"], "--method, --seed cannot change it"),
    ):
        command = [sys.executable, "-m", "pikv_cli", "compress", *map(str, flags)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr and "hint: " in done.stderr


@pytest.mark.slow
def test_ranks_share_the_cells_and_find_the_same(model_folder, tmp_path):
    asked = recipe(model_folder, tmp_path / "alone", methods=["h2o", "tova", "int8", "quest"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun gives each rank: on some processors sums depend on it in the last bit
    try:
        alone = compress.run(asked, Run(asked)).results
    finally:
        torch.set_num_threads(threads)
    flags = ["--model", model_folder, "--method", "h2o,tova,int8,quest", "--budget", "0.25", "--json"]
    flags += ["--set", "context_tokens=96", "--set", "num_queries=32", "--set", "num_texts=4"]
    torchrun = [Path(sys.executable).parent / "torchrun", "--nproc-per-node", "2", "-m", "pikv_cli", "compress"]
    done = subprocess.run(
        [*map(str, [*torchrun, *flags]), "--out", str(tmp_path / "shared")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    shared = json.loads(done.stdout)["results"]
    assert [replaced(row) for row in shared] == [replaced(row) for row in alone]
    assert not list((tmp_path / "shared").glob("results.*.jsonl"))


def replaced(row):
    return {name: value for name, value in without_times(row).items() if name != "key"}
