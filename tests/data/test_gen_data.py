"""gen-data as a job: what it writes is described truly, the same twice, and nothing stays of a failure."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from pikv_core import recipes
from pikv_core.components import build
from pikv_core.data import TASKS, corpus, stdlib_text
from pikv_core.data.recall import Recall
from pikv_core.errors import PiKVError
from pikv_core.jobs import gen_data
from pikv_core.runs import Reporter, Run
from pikv_core.schema import GenDataRecipe


def generate(out: Path, task: Any, **settings: Any) -> gen_data.Result:
    recipe = GenDataRecipe.model_validate({"task": task, "out": str(out), "num_samples": 20, **settings})
    return gen_data.run(recipe, Run(recipe))


@pytest.mark.parametrize("task", [*TASKS.names(), {"name": "recall", "filler": "text", "length": 200}])
def test_every_file_is_described_and_the_same_twice(
    task: Any, documents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stdlib_text, "read", lambda: documents)
    first, again = (generate(tmp_path / name, task, seed=7) for name in ("first", "again"))
    assert first.files == again.files
    assert first.files
    manifests = [(tmp_path / name / "manifest.json").read_bytes() for name in ("first", "again")]
    assert manifests[0] == manifests[1]
    manifest = json.loads(manifests[0])
    assert manifest["files"] == first.files
    assert manifest["seed"] == 7
    for row in first.files:
        data = (tmp_path / "first" / row["file"]).read_bytes()
        assert row["sha256"] == hashlib.sha256(data).hexdigest()
        assert row["num_bytes"] == len(data)
        if row["file"].endswith(".jsonl"):
            assert row["num_samples"] == len(data.decode("utf-8").splitlines())
    written = {
        file.relative_to(tmp_path / "first").as_posix()
        for file in (tmp_path / "first").rglob("*")
        if file.is_file() and "tb" not in file.parts
    }
    own = {"manifest.json", "recipe.yaml", "result.json"}
    assert written - own == {row["file"] for row in first.files}
    other = generate(tmp_path / "other", task, seed=8)
    assert other.files != first.files


@pytest.mark.parametrize("filler", ["synthetic", "text"])
def test_samples_say_where_their_answers_are(filler: str, tmp_path: Path, text_folder: Path) -> None:
    text = [str(text_folder)] if filler == "text" else []
    task = {"name": "recall", "filler": filler, "vocab_size": 600, "length": 150}
    generate(tmp_path / "data", task, text=text)
    lines = {
        split: (tmp_path / "data" / f"samples.{split}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        for split in ("train", "test")
    }
    assert [len(lines["train"]), len(lines["test"])] == [18, 2]
    for line in lines["train"] + lines["test"]:
        row = json.loads(line)
        assert len(row["ids"]) == 150
        assert row["text"].startswith(row["prompt"])
        assert row["text"][len(row["prompt"]) :].split()[0].split("<")[0] == row["answers"][0]["value"].strip()
        stride = row["question_tokens"] + 1
        positions = [answer["position"] for answer in row["answers"]]
        assert positions == list(range(row["context_length"] + stride - 1, 150, stride))
        for answer in row["answers"]:
            assert 0 <= answer["depth"] <= 1
            joint = f"{answer['key']}{'' if filler == 'text' else ' '}{answer['value']}"
            assert row["text"].count(joint) >= 2
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    if filler == "text":
        assert manifest["corpus"]["num_train_documents"] == 54
        assert manifest["corpus"]["source"] == str(text_folder)
    else:
        assert manifest["corpus"] is None


@pytest.mark.parametrize("name", ["recall", "text"])
def test_a_written_folder_opens_with_its_own_settings(name: str, tmp_path: Path, text_folder: Path) -> None:
    options = {"filler": "text", "num_keys": 40} if name == "recall" else {}
    written = {"name": name, "vocab_size": 520, **options}
    generate(tmp_path / "data", written, text=[str(text_folder)], num_samples=100)
    task = build(TASKS, GenDataRecipe(task=name).task)
    source = task.open(str(tmp_path / "data"), 0, [], None, Reporter())
    assert source.vocab_size == 520
    assert source.task.vocab_size == 520
    fresh = source.task.open(None, 0, [str(text_folder)], None, Reporter())
    for split in ("train", "test"):
        batches = [one.batch(np.random.default_rng(1), 3, 120, split).ids for one in (source, fresh)]
        assert np.array_equal(*batches)


def test_disagreeing_options_are_refused(tmp_path: Path) -> None:
    generate(tmp_path / "data", {"name": "recall", "num_keys": 40})
    with pytest.raises(PiKVError, match=r"recall.json: num_keys: the data were written with 40.* asks for 50"):
        Recall(num_keys=50).open(str(tmp_path / "data"), 0, [], None, Reporter())
    with pytest.raises(PiKVError, match="bring their own"):
        Recall().open(str(tmp_path / "data"), 0, ["x.txt"], None, Reporter())


def test_a_folder_of_another_task_is_refused(tmp_path: Path, text_folder: Path) -> None:
    generate(tmp_path / "data", {"name": "text", "vocab_size": 400}, text=[str(text_folder)])
    with pytest.raises(PiKVError, match=r"manifest.json: task: these data are for 'text', not for 'recall'"):
        Recall().open(str(tmp_path / "data"), 0, [], None, Reporter())
    (tmp_path / "data" / "manifest.json").unlink()
    with pytest.raises(PiKVError, match=r"manifest.json: no such file"):
        Recall().open(str(tmp_path / "data"), 0, [], None, Reporter())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "text", "text": ["nowhere.txt"]}, "nowhere.txt: no such file or folder"),
        ({"task": "text", "column": "body"}, "column: 'body' names a column"),
        ({"task": "recall", "text": ["x.txt"]}, "synthetic filler uses no text"),
        ({"task": "recall", "num_samples": 1}, "need 2 samples or more"),
        ({"task": {"name": "recall", "length": 3}}, "length 3 is too short"),
    ],
)
def test_a_failure_leaves_no_folder(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(PiKVError) as caught:
        generate(tmp_path / "data", **settings)
    assert message in caught.value.message
    assert not (tmp_path / "data").exists()


def test_a_failure_half_way_leaves_no_folder(
    tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpus.tokens, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        generate(tmp_path / "data", {"name": "text", "vocab_size": 400}, text=[str(text_folder)])
    assert not (tmp_path / "data").exists()


def test_options_of_a_task_may_come_before_its_name() -> None:
    recipe = recipes.load("gen-data", None, ["task.num_keys=12"], {"task": "recall"})
    assert recipe.task.options == {"num_keys": 12}
    with pytest.raises(PiKVError, match="expected a whole number, got 'fast'"):
        recipes.load("gen-data", None, ["task.num_keys=fast"], {"task": "recall"})


def test_damaged_folders_are_named(tmp_path: Path, text_folder: Path) -> None:
    folder = tmp_path / "data"
    generate(folder, {"name": "recall", "filler": "text", "length": 100, "vocab_size": 520}, text=[str(text_folder)])
    for name, damage, message in [
        ("tokens.test.npy", b"", "tokens.test.npy: not a readable token file"),
        ("tokenizer/tokenizer.json", b"{}", "tokenizer.json: not a readable tokenizer file"),
        ("recall.json", b'{"num_keys": 0}', "recall.json: num_keys: input should be greater than 0"),
        ("recall.json", b"{", "recall.json: not valid JSON"),
        ("manifest.json", b"[]", "these data are for 'None'"),
    ]:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(damage)
        with pytest.raises(PiKVError) as caught:
            Recall().open(str(folder), 0, [], None, Reporter())
        assert message in caught.value.message
        (folder / name).write_bytes(whole)
    assert Recall().open(str(folder), 0, [], None, Reporter()).task.filler == "text"


def test_the_command_prints_the_result_alone(tmp_path: Path, text_folder: Path) -> None:
    from pikv_cli.app import app

    words = ["gen-data", "recall", "--filler", "text", "--text", str(text_folder), "--num-samples", "4"]
    options = ["--set", "task.vocab_size=520", "--set", "task.length=64", "--out", str(tmp_path / "data"), "--json"]
    outcome = CliRunner().invoke(app, [*words, *options], catch_exceptions=False)
    result = json.loads(outcome.stdout)
    assert result["task"] == "recall"
    counts = {row["file"]: row["num_samples"] for row in result["files"]}
    assert counts["samples.train.jsonl"] == 3
    assert counts["samples.test.jsonl"] == 1
    assert counts["tokenizer/tokenizer.json"] is None
