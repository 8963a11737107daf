"""The enhanced model: transformers' own greedy text with a full cache, and a report of its live cache."""

import pytest
import torch
import transformers
from small_models import CONFIGS

from pikv_core.classic import PiKVEnhancedModel
from pikv_core.data.recall import Recall
from pikv_core.errors import PiKVError, RecipeError, UsageError
from pikv_core.runs import Reporter

PROMPT = "f1 f2 k3 v4 f5 f6 f7 k3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    source = Recall().open(None, 0, [], None, Reporter())
    config = CONFIGS["llama"]()
    config.vocab_size = source.vocab_size
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(run / "model")
    source.save(run / "model")
    return str(run)


def test_a_full_cache_gives_transformers_own_text(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{folder}/model")
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0], skip_special_tokens=True)
    enhanced = PiKVEnhancedModel(folder)
    assert enhanced.generate(PROMPT, max_new_tokens=12) == expected and expected.startswith(PROMPT)
    stats = enhanced.get_stats()
    assert stats["cache_stats"] == {"hit_rate": 1.0, "evictions": 0, "events": []}
    assert stats["compression_stats"]["full_bytes"] == (ids.shape[1] + 11) * 3 * 2 * 2 * 16 * 4
    assert stats["generation_stats"]["tokens_per_s"] > 0


def test_the_report_is_of_the_last_text(folder):
    enhanced = PiKVEnhancedModel(folder, policy="streaming-llm", budget=6, dtype="float32")
    for num_new in (9, 20):
        enhanced.generate(PROMPT, max_new_tokens=num_new)
        stats = enhanced.get_stats()
        seen = len(PROMPT.split()) + num_new - 1
        assert stats["cache_stats"]["hit_rate"] == pytest.approx(6 / seen)
        assert stats["cache_stats"]["evictions"] == (seen - 6) * 3 * 2
        compression = stats["compression_stats"]
        assert compression["resident_bytes"] == enhanced.cache.resident_bytes < compression["full_bytes"]
        assert compression["compression_ratio"] == compression["resident_bytes"] / compression["full_bytes"]


def test_mistakes_are_told(folder, tmp_path):
    with pytest.raises(RecipeError, match=r"cache\.polcy: unknown key; did you mean 'policy'"):
        PiKVEnhancedModel(folder, polcy="h2o")
    with pytest.raises(PiKVError, match="no model here"):
        PiKVEnhancedModel(str(tmp_path))
    enhanced = PiKVEnhancedModel(folder, max_length=12)
    with pytest.raises(UsageError, match="8 tokens and 5 new ones are more than max_length 12"):
        enhanced.generate(PROMPT, max_new_tokens=5)
    with pytest.raises(UsageError, match="nothing has been generated yet"):
        enhanced.get_stats()
    enhanced.generate(PROMPT, max_new_tokens=4)
    uncalibrated = PiKVEnhancedModel(folder, codec="svd")
    with pytest.raises(UsageError, match="runs only with a calibration"):
        uncalibrated.generate(PROMPT)
