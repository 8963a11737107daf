"""Every example of docs/python.md runs as it stands."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from small_models import CONFIGS

from pikv_core.data.recall import Recall
from pikv_core.runs import Reporter
from pikv_core.scheduling import POLICIES

GUIDE = Path(__file__).parent.parent.parent / "docs" / "python.md"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a random model where the guide expects a trained one."""
    run = tmp_path / "runs" / "recall-tiny-latest"
    source = Recall().open(None, 0, [], None, Reporter())
    config = CONFIGS["llama"]()
    config.vocab_size = source.vocab_size
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(run / "model")
    source.save(run / "model")
    monkeypatch.chdir(tmp_path)
    yield
    POLICIES._classes.pop("every-nth", None)


def test_the_examples_run(place, capsys):
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(blocks) > 8
    scope = {"__name__": "guide"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{GUIDE.name}, example {number + 1}", "exec"), scope)
    told = capsys.readouterr().out
    assert "of the bytes, key error" in told and "evictions 512" in told
    assert scope["stats"]["compression_stats"]["resident_bytes"] == scope["enhanced"].cache.resident_bytes > 0
