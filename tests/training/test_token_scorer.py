"""Networks for the learned scorer: they learn what is there to learn, and are saved for the model alone."""

import json

import numpy as np
import pytest
import torch
import transformers
from small_models import SMALL

from pikv_core.cache import PiKVCache, calibration
from pikv_core.components import Component
from pikv_core.data.recall import Recall, RecallSource
from pikv_core.data.tokenizer import build_word_level
from pikv_core.errors import RecipeError, UsageError
from pikv_core.jobs import token_scorer as job
from pikv_core.model.steps import feed
from pikv_core.recipes import dump, load
from pikv_core.runs import Run
from pikv_core.schema import TokenScorerSettings
from pikv_core.training import token_scorer

TASK = Recall(num_keys=16, num_values=8, num_filler=16)
SETTINGS = TokenScorerSettings(length=64, samples=6, width=8, steps=150, batch_tokens=128, eval_samples=2)


@pytest.fixture
def source():
    return RecallSource(TASK, build_word_level(TASK.words()))


@pytest.fixture
def model(source):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, "vocab_size": source.vocab_size}))
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.15)
    return model.eval()


def run_in(folder):
    return Run(load("train", None, ["start=given", "token_scorer={}"], {"out": str(folder)}))


def start(folder, out, *overrides):
    given = SETTINGS.model_dump(exclude={"column", "text"})
    settings = [f"token_scorer.{name}={value}" for name, value in given.items()]
    recipe = load("train", None, [f"start={folder}", f"out={out}", *settings, *overrides])
    return job.run(recipe, Run(recipe))


def test_peaks_are_the_largest_attention_of_a_repetition_and_of_what_follows(model, source):
    lessons = token_scorer.gather(model, source, SETTINGS, 2, seed=1, split="train")
    ids = torch.from_numpy(source.batch(np.random.default_rng([1, 0]), 2, 64, "train").ids)
    C = SETTINGS.num_context
    assert lessons.peaks.shape[2:] == (2, C) and lessons.num_tokens == 128
    eager = transformers.LlamaForCausalLM(transformers.LlamaConfig(**model.config.to_diff_dict())).eval()
    eager.load_state_dict(model.state_dict())
    eager.set_attn_implementation("eager")
    expected = []
    for later in (ids[:, :C], ids[:, C:]):
        with torch.no_grad():
            seen = eager(torch.cat([ids[:, :C], later], 1), output_attentions=True, use_cache=False).attentions
        by_layer = torch.stack(seen)[..., C:, :C]  # [L,B,H,T,C]
        groups = model.config.num_key_value_heads
        expected.append(by_layer.unflatten(2, (groups, -1)).amax(dim=(3, 4)))  # of a group's heads and queries
    torch.testing.assert_close(lessons.peaks.transpose(1, 2), torch.maximum(*expected), rtol=1e-3, atol=1e-5)


def test_a_rule_that_the_key_tells_is_learnt(tmp_path, model, source):
    lessons = token_scorer.gather(model, source, SETTINGS, 4, seed=1, split="train")
    rule = torch.exp(-2 - lessons.features[..., 3])
    planted = token_scorer.Lessons(lessons.features, rule.clamp(max=1.0), lessons.sha256, lessons.num_tokens)
    networks = token_scorer.learn(planted, SETTINGS, run_in(tmp_path)).networks
    other = token_scorer.gather(model, source, SETTINGS, 2, seed=2, split="test")
    unseen = token_scorer.Lessons(
        other.features, torch.exp(-2 - other.features[..., 3]).clamp(max=1.0), other.sha256, other.num_tokens
    )
    found = token_scorer.measure(unseen, networks, seed=0)
    assert found["kept_0.25"] > 0.9 > found["kept_by_chance_0.25"] + 0.1


def test_the_job_saves_what_the_policy_goes_by_of_this_model_alone(tmp_path, model, source):
    model.save_pretrained(tmp_path / "model")
    source.save(tmp_path / "model")
    result = start(tmp_path / "model", tmp_path / "run")
    assert result.calibration == str(tmp_path / "run" / "calibration")
    assert result.num_tokens == 6 * 64
    stored = json.loads((tmp_path / "run" / "result.json").read_text())["result"]
    assert stored["metrics"] == result.metrics and set(result.metrics) >= {"loss", "kept_0.5", "kept_by_chance_0.12"}
    networks = calibration.fitted([result.calibration], "policy", Component("learned-scorer"), model.config)[1]
    assert sum(x.numel() for x in networks.values()) == result.num_weights
    again = start(tmp_path / "model", tmp_path / "again")
    assert calibration.read(again.calibration) == calibration.read(result.calibration)

    cache = PiKVCache.for_model(
        model, {"policy": "learned-scorer", "budget": 0.25, "calibration": [str(tmp_path / "run")]}
    )
    with torch.no_grad():
        feed(model, cache, torch.arange(1, 41)[None] % source.vocab_size)
    assert cache.num_stored == [10] * len(cache.own_layers)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.add_(0.5)
    with pytest.raises(UsageError, match="other weights") as caught:
        PiKVCache.for_model(model, {"policy": "learned-scorer", "budget": 0.25, "calibration": [result.calibration]})
    assert "token-scorer.yaml" in caught.value.hint


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["token_scorer.steps=3"], "go together"),
        (["start=DIR", "token_scorer={}", "duo_gates={}"], "duo_gates and token_scorer are 2 runs"),
        (["start=DIR", "token_scorer={}", "model.num_layers=2"], "model: nothing of the model itself"),
        (["start=DIR", "token_scorer.context=1.0"], "token_scorer.context"),
    ],
)
def test_a_contradictory_recipe_is_refused(overrides, message):
    with pytest.raises(RecipeError, match=message):
        load("train", None, overrides)


def test_a_recipe_shows_only_what_it_goes_by():
    shown = dump(load("train", None, ["start=DIR", "token_scorer={}"]))
    assert "token_scorer:" in shown and "curriculum" not in shown and "duo_gates" not in shown
