"""A model that decodes through the Triton kernels writes what it writes through torch, whatever keeps its tokens."""

import pytest
import torch
import transformers
from kernel_checks import DEVICES
from small_models import SMALL

from pikv_core.cache import PiKVCache
from pikv_kernels.backends import backend_report, forced

CODES = {"name": "int4", "group": 32, "residual": 16}
FEW = {"name": "int8", "group": 16, "residual": 8}
QUEST = {"policy": {"name": "quest", "dense_layers": 0}, "budget": 48}
RECIPES = {
    "full": {},
    "int8": {"codec": CODES | {"name": "int8"}},
    "int4": {"codec": CODES},
    "int2": {"codec": CODES | {"name": "int2"}},
    "fp8": {"codec": {"name": "fp8", "page": 32}},
    "h2o": {"policy": "h2o", "budget": 0.5},
    "quest": QUEST,
    "quest, int4": QUEST | {"codec": CODES},
    "quest, fp8": QUEST | {"codec": {"name": "fp8", "page": 16}},
    "snapkv, int8": {"policy": {"name": "snapkv", "window": 16}, "budget": 0.5, "codec": FEW},
    "h2o, int8": {"policy": "h2o", "budget": 0.5, "codec": FEW},
}
OPS = {"full": {"attend_tokens"}, "h2o": {"attend_tokens"}, "quest": {"attend_pages", "page_scores"}}
OPS |= {"int2": {"attend_codes"}, "fp8": {"attend_float8"}, "quest, fp8": {"attend_float8", "page_scores"}}
QUICK = ("full", "quest, int4", "h2o, int8")


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL | {"num_hidden_layers": 2})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return model


def decoded(model, inputs, recipe, backend):
    """Return the tokens and their logits after a prompt, and the bytes that the cache holds."""
    cache = PiKVCache.from_recipe(model.config, recipe)
    with forced(backend):
        found = model.generate(
            **inputs,
            past_key_values=cache,
            max_new_tokens=3,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return found.sequences, torch.stack(found.logits), cache.peak_bytes


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_the_same_tokens_and_close_logits(model, device, name, monkeypatch):
    monkeypatch.setattr("pikv_kernels.backends._choices", {})
    model, recipe = model.to(device), RECIPES[name]
    ids = torch.randint(1, 97, (1, 90), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(90) >= 20)[None].long()
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    tokens, logits, num_bytes = decoded(model, inputs, recipe, "triton")
    ran = {choice.op for choice in backend_report() if choice.backend == "triton"}
    assert ran >= OPS.get(name, {"attend_codes", "quantize_kv"})
    expected_tokens, expected, expected_bytes = decoded(model, inputs, recipe, "torch")
    assert torch.equal(tokens, expected_tokens) and num_bytes == expected_bytes
    error = ((logits - expected).norm() / expected.norm()).item()
    assert error < (5e-3 if "codec" in recipe else 1e-5), f"relative error {error}"
