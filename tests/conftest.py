"""Set the interpreter before triton is imported; give each test the small random models."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import transformers
from small_models import CONFIGS

transformers.logging.set_verbosity_error()


@pytest.fixture(scope="session")
def small_model():
    """Return a function: architecture name → a random float32 model with attention that is not flat."""
    made = {}

    def make(arch):
        if arch not in made:
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(CONFIGS[arch]()).eval()
            for weight in model.parameters():
                if weight.dim() > 1:
                    torch.nn.init.normal_(weight, std=0.2)
            made[arch] = model
        return made[arch]

    return make


@pytest.fixture(autouse=True)
def _two_threads_at_most():
    beside_others = "PYTEST_XDIST_WORKER" in os.environ
    torch.set_num_threads(min(1 if beside_others else 2, torch.get_num_threads()))
