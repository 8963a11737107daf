"""Low-rank weights: they alone learn, merged they say the same, and peft loads what is saved."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_models import CONFIGS, SMALL
from small_training import InterruptedAt, train_small
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from pikv_core.errors import PiKVError, UsageError
from pikv_core.model import PiKVConfig
from pikv_core.schema.train import LoRASettings
from pikv_core.training.gates import gates_of
from pikv_core.training.lora import add_adapter, find_targets

ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
BLOCK = ["down_proj", "gate_proj", "up_proj"]
STACKED = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
OTHERS = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=97, n_embd=64, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    ),
    "pikv-low-rank": lambda: PiKVConfig(num_experts=4, expert_rank=2, **SMALL),
    "pikv-shared": lambda: PiKVConfig(num_experts=4, shared_expert=True, **SMALL),
}
TARGETS = {
    "llama": (sorted(ATTENTION + BLOCK), []),
    "mixtral": (ATTENTION, STACKED),
    "qwen3_moe": (ATTENTION, STACKED),
    "pikv": (ATTENTION, STACKED),
    "gpt_oss": (ATTENTION, STACKED),
    "gpt2": (["c_attn", "c_fc", "c_proj"], []),
    "gpt_neox": (["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"], []),
    "pikv-low-rank": (ATTENTION, []),
    "pikv-shared": (sorted([*ATTENTION, "down_proj", "gate_up_proj"]), STACKED),
}


def small(kind):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config((CONFIGS | OTHERS)[kind]()).eval()


def logits(model):
    with torch.no_grad():
        return model(torch.arange(32).view(2, 16) * 31 % SMALL["vocab_size"]).logits


def learn(model):
    """Give the low-rank weights values as if they had learned."""
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)


@pytest.mark.parametrize("kind", TARGETS)
def test_by_default_attention_and_feed_forward_blocks_are_adapted(kind):
    targets = find_targets(small(kind), [])
    assert (targets.modules, targets.weights, targets.whole) == (*TARGETS[kind], [])


@pytest.mark.parametrize("kind", TARGETS)
def test_an_adapter_changes_nothing_at_first_and_merged_it_says_the_same(kind):
    model = small(kind)
    plain, weights = logits(model), {name: weight.clone() for name, weight in model.state_dict().items()}
    adapter = add_adapter(model, LoRASettings(rank=4), "causal-lm")
    assert all("lora_" in name for name, weight in model.named_parameters() if weight.requires_grad)
    assert torch.equal(logits(model), plain)
    learn(model)
    learned = logits(model)
    assert (learned - plain).abs().max() > 0.1
    adapter.merge()
    torch.testing.assert_close(logits(model), learned, rtol=1e-5, atol=1e-5)
    merged = adapter.take_out()
    assert merged.state_dict().keys() == weights.keys()
    torch.testing.assert_close(logits(merged), learned, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen3_moe", "pikv", "gpt2"])
def test_peft_loads_the_adapter_onto_the_base(kind, tmp_path):
    model = small(kind)
    adapter = add_adapter(model, LoRASettings(rank=4, merge=False), "causal-lm")
    learn(model)
    learned = logits(model)
    num_bytes = adapter.save(tmp_path / "adapter", None)
    assert num_bytes == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    low_rank = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    assert low_rank < num_bytes < low_rank + 10_000
    base = adapter.take_out()
    assert all(torch.equal(weight, base.state_dict()[name]) for name, weight in small(kind).state_dict().items())
    with_adapter = peft.PeftModel.from_pretrained(small(kind), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(with_adapter), learned, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "pikv"])
def test_losses_and_load_of_the_routers_are_those_without_an_adapter(kind):
    told = []
    for adapted in (False, True):
        model = small(kind)
        if adapted:
            add_adapter(model, LoRASettings(), "causal-lm")
        gates = gates_of(model, 0.01, 0.001)
        with torch.no_grad():  # both through their modules: without an adapter, training goes round those of attention
            losses = gates.losses(model.base_model(input_ids=torch.arange(32).view(2, 16), use_cache=False))
        told.append(({name: loss.item() for name, loss in losses.items()}, gates.statistics()))
    assert told[0] == told[1]


@pytest.mark.parametrize("kind", ["mixtral", "pikv"])
def test_a_router_learns_whole_where_it_is_named(kind, tmp_path):
    model = small(kind)
    adapter = add_adapter(model, LoRASettings(targets=["q_proj", "gate"]), "causal-lm")
    gates = gates_of(model, 0.01, 0.001)
    outputs = model.base_model(input_ids=torch.arange(32).view(2, 16), use_cache=False)
    sum(gates.losses(outputs).values()).backward()
    routers = [weight for name, weight in model.named_parameters() if ".gate." in name and weight.requires_grad]
    assert len(routers) == SMALL["num_hidden_layers"]
    assert all(weight.grad.any() for weight in routers)
    with torch.no_grad():
        for weight in routers:
            weight.normal_()
    gates.end_step()
    learned = logits(model)
    adapter.save(tmp_path, None)
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(small(kind), str(tmp_path))), learned)
    adapter.merge()
    torch.testing.assert_close(logits(adapter.take_out()), learned)


def test_a_frozen_router_keeps_its_bias():
    torch.manual_seed(0)
    config = PiKVConfig(num_experts=4, router="balanced", **SMALL)
    for targets, moves in ((["q_proj"], False), (["q_proj", "gate"], True)):
        model = AutoModelForCausalLM.from_config(config).train()
        add_adapter(model, LoRASettings(targets=targets), "causal-lm")
        gates = gates_of(model, 0.0, 0.0)
        model(torch.arange(32).view(2, 16))
        gates.end_step()
        assert bool(model.model.layers[0].mlp.gate.bias.any()) == moves


def test_a_head_that_the_task_brings_learns_whole_and_is_saved(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(num_labels=5, **SMALL)
    base = AutoModelForSequenceClassification.from_config(config)
    base.save_pretrained(tmp_path / "base")
    adapter = add_adapter(base, LoRASettings(rank=2), "sequence-classification")
    learning = {name for name, weight in base.named_parameters() if weight.requires_grad and "lora_" not in name}
    assert learning == {"score.modules_to_save.default.weight"}
    learn(base)
    torch.nn.init.normal_(base.score.weight)
    learned = logits(base)
    adapter.save(tmp_path / "adapter", None)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(again, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(again), learned)
    adapter.merge()
    torch.testing.assert_close(logits(adapter.take_out()), learned)


def test_unknown_targets_and_dropout_of_experts_are_refused():
    with pytest.raises(UsageError, match="the model has no 'q_prj'; did you mean 'q_proj'"):
        add_adapter(small("llama"), LoRASettings(targets=["q_prj"]), "causal-lm")
    with pytest.raises(UsageError, match="dropout") as caught:
        add_adapter(small("mixtral"), LoRASettings(dropout=0.1), "causal-lm")
    assert "q_proj" in caught.value.hint
    add_adapter(small("mixtral"), LoRASettings(dropout=0.1, targets=["q_proj"]), "causal-lm")


@pytest.mark.parametrize("arch", ["llama", "mixtral", "qwen3_moe", "pikv"])
def test_a_run_changes_the_low_rank_weights_alone(tmp_path, arch):
    train_small(tmp_path / "base", f"model.arch={arch}", "train.max_steps=4")
    overrides = [f"train.init_from={tmp_path / 'base'}", "train.lora={rank: 2, merge: false}"]
    result = train_small(tmp_path / "run", *overrides, sizes=False)
    before, after = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("base", "run"))
    assert before.keys() == after.keys()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    low_rank = load_file(f"{result.adapter}/adapter_model.safetensors")
    assert all(weight.any() for weight in low_rank.values())
    assert result.num_trainable == sum(weight.numel() for weight in low_rank.values()) < result.num_weights
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == result.model


@pytest.mark.parametrize("arch", ["llama", "pikv"])
def test_a_run_with_low_rank_weights_resumes_bit_for_bit_and_merges(tmp_path, arch):
    train_small(tmp_path / "base", f"model.arch={arch}", "train.max_steps=4")
    overrides = [f"train.init_from={tmp_path / 'base'}", "train.lora={rank: 2}"]
    whole = train_small(tmp_path / "whole", *overrides, sizes=False)
    with pytest.raises(PiKVError, match="interrupted at step 6"):
        train_small(tmp_path / "cut", *overrides, sizes=False, reporter=InterruptedAt(6))
    torch.manual_seed(99)
    cut = train_small(tmp_path / "cut", *overrides, sizes=False, resume=True)
    assert cut.metrics == whole.metrics
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        one, other = (load_file(tmp_path / run / file) for run in ("whole", "cut"))
        assert all(torch.equal(weight, other[name]) for name, weight in one.items())
    assert (tmp_path / "cut" / "adapter" / "adapter_config.json").read_text() == (
        tmp_path / "whole" / "adapter" / "adapter_config.json"
    ).read_text()
    merged = AutoModelForCausalLM.from_pretrained(whole.model).eval()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base" / "model")
    adapted = peft.PeftModel.from_pretrained(base, whole.adapter).eval()
    ids = torch.arange(3, 35).view(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-5, atol=1e-5)
