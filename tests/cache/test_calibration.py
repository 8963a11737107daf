"""Calibrations on disk: what is read is what was written, and nothing else is taken for it."""

import copy
import json

import pytest
import torch
import transformers
from small_models import CONFIGS, SMALL

from pikv_core.cache import PiKVCache, calibration
from pikv_core.components import Component
from pikv_core.errors import PiKVError, UsageError
from pikv_core.model.steps import feed
from pikv_core.schema import CacheRecipe

CORPUS = calibration.Corpus(source="words", sha256="ab" * 32, num_tokens=10)


def svd(**more):
    tensors = {"layers.0.key": torch.randn(2, 16, 4), "flag": torch.tensor(True)}
    return calibration.Member("svd", "codec", {"rank": 4, "rope": "after", **more}, tensors, {"errors": [0.5]})


@pytest.fixture
def model(small_model):
    return small_model("llama")


@pytest.fixture
def saved(model, tmp_path):
    gates = calibration.Member("duo-attention", "policy", {}, {"gates": torch.rand(3, 2)})
    calibration.save(tmp_path / "made", "runs/a", model, CORPUS, [svd(), gates])
    return str(tmp_path / "made")


def fitted(folders, config, kind="codec", name="svd", **options):
    return calibration.fitted(folders, kind, Component(name, options), config)[1]


def test_what_is_read_is_what_was_written(model, tmp_path):
    member = svd()
    calibration.save(tmp_path / "made", "runs/a", model, CORPUS, [member])
    found = fitted([str(tmp_path / "made")], model.config, rank=4)
    assert found.keys() == member.tensors.keys()
    assert all(torch.equal(found[name], x) and found[name].dtype == x.dtype for name, x in member.tensors.items())
    manifest = calibration.read(tmp_path / "made")
    assert manifest.corpus == CORPUS and manifest.model.source == "runs/a"
    assert manifest.members["svd"].notes == {"errors": [0.5]}
    assert len(manifest.layers) == 3 and manifest.layers[0].head_dim == 16 and manifest.layers[0].num_kv_heads == 2


def test_each_kind_and_folder_is_looked_through(model, saved, tmp_path):
    calibration.save(tmp_path / "other", "runs/a", model, CORPUS, [calibration.Member("lora", "codec", {}, {})])
    folders = [str(tmp_path / "other"), saved]
    assert fitted(folders, model.config).keys() == {"layers.0.key", "flag"}
    assert fitted(folders, model.config, "policy", "duo-attention")["gates"].shape == (3, 2)


def refused(error, folders, config, kind="codec", name="svd", **options):
    with pytest.raises(error) as caught:
        fitted(folders, config, kind, name, **options)
    return f"{caught.value.message} / {caught.value.hint}"


def test_none_at_all_is_refused_with_the_command_that_makes_one(model, saved):
    assert "pikv compress --calibrate --method svd" in refused(UsageError, [], model.config)
    text = refused(UsageError, [saved], model.config, name="lora")
    assert "holds svd, duo-attention" in text and "--method lora" in text
    assert "duo-gates.yaml" in refused(UsageError, [], model.config, "policy", "duo-attention")
    assert "no calibration of policy 'svd'" in refused(UsageError, [saved], model.config, "policy")
    assert "no calibration here" in refused(UsageError, [saved + "-not"], model.config)


def test_two_of_one_member_are_refused(model, saved, tmp_path):
    calibration.save(tmp_path / "again", "runs/a", model, CORPUS, [svd()])
    assert "give one of them" in refused(UsageError, [saved, str(tmp_path / "again")], model.config)


def test_other_layers_are_refused(saved):
    config = transformers.LlamaConfig(**{**SMALL, "num_hidden_layers": 4, "num_key_value_heads": 4})
    text = refused(UsageError, [saved], config)
    assert "3 layers of 2 heads of 16 channels" in text and "4 layers of 4 heads of 16" in text


@pytest.mark.parametrize(("option", "value"), [("rank", 5), ("rope", "before")])
def test_another_option_than_the_fitted_one_is_refused(model, saved, option, value):
    assert f"was fitted with {option}" in refused(UsageError, [saved], model.config, **{option: value})
    assert fitted([saved], model.config, energy=0.5)  # nothing that the calibration depends on


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_refused(model, saved, tmp_path, damage):
    assert fitted([saved], model.config)
    file = tmp_path / "made" / "svd.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    else:
        data[-3] ^= 1
        file.write_bytes(data if damage == "flip" else data[:-5])
    assert "svd.safetensors: damaged" in refused(PiKVError, [saved], model.config)


@pytest.mark.parametrize("change", [{"format": 2}, {"layers": "many"}, {"surprise": 1}, None])
def test_a_manifest_that_is_none_is_refused(model, saved, tmp_path, change):
    file = tmp_path / "made" / "manifest.json"
    text = json.dumps({**json.loads(file.read_text()), **change}) if change else file.read_text()[:-20]
    file.write_text(text)
    assert "manifest.json: not a calibration" in refused(PiKVError, [saved], model.config)


def test_a_failed_save_leaves_what_was_there(model, saved, tmp_path):
    before = {file.name: file.read_bytes() for file in (tmp_path / "made").iterdir()}
    broken = calibration.Member("lora", "codec", {}, {}, {"cannot be JSON": object()})
    with pytest.raises(Exception, match="object"):
        calibration.save(tmp_path / "made", "runs/a", model, CORPUS, [svd(), broken])
    assert {file.name: file.read_bytes() for file in (tmp_path / "made").iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("arch", ["llama", "gpt_oss", "pikv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_model_is_known_again_in_any_precision(small_model, tmp_path, arch, dtype):
    model = small_model(arch)
    calibration.save(tmp_path / "made", "runs/a", model, CORPUS, [svd()])
    calibration.check_model([str(tmp_path / "made")], copy.deepcopy(model).to(dtype))
    low = copy.deepcopy(model).to(dtype)
    calibration.save(tmp_path / "low", "runs/a", low, CORPUS, [svd()])
    calibration.check_model([str(tmp_path / "low")], model)


def test_another_training_of_the_same_architecture_is_refused(model, saved):
    torch.manual_seed(1)
    other = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    with pytest.raises(UsageError, match=r"a calibration of runs/a \(llama\); this model has other weights") as caught:
        calibration.check_model([saved], other)
    assert "--method svd" in caught.value.hint and "duo-gates.yaml" in caught.value.hint
    trained = copy.deepcopy(model)
    with torch.no_grad():
        trained.model.layers[-1].self_attn.k_proj.weight.mul_(1.02)
    with pytest.raises(UsageError, match="other weights"):
        calibration.check_model([saved], trained)


def test_a_cache_is_refused_before_it_holds_anything(model, saved):
    with pytest.raises(UsageError, match="codec 'lora' runs only with a calibration"):
        PiKVCache.for_model(model, CacheRecipe(codec=Component("lora")))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].self_attn.k_proj.weight.add_(0.1)
    with pytest.raises(UsageError, match="other weights"):
        PiKVCache.for_model(other, CacheRecipe(calibration=[saved]))
    cache = PiKVCache(model.config, CacheRecipe()).attach(model)
    assert feed(model, cache, torch.ones(1, 4, dtype=torch.long)).isfinite().all()
