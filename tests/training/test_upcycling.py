"""Experts made of a dense model: the same predictions at first, whatever the router, and sizes that are the model's."""

import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_models import CONFIGS, SMALL
from small_training import train_small
from transformers import AutoModelForCausalLM

from pikv_core.errors import UsageError
from pikv_core.moe.routers import ROUTERS
from pikv_core.recipes import dump, load
from pikv_core.schema.train import ModelRecipe
from pikv_core.training.upcycling import upcycle

NORMALISED = [name for name in ROUTERS.names() if name != "time"]  # which weighs with the plain softmax
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 32,
}
DENSE = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "llama-biases": lambda: transformers.LlamaConfig(attention_bias=True, rope_parameters=LLAMA3_ROPE, **SMALL),
    "mistral": lambda: transformers.MistralConfig(sliding_window=None, **SMALL),
    "qwen2-tied": lambda: transformers.Qwen2Config(tie_word_embeddings=True, **SMALL),
    "qwen3": CONFIGS["qwen3"],
}


def dense_model(kind="llama"):
    """Return a random model whose weights are large enough for blocks to matter, norms and biases too."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(DENSE[kind]()).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5 if weight.dim() == 1 else weight.shape[-1] ** -0.5)
    return model


def recipe(**given):
    return ModelRecipe.model_validate({"arch": "pikv", "num_experts": 4, **given})


def outputs(model, num_tokens=48):
    ids = torch.arange(2 * num_tokens).view(2, num_tokens) * 31 % SMALL["vocab_size"]
    with torch.no_grad():
        return model(ids).logits


def assert_same(model, dense):
    expected = outputs(dense)
    assert expected.std() > 0.3
    torch.testing.assert_close(outputs(model.eval()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("router", [*NORMALISED, {"name": "fast", "gate": "noisy"}], ids=str)
def test_the_model_with_experts_predicts_as_the_dense_one(router):
    dense = dense_model()
    assert_same(upcycle(dense, recipe(router=router), "causal-lm"), dense)


@pytest.mark.parametrize(
    ("kind", "arch"),
    [
        ("llama", "mixtral"),
        ("mistral", "mixtral"),
        ("llama-biases", "pikv"),
        ("qwen2-tied", "pikv"),
        ("qwen3", "qwen3_moe"),
        ("qwen3", "pikv"),
    ],
)
def test_every_pair_of_architectures_that_fits_predicts_the_same(kind, arch):
    dense = dense_model(kind)
    model = upcycle(dense, recipe(arch=arch), "causal-lm")
    assert model.config.model_type == arch
    assert_same(model, dense)


@pytest.mark.parametrize("given", [{"expert_rank": 2}, {"shared_expert": True}, {"top_k": 3}], ids=str)
def test_low_rank_and_shared_experts_change_nothing_at_first(given):
    dense = dense_model()
    assert_same(upcycle(dense, recipe(**given), "causal-lm"), dense)


def test_unnormalised_weights_scale_the_block():
    dense = dense_model()
    model = upcycle(dense, recipe(router="time"), "causal-lm").eval()
    torch.manual_seed(0)
    x = torch.randn(7, SMALL["hidden_size"])
    with torch.no_grad():
        y, routing = model.model.layers[0].mlp(x)
        expected = routing.weights.sum(-1, keepdim=True) * dense.model.layers[0].mlp(x)
    assert (routing.weights.sum(-1) < 1).all()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_the_router_is_drawn_from_the_seed():
    dense = dense_model()
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        drawn.append(upcycle(dense, recipe(), "causal-lm").model.layers[1].mlp.gate.weight)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("llama", {"arch": "llama"}, "has no experts"),
        ("llama", {"arch": "qwen3_moe"}, "norms queries and keys"),
        ("llama-biases", {"arch": "mixtral"}, "no place for 12 weights .*q_proj.bias"),
        ("qwen3", {"arch": "mixtral"}, "no place for 6 weights .*q_norm"),
        (
            "llama",
            {"num_layers": 2, "expert_size": 24},
            r"num_layers 2 \(it has 3\), model.expert_size 24 \(it has 96\)",
        ),
    ],
)
def test_what_cannot_be_taken_over_is_named(kind, given, message):
    with pytest.raises(UsageError, match=message):
        upcycle(dense_model(kind), recipe(**given), "causal-lm")


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "pikv"])
def test_models_of_other_kinds_are_refused(kind):
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]())
    with pytest.raises(UsageError, match=r"sliding window|cannot be made into experts"):
        upcycle(model, recipe(), "causal-lm")


def test_a_recipe_of_upcycling_keeps_only_the_sizes_that_were_given(tmp_path):
    given = ["train.init_from=runs/x", "model={arch: pikv, num_experts: 6}", "train.curriculum=[8192]"]
    (tmp_path / "recipe.yaml").write_text(dump(load("train", None, given)))
    again = load("train", tmp_path / "recipe.yaml")
    assert again.model.model_fields_set == {"arch", "num_experts"}
    assert again.builds


def test_a_dense_run_goes_on_as_experts(tmp_path):
    dense = train_small(tmp_path / "dense")
    overrides = [f"train.init_from={tmp_path / 'dense'}", "model={arch: pikv, router: balanced, num_experts: 4}"]
    result = train_small(tmp_path / "experts", *overrides, sizes=False)
    model = AutoModelForCausalLM.from_pretrained(result.model)
    assert model.config.num_experts == 4
    assert model.model.layers[0].mlp.experts.down_proj.shape == (4, 32, 48)
    lines = (tmp_path / "experts" / "metrics.jsonl").read_text().splitlines()
    assert f'"start/recall_32": {dense.metrics["recall_32"]}' in lines[0]
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (dense.model, result.model))
    assert not torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


def test_low_rank_experts_leave_their_frozen_base_as_it_was(tmp_path):
    train_small(tmp_path / "dense")
    overrides = [f"train.init_from={tmp_path / 'dense'}"]
    overrides += ["model={arch: pikv, num_experts: 4, expert_rank: 2, train_base: false}"]
    result = train_small(tmp_path / "experts", *overrides, sizes=False)
    dense, after = (load_file(f"{folder}/model.safetensors") for folder in (f"{tmp_path}/dense/model", result.model))
    for layer in (0, 1):
        block, experts = f"model.layers.{layer}.mlp.", f"model.layers.{layer}.mlp.experts."
        gate_up = torch.cat([dense[f"{block}gate_proj.weight"], dense[f"{block}up_proj.weight"]])
        assert torch.equal(after[f"{experts}gate_up_proj"], gate_up)
        assert torch.equal(after[f"{experts}down_proj"], dense[f"{block}down_proj.weight"])
        assert after[f"{experts}gate_up_B"].any() and after[f"{experts}down_B"].any()
