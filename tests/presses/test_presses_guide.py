"""Every example of docs/presses.md runs as it stands, and its table names every policy."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from small_models import CONFIGS

from pikv_core import presses
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


@pytest.mark.kvpress
def test_the_examples_run(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    model = tmp_path / "runs" / "recall-tiny-latest" / "model"
    source = Recall().open(None, 0, [], None, Reporter())
    config = CONFIGS["pikv"]()
    config.vocab_size, config.num_hidden_layers = source.vocab_size, 4
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(model)
    source.save(model)
    monkeypatch.chdir(tmp_path)
    exec("\n".join(blocks), {"__name__": "guide"})
    assert "'kept_tokens': 48, " in capsys.readouterr().out  # 6 of 13 tokens, in 4 layers of 2 heads
