"""A random model with the vocabulary of the recall task, as training saves it."""

from __future__ import annotations

import pytest
import torch
import transformers
from small_models import CONFIGS

from pikv_core.data.recall import Recall
from pikv_core.model.loading import load_model
from pikv_core.runs import Reporter
from pikv_core.schema import CompressRecipe


@pytest.fixture(scope="session")
def recall_model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "model"
    source = Recall().open(None, 0, [], None, Reporter())
    config = CONFIGS["llama"]()
    config.vocab_size = source.vocab_size
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    source.save(folder)
    return folder


@pytest.fixture(scope="session")
def loaded(recall_model_folder):
    return load_model(str(recall_model_folder), CompressRecipe(model="given"))
