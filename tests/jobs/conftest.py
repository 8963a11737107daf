"""What the tests of jobs share: a small model that the recall task's words can be put to."""

import pytest
import torch
import transformers
from small_models import CONFIGS

from pikv_core.data.recall import Recall
from pikv_core.runs import Reporter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder with a random llama that has the recall task's words."""
    run = tmp_path_factory.mktemp("run")
    source = Recall().open(None, 0, [], None, Reporter())
    config = CONFIGS["llama"]()
    config.vocab_size = source.vocab_size
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(run / "model")
    source.save(run / "model")
    return run
