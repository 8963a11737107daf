"""`pikv compress --calibrate` as a job: what it fits, writes and refuses, and that a sweep runs on it."""

import builtins
import inspect
import json

import numpy as np
import pytest
import torch
import transformers
from small_models import CONFIGS

from pikv_core.cache import PiKVCache, calibration
from pikv_core.components import Component
from pikv_core.data import stdlib_text
from pikv_core.data.recall import Recall
from pikv_core.errors import PiKVError, UsageError
from pikv_core.evaluation import samples
from pikv_core.jobs import calibrate
from pikv_core.model.loading import load_model
from pikv_core.model.steps import feed
from pikv_core.recipes import load
from pikv_core.runs import Reporter, Run
from pikv_core.schema import CacheRecipe

METHODS = ["svd", "h2o+lora-int8", {"codec": {"name": "auto", "bytes_share": 0.5, "candidates": ["int8", "svd"]}}]


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


def recipe(model_folder, tmp_path, **keys):
    small = {"context_tokens": 128, "num_texts": 4, "methods": METHODS, "calibrate": True}
    paths = {"model": str(model_folder), "out": str(tmp_path / "out"), "save": str(tmp_path / "made")}
    return load("compress", None, (), {**paths, **small, **keys})


@pytest.fixture(scope="module")
def made(model_folder, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("made")
    asked = recipe(model_folder, tmp_path)
    return tmp_path, calibrate.run(asked, Run(asked))


def test_every_codec_of_the_methods_is_fitted_and_measured(made):
    tmp_path, result = made
    assert [row["codec"] for row in result.results] == ["svd", "lora-int8", "auto"]
    assert result.num_tokens == 4 * 128 and result.corpus == "recall, synthetic filler"
    manifest = calibration.read(tmp_path / "made")
    assert list(manifest.members) == ["svd", "lora-int8", "auto"]
    assert manifest.members["auto"].options == {"bytes_share": 0.5, "candidates": ["int8", "svd"]}
    assert "residual" not in manifest.members["lora-int8"].options
    for row in result.results:
        member = manifest.members[row["codec"]]
        assert member.notes["measured"] == {name: value for name, value in row.items() if name != "codec"}
        assert len(member.notes["layers"]) == len(row["output_error_by_layer"]) == 3
        assert 0 < row["output_error"] < 1 and 0 < row["bytes_share"] < 1
    written = json.loads((tmp_path / "out" / "result.json").read_text())
    assert written["result"]["saved"] == str(tmp_path / "made") and list((tmp_path / "out" / "tb").iterdir())


def test_what_was_measured_is_what_a_cache_does(model_folder, made):
    """The bytes of a prompt's codes in a cache, and the keys that it holds, are those of the measurement."""
    tmp_path, result = made
    loaded = load_model(str(model_folder), recipe(model_folder, tmp_path))
    cache = PiKVCache.for_model(loaded.model, CacheRecipe(codec=Component("svd"), calibration=[str(tmp_path / "made")]))
    windows = samples.calibration_windows(loaded, [], None, 4, 128, 0, Reporter())
    assert samples.fingerprint(windows.ids) == calibration.read(tmp_path / "made").corpus.sha256
    full = PiKVCache(loaded.model.config).attach(loaded.model)
    feed(loaded.model, full, windows.ids)
    feed(loaded.model, cache, windows.ids)
    svd = result.results[0]
    assert cache.resident_bytes / cache.full_bytes == pytest.approx(svd["bytes_share"], rel=0.01)
    exact, found = full.retrieve(0)[0], cache.retrieve(0)[0]
    assert float((found - exact).norm() / exact.norm()) == pytest.approx(svd["key_error_by_layer"][0], rel=1e-3)


def test_samples_are_the_queries_keys_and_values_of_every_layer(small_model):
    for arch in ("llama", "gemma2", "gpt_oss"):
        model = small_model(arch)
        ids = torch.randint(1, 97, (3, 40), generator=torch.Generator().manual_seed(0))
        found = samples.collect(model, ids, 2)
        full = PiKVCache(model.config).attach(model)
        feed(model, full, ids)
        assert len(found) == 3
        for index, layer in enumerate(found):
            keys, values, position = full.retrieve(index)
            kept = keys.shape[2]  # sliding windows hold the newest tokens alone
            torch.testing.assert_close(layer.keys[:, :, -kept:], keys)
            torch.testing.assert_close(layer.values[:, :, -kept:], values)
            assert layer.queries.shape == (3, 4, 40, 16) and torch.equal(layer.position[-kept:], position[0, 0].long())
            assert layer.scale == pytest.approx(16**-0.5) and layer.rotary is not None


def test_numbers_that_are_not_finite_are_refused(small_model):
    model = small_model("llama")
    weight = model.model.layers[-1].self_attn.q_proj.weight  # the cache itself refuses keys and values
    kept = weight.detach().clone()
    try:
        weight.data[0, 0] = torch.nan
        with pytest.raises(PiKVError, match="layer 2: the model's numbers are not finite"):
            samples.collect(model, torch.ones(1, 8, dtype=torch.long), 1)
    finally:
        weight.data.copy_(kept)


def test_text_that_is_held_out_is_never_calibrated_on(tmp_path, monkeypatch):
    documents = [text for x in vars(builtins).values() if (text := inspect.getdoc(x)) and len(text) > 100]
    monkeypatch.setattr(stdlib_text, "read", lambda: documents)
    source = Recall(filler="text", vocab_size=600).open(None, 0, [], None, Reporter())
    config = CONFIGS["llama"]()
    config.vocab_size = source.vocab_size
    folder = tmp_path / "model"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    source.save(folder)
    loaded = load_model(str(folder), load("compress", None, (), {"model": str(folder)}))
    held_out = loaded.tokenizer.decode(np.load(folder / "held_out.npy").astype(np.int64))
    for seed in (0, 5):  # another seed splits the corpus in another way
        found, _ = samples._training_documents(loaded, None, seed, Reporter())
        assert len(found) > 0.7 * len(set(documents)) and not any(document in held_out for document in found)
    windows, again = (samples.calibration_windows(loaded, [], None, 3, 200, 0, Reporter()) for _ in range(2))
    assert windows.ids.shape == (3, 200) and windows.source.startswith("recall in standard library")
    assert torch.equal(windows.ids, again.ids)


def test_the_users_text_goes_first(tmp_path, model_folder):
    (tmp_path / "mine.txt").write_text(" ".join(f"v{number % 64} k{number % 128}" for number in range(400)))
    loaded = load_model(str(model_folder), recipe(model_folder, tmp_path))
    windows = samples.calibration_windows(loaded, [str(tmp_path / "mine.txt")], None, 2, 64, 0, Reporter())
    assert windows.source == str(tmp_path / "mine.txt") and windows.ids.shape == (2, 64)
    (tmp_path / "foreign.txt").write_text("words that no one has drawn " * 100)
    with pytest.raises(PiKVError, match="does not know 100% of the words"):
        samples.calibration_windows(loaded, [str(tmp_path / "foreign.txt")], None, 2, 64, 0, Reporter())


def test_samples_stay_within_the_memory_for_them(model_folder, tmp_path, monkeypatch):
    asked = recipe(model_folder, tmp_path, methods=["svd"])
    monkeypatch.setattr(samples, "MOST_BYTES", 3 * 128 * 3 * (4 + 2 * 2) * 16 * 4)
    assert calibrate.run(asked, Run(asked)).num_tokens == 3 * 128


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["svd", "int8"], "codec 'int8' has nothing to calibrate"),
        (["h2o"], "policy 'h2o' without a codec"),
        ([{"codec": {"name": "svd", "rank": 2}}, "svd"], "two sets of options"),
    ],
)
def test_what_needs_no_calibration_is_refused_before_anything_is_written(model_folder, tmp_path, methods, message):
    asked = recipe(model_folder, tmp_path, methods=methods)
    with pytest.raises(UsageError, match=message):
        calibrate.run(asked, Run(asked))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(model_folder, tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "mine").write_text("kept")
    asked = recipe(model_folder, tmp_path)
    with pytest.raises(PiKVError, match="there is something already"):
        calibrate.run(asked, Run(asked))
    assert [file.name for file in tmp_path.iterdir()] == ["made"]
