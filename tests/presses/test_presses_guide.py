"""Every example of docs/presses.md runs as it stands, and its table names every policy."""

import ast
import re
from pathlib import Path

import pytest
import torch
import transformers
from small_calibration import routers, write
from small_models import CONFIGS

from pikv_core import presses
from pikv_core.cache.calibration import Member
from pikv_core.data.recall import Recall
from pikv_core.runs import Reporter
from pikv_core.scheduling import POLICIES

GUIDE = (Path(__file__).parent.parent.parent / "docs" / "presses.md").read_text(encoding="utf-8")


def test_the_table_is_true():
    table = GUIDE.partition("## Which")[2].partition("## Composed")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    told = {name: row[2] for row in rows for name in re.findall(r"`([a-z0-9-]+)`", row[1])}
    assert len(told) > 15
    for name, text in told.items():
        policy = POLICIES[name]
        assert text.startswith(" none: ") == (presses.unfit(policy) is not None), name
        assert text.startswith(" none: ") or f"`{presses.press_name(policy)}`" in text, name


def routers_of_the_guide(config):
    """Return what its command would train: aware routers of kind pikv over its four strategies, here random ones."""
    command = GUIDE.partition("pikv train --recipe recipes/train/policy-router.yaml")[2].partition("```")[0]
    settings = dict(re.findall(r"policy_router\.(\w+)='?\[?([^]\s]\w*(?:, \w+)*)", command))
    assert settings["cache_aware"] == "true"
    kind, strategies = settings["router"], settings["strategies"].split(", ")
    num_layers, num_strategies = config.num_hidden_layers, len(strategies)
    tensors = routers(num_layers, config.head_dim, num_strategies, cache_aware=True)
    for name in ("hits", "accesses", "latency_sum_s", "latency_count"):
        tensors[f"router/{name}"] = torch.zeros(num_layers, num_strategies)
    options = {"strategies": strategies, "router": kind, "cache_aware": True}
    return Member("moe-router", "policy", options, tensors)


@pytest.mark.kvpress
def test_the_examples_run(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    model = tmp_path / "runs" / "recall-tiny-latest" / "model"
    source = Recall().open(None, 0, [], None, Reporter())
    config = CONFIGS["pikv"]()
    config.vocab_size, config.num_hidden_layers = source.vocab_size, 4
    torch.manual_seed(0)
    untrained = transformers.AutoModelForCausalLM.from_config(config)
    untrained.save_pretrained(model)
    write(untrained, tmp_path / "runs" / "policy-router-latest", [routers_of_the_guide(config)])
    source.save(model)
    monkeypatch.chdir(tmp_path)
    exec("\n".join(blocks), {"__name__": "guide"})
    told = capsys.readouterr().out.splitlines()
    assert "'kept_tokens': 48, " in told[-3]  # 6 of 13 tokens, in 4 layers of 2 heads
    assert 0 < float(told[-2]) < 4
    usage = ast.literal_eval(told[-1])
    assert list(usage) == ["aggressive", "moderate", "conservative", "snapkv"]
    assert sum(usage.values()) == pytest.approx(1)  # one row
